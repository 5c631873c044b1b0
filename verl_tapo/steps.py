"""Tool-use steps: what a rollout did with its tools, and which tokens did it."""

from __future__ import annotations

import math
import reprlib
import unicodedata
from array import array
from collections.abc import Hashable, Mapping, Sequence
from itertools import chain
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from verl_tapo.images import content_hash

TokenScope: TypeAlias = Literal["step", "call"]
IntArray: TypeAlias = npt.NDArray[np.int64]

MAX_DEPTH = 64
"""Deepest nesting of an argument value that is parsed or recorded; no information tool needs more [ours]."""
MAX_ITEMS = 100_000
"""Most parts that an argument value may have to be compared by content; no model writes more in one response [ours]."""
_WHOLE_NUMBERS = frozenset({torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})
_FLOAT_BITS = 1024  # of the largest finite float


class ToolStep(NamedTuple):
    """One tool-use step ``u`` of a rollout: one tool call and the assistant turn that made it.

    A turn with several (parallel) calls gives several steps that share ``turn``.
    """

    row: int
    """Row of the batch, in ``[0, B)``."""
    tool: str
    """Name of the called tool."""
    arguments: Mapping[str, Any]
    """Parsed call parameters (JSON values). Image parameters should hold an identity of the image's content."""
    turn: tuple[int, int]
    """Half-open span of the assistant turn in response tokens, within ``[0, L]``."""
    call: tuple[int, int]
    """Half-open span of the call's own tokens, inside ``turn``."""
    ok: bool = True
    """The call was executed and answered without an error."""

    def span(self, token_scope: TokenScope) -> tuple[int, int]:
        """The half-open token span this step stands for under ``token_scope``."""
        return self.call if token_scope == "call" else self.turn


class StepColumns(NamedTuple):
    """Steps as checked columns: what the vectorised code works on. S steps."""

    row: IntArray  # (S,)
    tool: tuple[str, ...]
    arguments: tuple[Mapping[str, Any], ...]
    turn: IntArray  # (S, 2)
    call: IntArray  # (S, 2)
    ok: npt.NDArray[np.bool_]  # (S,)

    def span(self, token_scope: TokenScope) -> IntArray:
        return self.call if token_scope == "call" else self.turn


def step_columns(steps: Sequence[ToolStep], batch_size: int, length: int) -> StepColumns:
    """Turns steps into columns and checks every one of them.

    Raises:
        ValueError: ``steps`` is no sequence; or naming the first step with a row outside ``[0, batch_size)``, a span
            outside ``[0, length]`` or reversed, a call outside its turn, or a field of the wrong type.
    """
    given: Any = steps
    if not isinstance(given, Sequence) or isinstance(given, str | bytes):
        raise ValueError(f"steps must be a list of ToolSteps, got {type(given).__name__}")
    if not len(steps):
        empty = np.zeros(0, np.int64)
        return StepColumns(empty, (), (), empty.reshape(0, 2), empty.reshape(0, 2), empty.astype(bool))
    try:
        rows, tools, arguments, turns, calls, oks = zip(*steps, strict=True)
        spans = list(chain.from_iterable(turns)), list(chain.from_iterable(calls))
        # array("q") takes whole numbers only, and is much faster on many small tuples than np.array.
        row, turn, call = (np.frombuffer(array("q", numbers), dtype=np.int64) for numbers in (rows, *spans))
        turn, call = turn.reshape(-1, 2), call.reshape(-1, 2)
        ok = np.array(oks)
        fine = (
            ok.dtype.kind == "b"
            and set(map(type, rows)) == set(map(type, chain(*spans))) == {int}  # True is a whole number, too
            and set(map(type, turns)) | set(map(type, calls)) == {tuple}
            and set(map(len, turns)) == set(map(len, calls)) == {2}
            and set(map(type, tools)) == {str}
            and (set(map(type, arguments)) == {dict} or all(isinstance(a, Mapping) for a in arguments))
            and bool(
                (
                    (row >= 0)
                    & (row < batch_size)
                    & (turn[:, 0] >= 0)
                    & (turn[:, 0] <= call[:, 0])
                    & (call[:, 0] <= call[:, 1])
                    & (call[:, 1] <= turn[:, 1])
                    & (turn[:, 1] <= length)
                ).all()
            )
        )
    except (TypeError, ValueError, OverflowError):
        fine = False
    if not fine:
        for number, step in enumerate(steps):
            _check_step(number, step, batch_size, length)
        # Odd but valid types (a NumPy bool, a list for a span): bring them into form and go on.
        return step_columns(
            [ToolStep(int(s.row), str(s.tool), s.arguments, _pair(s.turn), _pair(s.call), bool(s.ok)) for s in steps],
            batch_size,
            length,
        )
    return StepColumns(row, tools, arguments, turn, call, ok)


