"""Records of training steps: the reader's interface. (Placeholder: the format, its writer and reader come next.)"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def is_step_records(path: Path) -> bool:
    """Whether a file holds step records."""
    return path.name.endswith(".tapo-records")


def read_step_records(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]], list[tuple[int, str]]]:
    """Header, rows and problems."""
    raise ValueError(f"{path}: no step records")
