"""Tool-use steps: what a rollout did with its tools, and which tokens did it."""

from __future__ import annotations

import math
import unicodedata
from array import array
from collections.abc import Hashable, Mapping, Sequence
from itertools import chain
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

TokenScope: TypeAlias = Literal["step", "call"]
IntArray: TypeAlias = npt.NDArray[np.int64]

MAX_DEPTH = 64
"""Deepest nesting of an argument value that is looked at; no information tool needs more [ours]."""


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
        ValueError: naming the first step with a row outside ``[0, batch_size)``, a span outside ``[0, length]``
            or reversed, a call outside its turn, or a field of the wrong type.
    """
    if not len(steps):
        empty = np.zeros(0, np.int64)
        return StepColumns(empty, (), (), empty.reshape(0, 2), empty.reshape(0, 2), empty.astype(bool))
    try:
        rows, tools, arguments, turns, calls, oks = zip(*steps, strict=True)
        # array("q") takes whole numbers only, and is much faster on many small tuples than np.array.
        row, turn, call = (
            np.frombuffer(array("q", numbers), dtype=np.int64)
            for numbers in (rows, chain.from_iterable(turns), chain.from_iterable(calls))
        )
        turn, call = turn.reshape(-1, 2), call.reshape(-1, 2)
        ok = np.array(oks)
        fine = (
            ok.dtype.kind == "b"
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
        raise ValueError(f"steps[{number}]: {why} (step: {str(step)[:200]})")

    if not isinstance(step, ToolStep):
        fail(f"expected a ToolStep, got {type(step).__name__}")
    if not _is_int(step.row) or not 0 <= step.row < batch_size:
        fail(f"row {step.row!r} is outside the batch of {batch_size} rows")
    if not isinstance(step.tool, str):
        fail(f"tool must be a string, got {type(step.tool).__name__}")
    if not isinstance(step.arguments, Mapping):
        fail(f"arguments must be a mapping, got {type(step.arguments).__name__}")
    if not isinstance(step.ok, bool | np.bool_):
        fail(f"ok must be a bool, got {step.ok!r}")
    for name, span in (("turn", step.turn), ("call", step.call)):
        try:
            start, end = span
        except (TypeError, ValueError):
            fail(f"{name} must be a (start, end) pair, got {span!r}")
        if not (_is_int(start) and _is_int(end)):
            fail(f"{name} must hold two integers, got {span!r}")
        if start > end:
            fail(f"{name} {span!r} is reversed")
        if start < 0 or end > length:
            fail(f"{name} {span!r} is outside the response of {length} tokens")
    if step.call[0] < step.turn[0] or step.call[1] > step.turn[1]:
        fail(f"call {step.call!r} is outside its turn {step.turn!r}")


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
        ValueError: for a mask that is not (B, L), an unknown ``token_scope``, or a bad step (see `step_columns`).
    """
    if response_mask.dim() != 2:
        raise ValueError(f"response_mask must be (B, L), got shape {tuple(response_mask.shape)}")
    check_token_scope(token_scope)
    columns = step_columns(steps, *response_mask.shape)
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
        mask[touched] *= response_mask[touched] != 0
    return mask


def check_token_scope(token_scope: str) -> None:
    """Raises ValueError unless ``token_scope`` is ``"step"`` or ``"call"``."""
    if token_scope not in ("step", "call"):
        raise ValueError(f"token_scope must be 'step' or 'call', got {token_scope!r}")


def fold_text(text: str) -> str:
    """NFKC-normalised text, stripped, inner white space folded to single spaces."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return " ".join(text.split())


def canonical(value: Any, depth: int = 0) -> Hashable:
    """The canonical, hashable form of a JSON-like argument value (the spec's ``exact`` kernel).

    Strings are NFKC-normalised, stripped, inner white space folded; -0.0 is 0.0; integral floats equal their ints;
    mappings compare by sorted key, sequences by order. Booleans are not numbers, and NaN equals NaN [ours]. Values
    of other types compare as their own type and text.

    Raises:
        ValueError: where values are nested deeper than `MAX_DEPTH`.
    """
    if isinstance(value, str):
        return fold_text(value)
    if value is None or isinstance(value, bool):
        return ("const", value)
    if isinstance(value, int):
        return ("number", value)
    if isinstance(value, float):
        if math.isnan(value):
            return ("number", "nan")
        return ("number", int(value) if value.is_integer() else value)
    if isinstance(value, np.generic):
        return canonical(value.item(), depth)
    if depth >= MAX_DEPTH:
        raise ValueError(f"argument values are nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, Mapping):
        items = [(canonical(str(key), depth + 1), canonical(item, depth + 1)) for key, item in value.items()]
        return ("mapping", tuple(sorted(items, key=lambda item: str(item[0]))))
    if isinstance(value, list | tuple):
        return ("sequence", tuple([canonical(item, depth + 1) for item in value]))
    return (type(value).__name__, str(value))
