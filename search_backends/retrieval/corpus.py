"""Reads passages and images out of the user's files, row by row, and keeps account of bad rows."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet

from search_backends.retrieval.documents import encode_document
from search_backends.retrieval.manifest import IndexProblem

SHOWN = 20
"""Bad rows that are printed; the others are counted."""
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")

_QUOTED_TITLE = re.compile(r'"([^\n]*)"\n')
_BLOCK = 1 << 20


class BadRow(ValueError):
    """A row that cannot be used; the message says why."""


@dataclass(frozen=True)
class Row:
    """One row and its place: ``FILE:LINE``, or ``FILE row N`` for parquet, both counted from 1."""

    place: str
    values: Mapping[str, Any] | BadRow

    def get(self) -> Mapping[str, Any]:
        """The values.

        Raises:
            BadRow: There are none.
        """
        if isinstance(self.values, BadRow):
            raise self.values
        return self.values


class BadRows:
    """Prints the first bad rows, counts all."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, place: str, reason: BadRow) -> None:
        self.count += 1
        if self.count <= SHOWN:
            print(f"bad row: {place}: {reason}", file=sys.stderr)

    def refuse_beyond(self, allowed: int) -> None:
        """Raises IndexProblem: There are more than ``allowed``."""
        if self.count > allowed:
            listed = f" (the first {SHOWN} are listed above)" if self.count > SHOWN else ""
            raise IndexProblem(
                f"{self.count} bad rows{listed}, --max-bad allows {allowed}; mend them, or allow more to leave them out"
            )


class SeenIds:
    """Refuses an id that came before. Keeps 64 bits of each: for 20 million ids that is about 1.7 GB, and the chance
    that two different ones are taken for the same is 1 in 90,000.
    """

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def add(self, identifier: str) -> None:
        key = int.from_bytes(hashlib.blake2b(identifier.encode(), digest_size=8).digest(), "little")
        if key in self._seen:
            raise BadRow(f"the id {identifier!r} was used before")
        self._seen.add(key)


def fingerprint(files: Sequence[Path], advance: Callable[[int], None]) -> str:
    """Returns a fingerprint of the files' content; ``advance`` is given the number of bytes read."""
    whole = hashlib.blake2b(digest_size=16)
    for file in files:
        own = hashlib.blake2b(digest_size=16)
        with file.open("rb") as source:
            while block := source.read(_BLOCK):
                own.update(block)
                advance(len(block))
        whole.update(own.digest())
    return whole.hexdigest()


def check_corpus(files: Sequence[Path]) -> None:
    """Raises IndexProblem: A file is missing or of no kind that can be read."""
    for file in files:
        if not file.is_file():
            raise IndexProblem(f"--corpus: there is no file {file}")
        if not file.name.endswith((".jsonl", ".jsonl.gz", ".parquet")):
            raise IndexProblem(f"--corpus: {file} is neither .jsonl, .jsonl.gz nor .parquet")


