"""Writes what TAPO did in each training step to files that `verl-tapo audit` reads
(``algorithm.tapo.record_dir``).

One file for each step (``000012.jsonl.gz``; ``000012_1.jsonl.gz`` for a second batch of a step). As JSON lines, the
first is the header, every other one a row of the batch, padding left out::

    {"kind": "tapo_step_records", "version": 1, "step": 12, "created": "2026-11-23T09:00:00+00:00",
     "verl_tapo": "0.1.0", "settings": {... algorithm.tapo ...}, "metrics": {"tapo/corrected_steps": 0.5, ...}}
    {"key": "<uid>_<session>_<output>", "uid": "...", "trajectory": 0, "score": 0.0, "success": false,
     "advantage": -0.72, "tokens": 310, "length": 512, "changed_tokens": 120, "recognisable": true, "calls": [
       {"tool": "text_search", "arguments": {...}, "turn": [0, 40], "call": [12, 39], "turn_tokens": 40,
        "call_tokens": 27, "ok": true, "seen": false, "status": "ok", "latency_s": 0.12, "fault": null,
        "role": "failing",
        "gate": "corrected", "similarity": 1.0, "support": 1.0, "alpha": 1.0, "reference_advantage": 1.2,
        "transfer": 0.96, "witness": [1, 0]}, ...]}

``arguments`` are as the rule compared them, with identities of images instead of indices. Spans and
counts are in response tokens; ``advantage`` is the trajectory's ``a``; ``witness`` is a row of the
file and the number of its call. ``seen`` is null if it is unknown whether the answer held an
accepted answer. ``recognisable``, whether a tool could have shown one, is asked with
``grounding.luck`` only. ``status``, ``latency_s`` and ``fault`` are null for calls that were parsed,
not recorded. Parquet files have a row for each of these lines, with ``arguments`` as JSON text, and
the header in the schema's metadata.

Writing happens in the background. It neither slows nor fails a training step: a failed write is
logged once, and counted. Only a step's own file, recognised by its name and header, is ever
replaced or removed.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from verl_tapo.calls.call import fault_of
from verl_tapo.rule.arrays import IntArray
from verl_tapo.rule.report import CreditReport
from verl_tapo.rule.steps import ToolStep
from verl_tapo.rule.values import MAX_DEPTH, prints, shown
from verl_tapo.settings import RecordFormat, TapoSettings
from verl_tapo.text_files import BROKEN, UnknownCompression, open_utf8, read_line

logger = logging.getLogger("verl_tapo")

KIND = "tapo_step_records"
VERSION = 1
_WAITING = 2  # steps that may wait to be written; more would pile up their tensors
_SUFFIX: dict[RecordFormat, str] = {"jsonl": "jsonl.gz", "parquet": "parquet"}
_NAME = re.compile(r"(\d+)(?:_(\d+))?\.(jsonl\.gz|parquet)")
HEAD = f'{{"kind": "{KIND}"'
"""The beginning of the first line of a file in JSON lines."""


# --- What is written ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepSnapshot:
    """A training step, as the estimator leaves it. B rows, S steps."""

    step: int
    part: int
    """Number of the batch within the training step, from 0."""
    settings: TapoSettings
    metrics: Mapping[str, float]
    keys: Sequence[str] | None
    """(B,) veRL's ``{uid}_{session}_{output}``."""
    index: Sequence[Any] | npt.NDArray[Any]
    """(B,) prompt groups."""
    trajectory: IntArray
    """(B,) number of each row's trajectory."""
    scores: npt.NDArray[np.float64]
    success: npt.NDArray[np.bool_]
    padding: npt.NDArray[np.bool_]
    lengths: IntArray
    """(B,) response tokens."""
    response_mask: torch.Tensor
    """(B, L); read in the background, so not to be changed in place."""
    changed: IntArray
    """(B,) tokens with another advantage than the base's."""
    steps: Sequence[ToolStep]
    report: CreditReport
    records: Sequence[Any]
    """(B,) the agent loop's records; None for a trajectory without one."""

    def header(self) -> dict[str, Any]:
        from verl_tapo import __version__

        metrics = {name: value for name, value in self.metrics.items() if not name.startswith("tapo/ms/")}
        return {
            "kind": KIND,
            "version": VERSION,
            "step": self.step,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "verl_tapo": __version__,
            "settings": json_value(self.settings.to_mapping()),
            "metrics": json_value(metrics),
        }

    def rows(self) -> Iterator[dict[str, Any]]:
        """One for each row that is no padding."""
        policy = self.response_mask.cpu().numpy() != 0
        credits, advantages = self.report.steps, self.report.advantage_of_row
        recognisable = self.report.recognisable_of_row
        of_row: dict[int, list[int]] = {}
        number = np.zeros(len(self.steps), dtype=np.int64)
        for position, step in enumerate(self.steps):
            earlier = of_row.setdefault(step.row, [])
            number[position] = len(earlier)
            earlier.append(position)
        real = np.flatnonzero(~self.padding).tolist()
        line = {row: index for index, row in enumerate(real)}
        for row in real:
            recorded = _recorded(self.records[row], int(self.lengths[row]))
            positions = of_row.get(row, [])
            calls = []
            for number_in_row, position in enumerate(positions):
                step, credit = self.steps[position], credits[position]
                witness = credit.witness
                calls.append(
                    {
                        "tool": step.tool,
                        "arguments": json_value(step.arguments),
                        "turn": list(step.turn),
                        "call": list(step.call),
                        "turn_tokens": int(policy[row, slice(*step.turn)].sum()),
                        "call_tokens": int(policy[row, slice(*step.call)].sum()),
                        "ok": bool(step.ok),
                        "seen": step.seen,
                        **(recorded[number_in_row] if len(recorded) == len(positions) else _NOT_RECORDED),
                        "role": credit.role,
                        "gate": credit.gate,
                        "similarity": credit.similarity,
                        "support": credit.support,
                        "alpha": credit.alpha,
                        "reference_advantage": credit.reference_advantage,
                        "transfer": credit.transfer,
                        "witness": None if witness is None else [line[self.steps[witness].row], int(number[witness])],
                    }
                )
            yield {
                "key": None if self.keys is None else str(self.keys[row]),
                "uid": str(self.index[row]),
                "trajectory": int(self.trajectory[row]),
                "score": json_value(float(self.scores[row])),
                "success": bool(self.success[row]),
                "advantage": float(advantages[row]),
                "tokens": int(policy[row].sum()),
                "length": int(self.lengths[row]),
                "changed_tokens": int(self.changed[row]),
                "recognisable": bool(recognisable[row]),
                "calls": calls,
            }


