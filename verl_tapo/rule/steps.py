"""Tool-use steps: a rollout's tool calls, and the tokens that made them."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import torch

from verl_tapo.rule.arrays import BoolArray, IntArray
from verl_tapo.rule.checks import choice
from verl_tapo.rule.values import shown

TokenScope: TypeAlias = Literal["step", "call"]
UNKNOWN, UNSEEN, SEEN = -1, 0, 1
SIGHTS = {None: UNKNOWN, False: UNSEEN, True: SEEN}
"""`ToolStep.seen` as a number."""
_WHOLE_NUMBERS = frozenset({torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})


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
    seen: bool | None = None
    """True if the whole answer of the tool held an accepted answer of the prompt; None if that is unknown."""

    def span(self, token_scope: TokenScope) -> tuple[int, int]:
        """The half-open token span that this step covers under ``token_scope``."""
        return self.call if token_scope == "call" else self.turn


class StepColumns(NamedTuple):
    """Checked columns of S steps, the input of the vectorised code."""

    row: IntArray  # (S,)
    tool: tuple[str, ...]
    arguments: tuple[Mapping[str, Any], ...]
    turn: IntArray  # (S, 2)
    call: IntArray  # (S, 2)
    ok: BoolArray  # (S,)
    seen: IntArray  # (S,) UNKNOWN, UNSEEN or SEEN

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
        return StepColumns(empty, (), (), empty.reshape(0, 2), empty.reshape(0, 2), empty.astype(bool), empty)
    columns = _plain_columns(steps, batch_size, length)
    if columns is not None:
        return columns
    for number, step in enumerate(steps):
        _check_step(number, step, batch_size, length)
    # Odd but valid types (a NumPy bool, a list for a span): bring them into form and go on.
    return step_columns([_plain(step) for step in steps], batch_size, length)


def _plain_columns(steps: Sequence[ToolStep], batch_size: int, length: int) -> StepColumns | None:
    """Returns the columns of steps that are valid and of plain types; None if one is not."""
    try:
        rows, tools, arguments, turns, calls, oks, sights = zip(*steps, strict=True)
        spans = list(chain.from_iterable(turns)), list(chain.from_iterable(calls))
        # array("q") takes whole numbers only, and is much faster on many small tuples than np.array.
        row, turn, call = (np.frombuffer(array("q", numbers), dtype=np.int64) for numbers in (rows, *spans))
        turn, call = turn.reshape(-1, 2), call.reshape(-1, 2)
        ok = np.array(oks)
        seen = np.array([SIGHTS[sight] for sight in sights])
        fine = (
            ok.dtype.kind == "b"
            and set(map(type, rows)) == set(map(type, chain(*spans))) == {int}  # True is a whole number, too
            and set(map(type, turns)) | set(map(type, calls)) == {tuple}
            and set(map(len, turns)) == set(map(len, calls)) == {2}
            and set(map(type, tools)) == {str}
            and set(map(type, sights)) <= {bool, type(None)}
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
    except (TypeError, ValueError, OverflowError, KeyError):
        return None
    return StepColumns(row, tools, arguments, turn, call, ok, seen) if fine else None


def _plain(s: ToolStep) -> ToolStep:
    seen = None if s.seen is None else bool(s.seen)
    return ToolStep(int(s.row), str(s.tool), s.arguments, _pair(s.turn), _pair(s.call), bool(s.ok), seen)


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
    if not (step.seen is None or isinstance(step.seen, bool | np.bool_)):
        fail(f"seen must be a bool or None, got {shown(step.seen)}")
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
    choice(*get_args(TokenScope))("token_scope", token_scope)
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
