"""Readable text of untrusted pages, in a process of its own that can be killed, and that may crash.

Run as a script, by its path, it answers requests on standard input and imports nothing of this package.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from typing import Any, BinaryIO

_MEMORY_BYTES = 4 << 30  # of such a process
_TITLE_CHARS = 500


class ExtractionFailed(Exception):
    """The process was killed or died: the page took too long, or too much memory."""


class Extractor:
    """A process that extracts texts, one after another; started when it is needed. For one thread at a time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def extract(self, body: bytes, content_type: str, *, max_chars: int, timeout_s: float) -> tuple[str, str]:
        """Title and text of a page, both empty where there is nothing to read.

        Args:
            body: HTML or any text.
            content_type: with its charset, where it has one.
            max_chars: of the text; the rest is left out.
            timeout_s: after which the process is killed.

        Raises:
            ExtractionFailed
        """
        process = self._process
        if process is None or process.poll() is not None:
            process = self._process = subprocess.Popen(
                [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
        assert process.stdin is not None
        assert process.stdout is not None
        request = {"bytes": len(body), "content_type": content_type, "max_chars": max_chars}
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
            self.close()
            raise ExtractionFailed
        title, text = json.loads(answer)
        return title, text

    def close(self) -> None:
        """Ends the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            with contextlib.suppress(OSError):  # what it did not read
                process.communicate()


def is_html(kind: str) -> bool:
    """Whether a content type is a web page's; a server that names none sends one, most likely."""
    return kind in ("", "text/html", "application/xhtml+xml")


def is_readable(kind: str) -> bool:
    """Whether texts of a content type can be read."""
    return is_html(kind) or kind.startswith("text/") or kind == "application/json" or kind.endswith("+json")


def _serve(requests: BinaryIO, answers: BinaryIO) -> None:
    import trafilatura  # noqa: F401  here: that it is missing must not look like an empty page

    while line := requests.readline():
        request: dict[str, Any] = json.loads(line)
        title, text = "", ""
        body = requests.read(request["bytes"])
        with contextlib.suppress(Exception):  # what a parser raises on a page: there is nothing to read
            title, text = _extract(body, request["content_type"])
        answer = [" ".join(title.split())[:_TITLE_CHARS], text[: request["max_chars"]]]
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


def _extract(body: bytes, content_type: str) -> tuple[str, str]:
    import trafilatura
    from trafilatura.utils import decode_file

    kind, _, parameters = content_type.partition(";")
    content = _decode(body, parameters) or decode_file(body)
    if not is_html(kind.strip().lower()):
        return "", content
    tree = trafilatura.load_html(content)
    if tree is None:
        return "", ""
    return tree.findtext(".//title") or "", trafilatura.extract(tree, include_comments=False, favor_recall=True) or ""


def _decode(body: bytes, parameters: str) -> str:
    """By the charset that the header names; empty where it names none or a wrong one."""
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
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    _serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    _main()
