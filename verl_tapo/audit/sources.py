"""Which files of a run hold rollouts, and what stands in them: veRL's rollout dumps and our own step records.

Files come from strangers. What is no plain file is never opened, each file is read once however many names it has, and
whatever is not read is told with its reason.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from array import array
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, TypeAlias

from verl_tapo.audit.model import Problem
from verl_tapo.rule.values import success_number
from verl_tapo.step_records import HEAD, parquet_header
from verl_tapo.text_files import BROKEN, MAX_LINE, Line, UnknownCompression, open_utf8, read_line

FIELDS = ("input", "output", "gts", "score", "step", "uid")
"""What is read of a dump's line, as veRL names it (besides the success key)."""
_GROUND_TRUTHS = (("ground_truth",), ("reward_model", "ground_truth"))
"""Where people's own dumps have the ground truth, which veRL calls ``gts``."""
LARGEST = 1e15
"""Of scores and advantages: what lies beyond overflows in veRL's arithmetic, which squares them in 32 bits."""
_NAME = re.compile(r".*\.(parquet|(jsonl|ndjson|jsonlines)(\.(gz|zst|xz|bz2|lz4|zip))?)", re.IGNORECASE | re.DOTALL)
_STEP_FILE = re.compile(r"[0-9]+\.jsonl(\.gz)?")  # as veRL names a step's dump
_NOT_ENTERED = re.compile(r"val|\.|checkpoints$|global_step_")  # folders: validation, hidden ones, checkpoints
_LOOKED_AT = 100  # lines of a file before it is no dump: the first ones may be broken
_SHOWN = 20  # problems of one kind in one file
_SHOWN_IN_ALL = 2000
_MAX_STEP = 10**15

NoteKind: TypeAlias = Literal["success", "uid", "copy", "text"]
"""What is read in another way than it is written: a success that is neither number nor truth value, uids that are no
keys of veRL's, lines that stand there twice, and texts and steps."""


class Source(NamedTuple):
    """A file with rollouts."""

    path: Path
    kind: Literal["records", "dump"]
    step: int | None
    """Of its first line; None where that cannot be read."""
    size: int
    """In bytes."""


class Row(NamedTuple):
    """A dump's line."""

    line: int
    value: Mapping[str, Any]
    file: Path = Path()


class Notes:
    """How many lines are read in another way than they are written, and the first of them."""

    def __init__(self) -> None:
        self.lines = 0
        self.first = ""

    def add(self, path: Path, line: int | None, reason: str, lines: int = 1) -> None:
        place = path.name if line is None else f"{path.name}:{line}"
        self.first = self.first or f"{place}: {reason}"
        self.lines += lines


class Problems:
    """Collects what was not read. Many of one kind in one file are counted, not listed."""

    def __init__(self) -> None:
        self.skipped = 0
        """Lines left out."""
        self.files = 0
        """Files that could not be read, or not to their end."""
        self.notes: dict[NoteKind, Notes] = defaultdict(Notes)
        self._listed: list[Problem] = []
        self._alike: Counter[tuple[str, str]] = Counter()
        self._unlisted = 0

    def add(self, path: Path, line: int | None, reason: str) -> None:
        """Takes a line that was left out; with ``line`` None all that would have followed in the file."""
        self.skipped += line is not None
        self.files += line is None
        key = (str(path), reason)
        if key not in self._alike and len(self._alike) >= _SHOWN_IN_ALL:
            self._unlisted += 1
            return
        self._alike[key] += 1
        if self._alike[key] <= _SHOWN:
            self._listed.append(Problem(str(path), line, reason))

    def listed(self) -> list[Problem]:
        """All of them; where there are many alike, how many more."""
        more = [
            Problem(file, None, f"{count - _SHOWN} more lines: {reason}")
            for (file, reason), count in self._alike.items()
            if count > _SHOWN
        ]
        if self._unlisted:
            more.append(Problem("", None, f"{self._unlisted:,} more problems"))
        return [*self._listed, *more]


@dataclass
class Found:
    """The files of a run."""

    sources: list[Source] = field(default_factory=list)
    left_out: dict[Path, str] = field(default_factory=dict)
    """Files with a fitting name that hold something else, and folders that were not entered; with the reason."""
    damaged: list[Problem] = field(default_factory=list)
    """Files and folders that cannot even be begun."""

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(source.size for source in self.sources)