def _pair(span: Sequence[int]) -> tuple[int, int]:
    start, end = span
    return int(start), int(end)


def _is_int(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _check_step(number: int, step: Any, batch_size: int, length: int) -> None:
    def fail(why: str) -> None:
        raise ValueError(f"steps[{number}]: {why} (step: {shown(step)})")

    if not isinstance(step, ToolStep):
        fail(f"expected a ToolStep, got {type(step).__name__}")
    if not _is_int(step.row) or not 0 <= step.row < batch_size:
        fail(f"row {shown(step.row)} is outside the batch of {batch_size} rows")
    if not isinstance(step.tool, str):
        fail(f"tool must be a string, got {type(step.tool).__name__}")
    if not isinstance(step.arguments, Mapping):
        fail(f"arguments must be a mapping, got {type(step.arguments).__name__}")
    if not isinstance(step.ok, bool | np.bool_):
        fail(f"ok must be a bool, got {shown(step.ok)}")
    for name, span in (("turn", step.turn), ("call", step.call)):
        if not isinstance(span, tuple | list | np.ndarray) or len(span) != 2:
            fail(f"{name} must be a (start, end) pair, got {shown(span)}")
        start, end = span
        if not (_is_int(start) and _is_int(end)):
            fail(f"{name} must hold two integers, got {shown(span)}")
        if start > end:
            fail(f"{name} {shown(span)} is reversed")
        if start < 0 or end > length:
            fail(f"{name} {shown(span)} is outside the response of {length} tokens")
    if step.call[0] < step.turn[0] or step.call[1] > step.turn[1]:
        fail(f"call {shown(step.call)} is outside its turn {shown(step.turn)}")


def build_tool_mask(
    steps: Sequence[ToolStep],
    response_mask: torch.Tensor,
    token_scope: TokenScope = "step",
    dtype: torch.dtype = torch.int64,
) -> torch.Tensor:
    """Marks the policy tokens of each tool-use step.

    Args:
        steps: S steps, any order.
        response_mask: (B, L), 1 on tokens the policy generated.
        token_scope: ``"step"`` marks the whole assistant turn that made the call, ``"call"`` the call's tokens only.
        dtype: integer dtype of the result; a smaller one saves memory.

    Returns:
        (B, L) tensor on ``response_mask``'s device: 0 outside tool-use steps, k >= 1 on policy tokens of the row's
        k-th step (by turn start, then call start); a token in several steps takes the first.

    Raises:
        ValueError: for a mask that is no (B, L) tensor, or not 0/1 in a row with steps, an unknown ``token_scope``, a
            ``dtype`` that cannot hold the numbers, or a bad step (see `step_columns`).
    """
    if not isinstance(response_mask, torch.Tensor) or response_mask.is_nested or response_mask.dim() != 2:
        raise ValueError(f"response_mask must be a (B, L) tensor, got {described(response_mask)}")
    check_token_scope(token_scope)
    columns = step_columns(steps, *response_mask.shape)
    most = int(np.bincount(columns.row).max(initial=0))
    if not isinstance(dtype, torch.dtype) or dtype not in _WHOLE_NUMBERS or most > torch.iinfo(dtype).max:
        raise ValueError(f"dtype must be an integer dtype that holds {most}, got {shown(dtype)}")
    mask = torch.zeros(response_mask.shape, dtype=dtype, device=response_mask.device)
    spans = columns.span(token_scope)
    order = np.lexsort((columns.call[:, 0], columns.turn[:, 0], columns.row))
    rows = columns.row[order]
    first_of_row = np.searchsorted(rows, rows)
    numbers = np.arange(len(order)) - first_of_row + 1
    # Later steps first, so that a token in several steps ends up with the first of them.
    for position in range(len(order) - 1, -1, -1):
        start, end = spans[order[position]]
        mask[rows[position], start:end] = int(numbers[position])
    touched = torch.from_numpy(np.unique(rows)).to(mask.device)
    if len(touched):
        policy = response_mask[touched]
        odd = ((policy != 0) & (policy != 1)).any(1).nonzero()
        if len(odd):
            raise ValueError(f"response_mask[{int(touched[odd[0, 0]])}] must be 0/1")
        mask[touched] *= policy != 0
    return mask


def described(value: Any) -> str:
    """A value's type, and a tensor's dtype and shape, for a message."""
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    return f"{value.dtype} {'nested' if value.is_nested else tuple(value.shape)}"


def check_token_scope(token_scope: str) -> None:
    """Raises ValueError unless ``token_scope`` is ``"step"`` or ``"call"``."""
    if not isinstance(token_scope, str) or token_scope not in ("step", "call"):
        raise ValueError(f"token_scope must be 'step' or 'call', got {shown(token_scope)}")


def fold_text(text: str) -> str:
    """NFKC-normalised text, stripped, inner white space folded to single spaces."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return " ".join(text.split())


def shown(value: Any, longest: int = 200) -> str:
    """A short text of any value for a message; it never raises, and never takes long."""
    try:
        text = _REPR.repr(value)
    except Exception:  # a number of more digits than Python prints, an object whose own text fails
        text = f"<{type(value).__name__}>"
    return text if len(text) <= longest else text[: longest - 3] + "..."


class _Repr(reprlib.Repr):
    """Cuts texts and containers, at every level; of a class's own containers, too, whose own text would be whole."""

    def repr_instance(self, x: Any, level: int) -> str:
        if isinstance(x, Mapping):
            return self.repr_dict(dict(x), level)
        if isinstance(x, tuple | list):
            return self.repr_tuple(tuple(x), level)
        return super().repr_instance(x, level)


_REPR = _Repr()
_REPR.maxstring = _REPR.maxother = 120


def deeper_than(value: Any, levels: int) -> bool:
    """Whether a JSON value is nested deeper than that many levels."""
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list):
        return False
    return levels <= 0 or any(deeper_than(item, levels - 1) for item in value)


