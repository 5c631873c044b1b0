"""Reads text files of any origin: compressed or not, whatever the name; with a byte order mark;
with Windows line ends."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

BROKEN = (OSError, EOFError, zlib.error)
"""The errors that reading a truncated or damaged file raises."""
MAX_LINE = 1 << 26
"""The number of bytes from which on a line is not ours, but a different file or a bomb."""

_COMPRESSED = {
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"PK\x03\x04": "zip",
    b"\x04\x22\x4d\x18": "lz4",
}
_CHUNK = 1 << 20


class UnknownCompression(ValueError):
    """A file that is compressed in a way not read here."""


class Line(NamedTuple):
    """A line of a text file."""

    text: str
    """The line without a byte order mark, cut to `MAX_LINE` characters."""
    end: int
    """The position of the next line in the stream, in bytes."""
    whole: bool
    """True if a line end follows."""
    broken: bool
    """True if parts were not UTF-8 and have been replaced."""
    too_long: bool


@contextlib.contextmanager
def open_utf8(path: str | os.PathLike[str], in_order: bool = True) -> Iterator[BinaryIO]:
    """A text file as a stream of UTF-8, decompressed.

    Args:
        path: a file, whatever its name.
        in_order: True to read from front to back. Otherwise a compressed file is first decompressed to a copy.

    Raises:
        UnknownCompression: it is compressed, and not with gzip.
    """
    with contextlib.ExitStack() as opened:
        stream: Any = opened.enter_context(Path(path).open("rb"))
        head = stream.peek(4)[:4]
        if compressed := head.startswith(b"\x1f\x8b"):
            stream = opened.enter_context(gzip.GzipFile(fileobj=stream))
            head = stream.peek(4)[:4]
        for magic, name in _COMPRESSED.items():
            if head.startswith(magic):
                raise UnknownCompression(f"compressed with {name}, and only gzip is read")
        encoding = json.detect_encoding(head)
        wide = not encoding.startswith("utf-8") and _is_json(head.decode(encoding, "replace"))
        if wide or (compressed and not in_order):
            copy = opened.enter_context(tempfile.TemporaryFile())
            _copy(stream, encoding if wide else None, copy)
            copy.seek(0)
            stream = copy
        yield stream


def _copy(stream: BinaryIO, encoding: str | None, copy: BinaryIO) -> None:
    if encoding is None:
        with contextlib.suppress(EOFError, zlib.error, gzip.BadGzipFile):
            while line := stream.readline(MAX_LINE):
                copy.write(line)
        return
    text = io.TextIOWrapper(stream, encoding, "replace", newline="")
    while chunk := text.read(_CHUNK):
        copy.write(chunk.encode("utf-8", "replace"))
    text.detach()


def _is_json(head: str) -> bool:
    return head.lstrip("\ufeff \t\r\n")[:1] in ("", "{", "[", '"')


def read_line(stream: BinaryIO, start: int, to_its_end: bool = True) -> Line | None:
    """A line of a stream of `open_utf8`; None at the stream's end.

    Args:
        stream: a stream at the beginning of the line.
        start: the position of the stream, in bytes.
        to_its_end: go on to the next line, however long this one is; else the stream stays in a line that is too long.
    """
    data = stream.readline(MAX_LINE)
    if not data:
        return None
    end, whole, too_long = start + len(data), data.endswith(b"\n"), len(data) == MAX_LINE
    while to_its_end and not whole and len(data) == MAX_LINE:
        data = stream.readline(MAX_LINE)
        end, whole = end + len(data), data.endswith(b"\n")
    if too_long:
        data = data[:100]
    if start == 0:
        data = data.removeprefix(b"\xef\xbb\xbf")
    try:
        return Line(data.decode(), end, whole, False, too_long)
    except UnicodeDecodeError:
        return Line(data.decode("utf-8", "replace"), end, whole, True, too_long)
