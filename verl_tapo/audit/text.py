"""Tool calls in a rollout's decoded text, as veRL dumps it: without special tokens.

Turns are told apart by what the chat template leaves of them: an observation is a user's or tool's header with an
answer's marker (``\\nuser\\n<tool_response>``), up to the next assistant header. Where no header is left, the markers
themselves count; where no marker is (a template that knows no tools), a header after a call. A model that writes such
a header itself cannot be told from the template [ours].
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from verl_tapo.audit.model import Call, Span
from verl_tapo.formats import FORMATS, Format, read_text
from verl_tapo.parsing import NOT_EXECUTED_PREFIX, answer_is_error

# Before an answer's marker, and after the last answer; looked for beside the markers, which are quick to find.
_OPEN_HEADER = re.compile(r"(?:<\|im_end\|>)?\s*(?:<\|im_start\|>)?\b(?:user|tool|observation|ipython)\s+\Z")
_CLOSE_HEADER = re.compile(r"\s*(?:<\|im_end\|>)?\s*(?:<\|im_start\|>)?\bassistant[^\S\n]*(?:\n|\Z)")
_HEADER_CHARS = 64
# Where answers have no markers.
_NEXT_HEADER = re.compile(r"(?:<\|im_end\|>)?\n(?:<\|im_start\|>)?assistant(?:\n|\Z)")
_ANSWER_HEADER = re.compile(r"(?:<\|im_end\|>)?\n(?:<\|im_start\|>)?tool\n")


class TextTurns(NamedTuple):
    """A response in pieces."""

    assistant: list[Span]
    """What the policy wrote."""
    answers: list[list[Span]]
    """The answers in the observation that follows each of them, without their markers; the last may have none."""


class _Markers(NamedTuple):
    begin: re.Pattern[str]
    """What an answer begins with."""
    end: str
    """What it ends with; empty where the format has nothing for it."""


@cache
def _markers(tool_format: str) -> _Markers:
    begins = [marker.decode() for marker in FORMATS[tool_format].responses]
    ends = [begin.replace("<", "</") for begin in begins if re.fullmatch(r"<\w+>", begin)]
    return _Markers(re.compile("|".join(map(re.escape, begins))), ends[0] if ends else "")


def split_turns(text: str, tool_format: str) -> TextTurns:
    """Tells the policy's turns from what the tools answered."""
    markers = _markers(tool_format)
    begins = [found.start() for found in markers.begin.finditer(text)]
    heads = {begin: head for begin in begins if (head := _header_before(text, begin)) is not None}
    turns = TextTurns([], [])
    if not begins:
        return _split_by_headers(text, FORMATS[tool_format].closing.decode())
    at = 0
    for begin in begins:
        if begin < at or (heads and begin not in heads):
            continue
        turns.assistant.append((at, heads.get(begin, begin)))
        stop, at = _observation_end(text, begin, markers, bool(heads))
        turns.answers.append(_answers(text, begin, stop, markers))
    if at < len(text):
        turns.assistant.append((at, len(text)))
    return turns


def _split_by_headers(text: str, call_end: str) -> TextTurns:
    """The turns where answers have no markers: what stands between a header after a call and the assistant's."""
    turns = TextTurns([], [])
    at = 0
    after_call = _header_after(call_end)
    while (found := after_call.search(text, at)) is not None:
        turns.assistant.append((at, found.start() + len(call_end)))
        close = _NEXT_HEADER.search(text, found.end())
        stop, at = (close.start(), close.end()) if close else (len(text), len(text))
        limits = [found.end()]
        for again in _ANSWER_HEADER.finditer(text, found.end(), stop):
            limits += [again.start(), again.end()]
        limits.append(stop)
        turns.answers.append(list(zip(limits[::2], limits[1::2], strict=True)))
    if at < len(text):
        turns.assistant.append((at, len(text)))
    return turns


@cache
def _header_after(call_end: str) -> re.Pattern[str]:
    return re.compile(
        rf"{re.escape(call_end)}(?:<\|im_end\|>)?\s*(?:<\|im_start\|>)?(?:user|tool|observation|ipython)\n"
    )