def canonical(value: Any) -> Hashable:
    """The canonical, hashable form of an argument value (the spec's ``exact`` kernel). It never raises.

    Strings are NFKC-normalised, stripped, inner white space folded; -0.0 is 0.0; integral floats equal their ints;
    mappings compare by sorted key, sequences by order, sets without order. Booleans are not numbers, and NaN equals
    NaN [ours]. Bytes, arrays, tensors and images compare by type and content, values of other types by type and text.
    A value with more than `MAX_ITEMS` parts, or one that cannot be read, equals only itself.

    The form of a container is flat, so that neither hashing nor printing it depends on how deep the value is.
    """
    if isinstance(value, str):
        return fold_text(value)
    try:
        return tuple(_parts(value)) if isinstance(value, _CONTAINERS) else _scalar(value)
    except Exception:  # foreign containers and objects may raise anything
        return (type(value).__name__, "unreadable", id(value))


_CONTAINERS = (Mapping, list, tuple, set, frozenset)


def _parts(value: Any) -> list[Hashable]:
    """A container as a flat list: each container as a head that tells its size, then its members."""
    parts: list[Hashable] = []
    waiting, expected = [value], 1
    while waiting:
        item = waiting.pop()
        if not isinstance(item, _CONTAINERS):
            parts.append(fold_text(item) if isinstance(item, str) else _scalar(item))
            continue
        expected += len(item)
        if expected > MAX_ITEMS:
            return [(type(value).__name__, f"more than {MAX_ITEMS} items", id(value))]
        if isinstance(item, Mapping):
            # Keys that fold to the same text come in an order of their own, whatever the mapping's.
            named = [(fold_text(text := _key_text(key)), text, type(key).__name__, key) for key in item]
            named.sort(key=lambda entry: entry[:3])
            parts.append(("mapping", tuple([folded for folded, *_ in named])))
            waiting += [item[key] for *_, key in reversed(named)]
        elif isinstance(item, list | tuple):
            parts.append(("sequence", len(item)))
            waiting += reversed(item)
        else:
            parts.append(("set", tuple(sorted((canonical(member) for member in item), key=repr))))
    return parts


def prints(number: float) -> bool:
    """Whether a number has a text: Python prints no whole number of thousands of digits. No float is as large."""
    return not isinstance(number, int) or number.bit_length() <= _FLOAT_BITS


def _key_text(key: Any) -> str:
    return str(key) if prints(key) else hex(key)


def _scalar(value: Any) -> Hashable:
    if value is None or isinstance(value, bool | np.bool_):
        return ("const", value if value is None else bool(value))
    if isinstance(value, np.generic) and not isinstance(value.item(), np.generic):
        value = value.item()
    if isinstance(value, int):
        return ("number", int(value) if prints(value) else hex(value))
    if isinstance(value, float):
        if math.isnan(value):
            return ("number", "nan")
        return ("number", int(value) if value.is_integer() else float(value))
    if isinstance(value, np.ndarray) and value.dtype.hasobject:
        return ("ndarray", canonical(value.tolist()))
    if isinstance(value, bytes | bytearray | torch.Tensor) or hasattr(value, "tobytes"):
        return (type(value).__name__, content_hash(value))
    return (type(value).__name__, str(value))
