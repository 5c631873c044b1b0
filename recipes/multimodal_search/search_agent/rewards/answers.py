"""The answer in a trajectory's text, and the accepted ones."""

from __future__ import annotations

import ast
import json
import math
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, NamedTuple

_OPEN, _CLOSE = "<tool_response>", "</tool_response>"
_ROLE_AT_START = re.compile(r"\s*assistant\s*\n")
_ROLE = re.compile(r"^assistant[^\S\n]*\n", re.MULTILINE)
_ANSWER_TAG = re.compile(r"</?answer>")
_ANSWER_KEYS = ("target", "wikidata", "range")
_PRINTED_ARRAY = re.compile(r"""(['"])\s+\1""")


@dataclass(frozen=True)
class Reply:
    """The model's last turn."""

    answer: str | None
    """Between the last answer tags, after any thought; None where there is none, or only white space."""
    well_formed: bool
    """One answer, at the end; and a thought before it, where one is asked for."""


class Range(NamedTuple):
    """Numbers each of which is a right answer."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"any number from {self.low!r} to {self.high!r}"

    def to_json(self) -> str:
        """A text that `accepted_answers` reads."""
        return json.dumps({"range": list(self)})


def read_reply(solution: str, calls: Sequence[Mapping[str, Any]] | None, *, think: bool) -> Reply:
    """The last turn of a response that was decoded without special tokens.

    It begins after the last ``</tool_response>`` and a line that only says ``assistant``. Where the chat template has
    no such mark, after the last such line, if the record shows answers of tools or there is none.
    An opening mark after that ends it: the trajectory ended in a tool's answer, or the model wrote one itself. Tools'
    text comes before the last mark, so it can neither answer nor break a format.

    Args:
        solution: turns and tools' answers.
        calls: of the trajectory's record; None where there is none.
        think: whether a well-formed turn has a thought, between ``<think>`` (which may belong to the prompt) and
            ``</think>``.
    """
    answered = None if calls is None else sum(call["status"] != "not_executed" for call in calls)
    _, mark, turn = solution.rpartition(_CLOSE)
    if mark:
        turn = turn[role.end() :] if (role := _ROLE_AT_START.match(turn)) else turn
    elif answered != 0:
        turn = _ROLE.split(turn)[-1]
    turn, unclosed, _ = turn.partition(_OPEN)
    own_marks = answered is not None and max(solution.count(_OPEN), solution.count(_CLOSE)) > answered
    thought, closed, rest = turn.rpartition("</think>")
    if not closed and "<think>" in turn:  # it never came to an answer
        return Reply(None, False)
    answer = _last_answer(rest).strip()
    well_formed = not unclosed and not own_marks and _one_answer(turn, rest) and (not think or _one_thought(thought))
    return Reply(answer or None, well_formed)


def _last_answer(text: str) -> str:
    """What stands between the last answer tags with no other ones in between."""
    answer, opened = "", None
    for tag in _ANSWER_TAG.finditer(text):
        if tag[0] == "<answer>":
            opened = tag.end()
        elif opened is not None:
            answer, opened = text[opened : tag.start()], None
    return answer


def _one_answer(turn: str, rest: str) -> bool:
    """Whether ``rest``, the turn after its thought, ends with the turn's only answer."""
    if not turn.count("<answer>") == turn.count("</answer>") == 1:
        return False
    _, opened, answer = rest.partition("<answer>")
    answer, closed, after = answer.partition("</answer>")
    return bool(opened and closed and answer.strip()) and not after.strip()


def _one_thought(thought: str) -> bool:
    thought = thought.strip().removeprefix("<think>")
    return bool(thought.strip()) and "<think>" not in thought and "</think>" not in thought


def accepted_answers(ground_truth: Any) -> list[str | Range]:
    """The accepted answers, each once, the canonical one first.

    Args:
        ground_truth: an answer; a list, tuple or array of answers; ``{"target": [...]}``, as Search-R1 has it;
            ``{"wikidata": 324, "range": [291.6, 356.4]}``, as InfoSeek has it; or one of these as JSON in a text.

    Raises:
        ValueError: There is none, or something that is no answer.
    """
    try:
        accepted = list(dict.fromkeys(_read(ground_truth)))
    except RecursionError:
        raise ValueError("ground_truth is nested too deeply to hold answers") from None
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

    None where it holds neither: an answer may begin with a bracket.
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