def find_sources(paths: Sequence[str | os.PathLike[str]], output_field: str = "output") -> Found:
    """Looks for rollouts: in the files named, and in the folders named with all below them.

    Folders of validation rollouts and checkpoints are not entered, unless named themselves.

    Raises:
        ValueError: a path does not exist, a file named holds no rollouts, or there are none at all.
    """
    found = Found()
    seen: set[tuple[int, int]] = set()
    for name in paths:
        path = Path(name)
        try:
            status = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(f"{path}: there is no such file or folder") from None
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from None
        if stat.S_ISDIR(status.st_mode):
            for file in _walk(path, found, seen):
                reason = _take(file, output_field, found, seen)
                if isinstance(reason, _Spoilt) and _STEP_FILE.fullmatch(file.name):
                    found.damaged.append(Problem(str(file), None, str(reason)))
                elif reason:
                    found.left_out[file] = str(reason)
        elif not stat.S_ISREG(status.st_mode):
            found.damaged.append(Problem(str(path), None, f"{_kind(status.st_mode)}, not a plain file"))
        elif reason := _take(path, output_field, found, seen):
            raise ValueError(
                f"{path}: neither a rollout dump of veRL (JSON lines with {output_field!r}, 'score', ...) nor step "
                f"records: {reason}"
            )
    if not found.sources:
        others = [*(f"{p.file}: {p.reason}" for p in found.damaged)]
        others += [f"{path} ({reason})" for path, reason in found.left_out.items()]
        more = f". Left out: {'; '.join(others[:5])}" if others else ""
        raise ValueError(
            f"no rollouts in {', '.join(map(str, paths))}. veRL writes them where trainer.rollout_data_dir is set, "
            f"this plug-in where algorithm.tapo.record_dir is{more}"
        )
    found.sources.sort(key=lambda source: (source.step is None, source.step or 0, _natural(str(source.path))))
    return found


def _walk(folder: Path, found: Found, seen: set[tuple[int, int]]) -> Iterator[Path]:
    """The files below a folder that may hold rollouts, by their names; links last, so that files keep their own."""
    links: deque[Path] = deque()
    folders = deque([folder])
    while folders or links:
        at = folders.popleft() if folders else links.popleft()
        try:
            status = at.stat()
            if stat.S_ISDIR(status.st_mode):
                if at != folder and _NOT_ENTERED.match(at.name):
                    found.left_out[at] = "not entered"
                elif (status.st_dev, status.st_ino) not in seen:
                    seen.add((status.st_dev, status.st_ino))
                    with os.scandir(at) as entries:
                        for entry in sorted(entries, key=lambda entry: _natural(entry.name)):
                            if entry.is_symlink():
                                links.append(at / entry.name)
                            elif entry.is_dir() or _NAME.fullmatch(entry.name):
                                folders.append(at / entry.name)
            elif not _NAME.fullmatch(at.name):
                continue
            elif stat.S_ISREG(status.st_mode):
                yield at
            else:
                found.left_out[at] = f"{_kind(status.st_mode)}, not a plain file"
        except OSError as error:
            found.damaged.append(Problem(str(at), None, f"cannot be read: {error.strerror}"))


def _kind(mode: int) -> str:
    if stat.S_ISFIFO(mode):
        return "a named pipe"
    return "a socket" if stat.S_ISSOCK(mode) else "a device"


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part[:18] or 0), text) for text, part in re.findall(r"(\D*)([0-9]*)", name)]


def _take(file: Path, output_field: str, found: Found, seen: set[tuple[int, int]]) -> _NoRollouts | None:
    """Adds a file that holds rollouts, unless it was seen before; returns why it holds none."""
    try:
        status = file.stat()
        if (status.st_dev, status.st_ino) in seen:
            return None
        seen.add((status.st_dev, status.st_ino))
        kind, step = _recognise(file, output_field)
    except _NoRollouts as reason:
        return reason
    except BROKEN as error:
        found.damaged.append(Problem(str(file), None, f"cannot be read: {error}"))
    else:
        found.sources.append(Source(file, kind, step, status.st_size))
    return None


class _NoRollouts(Exception):
    """Why a file is no source."""


