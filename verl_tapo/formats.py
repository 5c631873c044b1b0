"""Tool-call formats: how calls are written, in text. `verl_tapo.parsing` finds them in tokens.

What counts as a call, its name and its arguments agree with veRL's own parser of the same name
(``verl/experimental/agent_loop/tool_parser.py``, the contract). Different from it, a call that cannot be used is not
dropped but returned as `MALFORMED`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from verl_tapo.steps import MAX_DEPTH

MALFORMED = "(malformed)"
"""Tool name of a call that could not be parsed."""
MAX_CALL_CHARS = 65536
"""Longest text of a call that is parsed."""

Element: TypeAlias = tuple[int, int, str]  # byte span within a block, and the text of the call


class _BadCall(Exception):
    """A call that cannot be used. ``dropped``: veRL's parser would not return it either."""

    def __init__(self, why: str, dropped: bool = False):
        super().__init__(why)
        self.dropped = dropped


class Call(NamedTuple):
    """One call, with its span in bytes or tokens, why it is malformed, if it is, and whether veRL's parser drops it."""

    tool: str
    arguments: dict[str, Any]
    start: int
    end: int
    error: str | None
    dropped: bool


_scan: Callable[[str, int], tuple[Any, int]] = vars(json.JSONDecoder())["scan_once"]


def _loads(text: str) -> Any:
    """``json.loads``, less its overhead on the small texts met here."""
    stripped = text.strip(" \t\n\r")
    try:
        value, end = _scan(stripped, 0)
        if end == len(stripped):
            return value
    except (ValueError, StopIteration):
        pass
    return json.loads(text)  # for its error message


def _value(text: str) -> Any:
    """A value without a schema: JSON where it is, else the text."""
    try:
        return _loads(text)
    except (ValueError, RecursionError):
        return text


def _read_json_call(text: str) -> tuple[str, Any]:
    try:
        call = _loads(text)
    except RecursionError:
        raise _BadCall("the call is nested too deeply", dropped=True) from None
    except ValueError as error:
        raise _BadCall(f"the call is not valid JSON: {str(error)[:200]}", dropped=True) from None
    if not isinstance(call, dict):
        raise _BadCall("the call is not a JSON object", dropped=True)
    if not isinstance(call.get("name"), str):
        raise _BadCall("the call has no 'name' that is a string", dropped=True)
    if "arguments" not in call:
        raise _BadCall("the call has no 'arguments'", dropped=True)
    return call["name"], call["arguments"]


def _read_arguments(text: str) -> tuple[str, Any]:
    try:
        return "", _loads(text)
    except (ValueError, RecursionError):
        raise _BadCall("the arguments are not valid JSON") from None


# Names and keys are bounded (veRL's are not): without a bound, repeated markers cost quadratic time.
_GLM_PAIR = re.compile(r"<arg_key>(.{0,256}?)</arg_key>[^\S\x1c-\x1f]*<arg_value>", re.DOTALL)
_SEED_FUNCTION = re.compile(r"<function=([^>\n]{1,256})>")
_SEED_PARAMETER = re.compile(r"<parameter=([^>\n]{1,256})>")
_MINIMAX_INVOKE = re.compile(rb'<invoke name="[^"]{1,256}">')
_MINIMAX_PARAMETER = re.compile(r'<parameter name="([^"]{1,256})">')
_KIMI_NAME = re.compile(r"functions\.(.+):\d+", re.DOTALL)


def _pairs(text: str, head: re.Pattern[str], tail: str) -> dict[str, Any]:
    """Arguments written as ``head value tail``, the name being the head's group."""
    arguments = {}
    at = 0
    while (match := head.search(text, at)) and (end := text.find(tail, match.end())) >= 0:
        arguments[match[1].strip()] = _value(text[match.end() : end].strip())
        at = end + len(tail)
    return arguments


def _read_glm(text: str) -> tuple[str, Any]:
    first = text.find("<arg_key>")
    if first < 0:
        return text.strip(), {}
    return text[:first].strip(), _pairs(text[first:], _GLM_PAIR, "</arg_value>")


