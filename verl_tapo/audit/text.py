"""Tool calls in a rollout's decoded text, as veRL dumps it: without special tokens.

Turns are told apart by what the chat template leaves of them: an observation is a user's or tool's header with an
answer's marker (``\\nuser\\n<tool_response>``), up to the next assistant header. Where no header is left, the markers
themselves count, right behind a call; where no marker is (a template that knows no tools), a header after a call. The
markers are those of the format or of any template that is known here: which of them a call is answered with decides. A
model that writes such a header itself cannot be told from the template [ours]. Where nothing of all that is left,
`TextCalls.unclear` says so.

Calls and answers then belong together as in training. A test compares both on rollouts of real tokenizers.

Reading takes time in proportion to the text, whatever it holds: no expression here has two repetitions that can share
a run of white space, nor is tried again over the same run.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from verl_tapo.audit.model import Call, Span
from verl_tapo.calls.formats import FORMATS, Format, read_text
from verl_tapo.calls.limits import NOT_EXECUTED_PREFIX
from verl_tapo.calls.parsing import ANSWER_HEADINGS, KNOWN_ANSWERS, AnswerMarks, answer_is_error

# The special tokens of a message, for dumps that kept them: its end, what its role stands between.
_END = r"(?:<\|im_end\|>|<\|eot_id\|>|<\|eom_id\|>|<end_of_turn>|<seed:eos>)"
_BEGIN = r"(?:<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|<seed:bos>|<\|im_(?:user|system|assistant)\|>)"
_ROLE_END = r"(?:<\|end_header_id\|>|<\|im_middle\|>)"
_ANSWERER = r"(?:user|tool|observation|ipython)"
_POLICY = rf"(?:assistant|model)(?:{_ROLE_END}\n?|[^\S\n]*(?:\n|\Z))"

# Before an answer's marker, and after the last answer; looked for beside the markers, which are quick to find.
_OPEN_HEADER = re.compile(rf"{_END}?\s*{_BEGIN}?\b{_ANSWERER}(?:{_ROLE_END}\s*|\s+)\Z")
_CLOSE_HEADER = re.compile(rf"\s*(?:{_END}\s*)?{_BEGIN}?\b{_POLICY}")
_HEADER_CHARS = 64
_CALL_END_CHARS = 160  # of a call's end, and special tokens behind it
# After an answer whose format has no marker for its end.
_FREE_HEADER = re.compile(rf"(?:{_END}\s*{_BEGIN}?|{_BEGIN}|(?<=\n)){_POLICY}")
_TAG = re.compile(r"<[^<>\n]{1,40}>")

# Where answers have no markers. ChatML and Gemma give a header a line of its own.
_LINE_ANSWER = re.compile(rf"{_END}?\n{_BEGIN}?tool\n")
# Llama puts a header right behind the message before, and an empty line after it: "It is Parisassistant\n\n". Where
# the word belongs to a sentence, a blank, a hyphen or the like stands before it.
_GLUED = rf"{_END}?{_BEGIN}?(?<![ \t\u00a0(\[#/-])"
_GLUED_HEADER = re.compile(rf"{_END}?\n{_BEGIN}?assistant(?:\n|\Z)|{_GLUED}assistant{_ROLE_END}?(?:\n\n|\Z)")
_GLUED_ANSWER = re.compile(rf"{_GLUED}(?:tool|ipython){_ROLE_END}?\n\n")
_GLUED_END = re.compile(rf"{_GLUED_ANSWER.pattern}\Z")

_SPECIAL = r"<(?:\|[^|<>\s]{1,40}\||｜[^｜<>\s]{1,40}｜)>"
# What ends an answer's text, after such a heading.
_TAILS = {'<|message|>"': '"', '{value:<|"|>': '<|"|>}'}
_DEEPSEEK_V3 = AnswerMarks("<｜tool▁output▁begin｜>".encode(), ending="<｜tool▁output▁end｜>".encode())


class TextTurns(NamedTuple):
    """A response in pieces."""

    assistant: list[Span]
    """What the policy wrote."""
    answers: list[list[Span]]
    """The answers in the observation that follows each of them, without their markers; the last may have none."""


class _Markers(NamedTuple):
    """How the answers of a text are written."""

    begin: str
    """What an answer begins with."""
    heading: str
    """What ends the heading between that and the answer's text; empty where there is none."""
    end: str
    """What an answer ends with; empty where there is nothing for it."""


