"""The answer in a trajectory's text, and the accepted ones."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

_OPEN, _CLOSE = "<tool_response>", "</tool_response>"
_ROLE_AT_START = re.compile(r"\s*assistant\s*\n")
_ROLE = re.compile(r"^assistant[^\S\n]*\n", re.MULTILINE)
_ANSWER = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL)


@dataclass(frozen=True)
class Reply:
    """The model's last turn."""

    answer: str | None
    """Between the last answer tags, after any thought; None where there is none, or only white space."""
    well_formed: bool
    """One answer, at the end; and a thought before it, where one is asked for."""


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
    found = _ANSWER.findall(rest)
    answer = found[-1].strip() if found else ""
    well_formed = not unclosed and not own_marks and _one_answer(turn, rest) and (not think or _one_thought(thought))
    return Reply(answer or None, well_formed)


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


def accepted_answers(ground_truth: Any) -> list[str]:
    """The accepted answers, each once, the canonical one first.

    Args:
        ground_truth: an answer; a list, tuple or array of answers; or a JSON list of them in a string, as FVQA has it.

    Raises:
        ValueError: There is none.
    """
    given = ground_truth.tolist() if hasattr(ground_truth, "tolist") else ground_truth
    if isinstance(given, str) and given.lstrip().startswith("["):
        with suppress(ValueError, RecursionError):  # an answer may begin with a bracket
            given = json.loads(given)
    values = given if isinstance(given, list | tuple) else [given]
    texts = [str(value).strip() for value in values if value is not None]
    accepted = list(dict.fromkeys(text for text in texts if text))
    if not accepted:
        raise ValueError(f"ground_truth has no accepted answer: {reprlib.repr(ground_truth)}")
    return accepted