def _header_before(text: str, place: int) -> int | None:
    """Where a user's or tool's header that ends at ``place`` begins."""
    first = max(0, place - _HEADER_CHARS)
    found = _OPEN_HEADER.search(text[first:place])
    return first + found.start() if found else None


def _observation_end(text: str, begin: int, markers: _Markers, headers: bool) -> tuple[int, int]:
    """Where the last answer of an observation ends, and where the next turn begins."""
    at = begin
    while (end := text.find(markers.end, at)) >= 0 and markers.end:
        at = end + len(markers.end)
        header = _CLOSE_HEADER.match(text, at)
        if header:
            return at, header.end()
        if not headers and markers.begin.match(text, _skip_blank(text, at)) is None:
            return at, at
    if not markers.end and (header := _CLOSE_HEADER.search(text, begin)):
        return header.start(), header.end()
    return len(text), len(text)


def _skip_blank(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def _answers(text: str, begin: int, stop: int, markers: _Markers) -> list[Span]:
    found = [match.span() for match in markers.begin.finditer(text, begin, stop)]
    limits = [*(first for first, _ in found[1:]), stop]
    spans = []
    for (_, start), limit in zip(found, limits, strict=True):
        end = text.rfind(markers.end, start, limit) if markers.end else -1
        spans.append((start, end if end >= 0 else limit))
    return spans


class TextCalls(NamedTuple):
    """What a response's text holds."""

    calls: list[Call]
    size: int
    """Characters the policy wrote."""
    unclosed: int
    """Turns that break off within a call."""


def find_calls(text: str, tool_format: str, error_markers: Iterable[str] = ()) -> TextCalls:
    """The tool calls of a response, in order, with their answers; `Call.compared` is still the arguments as written.

    A call is ``ok`` where it could be parsed, is answered, and the answer is no error; calls and answers belong
    together as in `verl_tapo.parsing.parse_steps`.

    Args:
        text: a decoded response.
        tool_format: one of `verl_tapo.formats.NATIVE_FORMATS`.
        error_markers: see `verl_tapo.parsing.answer_is_error`.
    """
    turns = split_turns(text, tool_format)
    fmt = FORMATS[tool_format]
    calls: list[Call] = []
    unclosed = 0
    for number, (start, end) in enumerate(turns.assistant):
        answers = turns.answers[number] if number < len(turns.answers) else []
        found, open_ended = _turn_calls(fmt, text[start:end])
        unclosed += open_ended
        all_answered = len(answers) == len(found)
        taken = 0
        for tool, arguments, (first, last), error, dropped in found:
            result = None
            if taken < len(answers) and (all_answered or not dropped):
                result = text[slice(*answers[taken])].strip()
                taken += 1
            status = _status(error, result, error_markers)
            span, call_span = (start, end), (start + first, start + last)
            size, call_size = end - start, last - first
            ok = status == "ok"
            calls.append(Call(tool, arguments, arguments, number, ok, status, size, call_size, span, call_span, result))
    return TextCalls(calls, sum(end - start for start, end in turns.assistant), unclosed)


def _status(error: str | None, result: str | None, error_markers: Iterable[str]) -> str:
    if error is not None:
        return "malformed"
    if result is None:
        return "unanswered"
    if result.startswith(NOT_EXECUTED_PREFIX):
        return "not_executed"
    return "error" if answer_is_error(result, error_markers) else "ok"


def _turn_calls(fmt: Format, text: str) -> tuple[list[tuple[str, dict[str, Any], Span, str | None, bool]], int]:
    data = text.encode("utf-8", "surrogatepass")
    found, unclosed = read_text(fmt, data)
    places = [place for call in found for place in (call.start, call.end)]
    if len(data) > len(text):  # from bytes to characters
        pieces = [len(data[first:last].decode("utf-8", "surrogatepass")) for first, last in pairwise([0, *places])]
        places = list(accumulate(pieces))
    return [
        (call.tool, call.arguments, (places[2 * k], places[2 * k + 1]), call.error, call.dropped)
        for k, call in enumerate(found)
    ], unclosed
