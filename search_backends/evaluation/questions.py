"""Questions of parquet files in veRL's format, read a few at a time: the images of seven benchmarks are many."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from verl_tapo.answers.accepted import accepted_answers

COLUMNS = ("data_source", "prompt", "images", "reward_model", "extra_info")
PLACEHOLDER = "<image>"
_ROWS = 16  # read at a time


@dataclass(frozen=True)
class Question:
    """One row."""

    id: str
    """Benchmark, the row's own identity, and a hash of its images."""
    data_source: str
    """The benchmark."""
    prompt: tuple[Mapping[str, str], ...]
    """The question's messages, with role and content. ``<image>`` in a text marks the place of the
    next image."""
    images: tuple[bytes, ...]
    """The images as in the file: PNG, JPEG or WebP."""
    ground_truth: Any
    """Accepted answers."""
    extra_info: Mapping[str, Any]


def _without_none(value: Any) -> Any:
    """Removes keys whose value is None: Parquet gives every row the keys of all rows."""
    if isinstance(value, dict):
        return {key: _without_none(entry) for key, entry in value.items() if entry is not None}
    return [_without_none(entry) for entry in value] if isinstance(value, list) else value


def _question(row: Mapping[str, Any], where: str) -> Question:
    try:
        return _read(row, where)
    except (AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"{where} is not as search_agent.data.prepare writes it: {error!r}") from None


def _read(row: Mapping[str, Any], where: str) -> Question:
    images = tuple(entry.get("bytes") or b"" for entry in row["images"] or [])
    for image in images:
        try:
            Image.open(io.BytesIO(image)).close()
        except OSError:
            raise ValueError(f"{where}: an image has no bytes, or none that are an image") from None
    prompt = tuple({"role": message["role"], "content": message["content"]} for message in row["prompt"])
    places = sum(message["content"].count(PLACEHOLDER) for message in prompt)
    if places != len(images):
        raise ValueError(f"{where}: the prompt has {places} {PLACEHOLDER}, and there are {len(images)} images")
    extra = _without_none(row["extra_info"] or {})
    own = extra.get("data_id", extra.get("index"))
    if own is None:
        raise ValueError(f"{where}: extra_info has no data_id")
    digest = hashlib.sha256()
    for image in images:
        digest.update(len(image).to_bytes(8, "little") + image)
    identity = f"{row['data_source']}/{own}/{digest.hexdigest()[:16]}"
    truth = row["reward_model"]["ground_truth"]
    try:
        accepted_answers(truth)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return Question(identity, row["data_source"], prompt, images, truth, extra)


def read_questions(files: Sequence[Path], limit: int | None = None) -> Iterator[Question]:
    """The files' questions, in order.

    A row that is in its file twice is two questions (``...#2``); benchmarks have such rows.

    Args:
        files: parquet files.
        limit: that many of each benchmark, its first.

    Raises:
        ValueError: for a file of another format, or the same question in two files.
    """
    taken: Counter[str] = Counter()
    where_seen: dict[str, Path] = {}
    for path in files:
        try:
            file = pq.ParquetFile(path)
        except (OSError, pa.ArrowInvalid) as error:
            raise ValueError(f"{path} is not a parquet file that can be read: {error}") from None
        missing = [name for name in COLUMNS if name not in file.schema_arrow.names]
        if missing:
            raise ValueError(f"{path} has no column {missing[0]!r}; search_agent.data.prepare writes what is needed")
        seen: Counter[str] = Counter()
        number = 0
        for batch in file.iter_batches(batch_size=_ROWS, columns=list(COLUMNS)):
            for row in batch.to_pylist():
                question = _question(row, f"{path}, row {number}")
                number += 1
                if where_seen.setdefault(question.id, path) != path:
                    raise ValueError(f"{question.id} is in {path} and in {where_seen[question.id]}: name one of them")
                seen[question.id] += 1
                if limit is not None and taken[question.data_source] >= limit:
                    continue
                taken[question.data_source] += 1
                if seen[question.id] > 1:
                    question = replace(question, id=f"{question.id}#{seen[question.id]}")
                yield question
