"""Tool-call formats: the written form of calls in text. `verl_tapo.calls.tokens` finds them in
tokens.

What counts as a call, its name and its arguments agree with veRL's own parser of the same name
(``verl/experimental/agent_loop/tool_parser.py``, the contract). Different from it, a call that cannot be used is not
dropped but returned as `MALFORMED`. Every reader takes time linear in the text, whatever the text is.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from verl_tapo.calls.call import MALFORMED, Call
from verl_tapo.rule.arrays import IntArray
from verl_tapo.rule.values import MAX_DEPTH, deeper_than

MAX_CALL_CHARS = 65536
"""Longest text of a call that is parsed."""

Element: TypeAlias = tuple[int, int, bytes]  # byte span, and the text of the call
Tools: TypeAlias = Mapping[str, Collection[str]]  # names of the tools, and the parameters that each requires


class _BadCall(Exception):
    """A call that cannot be used. ``dropped``: veRL's parser would not return it either."""

    def __init__(self, why: str, dropped: bool = False):
        super().__init__(why)
        self.dropped = dropped


# --- Values ---------------------------------------------------------------------------------------------------------

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
    """Reads a value without a schema: as JSON if it is, else as text."""
    try:
        return _loads(text)
    except (ValueError, RecursionError):
        return text


# A head gives a name and where its value begins, the first at or after a position. Those that repeat without an end
# are not tried one by one.
_Head: TypeAlias = Callable[[str, int], "tuple[str, int] | None"]


def _named(opening: str, middle: str, text: str, at: int) -> tuple[str, int] | None:
    """The next ``opening name middle``, with the shortest name."""
    start = text.find(opening, at)
    found = re.compile(middle).search(text, start + len(opening)) if start >= 0 else None
    return (text[start + len(opening) : found.start()], found.end()) if found else None


def _tag(opening: str, text: str, at: int) -> tuple[str, int] | None:
    """Finds the next ``opening name>``, whose name is not empty and has no line break."""
    while found := _named(opening, r"[>\n]", text, at):
        if found[0] and text[found[1] - 1] == ">":
            return found
        at = found[1] - 1
    return None


def _quoted(opening: str, text: str, at: int) -> tuple[str, int] | None:
    """Finds the next ``opening name">``, whose name is not empty and has no quotation mark."""
    found = re.compile(opening + r'([^"]+)">').search(text, at)
    return (found[1], found.end()) if found else None


def _pairs(text: str, head: _Head, tail: str) -> dict[str, Any]:
    """Arguments written as ``head value tail``."""
    arguments = {}
    at = 0
    while (found := head(text, at)) and (end := text.find(tail, found[1])) >= 0:
        arguments[found[0].strip()] = _value(text[found[1] : end].strip())
        at = end + len(tail)
    return arguments


# --- Calls: the text of one to its name and arguments -----------------------------------------------------------------


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
        raise _BadCall("the call has no string 'name'", dropped=True)
    if "arguments" not in call:
        raise _BadCall("the call has no 'arguments'", dropped=True)
    return call["name"], call["arguments"]


def _read_arguments(text: str) -> tuple[str, Any]:
    """Arguments that veRL's loop reads, not its parser; those that it cannot read it answers with an error."""
    try:
        return "", _loads(text)
    except (ValueError, RecursionError):
        raise _BadCall("the arguments are not valid JSON") from None


def _read_glm(text: str) -> tuple[str, Any]:
    name, key, _ = text.partition("<arg_key>")
    # What veRL's `regex` takes for white space.
    head = partial(_named, "<arg_key>", r"</arg_key>[^\S\x1c-\x1f]*<arg_value>")
    return name.strip(), _pairs(text[len(name) :], head, "</arg_value>") if key else {}


def _read_seed(text: str) -> tuple[str, Any]:
    found = _tag("<function=", text, 0)
    end = text.find("</function>", found[1]) if found else -1
    if found is None or end < 0:
        raise _BadCall("the call has no <function=...> ... </function>", dropped=True)
    return found[0].strip(), _pairs(text[found[1] : end], partial(_tag, "<parameter="), "</parameter>")


def _read_minimax(text: str) -> tuple[str, Any]:
    found = _quoted('<invoke name="', text, 0)
    if found is None:
        raise _BadCall('the call has no <invoke name="..."> ... </invoke>', dropped=True)
    return found[0].strip(), _pairs(text[found[1] :], partial(_quoted, '<parameter name="'), "</parameter>")


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


def _read_kimi(text: str, tools: Tools | None = None) -> tuple[str, Any]:
    name, separator, raw = text.partition("<|tool_call_argument_begin|>")
    if not separator:
        raise _BadCall("the call has no <|tool_call_argument_begin|>", dropped=True)
    name = name.strip()
    arguments = _value(raw.strip())
    # As veRL: arguments that cannot be read are none, and the tool is called.
    arguments = arguments if isinstance(arguments, dict) else {}
    return _kimi_tool(name, arguments, tools) if tools else _kimi_name(name), arguments