_NOT_RECORDED: dict[str, Any] = {"status": None, "latency_s": None, "fault": None}


def _recorded(record: Any, length: int) -> list[dict[str, Any]]:
    """Returns the remaining figures in the agent loop's record, for the calls that
    `verl_tapo.records.recorded_steps` keeps."""
    if not isinstance(record, Mapping):
        return []
    kept = [step for step in record["steps"] if step["turn"][0] < length]
    return [
        {"status": step["status"], "latency_s": json_value(step.get("latency_s")), "fault": fault_of(step)}
        for step in kept
    ]


def json_value(value: Any, depth: int = 0) -> Any:
    """Returns a value as strict JSON: NaN and infinity become None, and any other value outside
    JSON its text.

    So do levels beyond `verl_tapo.rule.values.MAX_DEPTH`, which nothing here looks at.
    """
    if isinstance(value, Mapping | list | tuple) and depth >= MAX_DEPTH:
        return f"({type(value).__name__}, nested too deeply)"
    if isinstance(value, Mapping):
        return {_text(key): json_value(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item, depth + 1) for item in value]
    if isinstance(value, np.generic) and not isinstance(value.item(), np.generic):
        return json_value(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    plain = value is None or isinstance(value, str) or (isinstance(value, bool | int | float) and prints(value))
    return value if plain else _text(value)


def _text(value: Any) -> str:
    try:
        return str(value)
    except Exception:  # a number of thousands of digits, a foreign object
        return shown(value)


# --- Writing --------------------------------------------------------------------------------------------------------


class StepRecorder:
    """Writes step records in the background.

    Args:
        folder: made where it does not exist.
        record_format: ``jsonl`` (compressed) or ``parquet``.
        keep: the number of the newest steps' files to keep; 0: all.

    Raises:
        ValueError: the folder holds a foreign file with a name like ours, see `refuse_foreign_files`.
    """

    def __init__(self, folder: str | os.PathLike[str], record_format: RecordFormat = "jsonl", keep: int = 0) -> None:
        self._folder, self._format, self._keep = Path(folder), record_format, keep
        # A folder that cannot be listed cannot be written to either: that is logged with the first step.
        with contextlib.suppress(OSError):
            refuse_foreign_files(self._folder)
        # The interpreter waits for this thread when it ends normally.
        self._writer = ThreadPoolExecutor(1, "tapo-records")
        self._waiting: list[Future[None]] = []
        self._taken = self._lost = 0
        self._told = False

    @property
    def lost(self) -> float:
        """Share of the steps so far that could not be written."""
        return self._lost / self._taken if self._taken else 0.0

    def take(self, snapshot: StepSnapshot) -> None:
        """Hands a step over; returns at once, and never raises."""
        self._taken += 1
        self._waiting = [future for future in self._waiting if not future.done()]
        if len(self._waiting) >= _WAITING:
            self._lose(f"{_WAITING} steps before it are still being written")
            return
        self._waiting.append(self._writer.submit(self._write, snapshot))

    def flush(self) -> None:
        """Waits until all that was taken is written."""
        for future in self._waiting:
            future.result()

    def _lose(self, why: object) -> None:
        self._lost += 1
        if not self._told:
            self._told = True
            logger.warning(
                "TAPO: a step's records could not be written to %s, and training goes on without them: %s. Said once; "
                "tapo/records_lost is the share of steps lost",
                self._folder,
                why,
            )

    def _write(self, snapshot: StepSnapshot) -> None:
        path = self._folder / _file_name(snapshot.step, snapshot.part, self._format)
        partial = path.with_name(f".{path.name}.partial")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if self._format == "jsonl":
                _write_lines(partial, snapshot)
            else:
                _write_parquet(partial, snapshot)
            # On the disk before it gets its name: a machine that goes down leaves no empty file under it.
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
            if os.path.lexists(path) and not _is_own(path):
                raise FileExistsError(f"{path} is there already and holds no step records; move it away")
            os.replace(partial, path)
            self._tidy(snapshot, path)
        except Exception as error:  # a full disk, a value of a type never thought of: nothing here may end a run
            self._lose(f"{type(error).__name__}: {error}")
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)

    def _tidy(self, snapshot: StepSnapshot, written: Path) -> None:
        """Removes the files of an earlier run of the step, and the oldest files beyond those to
        keep; after a resumption these are not the lowest numbers. Files that are not ours stay."""
        files: dict[int, list[Path]] = {}
        for path in self._folder.iterdir():
            named = _NAME.fullmatch(path.name)
            if named and (self._keep or int(named[1]) == snapshot.step) and _is_own(path):
                files.setdefault(int(named[1]), []).append(path)
        old = [path for path in files.get(snapshot.step, []) if path != written] if snapshot.part == 0 else []
        if self._keep:
            newest = sorted(files, key=lambda step: max(path.stat().st_mtime_ns for path in files[step]))
            old += [path for step in newest[: -self._keep] for path in files[step]]
        for path in old:
            path.unlink(missing_ok=True)