@cache
def _kinds(tool_format: str) -> tuple[_Markers, ...]:
    """All ways in which answers may be written, the format's own first: the chat template decides, as in training."""
    own = [AnswerMarks(marker, ANSWER_HEADINGS.get(marker, b"")) for marker in FORMATS[tool_format].responses]
    known = {kind.marker: kind for kind in (*KNOWN_ANSWERS, _DEEPSEEK_V3)}
    kinds = [known.get(kind.marker, kind) for kind in own] + list(known.values())
    found: dict[str, _Markers] = {}
    for marker, heading, ending in kinds:
        begin, end = marker.decode(), ending.decode()
        if re.fullmatch(r"<\w+>", begin):
            end = begin.replace("<", "</")
        found.setdefault(begin, _Markers(begin, heading.decode(), end))
    return tuple(found.values())


def split_turns(text: str, tool_format: str) -> TextTurns:
    """Tells the policy's turns from what the tools answered."""
    found = _answer_markers(text, tool_format)
    if found is None:
        return _split_by_headers(text, FORMATS[tool_format])
    markers, begins, heads = found
    ends = _ends(text, begins[0], markers)
    turns = TextTurns([], [])
    at = 0
    for begin in begins:
        if begin < at or (heads and begin not in heads):
            continue
        turns.assistant.append((at, heads.get(begin, begin)))
        stop, at = _observation_end(text, begin, begins, heads, ends)
        turns.answers.append(_answers(text, begin, stop, markers))
    if at < len(text):
        turns.assistant.append((at, len(text)))
    return turns


def _answer_markers(text: str, tool_format: str) -> tuple[_Markers, list[int], dict[int, int]] | None:
    """How the text's answers are written, where that stands, and where the headers before it begin.

    What counts stands right behind a call, or at least behind a header: other texts only quote it. None where answers
    have no markers.
    """
    behind_call = _behind_call(FORMATS[tool_format].closing.decode())
    with_headers = None
    for markers in _kinds(tool_format):
        begins = [found.start() for found in re.finditer(re.escape(markers.begin), text)]
        heads = {begin: head for begin in begins if (head := _header_before(text, begin)) is not None}
        found = markers, begins, heads
        for begin in begins:
            head = heads.get(begin, begin)
            if behind_call.search(text[max(0, head - _CALL_END_CHARS) : head]):
                return found
        if heads:
            with_headers = with_headers or found
    return with_headers


@cache
def _behind_call(call_end: str) -> re.Pattern[str]:
    return re.compile(rf"{re.escape(call_end)}(?:\s|{_SPECIAL})*\Z")


def _split_by_headers(text: str, fmt: Format) -> TextTurns:
    """The turns where answers have no markers: what stands between a header after a call and the assistant's."""
    turns = TextTurns([], [])
    at = 0
    call_end = fmt.closing.decode()
    after_call = _header_after(call_end)
    role = "model" if _line_header("model").search(text) and not _GLUED_HEADER.search(text) else "assistant"
    while (found := after_call.search(text, at)) is not None:
        turn, begin = (at, found.start() + len(call_end)), found.end()
        turns.assistant.append(turn)
        # A header on a line of its own has a line break before it, too.
        glued = role == "assistant" and text.startswith("\n", begin) and not found["space"]
        close = (_GLUED_HEADER if glued else _line_header(role)).search(text, begin)
        begin += glued
        # Behind an empty answer the header before it ends where the assistant's seems to begin.
        stop, at = (max(begin, close.start()), close.end()) if close else (len(text), len(text))
        stop += glued and _GLUED_END.search(text[max(begin, stop - _HEADER_CHARS) : stop + 1]) is not None
        limits = [begin]
        for again in (_GLUED_ANSWER if glued else _LINE_ANSWER).finditer(text, begin, stop):
            limits += [again.start(), again.end()]
        # A sentence may end with "tool": behind any text it is a header where there is one for each call.
        if glued and len(limits) // 2 + 1 not in _answered(fmt, text[slice(*turn)]):
            limits = [begin]
        limits.append(stop)
        turns.answers.append(list(zip(limits[::2], limits[1::2], strict=True)))
    if at < len(text):
        turns.assistant.append((at, len(text)))
    return turns


def _answered(fmt: Format, turn: str) -> tuple[int, int]:
    """How many answers a turn's calls may have: one each, or one for each that veRL does not drop."""
    calls = read_text(fmt, turn.encode("utf-8", "surrogatepass"))[0]
    return len(calls), sum(not call.dropped for call in calls)


@cache
def _line_header(role: str) -> re.Pattern[str]:
    """The policy's header on a line of its own, as ChatML and Gemma have it."""
    return re.compile(rf"{_END}?\n{_BEGIN}?{role}(?:\n|\Z)")


@cache
def _header_after(call_end: str) -> re.Pattern[str]:
    section_end = r"(?:<\|tool_calls_section_end\|>)?"
    return re.compile(rf"{re.escape(call_end)}{section_end}{_END}?(?P<space>\s*){_BEGIN}?{_ANSWERER}{_ROLE_END}?\n")