def _kimi_name(name: str) -> str:
    """The tool in an id that should be ``functions.NAME:NUMBER`` and may lack the prefix, the dot or the colon."""
    stem = name.rstrip("0123456789")
    if stem != name and stem.endswith(":"):
        stem = stem[:-1]
    elif name.startswith("functions.") or not name.startswith("functions"):
        stem = name
    tool = stem.removeprefix("functions.")
    if tool == stem != name and stem[len("functions") :][:1].isalnum():
        tool = stem.removeprefix("functions")
    return tool or name


def _kimi_tool(name: str, arguments: Mapping[str, Any], tools: Tools) -> str:
    """Returns the tool that veRL executes: the one of that name, one whose name it contains, or one
    that takes the arguments."""
    if name in tools:
        return name
    compact = name.lower().replace("-", "_")
    within = [tool for tool in tools if tool.lower() in compact]
    fitting = [tool for tool, required in tools.items() if required and set(required) <= set(arguments)]
    return next((found[0] for found in (within, fitting) if len(found) == 1), _kimi_name(name))


def _read_deepseek(text: str) -> tuple[str, Any]:
    name, separator, text = text.partition('">')
    if not separator:
        raise _BadCall('the call has no <｜DSML｜invoke name="..."> ... </｜DSML｜invoke>', dropped=True)
    arguments: dict[str, Any] = {}
    at = 0
    head = '" string="(?:true|false)">'
    while found := _named('<｜DSML｜parameter name="', head, text, at):
        end = text.find("</｜DSML｜parameter>", found[1])
        if end < 0:
            break
        value, is_text = text[found[1] : end], text.endswith('"true">', 0, found[1])
        arguments[found[0]] = value if is_text else _value(value)
        at = end
    return name, arguments


def _read_gpt_oss(text: str) -> tuple[str, Any]:
    name, separator, arguments = text.partition(" <|constrain|>json<|message|>")
    if not separator:
        raise _BadCall(
            "it is not <|start|>assistant<|channel|>... to=functions.NAME <|constrain|>json<|message|>", dropped=True
        )
    return name, _read_arguments(arguments)[1]


_GEMMA_VALUE = re.compile(r'<\|"\|>(.*?)<\|"\|>|([^,}]*)')


def _is_word(character: str) -> bool:
    """Returns whether veRL's ``regex`` takes a character for a part of a word."""
    kind = unicodedata.category(character)
    return kind[0] in "LM" or kind in ("Nd", "Nl", "Pc") or character in "\u200c\u200d"


def _read_gemma(text: str) -> tuple[str, Any]:
    call, name, rest = text.partition("call:")
    name, brace, rest = rest.partition("{")
    if call or not brace or not name or not all(map(_is_word, name)):
        raise _BadCall("the call is not call:NAME{...}", dropped=True)
    arguments: dict[str, Any] = {}
    at = 0
    while (colon := rest.find(":", at)) >= 0:
        first = colon
        while first > at and _is_word(rest[first - 1]):
            first -= 1
        at = colon + 1
        if first < colon and (value := _GEMMA_VALUE.match(rest, at)):
            arguments[rest[first:colon]] = _bare(value[2].strip()) if value[1] is None else value[1]
            at = value.end()
    return name, arguments


def _bare(text: str) -> Any:
    """A value that Gemma writes without quotation marks."""
    known = {"true": True, "false": False, "null": None}
    if text.lower() in known:
        return known[text.lower()]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            pass
    return text


# --- Turns: the bytes of one to the texts of its calls ----------------------------------------------------------------


def _whole(block: bytes) -> list[Element]:
    """A block that is one call."""
    return [(0, len(block), block)]


def _functions(block: bytes) -> list[Element]:
    """Calls ``<function=...</function>`` of a block; the last one need not be closed."""
    found = []
    at = block.find(b"<function=")
    while at >= 0:
        start = at + len(b"<function=")
        end = block.find(b"</function>", start)
        stop = end + len(b"</function>") if end >= 0 else len(block)
        found.append((at, stop, block[start : end if end >= 0 else stop]))
        at = block.find(b"<function=", stop)
    return found


def _invokes(block: bytes) -> list[Element]:
    """Calls ``<invoke name="...">...</invoke>`` of a block, and what lies between them and looks like one."""
    found: list[Element] = []
    at = 0
    while at < len(block):
        match = re.compile(rb'<invoke name="[^"]+">').search(block, at)
        end = block.find(b"</invoke>", match.end()) if match else -1
        start = match.start() if match and end >= 0 else len(block)
        if (bad := block.find(b"<invoke", at, start)) >= 0:
            found.append((bad, start, b""))
        at = end + len(b"</invoke>") if start < len(block) else start
        if start < at:
            found.append((start, at, block[start:end]))
    return found