class _Spoilt(_NoRollouts):
    """It is not even of something else: nothing in it can be read."""


def _recognise(path: Path, output_field: str) -> tuple[Literal["records", "dump"], int | None]:
    """What a file holds, and the training step it begins with."""
    if path.suffix.lower() == ".parquet":
        try:
            header = parquet_header(path)
        except ImportError:
            raise _NoRollouts("reading it needs pyarrow") from None
        if header is None:
            raise _NoRollouts("a Parquet file of something else")
        return "records", _step_in(path)
    try:
        return _recognise_lines(path, output_field)
    except UnknownCompression as error:
        raise _Spoilt(str(error)) from None


def _recognise_lines(path: Path, output_field: str) -> tuple[Literal["records", "dump"], int | None]:
    reason: _NoRollouts = _Spoilt("the file is empty")
    at, said = 0, False
    with open_utf8(path) as stream:
        for number in range(1, _LOOKED_AT + 1):
            line = read_line(stream, at, to_its_end=False)
            if line is None:
                break
            if line.too_long:
                raise _Spoilt(f"line {number} is longer than {MAX_LINE >> 20} MiB")
            at = line.end
            if line.text.startswith(HEAD):
                return "records", _step_in(path)
            value = _parse(line.text)
            if isinstance(value, dict) and output_field in value:
                return "dump", _step(value, path)
            if not said and line.text.strip():
                reason, said = _why_not(number, line, value, output_field), True
    raise reason


def _parse(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _why_not(number: int, line: Line, value: Any, output_field: str) -> _NoRollouts:
    if isinstance(value, dict):
        return _NoRollouts(f"no {output_field!r} in line {number}; fields: {_names(value)}")
    what = "no JSON" if value is None else f"no JSON object but {type(value).__name__}"
    return _Spoilt(f"line {number} is {what}: {line.text.strip()[:40]!r}")


def _names(value: Mapping[str, Any]) -> str:
    return ", ".join(name[:40] for name in sorted(value)[:12])


def _step(value: Mapping[str, Any], path: Path) -> int | None:
    step = _whole(value.get("step"))
    return _step_in(path) if step is None else step


def _whole(value: Any) -> int | None:
    """A whole number, also where it is a float or a text; None for anything else."""
    if isinstance(value, str) and re.fullmatch(r"\s*-?[0-9]{1,15}\s*", value):
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) > _MAX_STEP:
        return None
    return value


def _step_in(path: Path) -> int | None:
    """The training step in a file's name or its folder's: behind "step", else the first number of the file's name."""
    for name in (path.name, path.parent.name):
        if found := re.search(r"step[^0-9A-Za-z]?([0-9]{1,15})(?![0-9])", name, re.IGNORECASE):
            return int(found[1])
    first = re.search(r"(?<![0-9])[0-9]{1,15}(?![0-9])", path.name)
    return int(first[0]) if first else None


