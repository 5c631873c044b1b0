"""An audit's tables as CSV or Parquet files. Calls are written step by step, so that a run of any size fits."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, TypeAlias

import pandas

from verl_tapo.audit.analysis import StepAnalysis
from verl_tapo.audit.result import Audit, call_rows, frame_of

TableFormat: TypeAlias = Literal["csv", "parquet"]

_CALL_TYPES = {
    **dict.fromkeys(("step", "call"), "int64"),
    **dict.fromkeys(("group", "trajectory", "tool", "arguments", "status", "role", "gate"), "string"),
    **dict.fromkeys(("success", "lucky"), "bool"),
    **dict.fromkeys(
        ("similarity", "support", "alpha", "reference_advantage", "lift", "transfer", "before", "after"), "float64"
    ),
}


_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


class TableWriter:
    """Writes ``steps``, ``tools``, ``sweeps``, ``warnings`` and ``calls`` into a folder.

    Raises:
        OSError: where the folder cannot be made or written to.
    """

    def __init__(self, folder: str | os.PathLike[str], table_format: TableFormat) -> None:
        self._folder, self._format = Path(folder), table_format
        self._folder.mkdir(parents=True, exist_ok=True)
        self._parquet: Any = None
        self._calls = self._folder / f"calls.{table_format}"
        self._calls.unlink(missing_ok=True)

    def add(self, analysis: StepAnalysis) -> None:
        """Writes a step's calls."""
        frame = frame_of(call_rows(analysis), list(_CALL_TYPES)).astype(_CALL_TYPES)
        if self._format == "csv":
            _quoted(frame).to_csv(self._calls, mode="a", header=not self._calls.exists(), index=False)
            return
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.Table.from_pandas(frame, preserve_index=False)
        if self._parquet is None:
            self._parquet = pyarrow.parquet.ParquetWriter(self._calls, table.schema)
        self._parquet.write_table(table.cast(self._parquet.schema))

    def finish(self, audit: Audit) -> None:
        """Writes the other tables."""
        if self._parquet is not None:
            self._parquet.close()
        frames = {
            "steps": audit.steps.reset_index(),
            "tools": audit.tools.reset_index(),
            "sweeps": audit.sweeps,
            "warnings": audit.warnings,
        }
        for name, frame in frames.items():
            path = self._folder / f"{name}.{self._format}"
            if self._format == "csv":
                _quoted(frame).to_csv(path, index=False)
            else:
                frame.to_parquet(path, index=False)


def _quoted(frame: pandas.DataFrame) -> pandas.DataFrame:
    """Text that a spreadsheet would take for a formula gets a quote in front, by which it stays text."""
    texts = [name for name in frame.columns if not pandas.api.types.is_numeric_dtype(frame[name])]
    return frame.assign(**{name: frame[name].map(_as_text) for name in texts})


def _as_text(cell: Any) -> Any:
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULA) else cell