def _file_name(step: int, part: int, record_format: RecordFormat) -> str:
    return f"{step:06d}{f'_{part}' if part else ''}.{_SUFFIX[record_format]}"


def _is_own(path: Path) -> bool:
    """Returns whether a `StepRecorder` wrote a file: its name and header say so and agree on the
    step."""
    named = _NAME.fullmatch(path.name)
    if not named or path.is_symlink() or not is_step_records(path):
        return False
    record_format: RecordFormat = "parquet" if named[3] == "parquet" else "jsonl"
    if path.name != _file_name(int(named[1]), int(named[2] or 0), record_format):
        return False
    header = parquet_header(path) if record_format == "parquet" else _first_line(path)
    return isinstance(header, dict) and header.get("step") == int(named[1])


def _first_line(path: Path) -> Any:
    try:
        with open_utf8(path) as stream:
            line = read_line(stream, 0, to_its_end=False)
    except BROKEN:
        return None
    return None if line is None else _parsed(line.text)[0]


def _write_lines(path: Path, snapshot: StepSnapshot) -> None:
    with gzip.open(path, "wt", encoding="ascii", compresslevel=5) as file:
        for value in (snapshot.header(), *snapshot.rows()):
            file.write(json.dumps(value, allow_nan=False) + "\n")


def _write_parquet(path: Path, snapshot: StepSnapshot) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = list(snapshot.rows())
    for row in rows:
        for call in row["calls"]:
            call["arguments"] = json.dumps(call["arguments"], allow_nan=False)
            # A name with half a surrogate pair, which a model can write in JSON, fits into no UTF-8.
            call["tool"] = call["tool"].encode("utf-8", "replace").decode()
    number, whole, text, truth = pyarrow.float64(), pyarrow.int64(), pyarrow.string(), pyarrow.bool_()
    numbers = ("latency_s", "similarity", "support", "alpha", "reference_advantage", "transfer")
    call_type = pyarrow.struct(
        {
            **{name: text for name in ("tool", "arguments", "status", "fault", "role", "gate")},
            **{name: number for name in numbers},
            **{name: whole for name in ("turn_tokens", "call_tokens")},
            **{name: pyarrow.list_(whole) for name in ("turn", "call", "witness")},
            **{name: truth for name in ("ok", "seen")},
        }
    )
    schema = pyarrow.schema(
        {
            **{name: text for name in ("key", "uid")},
            **{name: whole for name in ("trajectory", "tokens", "length", "changed_tokens")},
            **{name: number for name in ("score", "advantage")},
            **{name: truth for name in ("success", "recognisable")},
            "calls": pyarrow.list_(call_type),
        },
        metadata={KIND: json.dumps(snapshot.header(), allow_nan=False)},
    )
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), path)