def _header_before(text: str, place: int) -> int | None:
    """Where a user's or tool's header that ends at ``place`` begins."""
    first = max(0, place - _HEADER_CHARS)
    found = _OPEN_HEADER.search(text[first:place])
    return first + found.start() if found else None


class _Ends(NamedTuple):
    """Where answers end, and where an assistant's header ends an observation; both rising."""

    answers: list[int]
    """Behind the end markers; empty where the format has none."""
    headers: list[Span]
    """From the end of the last answer to the beginning of the next turn."""


def _ends(text: str, begin: int, markers: _Markers) -> _Ends:
    """All of them from ``begin`` on, found in one pass."""
    answers, headers = [], []
    if markers.end:
        at = begin
        while (end := text.find(markers.end, at)) >= 0:
            at = end + len(markers.end)
            answers.append(at)
            if (header := _CLOSE_HEADER.match(text, at)) is not None:
                headers.append((at, header.end()))
    else:
        for header in _FREE_HEADER.finditer(text, begin):
            stop = header.start()
            while stop > begin and text[stop - 1].isspace():
                stop -= 1
            headers.append((stop, header.end()))
    return _Ends(answers, headers)


def _observation_end(
    text: str, begin: int, begins: Sequence[int], heads: Mapping[int, int], ends: _Ends
) -> tuple[int, int]:
    """Where the last answer of an observation ends, and where the next turn begins."""
    closing = bisect_left(ends.headers, (begin,))
    if closing < len(ends.headers) and (heads or not ends.answers):
        return ends.headers[closing]
    for number in range(bisect_left(ends.answers, begin), len(ends.answers)):
        at = ends.answers[number]
        if closing < len(ends.headers) and ends.headers[closing][0] == at:
            return ends.headers[closing]
        following = bisect_left(begins, at)
        if following < len(begins) and _skip_space(text, at) >= heads.get(begins[following], begins[following]):
            continue  # another answer of the same observation
        if heads and _is_header_begun(text[at : at + _HEADER_CHARS]):
            break
        return at, at
    return len(text), len(text)


def _is_header_begun(rest: str) -> bool:
    """Whether a text breaks off within the assistant's header."""
    return len(rest) < _HEADER_CHARS and "assistant".startswith(_TAG.sub("", rest).strip())


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def _answers(text: str, begin: int, stop: int, markers: _Markers) -> list[Span]:
    """The texts of an observation's answers. One begins where another has ended; other markers are quotes."""
    found, last, ended = [begin], begin, False
    while (place := text.find(markers.begin, last + 1, stop)) >= 0:
        ended = ended or text.find(markers.end, last, place) >= 0
        last = place
        if ended:
            found.append(place)
            ended = False
    spans = []
    for first, limit in zip(found, [*found[1:], stop], strict=True):
        start = first + len(markers.begin)
        end = text.rfind(markers.end, start, limit) if markers.end else -1
        end = end if end >= 0 else limit
        if markers.heading and (heading := text.find(markers.heading, start, end)) >= 0:
            start = heading + len(markers.heading)
            end -= len(tail) if text.endswith(tail := _TAILS.get(markers.heading, ""), start, end) else 0
        spans.append((start, end))
    return spans


class TextCalls(NamedTuple):
    """What a response's text holds."""

    calls: list[Call]
    size: int
    """Characters the policy wrote."""
    unclosed: int
    """Turns that break off within a call."""
    unclear: bool
    """Whether the turns cannot be told apart: policy text and answers follow each other with nothing between."""


def find_calls(text: str, tool_format: str, error_markers: Iterable[str] = ()) -> TextCalls:
    """The tool calls of a response, in order, with their answers; `Call.compared` is still the arguments as written.

    A call is ``ok`` where it could be parsed, is answered, and the answer is no error; calls and answers belong
    together as in `verl_tapo.calls.parsing.parse_steps`.

    Args:
        text: a decoded response.
        tool_format: one of `verl_tapo.calls.formats.NATIVE_FORMATS`.
        error_markers: see `verl_tapo.calls.parsing.answer_is_error`.
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
    size = sum(end - start for start, end in turns.assistant)
    return TextCalls(calls, size, unclosed, _is_unclear(text, turns, calls, fmt))


def _is_unclear(text: str, turns: TextTurns, calls: Sequence[Call], fmt: Format) -> bool:
    if turns.answers:
        # An observation to the end of the text with calls in it: what ends it was not recognised.
        return len(turns.answers) == len(turns.assistant) and fmt.opening.decode() in text[turns.answers[-1][0][0] :]
    # A rollout may end with a call, and calls may follow each other; no other text stands behind a call in its turn.
    spans = [call.call_span for call in calls if call.call_span]
    pieces = zip((end for _, end in spans), [*(start for start, _ in spans[1:]), len(text)], strict=False)
    return any(_TAG.sub("", text[end:start]).strip() for end, start in pieces)


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
