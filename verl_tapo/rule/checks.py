"""Settings: each is declared once, with its default, a sentence and its check."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection
from dataclasses import field, fields
from typing import Any, TypeAlias

from verl_tapo.rule.values import read_number, shown

Check: TypeAlias = Callable[[str, Any], None]
"""A check takes a setting's name and value, and raises a ValueError that says what it must be."""


def knob(default: Any, sentence: str, check: Check) -> Any:
    """A dataclass field of a class derived from `Knobs`.

    Args:
        default: its default.
        sentence: a description; `verl_tapo/conf/tapo.yaml` is made from it.
        check: asked whenever settings are made.
    """
    return field(default=default, metadata={"sentence": " ".join(sentence.split()), "check": check})


class Knobs:
    """A dataclass of settings."""

    block = ""
    """Stands before the names in messages."""

    def __post_init__(self) -> None:
        for each in fields(self):  # type: ignore[arg-type]
            if "check" in each.metadata:
                each.metadata["check"](f"{self.block}{each.name}", getattr(self, each.name))


def is_number(value: Any) -> bool:
    """Returns whether a value is a finite number that a float can hold, and not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and read_number(value) is not None


def _require(fine: bool, name: str, what: str, value: Any) -> None:
    if not fine:
        raise ValueError(f"{name} must be {what}, got {shown(value)}")


def number(upper: float = math.inf, *, null: bool = False) -> Check:
    """Accepts a number from 0 to ``upper``, and with ``null`` None."""
    span = f"in [0, {upper:g}]" if math.isfinite(upper) else ">= 0"
    what = f"null or a number from 0 to {upper:g}" if null else f"a number {span}"
    return lambda name, value: _require(
        (null and value is None) or (is_number(value) and 0 <= value <= upper), name, what, value
    )


def finite(name: str, value: Any) -> None:
    """A finite number."""
    _require(is_number(value), name, "a finite number", value)


def whole(name: str, value: Any) -> None:
    """A whole number from 0 on."""
    fine = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    _require(fine, name, "a whole number >= 0", value)


def choice(*choices: Any) -> Check:
    """One of the choices, by type as well: true is no 1."""
    what = f"one of {', '.join(map(repr, choices))}"
    return lambda name, value: _require(
        any(type(value) is type(each) and value == each for each in choices), name, what, value
    )


def truth(name: str, value: Any) -> None:
    """A truth value."""
    _require(isinstance(value, bool), name, "true or false", value)


def text(what: str, *, null: bool = False) -> Check:
    """Accepts a text that is not empty, and with ``null`` None."""
    return lambda name, value: _require(
        (null and value is None) or (isinstance(value, str) and value != ""), name, what, value
    )


def texts(name: str, value: Any) -> None:
    """A list of texts that are not empty."""
    fine = isinstance(value, list | tuple) and all(isinstance(item, str) and item for item in value)
    if not fine:
        raise ValueError(f"{name} must be a list of non-empty strings, got {shown(value)}; [] where there are none")


def hint(name: Any, known: Collection[str]) -> str:
    """The end of a message on an unknown name: the known one that was meant, as it seems, else all."""
    close = difflib.get_close_matches(str(name), known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known)) or 'none'}"
