"""An audit's tables as CSV or Parquet files. Calls are written step by step, so that a run of any size fits."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, TypeAlias

import pandas

from verl_tapo.audit.analysis import StepAnalysis
from verl_tapo.audit.result import Audit, call_rows, frame_of
from verl_tapo.audit.writing import replacing

TableFormat: TypeAlias = Literal["csv", "parquet"]

_CALL_TYPES = {
    **dict.fromkeys(("step", "call"), "int64"),
    **dict.fromkeys(("group", "trajectory", "tool", "arguments", "status", "role", "gate"), "string"),
    **dict.fromkeys(("success", "lucky"), "bool"),
    **dict.fromkeys(("seen", "grounded"), "boolean"),
    **dict.fromkeys(
        ("similarity", "support", "alpha", "reference_advantage", "lift", "transfer", "before", "after"), "float64"
    ),
}


_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


class TableWriter:
    """Writes ``steps``, ``tools``, ``sweeps``, ``warnings`` and ``calls`` into a folder, as a context.

    Tables that were there before are replaced by whole ones. ``calls`` is left as it was where the context is left with
    an error.

    Raises:
        OSError: where the folder cannot be made or written to.
    """

    def __init__(self, folder: str | os.PathLike[str], table_format: TableFormat) -> None:
        self._folder, self._format = Path(folder), table_format
        self._folder.mkdir(parents=True, exist_ok=True)
        self._open = ExitStack()
        self._parquet: Any = None
        self._calls = self._open.enter_context(replacing(self._folder / f"calls.{table_format}"))

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)

    def add(self, analysis: StepAnalysis) -> None:
        """Writes a step's calls."""
        frame = frame_of(call_rows(analysis), list(_CALL_TYPES)).astype(_CALL_TYPES)
        if self._format == "csv":
            self._calls.write(_csv(frame, header=self._calls.tell() == 0))
            return
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.Table.from_pandas(frame, preserve_index=False)
        if self._parquet is None:
            self._parquet = self._open.enter_context(pyarrow.parquet.ParquetWriter(self._calls, table.schema))
        self._parquet.write_table(table.cast(self._parquet.schema))

    def finish(self, audit: Audit) -> None:
        """Writes the other tables."""
        frames = {
            "steps": audit.steps.reset_index(),
            "tools": audit.tools.reset_index(),
            "sweeps": audit.sweeps,
            "warnings": audit.warnings,
        }
        for name, frame in frames.items():
            with replacing(self._folder / f"{name}.{self._format}") as file:
                if self._format == "csv":
                    file.write(_csv(frame))
                else:
                    frame.to_parquet(file, index=False)


def _csv(frame: pandas.DataFrame, header: bool = True) -> bytes:
    text: str = _quoted(frame).to_csv(index=False, header=header)
    return text.encode()


def _quoted(frame: pandas.DataFrame) -> pandas.DataFrame:
    """Text that a spreadsheet would take for a formula gets a quote in front, by which it stays text."""
    texts = [name for name in frame.columns if not pandas.api.types.is_numeric_dtype(frame[name])]
    return frame.assign(**{name: frame[name].map(_as_text) for name in texts})


def _as_text(cell: Any) -> Any:
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULA) else cell