def check_folder(folder: str | os.PathLike[str], make: bool = True) -> None:
    """Tries to write to the folder, and looks for files in it that would be in the way.

    Args:
        folder: ``algorithm.tapo.record_dir``.
        make: make the folder; else a folder that is not there is one that could be made.

    Raises:
        ValueError: it cannot be written to, or see `refuse_foreign_files`.
    """
    path = Path(folder)
    try:
        if make:
            path.mkdir(parents=True, exist_ok=True)
        where = path
        while not os.path.lexists(where):
            where = where.parent
        with tempfile.TemporaryFile(dir=where):
            pass
        refuse_foreign_files(path)
    except OSError as error:
        raise ValueError(f"algorithm.tapo.record_dir={path} cannot be written to: {error}") from None


def refuse_foreign_files(folder: Path) -> None:
    """Looks for files that are named as step records are and are none: compressed dumps, a data set's shards.

    Raises:
        ValueError: naming the first of them, and what to do.
        OSError: the folder cannot be listed.
    """
    if not os.path.lexists(folder):
        return
    foreign = sorted(path.name for path in folder.iterdir() if _NAME.fullmatch(path.name) and not _is_own(path))
    if foreign:
        more = f" (and {len(foreign) - 1} more)" if len(foreign) > 1 else ""
        raise ValueError(
            f"algorithm.tapo.record_dir={folder} holds {foreign[0]}{more}, named as a record of TAPO's is, but none, "
            f"or a damaged one; it will not be replaced. Name a folder of its own for the records, or move it away"
        )


# --- Reading --------------------------------------------------------------------------------------------------------


class StepFile(NamedTuple):
    """A step's records."""

    header: dict[str, Any]
    rows: list[dict[str, Any]]
    problems: list[tuple[int | None, str]]
    """Lines that were left out (rows, in Parquet files), and why; None for all that would have followed."""


def is_step_records(path: Path) -> bool:
    """Returns whether a file's beginning marks it as step records; False if it cannot be read."""
    if not path.is_file():
        return False  # a named pipe would be waited for
    try:
        if path.suffix == ".parquet":
            return parquet_header(path) is not None
        with open_utf8(path) as stream:
            line = read_line(stream, 0, to_its_end=False)
            return line is not None and line.text.startswith(HEAD)
    except (*BROKEN, UnknownCompression, ImportError):
        return False


def read_step_records(path: Path) -> StepFile:
    """Reads a step's file.

    Raises:
        ValueError: the file holds no step records, or of another version, or cannot be read.
    """
    try:
        return _read_parquet(path) if path.suffix.lower() == ".parquet" else _read_lines(path)
    except (OSError, UnknownCompression) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def _checked_header(path: Path, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or value.get("kind") != KIND:
        raise ValueError(f"{path} holds no step records")
    if value.get("version") != VERSION:
        raise ValueError(f"{path}: step records of version {str(value.get('version'))[:40]}, expected {VERSION}")
    for name, (fits, what) in _HEADER_FIELDS.items():
        if not fits(value.get(name)):
            raise ValueError(f"{path}: the header's {name} is {_shown(value, name)}, not {what}")
    return value


def _shown(value: Mapping[str, Any], name: str) -> str:
    if name not in value:
        return "missing"
    shown = value[name][:40] if isinstance(value[name], str) else value[name]
    return f"a {type(shown).__name__}" if isinstance(shown, dict | list) else repr(shown)[:40]


_Field: TypeAlias = tuple[Callable[[Any], bool], str]
_LARGEST = 1e15  # beyond, sums and squares overflow


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -_LARGEST <= value <= _LARGEST


def _is_whole(value: Any) -> bool:
    return _is_number(value) and isinstance(value, int)


def _is_span(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_count, value))


def _is_count(value: Any) -> bool:
    return _is_whole(value) and value >= 0


def _or_null(field: _Field) -> _Field:
    return (lambda value: value is None or field[0](value)), f"{field[1]} or null"