_DSML_INVOKE, _DSML_END = '<｜DSML｜invoke name="'.encode(), "</｜DSML｜invoke>".encode()


def _dsml_invokes(block: bytes) -> list[Element]:
    """Calls of DeepSeek's markup in a block."""
    found: list[Element] = []
    at = 0
    while (start := block.find(_DSML_INVOKE, at)) >= 0:
        name = block.find(b'">', start + len(_DSML_INVOKE))
        end = block.find(_DSML_END, name) if name >= 0 else -1
        if end < 0:
            return [*found, (start, len(block), b"")]
        at = end + len(_DSML_END)
        found.append((start, at, block[start + len(_DSML_INVOKE) : end]))
    return found


def _blocks(fmt: Format, text: bytes) -> tuple[list[Element], bool]:
    """The calls in blocks ``opening ... closing``, and whether the last block is not closed."""
    found: list[Element] = []
    if fmt.section not in text:
        return found, False
    last = text.rfind(fmt.closing)
    at = inner = 0
    while (start := text.find(fmt.opening, at)) >= 0:
        body = start + len(fmt.opening)
        if 0 <= inner < body:
            inner = text.find(fmt.inner, body)
        end = text.find(fmt.closing, max(inner, body) if inner < last else body)
        if end < 0 and not fmt.unclosed:
            return found, True
        # Where it may be closed by the turn's end, veRL's `$` leaves out one line break.
        block = text[body:end] if end >= 0 else text[body:].removesuffix(b"\n")
        at = end + len(fmt.closing) if end >= 0 else len(text)
        parts = fmt.parts(block)
        if not parts and end < 0:
            return found, True
        if len(parts) < 2:
            found.append((start, at, parts[0][2] if parts else b""))
        else:
            found += [(body + first, body + stop, part) for first, stop, part in parts]
    return found, False


_GEMMA_HEAD = re.compile(rb"call:([^{<]+)\{")


def _gemma_calls(fmt: Format, text: bytes) -> tuple[list[Element], bool]:
    found: list[Element] = []
    at = 0
    while (start := text.find(fmt.opening, at)) >= 0:
        at = body = start + len(fmt.opening)
        head = _GEMMA_HEAD.match(text, body)
        if head and all(map(_is_word, decode(head[1]))):
            end = text.find(b"}" + fmt.closing, head.end())
            if end < 0:
                return found, True
            at = end + 1 + len(fmt.closing)
            found.append((start, at, text[body:end]))
            continue
        after = text.find(fmt.opening, body)
        end = text.find(fmt.closing, body, after if after >= 0 else len(text))
        if end >= 0:
            at = end + len(fmt.closing)
            found.append((start, at, b""))
        elif after < 0:
            return found, True
    return found, False


_HARMONY_ROLE = b"<|start|>assistant"
_HARMONY = _HARMONY_ROLE + b"<|channel|>"
_HARMONY_TOOL, _HARMONY_JSON = b" to=functions.", b"<|constrain|>json<|message|>"


def _without(opening: bytes, closing: bytes, text: bytes, origin: IntArray) -> tuple[bytes, IntArray]:
    """Returns the text without what is between the two markers, and the original position of each byte."""
    kept = []
    at = 0
    while (start := text.find(opening, at)) >= 0 and (end := text.find(closing, start + len(opening))) >= 0:
        kept.append(slice(at, start))
        at = end + len(closing)
    kept.append(slice(at, len(text)))
    return b"".join([text[part] for part in kept]), np.concatenate([origin[part] for part in kept])


def _harmony_calls(fmt: Format, text: bytes) -> tuple[list[Element], bool]:
    """Calls outside of thoughts, and other messages that end like one."""
    origin: IntArray = np.arange(len(text))
    for thought in (_HARMONY + b"analysis<|message|>", b"<|channel|>analysis<|message|>"):
        text, origin = _without(thought, b"<|end|>", text, origin)
    calls: list[Element] = []
    at, unclosed = 0, False
    while (start := text.find(_HARMONY, at)) >= 0 and not unclosed:
        at = start + len(_HARMONY)
        tag = text.find(b"<", at)
        # The name has a character at least, and a space after it.
        name = text.rfind(_HARMONY_TOOL, at, tag - 2)
        if tag < 0 or name < 0 or text[tag - 1 : tag] != b" " or not text.startswith(_HARMONY_JSON, tag):
            continue
        end = text.find(fmt.closing, tag)
        unclosed = end < 0
        if not unclosed:
            at = end + len(fmt.closing)
            calls.append((start, at, text[name + len(_HARMONY_TOOL) : end]))
    found: list[Element] = []
    at = 0
    for call in [*calls, (len(text), len(text), b"")]:
        while (end := text.find(fmt.closing, at, call[0])) >= 0:
            start = text.rfind(fmt.opening, at, end)
            if start >= 0:
                start -= len(_HARMONY_ROLE) * text.endswith(_HARMONY_ROLE, at, start)
                found.append((start, end + len(fmt.closing), b""))
            at = end + len(fmt.closing)
        found.append(call)
        at = call[1]
    return [(int(origin[start]), int(origin[stop - 1]) + 1, part) for start, stop, part in found[:-1]], unclosed