def _read_seed(text: str) -> tuple[str, Any]:
    match = _SEED_FUNCTION.search(text)
    end = text.find("</function>", match.end()) if match else -1
    if match is None or end < 0:
        raise _BadCall("the call has no <function=...> ... </function>", dropped=True)
    return match[1].strip(), _pairs(text[match.end() : end], _SEED_PARAMETER, "</parameter>")


def _read_minimax(text: str) -> tuple[str, Any]:
    match = re.match(r'<invoke name="([^"]+)">', text)
    if match is None:
        raise _BadCall('the call has no <invoke name="..."> ... </invoke>', dropped=True)
    return match[1].strip(), _pairs(text[match.end() :], _MINIMAX_PARAMETER, "</parameter>")


def _read_qwen3_coder(text: str) -> tuple[str, Any]:
    name, separator, rest = text.partition(">")
    if not separator:
        raise _BadCall("the call has no <function=...>", dropped=True)
    arguments = {}
    at = rest.find("<parameter=")
    while at >= 0:
        start = at + len("<parameter=")
        end = rest.find("</parameter>", start)
        # Not closed: up to the end, where veRL's `$` leaves out one line break.
        key, separator, value = (rest[start:end] if end >= 0 else rest[start:].removesuffix("\n")).partition(">")
        if separator:
            value = value.removeprefix("\n").removesuffix("\n")
            arguments[key] = None if value.lower() == "null" else _value(value)
        at = rest.find("<parameter=", end) if end >= 0 else -1
    return name, arguments


def _read_kimi(text: str) -> tuple[str, Any]:
    name, separator, raw = text.partition("<|tool_call_argument_begin|>")
    if not separator:
        raise _BadCall("the call has no <|tool_call_argument_begin|>", dropped=True)
    name = name.strip()
    # Kimi calls tools `functions.NAME:NUMBER`; veRL finds the tool whose name that contains.
    match = _KIMI_NAME.fullmatch(name)
    arguments = _value(raw.strip())
    # As veRL: arguments that cannot be read are none, and the tool is called.
    return match[1] if match else name, arguments if isinstance(arguments, dict) else {}


def _whole(block: bytes) -> list[Element]:
    """A block that is one call."""
    return [(0, len(block), decode(block))]


def _functions(block: bytes) -> list[Element]:
    """Calls ``<function=...</function>`` of a block; the last one need not be closed."""
    found = []
    at = block.find(b"<function=")
    while at >= 0:
        start = at + len(b"<function=")
        end = block.find(b"</function>", start)
        stop = end + len(b"</function>") if end >= 0 else len(block)
        found.append((at, stop, decode(block[start : end if end >= 0 else stop])))
        at = block.find(b"<function=", stop)
    return found


def _invokes(block: bytes) -> list[Element]:
    """Calls ``<invoke name="...">...</invoke>`` of a block, and what lies between them and looks like one."""
    found = []
    at = 0
    while at < len(block):
        match = _MINIMAX_INVOKE.search(block, at)
        end = block.find(b"</invoke>", match.end()) if match else -1
        start = match.start() if match and end >= 0 else len(block)
        if (bad := block.find(b"<invoke", at, start)) >= 0:
            found.append((bad, start, ""))
        at = end + len(b"</invoke>") if start < len(block) else start
        if start < at:
            found.append((start, at, decode(block[start:end])))
    return found


class Format(NamedTuple):
    """A tool-call format: blocks ``opening ... (inner ...) closing`` with one or more calls each."""

    opening: bytes
    closing: bytes
    read: Callable[[str], tuple[str, Any]]
    elements: Callable[[bytes], list[Element]] = _whole
    inner: bytes = b""
    """Must stand between opening and closing."""
    section: bytes = b""
    """Must stand somewhere in the turn."""
    unclosed: bool = False
    """A block may be closed by the turn's end."""
    responses: tuple[bytes, ...] = (b"<tool_response>",)
    """What an answer of a tool begins with, the preferred one first; two at most."""

    @property
    def plain(self) -> bool:
        """Whether every block is one call, from its opening to its closing marker."""
        return self.elements is _whole and not (self.unclosed or self.section or self.inner)


