"""Which files of a run hold rollouts, and what stands in them: veRL's rollout dumps and our own step records."""

from __future__ import annotations

import gzip
import io
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from verl_tapo.audit.model import Problem
from verl_tapo.step_records import BROKEN, is_step_records

FIELDS = ("input", "output", "gts", "score", "step", "uid")
"""What is read of a dump's line, as veRL names it (besides the success key)."""
_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
_NOT_ENTERED = re.compile(r"val|\.|checkpoints$|global_step_")  # folders: validation, hidden ones, checkpoints
_SHOWN = 20  # problems of one kind in one file


class Source(NamedTuple):
    """A file with rollouts."""

    path: Path
    kind: Literal["records", "dump"]
    step: int | None
    """Of its first line; None where that cannot be read."""


class Row(NamedTuple):
    """A dump's line."""

    line: int
    value: Mapping[str, Any]


@dataclass
class Problems:
    """Collects what was not read. Many of one kind in one file are counted, not listed."""

    skipped: int = 0
    """Lines left out."""
    _listed: list[Problem] = field(default_factory=list)
    _counts: dict[tuple[str, str], int] = field(default_factory=dict)

    def add(self, path: Path, line: int | None, reason: str) -> None:
        key = (str(path), reason)
        self._counts[key] = self._counts.get(key, 0) + 1
        self.skipped += line is not None
        if self._counts[key] <= _SHOWN:
            self._listed.append(Problem(str(path), line, reason))

    def listed(self) -> list[Problem]:
        """All of them; where there are many alike, how many more."""
        more = [
            Problem(file, None, f"{count - _SHOWN} more lines: {reason}")
            for (file, reason), count in self._counts.items()
            if count > _SHOWN
        ]
        return [*self._listed, *more]


@dataclass
class Found:
    """The files of a run."""

    sources: list[Source]
    left_out: list[Path]
    """Files with a fitting name that hold something else, and folders that were not entered."""
    damaged: list[Problem] = field(default_factory=list)
    """Files that cannot even be begun."""

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(source.path.stat().st_size for source in self.sources)


def find_sources(paths: Sequence[str | os.PathLike[str]], output_field: str = "output") -> Found:
    """Looks for rollouts: in the files named, and in the folders named with all below them.

    Folders of validation rollouts and checkpoints are not entered, unless named themselves.

    Raises:
        ValueError: a path does not exist, a file named holds no rollouts, or there are none at all.
    """
    found = Found([], [])

    def recognise(file: Path) -> Source | None:
        try:
            return _recognise(file, output_field)
        except BROKEN as error:
            found.damaged.append(Problem(str(file), None, f"cannot be read: {error}"))
            return None

    for name in paths:
        path = Path(name)
        if not path.exists():
            raise ValueError(f"{path}: there is no such file or folder")
        if path.is_dir():
            for file in _walk(path, found.left_out):
                source = recognise(file)
                if source is None:
                    found.left_out.append(file)
                elif source not in found.sources:
                    found.sources.append(source)
            continue
        source = recognise(path)
        if source is None:
            raise ValueError(
                f"{path}: neither a rollout dump of veRL (JSON lines with {output_field!r}, 'score', ...) nor step "
                f"records"
            )
        found.sources.append(source)
    if not found.sources:
        others = ", ".join(str(path) for path in found.left_out[:5])
        raise ValueError(
            f"no rollouts in {', '.join(map(str, paths))}. veRL writes them where trainer.rollout_data_dir is set, "
            f"this plug-in where algorithm.tapo.record_dir is{f'. Left out: {others}' if others else ''}"
        )
    found.sources.sort(key=lambda source: (source.step is None, source.step or 0, _natural(source.path)))
    return found


def _walk(folder: Path, left_out: list[Path]) -> Iterator[Path]:
    for entry in sorted(folder.iterdir(), key=_natural):
        if entry.is_dir():
            if _NOT_ENTERED.match(entry.name):
                left_out.append(entry)
            else:
                yield from _walk(entry, left_out)
        elif entry.name.endswith(_SUFFIXES):
            yield entry


def _natural(path: Path) -> list[tuple[int, str]]:
    return [(int(part or 0), text) for text, part in re.findall(r"(\D*)(\d*)", str(path))]


def _recognise(path: Path, output_field: str) -> Source | None:
    if is_step_records(path):
        step = re.match(r"\d+", path.name)
        return Source(path, "records", int(step[0]) if step else None)
    if path.suffix == ".parquet":
        return None
    with open_text(path) as file:
        for _, line in zip(range(5), file, strict=False):  # the first ones may be broken
            value = _parse(line)
            if isinstance(value, dict) and output_field in value:
                return Source(path, "dump", _step(value, path))
    return None


def _parse(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _step(value: Mapping[str, Any], path: Path) -> int | None:
    step = value.get("step")
    if isinstance(step, int) and not isinstance(step, bool):
        return step
    named = re.match(r"\d+", path.name)
    return int(named[0]) if named else None


def open_text(path: Path, raw: IO[bytes] | None = None) -> IO[str]:
    """A file's text, decompressed where its name ends in ``.gz``; broken UTF-8 is replaced."""
    stream = raw if raw is not None else path.open("rb")
    if path.suffix == ".gz":
        return gzip.open(stream, "rt", encoding="utf-8", errors="replace", newline="\n")
    return io.TextIOWrapper(stream, encoding="utf-8", errors="replace", newline="\n")


def read_dump(
    path: Path, fields: Mapping[str, str], problems: Problems, advance: Callable[[int], None]
) -> Iterator[tuple[int, list[Row]]]:
    """The lines of a rollout dump by training step; lines that follow each other and have one step are held at a time.

    Args:
        path: JSON lines, ``.gz`` or not.
        fields: the names that `FIELDS` have in this dump.
        problems: lines that cannot be used are added.
        advance: told how many bytes of the file were read since the last time.

    Yields:
        the step, and its lines with the names of `FIELDS`.
    """

    def rows() -> Iterator[tuple[int, Row]]:
        with path.open("rb") as raw:
            told = 0
            try:
                with open_text(path, raw) as file:
                    for number, line in enumerate(file, 1):
                        if number % 64 == 0:
                            advance(raw.tell() - told)
                            told = raw.tell()
                        if not line.strip():
                            continue
                        try:
                            value = _read_row(line, fields)
                        except _Unusable as error:
                            problems.add(path, number, str(error))
                        else:
                            yield _step(value, path) or 0, Row(number, value)
            except BROKEN as error:
                problems.add(path, None, f"the file breaks off: {error}")
            advance(path.stat().st_size - told)

    for step, together in groupby(rows(), key=lambda item: item[0]):
        yield step, [row for _, row in together]


class _Unusable(Exception):
    """Why a line is left out."""


def _read_row(line: str, fields: Mapping[str, str]) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except RecursionError:
        raise _Unusable("nested too deeply") from None
    except ValueError:
        raise _Unusable("not JSON" if line.endswith("\n") else "not JSON: the line is cut short") from None
    if not isinstance(value, dict):
        raise _Unusable(f"not a JSON object but {type(value).__name__}")
    row = {**value, **{name: value.get(own) for name, own in fields.items()}}
    if not isinstance(row.get("output"), str):
        raise _Unusable(f"no text in {fields.get('output', 'output')!r}; fields: {', '.join(sorted(value)[:12])}")
    score = row.get("score")
    if score is None:
        raise _Unusable("no score")
    if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
        raise _Unusable(f"the score is {str(score)[:40]!r}, not a finite number")
    return row
