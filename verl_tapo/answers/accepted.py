"""Reads the accepted answers from the ground truth of data sets."""

from __future__ import annotations

import ast
import json
import math
import re
import reprlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from decimal import Decimal
from itertools import islice
from typing import Any, NamedTuple

MOST_ANSWERS = 10_000
"""More are no answers to one question, and a list that holds itself has no end."""
_ANSWER_KEYS = ("target", "wikidata", "range")
_PRINTED_ARRAY = re.compile(r"""(['"])\s+\1""")


class Range(NamedTuple):
    """A range of numbers; each number in it is a right answer."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"any number from {self.low!r} to {self.high!r}"

    def to_json(self) -> str:
        """A text that `accepted_answers` reads."""
        return json.dumps({"range": list(self)})


def accepted_answers(ground_truth: Any) -> list[str | Range]:
    """The accepted answers, each once, the canonical one first.

    Args:
        ground_truth: an answer; a list, tuple or array of answers; ``{"target": [...]}``, as Search-R1 has it;
            ``{"wikidata": 324, "range": [291.6, 356.4]}``, as InfoSeek has it; or one of these as JSON in a text.

    Raises:
        ValueError: The answer is missing, or is not an answer.
    """
    try:
        read = list(islice(_read(ground_truth), MOST_ANSWERS + 1))
    except RecursionError:
        raise ValueError("ground_truth is nested too deeply to hold answers") from None
    if len(read) > MOST_ANSWERS:
        raise ValueError(f"ground_truth holds more than {MOST_ANSWERS} answers: {reprlib.repr(ground_truth)}")
    accepted = list(dict.fromkeys(read))
    if not accepted:
        raise ValueError(f"ground_truth has no accepted answer: {reprlib.repr(ground_truth)}")
    return accepted


def _read(value: Any) -> Iterator[str | Range]:
    if hasattr(value, "tolist"):  # of numpy, torch
        value = value.tolist()
    if isinstance(value, str):
        text = value.strip()
        content = _content(text) if text[:1] in ("[", "{") else None
        if content is not None:
            yield from _read(content)
        elif text:
            yield text
    elif isinstance(value, int | float):
        yield from _number(value)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _read(each)
    elif isinstance(value, Mapping):
        yield from _of_mapping(value)
    elif value is not None:
        raise ValueError(f"ground_truth holds a {type(value).__name__}, which is no answer: {reprlib.repr(value)}")


def _content(text: str) -> Any:
    """The list or mapping that a text holds as JSON or as Python prints it.

    None if it holds neither: an answer may begin with a bracket.
    """
    if text[-1] not in "]}":
        return None
    with suppress(ValueError, RecursionError):
        return json.loads(text)
    if _PRINTED_ARRAY.search(text):  # to Python this is one text
        raise ValueError(f"ground_truth is an array as numpy prints it, not JSON: {reprlib.repr(text)}")
    with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
        content = ast.literal_eval(text)
        return content if isinstance(content, list | tuple | dict) else None
    return None


def _number(value: int | float) -> Iterator[str]:
    if isinstance(value, float):
        if math.isfinite(value):  # else it is what a table has where nothing is
            yield format(Decimal(repr(value)), "f")
        return
    try:
        yield str(value)
    except ValueError:  # of Python's own, from 4300 digits
        raise ValueError("ground_truth holds a number of thousands of digits, which is no answer") from None


def _of_mapping(value: Mapping[str, Any]) -> Iterator[str | Range]:
    if not any(key in value for key in _ANSWER_KEYS):
        known = ", ".join(_ANSWER_KEYS)
        raise ValueError(f"ground_truth is a mapping of {reprlib.repr(list(value))}; answers are read from {known}")
    yield from _read(value.get("target"))
    yield from _read(value.get("wikidata"))
    if value.get("range") is not None:
        yield _range(value["range"])


def _range(value: Any) -> Range:
    with suppress(TypeError, ValueError, OverflowError):
        low, high = sorted(float(bound) for bound in value)
        if math.isfinite(low) and math.isfinite(high) and not isinstance(value, str):
            return Range(low, high)
    raise ValueError(f"ground_truth: the range must be two numbers, got {reprlib.repr(value)}")
