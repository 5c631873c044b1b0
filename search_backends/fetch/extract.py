"""Readable text of untrusted pages, in a process of its own that can be killed, and that may crash.

Run as a script, by its path, it answers requests on standard input and imports nothing of this package.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any, BinaryIO

_MEMORY_BYTES = 1 << 30  # of such a process
_TITLE_CHARS = 500
_MAX_TAGS = 50_000  # of a page: about 3 s of a core; hardly any page of the web has as many
# What costs trafilatura the square of its number, or most for each tag. Large pages of the web have a few hundred
# tables, and some 20,000 elements that lie 15 deep.
_MAX_TABLES = 1000
_MAX_DEPTHS = 800_000  # of all elements together
# The maximal number of attribute names and values of a tag. A parser's time grows with their
# square.
_MAX_PARTS = 2000
_MAX_PARTS_IN_ALL = 10 * _MAX_TAGS
_EXIT_S = 10.0  # for a process that has closed its output to be gone
# How a process ends that a page has brought down: the first is that of its limit of CPU time.
_CRASHES = (signal.SIGPROF, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)

_TAG = re.compile(r"<(?:!--|(script|style)(?=[\s/>])|[a-z]|(/)(?:p|br)\b)", re.IGNORECASE)  # </p> may open one, too
_IN_TAG = re.compile(r""">|=\s*(?:(["'])|[^\s>"']*)|[^\s=/>]+""")
_COMMENT_END = re.compile("--!?>")
_RAW_END = {name: re.compile(f"</{name}", re.IGNORECASE) for name in ("script", "style")}


class ExtractionFailed(Exception):
    """There is no answer: the process was killed or died. The message ends the sentence "could not be extracted"."""


class PageAtFault(ExtractionFailed):
    """Extraction failed because of the page, and would fail in any other process too."""


def _failure(exit_code: int | None, timeout_s: float) -> ExtractionFailed:
    if -(exit_code or 0) in _CRASHES:
        return PageAtFault("the page brought the process down")
    if exit_code in (None, -9):
        return ExtractionFailed(f"within {timeout_s:g} s")
    return ExtractionFailed(f"for the process ended with exit code {exit_code}: is trafilatura installed?")


class Extractor:
    """A process that extracts texts, one after another; started when it is needed. For one thread at a time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def extract(
        self, body: bytes, content_type: str, *, max_chars: int, timeout_s: float, cpu_s: float = 2.0
    ) -> tuple[str, str]:
        """Returns title and text of a page; both are empty if there is nothing to read.

        Args:
            body: HTML or any text.
            content_type: the content type, with its charset if it has one.
            max_chars: the maximal length of the text; the rest is left out.
            timeout_s: after which the process is killed, whatever it waited for.
            cpu_s: seconds of a core that the page may use.

        Raises:
            PageAtFault: The page is built too large, took more than ``cpu_s``, or made the process crash.
            ExtractionFailed: The process died or was too slow for another reason.
        """
        process = self._process
        if process is None or process.poll() is not None:
            process = self._process = subprocess.Popen(
                [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
        assert process.stdin is not None
        assert process.stdout is not None
        request = {"bytes": len(body), "content_type": content_type, "max_chars": max_chars, "cpu_s": cpu_s}
        killer = threading.Timer(timeout_s, process.kill)
        killer.start()
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n" + body)
            process.stdin.flush()
            answer = process.stdout.readline()
        except OSError:
            answer = b""
        finally:
            killer.cancel()
        if not answer.endswith(b"\n"):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_EXIT_S)
            self.close()
            raise _failure(process.returncode, timeout_s)
        found = json.loads(answer)
        if found is None:
            raise PageAtFault
        title, text = found
        return title, text

    def close(self) -> None:
        """Ends the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            with contextlib.suppress(OSError):  # what it did not read
                process.communicate()


def is_html(kind: str) -> bool:
    """Returns whether a content type is a web page's. A server that names none most likely sends
    one."""
    return kind in ("", "text/html", "application/xhtml+xml")


def is_readable(kind: str) -> bool:
    """Returns whether texts of a content type can be read."""
    return is_html(kind) or kind.startswith("text/") or kind == "application/json" or kind.endswith("+json")


def _serve(requests: BinaryIO, answers: BinaryIO) -> None:
    import trafilatura  # noqa: F401  here: that it is missing must not look like an empty page

    while line := requests.readline():
        request: dict[str, Any] = json.loads(line)
        body = requests.read(request["bytes"])
        answer: list[str] | None = ["", ""]
        try:
            with _limited_cpu(request["cpu_s"]):
                title, text = _extract(body, request["content_type"])
            answer = [" ".join(title.split())[:_TITLE_CHARS], text[: request["max_chars"]]]
        except PageAtFault:
            answer = None
        except Exception:  # what a parser raises on a page: there is nothing to read
            pass
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


@contextlib.contextmanager
def _limited_cpu(seconds: float) -> Iterator[None]:
    """Ends this process if the block uses more time of a core. Waiting for a core does not count."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _extract(body: bytes, content_type: str) -> tuple[str, str]:
    import trafilatura
    from trafilatura.utils import decode_file

    kind, _, parameters = content_type.partition(";")
    content = _decode(body, parameters) or decode_file(body)
    if not is_html(kind.strip().lower()):
        return "", content
    _require_modest(content)
    tree = trafilatura.load_html(content)
    if tree is None:
        return "", ""
    _require_shallow(tree)
    return tree.findtext(".//title") or "", trafilatura.extract(tree, include_comments=False, favor_recall=True) or ""


def _require_modest(html: str) -> None:
    """Reads the page once from front to back, as a parser would, and counts.

    Raises:
        PageAtFault: It has more tags, or one of them more attributes, than can be worked through in time.
    """
    opening = closing = parts = position = 0
    while tag := _TAG.search(html, position):
        position = tag.end()
        if tag[0] == "<!--":
            position = _end(_COMMENT_END, html, position - 2)  # "<!-->" is a whole one
            continue
        closing += tag[2] is not None
        opening += tag[2] is None
        before = parts
        while (part := _IN_TAG.search(html, position)) and part[0] != ">":
            parts += 1
            position = part.end()
            if part[1]:
                position = html.find(part[1], position) + 1 or len(html)
            if parts - before > _MAX_PARTS:
                raise PageAtFault
        position = part.end() if part else len(html)
        if tag[1]:
            position = _end(_RAW_END[tag[1].lower()], html, position)
        if max(opening, closing) > _MAX_TAGS or parts > _MAX_PARTS_IN_ALL:
            raise PageAtFault


def _require_shallow(tree: Any) -> None:
    """Counts in the parsed page.

    Raises:
        PageAtFault: It has more tables, or is nested deeper all in all, than can be worked through in time.
    """
    from lxml.etree import iterwalk

    depth = depths = tables = 0
    for event, element in iterwalk(tree, events=("start", "end")):
        depth += 1 if event == "start" else -1
        if event == "start":
            depths += depth
            tables += element.tag == "table"
            if tables > _MAX_TABLES or depths > _MAX_DEPTHS:
                raise PageAtFault


def _end(pattern: re.Pattern[str], text: str, position: int) -> int:
    found = pattern.search(text, position)
    return found.end() if found else len(text)


def _decode(body: bytes, parameters: str) -> str:
    """Decodes by the charset that the header names; empty if it names none or a wrong one."""
    for parameter in parameters.split(";"):
        name, _, value = parameter.partition("=")
        if name.strip().lower() == "charset":
            with contextlib.suppress(LookupError, ValueError):
                return body.decode(value.strip().strip("\"'"))
    return ""


def _main() -> None:
    with contextlib.suppress(ImportError, OSError, ValueError):  # not everywhere
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    # The signal would stay ignored if the parent process ignores it.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    _serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    _main()