_TEXT: _Field = (lambda value: isinstance(value, str)), "a text"
_TRUTH: _Field = (lambda value: isinstance(value, bool)), "true or false"
_MAPPING: _Field = (lambda value: isinstance(value, dict)), "a mapping"
_LIST: _Field = (lambda value: isinstance(value, list)), "a list"
_NUMBER: _Field = _is_number, "a number that can be reckoned with"
_WHOLE: _Field = _is_whole, "a whole number"
_COUNT: _Field = _is_count, "a count"
_SPAN: _Field = _is_span, "a span"

_HEADER_FIELDS: dict[str, _Field] = {"step": _WHOLE, "settings": _MAPPING}
_ROW_FIELDS: dict[str, _Field] = {
    "key": _or_null(_TEXT),
    "uid": _TEXT,
    "trajectory": _WHOLE,
    "score": _or_null(_NUMBER),
    "success": _TRUTH,
    "advantage": _NUMBER,
    "tokens": _COUNT,
    "length": _COUNT,
    "changed_tokens": _COUNT,
    "recognisable": _TRUTH,
    "calls": _LIST,
}
_CALL_FIELDS: dict[str, _Field] = {
    "tool": _TEXT,
    "arguments": _MAPPING,
    "turn": _SPAN,
    "turn_tokens": _COUNT,
    "call_tokens": _COUNT,
    "ok": _TRUTH,
    "status": _or_null(_TEXT),
    "gate": _TEXT,
    "seen": _or_null(_TRUTH),
}
_LATER = {"seen": None, "recognisable": False}
"""Fields that the first files do not have, and what is read for them."""


def _what_is_wrong(row: Any) -> str | None:
    """Names the first field that keeps a line from being a row of step records."""
    if not isinstance(row, dict) or not row.keys() >= _ROW_FIELDS.keys() - _LATER.keys():
        return "not a row of step records"
    for name, (fits, what) in _ROW_FIELDS.items():
        if not fits(row.get(name, _LATER.get(name))):
            return f"{name} is {_shown(row, name)}, not {what}"
    for number, call in enumerate(row["calls"]):
        if not isinstance(call, dict):
            return f"calls[{number}] is {type(call).__name__}, not a mapping"
        for name, (fits, what) in _CALL_FIELDS.items():
            if not fits(call.get(name)) or (name not in call and name not in _LATER):
                return f"calls[{number}].{name} is {_shown(call, name)}, not {what}"
    return None


def _read_lines(path: Path) -> StepFile:
    rows: list[dict[str, Any]] = []
    problems: list[tuple[int | None, str]] = []
    header: dict[str, Any] | None = None
    at = 0
    try:
        with open_utf8(path) as stream:
            for number in count(1):
                line = read_line(stream, at)
                if line is None:
                    break
                at = line.end
                if line.text.isspace():
                    continue
                value, wrong = _parsed(line.text)
                if header is None:
                    header = _checked_header(path, value)
                elif wrong := wrong or _what_is_wrong(value):
                    problems.append((number, wrong))
                else:
                    rows.append(value)
    except BROKEN as error:
        problems.append((None, f"the file breaks off: {error}"))
    if header is None:
        raise ValueError(f"{path} holds no step records")
    return StepFile(header, rows, problems)


def _parsed(text: str) -> tuple[Any, str | None]:
    """Returns a line's value, or why there is none."""
    try:
        return json.loads(text), None
    except RecursionError:
        return None, "nested too deeply"
    except ValueError:
        return None, "not JSON"


def parquet_header(path: Path) -> Any:
    """The header of a Parquet file of step records; None for a Parquet file of something else.

    Raises:
        OSError: the file is damaged.
        ImportError: pyarrow is not installed.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.read_schema(path).metadata or {}
    except pyarrow.ArrowException as error:
        raise OSError(str(error)[:200]) from None
    return _parsed(metadata[KIND.encode()].decode("utf-8", "replace"))[0] if KIND.encode() in metadata else None


def _read_parquet(path: Path) -> StepFile:
    import pyarrow
    import pyarrow.parquet

    header = _checked_header(path, parquet_header(path))
    try:
        values = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, MemoryError) as error:
        raise ValueError(f"{path} cannot be read: {str(error)[:200]}") from None
    rows: list[dict[str, Any]] = []
    problems: list[tuple[int | None, str]] = []
    for number, row in enumerate(values, 1):
        for call in row["calls"] if isinstance(row.get("calls"), list) else ():
            if isinstance(call, dict) and isinstance(call.get("arguments"), str):
                call["arguments"] = _parsed(call["arguments"])[0]
        wrong = _what_is_wrong(row)
        if wrong:
            problems.append((number, wrong))
        else:
            rows.append(row)
    return StepFile(header, rows, problems)
