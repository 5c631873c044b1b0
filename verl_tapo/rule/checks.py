"""Checks of settings: each raises ValueError with the setting's name and what it must be."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Sequence
from typing import Any

from verl_tapo.rule.values import read_number, shown


def is_number(value: Any) -> bool:
    """Whether a value is a number that a float can hold: finite, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and read_number(value) is not None


def check_number(name: str, value: Any, upper: float) -> None:
    """A number from 0 to ``upper``."""
    if not is_number(value) or not 0 <= value <= upper:
        span = f"in [0, {upper:g}]" if math.isfinite(upper) else ">= 0"
        raise ValueError(f"{name} must be a number {span}, got {shown(value)}")


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """One of the choices."""
    # By type as well: true is no 1.
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {shown(value)}")


def check_bool(name: str, value: Any) -> None:
    """A truth value."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {shown(value)}")


def check_text(name: str, value: Any, what: str) -> None:
    """A text that is not empty."""
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} must be {what}, got {shown(value)}")


def hint(name: Any, known: Collection[str]) -> str:
    """The end of a message on an unknown name: the known one that was meant, as it seems, else all."""
    close = difflib.get_close_matches(str(name), known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known)) or 'none'}"
