"""Rows out of files as the public data sets are distributed, one after the other."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

BATCH = 32  # rows that are in memory at a time, images and all

TEXT = "utf-8-sig"  # UTF-8, with the mark that editors on Windows put before it or without
_KINDS = (".parquet", ".jsonl", ".json", ".csv", ".tsv", ".arrow")


def read_rows(source: str) -> Iterator[tuple[str, Mapping[str, Any], Path | None]]:
    """Rows of a file, of all such files of a folder, or of a data set on the Hugging Face hub (``owner/name:split``).

    Yields: The row's place, for messages; the row; the folder that relative paths in it start from,
    or None.

    Raises:
        ValueError: There is no such source, or it cannot be read; the message says what was expected.
    """
    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in _KINDS)
        if not files:
            raise ValueError(f"{source}: there is no {', '.join(_KINDS)} file in this folder")
    elif path.is_file():
        files = [path]
    elif source.count("/") == 1 and not path.suffix and not path.is_absolute():
        yield from _hub(source)
        return
    else:
        raise ValueError(f"{source}: no such file or folder")
    for file in files:
        for number, row in enumerate(_file(file)):
            yield f"{file.name}, row {number + 1}", row, file.parent


def _file(file: Path) -> Iterator[Mapping[str, Any]]:
    try:
        yield from _READERS[file.suffix](file)
    except KeyError:
        raise ValueError(f"{file}: expected one of {', '.join(_KINDS)}") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:  # pyarrow's errors are OSErrors too
        raise ValueError(f"{file} cannot be read: {error}") from error


def _parquet(file: Path) -> Iterator[Mapping[str, Any]]:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    try:
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=BATCH):
            yield from batch.to_pylist()
    except arrow.ArrowInvalid as error:
        raise ValueError(f"{file} is not parquet: {error}") from error


def _arrow(file: Path) -> Iterator[Mapping[str, Any]]:
    import pyarrow as arrow

    with arrow.memory_map(str(file)) as mapped:
        try:
            batches: Any = arrow.ipc.open_stream(mapped)
        except arrow.ArrowInvalid:
            opened = arrow.ipc.open_file(mapped)
            batches = (opened.get_batch(number) for number in range(opened.num_record_batches))
        for batch in batches:
            for start in range(0, batch.num_rows, BATCH):
                yield from batch.slice(start, BATCH).to_pylist()


def _jsonl(file: Path) -> Iterator[Mapping[str, Any]]:
    with file.open(encoding=TEXT) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _row(_parsed(line, f"{file}, line {number}"), file)


def _json(file: Path) -> Iterator[Mapping[str, Any]]:
    content = _parsed(file.read_text(encoding=TEXT), str(file))
    if isinstance(content, dict):  # {"data": [...]}, or rows by their id
        lists = [value for value in content.values() if isinstance(value, list)]
        if len(lists) == 1:
            content = lists[0]
        else:
            content = [{"id": key, **value} for key, value in content.items() if isinstance(value, dict)]
    if not isinstance(content, list) or not content:
        raise ValueError(f"{file}: expected a JSON list of objects")
    for row in content:
        yield _row(row, file)


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {error}") from error


def _row(value: Any, file: Path) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{file}: expected JSON objects, found {type(value).__name__}")
    return value


def _csv(file: Path) -> Iterator[Mapping[str, Any]]:
    csv.field_size_limit(1 << 30)  # images as base64
    with file.open(encoding=TEXT, newline="") as lines:
        yield from csv.DictReader(lines, delimiter="\t" if file.suffix == ".tsv" else ",")


def _hub(source: str) -> Iterator[tuple[str, Mapping[str, Any], None]]:
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{source} is no file; to read it from the Hugging Face hub: pip install datasets") from None
    name, _, split = source.partition(":")
    loaded = datasets.load_dataset(name, split=split or "test", streaming=True)
    for column, feature in (loaded.features or {}).items():
        if isinstance(feature, datasets.Image):
            loaded = loaded.cast_column(column, datasets.Image(decode=False))
    for number, row in enumerate(loaded):
        yield f"{source}, row {number + 1}", row, None


_READERS = {
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
}