class Format(NamedTuple):
    """A tool-call format. Most write blocks ``opening ... closing`` with one or more calls each."""

    opening: bytes
    closing: bytes
    read: Callable[[str], tuple[str, Any]]
    """Name and arguments of the call that is written as a text; raises `_BadCall`."""
    parts: Callable[[bytes], list[Element]] = _whole
    """The calls of a block."""
    find: Callable[[Format, bytes], tuple[list[Element], bool]] = _blocks
    """The calls of a turn, and whether the last one is not closed."""
    inner: bytes = b""
    """Stands between opening and closing."""
    section: bytes = b""
    """A marker in the turn, which well-written turns have before their calls."""
    unclosed: bool = False
    """What stands behind the last closing marker counts: a block may be closed by the turn's end,
    or a thought in which a call stands."""
    responses: tuple[bytes, ...] = (b"<tool_response>",)
    """The beginnings of a tool's answer, the preferred one first."""
    silent: tuple[str, ...] = ()
    """The tokens that veRL's parser removes before it looks for calls."""


_XML = b"<tool_call>", b"</tool_call>"
FORMATS = {
    "hermes": Format(*_XML, _read_json_call),
    "qwen3_coder": Format(*_XML, _read_qwen3_coder, _functions, unclosed=True),
    "glm": Format(*_XML, _read_glm, responses=(b"<tool_response>", b"<|observation|>")),
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
    "deepseek_v4": Format(
        "<｜DSML｜tool_calls>".encode(),
        "</｜DSML｜tool_calls>".encode(),
        _read_deepseek,
        _dsml_invokes,
        responses=(b"<tool_result>",),
        silent=("pad_token_id", "eos_token_id"),
    ),
    "gemma4": Format(
        b"<|tool_call>",
        b"<tool_call|>",
        _read_gemma,
        find=_gemma_calls,
        responses=(b"<|tool_response>",),
        silent=("pad_token_id",),
    ),
    "gpt-oss": Format(
        b"<|channel|>",
        b"<|call|>",
        _read_gpt_oss,
        find=_harmony_calls,
        section=b"<|start|>",
        unclosed=True,
        responses=(b"<|start|>functions.",),
        silent=("pad_token_id",),
    ),
}
FALLBACK = Format(b"", b"", _read_arguments)
NATIVE_FORMATS: tuple[str, ...] = tuple(FORMATS)
"""Formats that are parsed here, with exact spans: all that veRL 0.9.1 has."""


def format_for(name: str, tools: Tools | None = None) -> Format | None:
    """Returns the format of that name for calls of these tools; None if it is not one of `NATIVE_FORMATS`."""
    fmt = FORMATS.get(name)
    return fmt._replace(read=partial(_read_kimi, tools=tools)) if fmt and fmt.read is _read_kimi else fmt


def decode(data: bytes) -> str:
    """Returns the text of a call or an answer, whatever its bytes, cut to a maximal length."""
    # A character has four bytes at most: text beyond is too long to be parsed anyway.
    return data[: 4 * MAX_CALL_CHARS + 4].decode("utf-8", "replace")


def _check(text: str, name: str, arguments: Any) -> None:
    """Raises `_BadCall` for a call that was read from ``text`` but cannot be used."""
    if not isinstance(arguments, dict):
        raise _BadCall("the arguments are not a JSON object")
    if text.count("{") + text.count("[") >= MAX_DEPTH and deeper_than(arguments, MAX_DEPTH):
        raise _BadCall(f"the arguments are nested deeper than {MAX_DEPTH} levels")
    if "\\u" in text:
        try:
            (name + json.dumps(arguments, ensure_ascii=False)).encode()
        except UnicodeEncodeError:
            raise _BadCall("the call contains an unpaired surrogate") from None


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
    """Returns the calls of a turn's text, and 1 if a last opening marker begins no call, else 0."""
    found, unclosed = fmt.find(fmt, text)
    return [read_call(fmt, decode(part), start, stop) for start, stop, part in found], int(unclosed)