class Dump:
    """A rollout dump: JSON lines, of training steps in any order.

    It is read twice, once for what stands where, and then step by step, so that one step is held at a time.

    Args:
        path: a file of JSON lines.
        fields: the names that `FIELDS` have in this dump.
        problems: lines that cannot be used are added.
        advance: told how many bytes of the file were read since the last time.
    """

    def __init__(
        self, path: Path, fields: Mapping[str, str], problems: Problems, advance: Callable[[int], None]
    ) -> None:
        self.path, self._fields, self._problems, self._advance = path, fields, problems, advance
        self._places: dict[int, array[int]] = {}  # number and offset of each line, step by step
        self._size = self._length = self._passed = self._told = 0
        self._in_order = True
        self._opened = ExitStack()
        self._stream: BinaryIO | None = None
        try:
            self._size = path.stat().st_size
            with open_utf8(path) as stream:
                self._index(stream)
        except BROKEN as error:
            self._in_order = False  # read as far as it goes, it is a copy then
            problems.add(path, None, f"the file breaks off: {error}")

    @property
    def steps(self) -> list[int]:
        """The training steps that have lines which can be used, rising."""
        return sorted(self._places)

    def _index(self, stream: BinaryIO) -> None:
        undated, last = 0, -_MAX_STEP
        for number in count(1):
            start = self._length
            line = read_line(stream, start)
            if line is None:
                break
            self._length = line.end
            if not line.text or line.text.isspace():
                continue
            try:
                value = _read_row(line, self._fields)
            except _Unusable as error:
                self._problems.add(self.path, number, str(error))
                continue
            if line.broken:
                self._problems.notes["text"].add(self.path, number, "not UTF-8")
            step = _step(value, self.path)
            if value.get("step") is not None and _whole(value["step"]) is None:
                self._problems.notes["text"].add(self.path, number, f"the step is {_short(value['step'])}, no number")
            undated += step is None
            self._in_order &= (step or 0) >= last
            last = step or 0
            self._places.setdefault(last, array("q")).extend((number, start))
        if undated:
            reason = "no step, neither in the line nor in the file's name: taken for step 0"
            self._problems.notes["text"].add(self.path, None, reason, undated)

    def rows(self, step: int) -> list[Row]:
        """A step's lines, with the names of `FIELDS`; the file stays open until `close`."""
        places = self._places.get(step, ())
        rows = []
        try:
            if self._stream is None:
                self._stream = self._opened.enter_context(open_utf8(self.path, self._in_order))
            stream = self._stream
            for number, start in zip(places[::2], places[1::2], strict=True):
                if stream.tell() != start:
                    stream.seek(start)
                line = read_line(stream, start)
                value = None if line is None else _read_row(line, self._fields)
                if line is None or value is None:
                    raise EOFError("the file has become shorter")
                self._passed += line.end - start
                rows.append(Row(number, value, self.path))
        except _Unusable as error:
            self._problems.add(self.path, None, f"the file changed while it was read: {error}")
        except BROKEN as error:
            self._problems.add(self.path, None, f"the file breaks off: {error}")
        self._tell(min(self._size, self._size * self._passed // max(self._length, 1)))
        return rows

    def close(self) -> None:
        """Lets go of the file; it may be read again."""
        self._opened.close()
        self._stream = None

    def finish(self) -> None:
        """Nothing more of it will be read."""
        self.close()
        self._tell(self._size)

    def _tell(self, read: int) -> None:
        self._advance(read - self._told)
        self._told = read


def read_dump(
    path: Path, fields: Mapping[str, str], problems: Problems, advance: Callable[[int], None]
) -> Iterator[tuple[int, list[Row]]]:
    """The lines of a rollout dump by training step, see `Dump`.

    Yields:
        the step, and its lines with the names of `FIELDS`.
    """
    dump = Dump(path, fields, problems, advance)
    for step in dump.steps:
        yield step, dump.rows(step)
    dump.finish()


class _Unusable(Exception):
    """Why a line is left out."""


def _read_row(line: Line, fields: Mapping[str, str]) -> dict[str, Any]:
    if line.too_long:
        raise _Unusable(f"longer than {MAX_LINE >> 20} MiB")
    try:
        value = json.loads(line.text)
    except RecursionError:
        raise _Unusable("nested too deeply") from None
    except json.JSONDecodeError:
        raise _Unusable("not JSON" if line.whole else "not JSON: the line is cut short") from None
    except ValueError:
        raise _Unusable("a number with too many digits") from None
    if not isinstance(value, dict):
        raise _Unusable(f"not a JSON object but {type(value).__name__}")
    row = {**value, **{name: value.get(own) for name, own in fields.items()}}
    if row.get("gts") is None and "gts" not in fields:
        row["gts"] = _ground_truth(value)
    if not isinstance(row.get("output"), str):
        raise _Unusable(f"no text in {fields.get('output', 'output')!r}; fields: {_names(value)}")
    score = row.get("score")
    if score is None:
        raise _Unusable("no score")
    number = success_number(score)
    if not math.isfinite(number):
        raise _Unusable(f"the score is {_short(score)}, not a finite number")
    if abs(number) > LARGEST:
        raise _Unusable(f"the score is {_short(score)}, beyond veRL's arithmetic")
    row["score"] = number
    return row


def _ground_truth(value: Mapping[str, Any]) -> Any:
    for path in _GROUND_TRUTHS:
        at: Any = value
        for name in path:
            at = at.get(name) if isinstance(at, dict) else None
        if at is not None:
            return at
    return None


def _short(value: Any) -> str:
    return f"a {type(value).__name__}" if isinstance(value, dict | list) else repr(str(value)[:40])
