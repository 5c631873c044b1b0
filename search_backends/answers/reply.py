"""The answer in a trajectory's text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_OPEN, _CLOSE = "<tool_response>", "</tool_response>"
_ROLE_AT_START = re.compile(r"\s*assistant\s*\n")
_ROLE = re.compile(r"^assistant[^\S\n]*\n", re.MULTILINE)
_ANSWER_TAG = re.compile(r"</?answer>")


@dataclass(frozen=True)
class Reply:
    """The model's last turn."""

    answer: str | None
    """The text between the last answer tags after any thought; None if it is missing or blank."""
    well_formed: bool
    """True if the reply ends with its only answer, after a thought if one is required."""


def read_reply(solution: str, calls: Sequence[Mapping[str, Any]] | None, *, think: bool) -> Reply:
    """The last turn of a response that was decoded without special tokens.

    The turn begins after the last ``</tool_response>`` and a line that only says ``assistant``.
    Without such a mark it starts after the last ``assistant`` line; if the record shows no answered
    call, the whole response is the turn. A later opening mark ends it: the trajectory ended in a
    tool's answer, or the model wrote one itself. The tools' text comes before the last mark, so it
    can neither answer nor break a format.

    Args:
        solution: turns and tools' answers.
        calls: the calls in the trajectory's record; None without a record.
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
    """Returns the text between the last answer tags that contain no other ones."""
    answer, opened = "", None
    for tag in _ANSWER_TAG.finditer(text):
        if tag[0] == "<answer>":
            opened = tag.end()
        elif opened is not None:
            answer, opened = text[opened : tag.start()], None
    return answer


def _one_answer(turn: str, rest: str) -> bool:
    """Returns whether ``rest``, the turn after its thought, ends with the turn's only answer."""
    if not turn.count("<answer>") == turn.count("</answer>") == 1:
        return False
    _, opened, answer = rest.partition("<answer>")
    answer, closed, after = answer.partition("</answer>")
    return bool(opened and closed and answer.strip()) and not after.strip()


def _one_thought(thought: str) -> bool:
    thought = thought.strip().removeprefix("<think>")
    return bool(thought.strip()) and "<think>" not in thought and "</think>" not in thought