def image_files(source: Path) -> list[Path]:
    """Returns the files of an image source: the parquet file, or the images of a folder by name.

    Raises:
        IndexProblem: There is nothing to read.
    """
    if source.is_dir():
        files = sorted(file for file in source.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
        if not files:
            raise IndexProblem(f"--images: there are no images ({', '.join(IMAGE_SUFFIXES)}) in {source}")
        return files
    if not source.is_file() or source.suffix != ".parquet":
        raise IndexProblem(f"--images: {source} is neither a folder nor a .parquet file")
    return [source]


def corpus_rows(files: Sequence[Path], advance: Callable[[int], None]) -> Iterator[Row]:
    """Yields all rows of all files; ``advance`` is given the number of bytes done."""
    for file in files:
        if file.suffix == ".parquet":
            size, done = file.stat().st_size, 0
            for number, (row, rows) in enumerate(parquet_rows(file, ("id", "title", "contents", "text", "url")), 1):
                yield row
                if (now := size * number // rows) - done >= _BLOCK or number == rows:
                    advance(now - done)
                    done = now
        else:
            yield from _json_rows(file, advance)


def _json_rows(file: Path, advance: Callable[[int], None]) -> Iterator[Row]:
    with file.open("rb") as raw:
        # A bar that follows the compressed file's position is right for both.
        lines = gzip.GzipFile(fileobj=raw) if file.suffix == ".gz" else raw
        position = 0
        try:
            for number, line in enumerate(lines, 1):
                if not line.isspace():
                    yield Row(f"{file}:{number}", _parse(line))
                if (now := raw.tell()) - position >= _BLOCK:
                    advance(now - position)
                    position = now
        except (OSError, EOFError) as error:
            raise IndexProblem(f"{file} cannot be read to its end: {error}") from error
        advance(raw.tell() - position)


def _parse(line: bytes) -> Mapping[str, Any] | BadRow:
    try:
        values = json.loads(line)
    except ValueError as error:  # UnicodeDecodeError too
        return BadRow(f"not JSON: {error}")
    except RecursionError:
        return BadRow("not JSON that can be read: nested too deeply")
    return values if isinstance(values, dict) else BadRow(f"a JSON {type(values).__name__}, expected an object")


def parquet_rows(file: Path, wanted: Sequence[str]) -> Iterator[tuple[Row, int]]:
    """Rows, and how many there are in all; a few at a time are in memory.

    Raises:
        IndexProblem: Not parquet, or damaged.
    """
    try:
        with _open_parquet(file) as source:
            names = [name for name in wanted if name in source.schema_arrow.names]
            number = 0
            for batch in source.iter_batches(batch_size=64 if "image" in names else 1024, columns=names):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"{file} row {number}", values), source.metadata.num_rows
    except (OSError, pa.ArrowException) as error:
        raise IndexProblem(f"{file} cannot be read as parquet: {error}") from error


def _open_parquet(file: Path) -> parquet.ParquetFile:
    try:
        return parquet.ParquetFile(file)
    except (OSError, pa.ArrowException) as error:
        raise IndexProblem(f"{file} cannot be read as parquet: {error}") from error


def passage(row: Row) -> tuple[str, bytes]:
    """A passage's id and its document.

    Raises:
        BadRow: No id or no text.
    """
    values = row.get()
    contents = _text(values, "contents") or _text(values, "text")
    title = _text(values, "title")
    if not title and (quoted := _QUOTED_TITLE.match(contents)):  # as Search-R1's corpora have it
        title, contents = quoted[1], contents[quoted.end() :]
    if not contents.strip():
        raise BadRow("no text: it needs `contents` or `text`")
    return _document(values, title, contents)


def picture(row: Row) -> tuple[str, bytes, bytes]:
    """An image's id, its document, and its bytes.

    Raises:
        BadRow: No id, neither title nor text, or no image.
    """
    values = row.get()
    title, text = _text(values, "title"), _text(values, "text")
    if not (title.strip() or text.strip()):
        raise BadRow("no text: it needs `title` or `text`")
    return *_document(values, title, text), _image_bytes(values.get("image"), row)


def count_images(source: Path, files: Sequence[Path]) -> int:
    """Counts the images of a source whose files `image_files` found."""
    return len(files) if source.is_dir() else _open_parquet(source).metadata.num_rows


def image_rows(source: Path, files: Sequence[Path]) -> Iterator[Row]:
    """Rows of a parquet file, or one for each image of a folder: its path is the id, its name in words the title."""
    if source.is_dir():
        for file in files:
            name = file.relative_to(source)
            yield Row(
                str(file), {"id": name.as_posix(), "title": re.sub(r"[_\-\s]+", " ", name.stem), "image": str(file)}
            )
    else:
        yield from (row for row, _ in parquet_rows(source, ("id", "title", "text", "url", "image")))


def _document(values: Mapping[str, Any], title: str, contents: str) -> tuple[str, bytes]:
    identifier = values.get("id")
    if isinstance(identifier, bool) or not isinstance(identifier, (str, int)) or identifier == "":
        raise BadRow("no `id`" if identifier in (None, "") else f"the id {identifier!r} is neither text nor a number")
    try:
        return str(identifier), encode_document(str(identifier), title, contents, _text(values, "url"))
    except UnicodeEncodeError as error:
        raise BadRow(f"text that is not Unicode: {error}") from error


def _text(values: Mapping[str, Any], column: str) -> str:
    value = values.get(column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRow(f"`{column}` is a {type(value).__name__}, expected text")
    return value


def _image_bytes(value: Any, row: Row) -> bytes:
    """Out of bytes, a path, or what `datasets` makes of an image: ``{bytes, path}``."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes) and value:
        return value
    if isinstance(value, str) and value:
        try:
            # A relative path is one from the folder of the parquet file.
            return Path(row.place.rpartition(" row ")[0]).parent.joinpath(value).read_bytes()
        except (OSError, ValueError) as error:  # of a path with a NUL
            raise BadRow(f"the image cannot be read: {error}") from error
    raise BadRow("no `image`: it needs bytes, {bytes, path}, or a path")