FORMATS = {
    "hermes": Format(b"<tool_call>", b"</tool_call>", _read_json_call),
    "qwen3_coder": Format(b"<tool_call>", b"</tool_call>", _read_qwen3_coder, _functions, unclosed=True),
    "glm": Format(b"<tool_call>", b"</tool_call>", _read_glm, responses=(b"<tool_response>", b"<|observation|>")),
    "seed": Format(
        b"<seed:tool_call>", b"</seed:tool_call>", _read_seed, responses=(b"<seed:bos>tool", b"<tool_response>")
    ),
    "minimax": Format(
        b"<minimax:tool_call>", b"</minimax:tool_call>", _read_minimax, _invokes, responses=(b"<response>",)
    ),
    "kimi": Format(
        b"<|tool_call_begin|>",
        b"<|tool_call_end|>",
        _read_kimi,
        inner=b"<|tool_call_argument_begin|>",
        section=b"<|tool_calls_section_begin|>",
        responses=(b"## Return of",),
    ),
}
FALLBACK = Format(b"", b"", _read_arguments)
NATIVE_FORMATS: tuple[str, ...] = tuple(FORMATS)
"""Formats that are parsed here, with exact spans."""


def decode(data: bytes) -> str:
    """The text of a call or an answer, whatever the bytes; cut where it is too long."""
    # A character has four bytes at most: text beyond is too long to be parsed anyway.
    return data[: 4 * MAX_CALL_CHARS + 4].decode("utf-8", "replace")


def _deeper_than(value: Any, levels: int) -> bool:
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list):
        return False
    return levels <= 0 or any(_deeper_than(item, levels - 1) for item in value)


def _check(text: str, name: str, arguments: Any) -> None:
    """Raises `_BadCall` for a call that was read from ``text`` but cannot be used."""
    if not isinstance(arguments, dict):
        raise _BadCall("the arguments are not a JSON object")
    if text.count("{") + text.count("[") >= MAX_DEPTH and _deeper_than(arguments, MAX_DEPTH):
        raise _BadCall(f"the arguments are nested deeper than {MAX_DEPTH} levels")
    if "\\u" in text:
        try:
            (name + json.dumps(arguments, ensure_ascii=False)).encode()
        except UnicodeEncodeError:
            raise _BadCall("the call holds half a surrogate pair", dropped=True) from None


def read_call(fmt: Format, text: str, start: int, end: int) -> Call:
    """The call written as ``text``, with the span given."""
    try:
        if len(text) > MAX_CALL_CHARS:
            raise _BadCall(f"the call is longer than {MAX_CALL_CHARS} characters")
        name, arguments = fmt.read(text)
        _check(text, name, arguments)
    except _BadCall as bad:
        return Call(MALFORMED, {}, start, end, str(bad), bad.dropped)
    return Call(name, arguments, start, end, None, False)


def read_text(fmt: Format, text: bytes) -> tuple[list[Call], int]:
    """The calls of a turn's text, and 1 where a last opening marker begins no call, else 0."""
    calls: list[Call] = []
    if fmt.section and fmt.section not in text:
        return calls, 0
    opening, closing = fmt.opening, fmt.closing
    at = 0
    while (start := text.find(opening, at)) >= 0:
        body = start + len(opening)
        end = -1
        if fmt.inner and (inner := text.find(fmt.inner, body)) >= 0:
            end = text.find(closing, inner + len(fmt.inner))
        if end < 0:
            end = text.find(closing, body)
        closed = end >= 0
        if not closed and not fmt.unclosed:
            return calls, 1
        block = text[body:end] if closed else text[body:].removesuffix(b"\n")
        at = end + len(closing) if closed else len(text)
        elements = fmt.elements(block)
        if not elements and not closed:
            return calls, 1
        if len(elements) < 2:
            calls.append(read_call(fmt, elements[0][2] if elements else "", start, at))
        else:
            calls += [read_call(fmt, part, body + first, body + last) for first, last, part in elements]
    return calls, 0
