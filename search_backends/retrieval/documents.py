"""Passages, image descriptions and thumbnails in files: any of twenty million is read without holding the others."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from search_backends.retrieval.manifest import IndexProblem


class RecordWriter:
    """Appends records of bytes to ``NAME.data`` and their ends to ``NAME.ends.npy``: 8 bytes of memory a record.

    A context manager; the files get their names only when all went well.
    """

    def __init__(self, path: Path):
        self._path = path
        self._partial = path.with_name(path.name + ".data.partial")
        self._file = self._partial.open("wb")
        self._ends = array("q", [0])
        self._hash = hashlib.blake2b(digest_size=16)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def append(self, record: bytes) -> None:
        self._file.write(record)
        self._hash.update(len(record).to_bytes(8, "little") + record)
        self._ends.append(self._ends[-1] + len(record))

    @property
    def digest(self) -> str:
        """The digest of all records so far."""
        return self._hash.hexdigest()

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if kind is not None:
                return
            self._file.flush()
            os.fsync(self._file.fileno())
        np.save(_ends_file(self._path), np.frombuffer(self._ends, dtype=np.int64))
        self._partial.replace(_data_file(self._path))


class Records:
    """Reads what a `RecordWriter` wrote. It is safe to use from several threads."""

    def __init__(self, path: Path):
        file = _data_file(path)
        try:
            self._ends = np.load(_ends_file(path), mmap_mode="r")
            with file.open("rb") as data:
                size = os.fstat(data.fileno()).st_size
                self._map = mmap.mmap(data.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        except (OSError, ValueError) as error:
            raise IndexProblem(f"the index is damaged: {error}") from error
        if problem := self._problem(size):
            self.close()
            raise IndexProblem(f"the index is damaged: {file} {problem}")

    def _problem(self, size: int) -> str:
        ends = self._ends
        if ends.ndim != 1 or ends.dtype != np.int64 or not len(ends) or ends[0] != 0 or (ends[1:] < ends[:-1]).any():
            return "has ends of records that are none"
        return "" if size == ends[-1] else f"has {size} bytes instead of {ends[-1]}"

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, position: int) -> bytes:
        if not 0 <= position < len(self):
            raise IndexError(position)
        start, end = int(self._ends[position]), int(self._ends[position + 1])
        # Out of a map, not by a read: that would give the interpreter up, and wait for it, for every record.
        return self._map[start:end]

    def __iter__(self) -> Iterator[bytes]:
        return (self[position] for position in range(len(self)))

    def close(self) -> None:
        if isinstance(self._map, mmap.mmap):
            self._map.close()


def encode_document(identifier: str, title: str, contents: str, url: str) -> bytes:
    """A document as the service sends it: a JSON object, in UTF-8.

    Raises:
        UnicodeEncodeError: The text holds half a surrogate pair.
    """
    document = {"id": identifier, "title": title, "contents": contents, "url": url}
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


def text_of(document: bytes) -> str:
    """Returns the text that is searched: the title, then the contents."""
    fields: dict[str, Any] = json.loads(document)
    return f"{fields['title']}\n{fields['contents']}" if fields["title"] else str(fields["contents"])


def _data_file(path: Path) -> Path:
    return path.with_name(path.name + ".data")


def _ends_file(path: Path) -> Path:
    return path.with_name(path.name + ".ends.npy")
