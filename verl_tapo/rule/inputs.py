"""The arguments of `verl_tapo.transfer_credit`: checked, and as the arrays that the rule works on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from verl_tapo.rule.arrays import BoolArray, FloatArray, IntArray, numbered, thread_count
from verl_tapo.rule.steps import StepColumns, described, step_columns
from verl_tapo.rule.values import shown

TokenArray: TypeAlias = npt.NDArray[Any]

_NUMPY_FLOATS = frozenset({torch.float16, torch.float32, torch.float64})
# Rows whose masked sums are taken at a time: few enough for the cache.
_ROW_BLOCK = 16


class Batch(NamedTuple):
    """A batch: B rows, L tokens, T rollouts (one per row by default), S tool-use steps."""

    policy: TokenArray
    """(B, L) the response mask, 1 on policy tokens."""
    rollout_of_row: IntArray
    """(B,)"""
    group: IntArray
    """(T,) prompt group."""
    success: BoolArray
    """(T,) ``y``"""
    recognisable: BoolArray
    """(T,) see `verl_tapo.transfer_credit`."""
    advantage: FloatArray
    """(T,) ``a``, the mean base advantage of the rollout's policy tokens; 0 without such tokens."""
    policy_tokens: FloatArray
    """(T,) their number."""
    steps: StepColumns
    holder: IntArray
    """(S,) the rollout that holds the step."""


def read_batch(
    base: torch.Tensor,
    response_mask: torch.Tensor,
    index: Any,
    success: Any,
    steps: Any,
    trajectory: Any,
    recognisable: Any,
) -> Batch:
    """Reads and checks the arguments of `verl_tapo.transfer_credit`, which documents their names
    and errors."""
    _check_tensors(base, response_mask)
    columns = step_columns(steps, *base.shape)
    rows = len(base)
    group = _codes("index", _of_rows("index", index, rows))
    y = _truths("success", _of_rows("success", success, rows))
    told: BoolArray = np.zeros(rows, dtype=bool)
    if recognisable is not None:
        told = _truths("recognisable", _of_rows("recognisable", recognisable, rows))
    rollout: IntArray = np.arange(rows)
    if trajectory is not None:
        rollout = _codes("trajectory", _of_rows("trajectory", trajectory, rows))
    _, first = np.unique(rollout, return_index=True)
    for name, values in (("index", group), ("success", y), ("recognisable", told)):
        differs = np.flatnonzero(values != values[first][rollout])
        if len(differs):
            raise ValueError(f"{name}[{differs[0]}] differs from that of an earlier row of the same trajectory")
    policy = as_array(response_mask)
    sums, counts = _masked_sums(as_array(base), policy)
    tokens = np.bincount(rollout, weights=counts, minlength=len(first)).astype(np.float64)
    advantage = np.bincount(rollout, weights=sums, minlength=len(first)) / np.maximum(tokens, 1.0)
    return Batch(policy, rollout, group[first], y[first], told[first], advantage, tokens, columns, rollout[columns.row])


def as_array(tensor: torch.Tensor) -> TokenArray:
    """Returns the tensor as an array: a view of its memory, or a copy if NumPy cannot have one."""
    tensor = tensor.detach().cpu().resolve_neg()
    small = tensor.is_floating_point() and tensor.dtype not in _NUMPY_FLOATS
    return (tensor.float() if small else tensor).numpy()


@contextmanager
def copied(tensor: torch.Tensor) -> Iterator[Callable[[], TokenArray]]:
    """Gives the function that returns the tensor's copy. It is made beside the block: copying is memory's work,
    matching calls the interpreter's."""
    with ThreadPoolExecutor(1) as beside:
        yield beside.submit(as_array(tensor).copy, "C").result


def _check_tensors(base: Any, response_mask: Any) -> None:
    def dense(tensor: Any) -> bool:
        return isinstance(tensor, torch.Tensor) and not tensor.is_nested and tensor.layout == torch.strided

    if not dense(base) or base.dim() != 2 or not base.is_floating_point():
        raise ValueError(f"base must be a (B, L) floating-point tensor, got {described(base)}")
    if not dense(response_mask) or response_mask.shape != base.shape or response_mask.is_complex():
        raise ValueError(f"response_mask must have base's shape {tuple(base.shape)}, got {described(response_mask)}")
    if response_mask.device != base.device:
        raise ValueError(f"response_mask is on {response_mask.device}, base on {base.device}")


def _of_rows(name: str, values: Any, rows: int) -> list[Any]:
    """The entries of an argument that has one for each row, as plain values."""
    if isinstance(values, torch.Tensor | np.ndarray):
        if values.ndim != 1:
            raise ValueError(f"{name} must have one entry for each row, got the shape {tuple(values.shape)}")
        values = values.tolist()
    # No mapping, set, text or iterator: what it holds has no order, or is no entry of a row.
    elif not isinstance(values, Sequence) or isinstance(values, str | bytes):
        raise ValueError(f"{name} must be a sequence with one entry for each row, got {type(values).__name__}")
    if len(values) != rows:
        raise ValueError(f"{name} has {len(values)} entries, base has {rows} rows")
    return list(values)


def _codes(name: str, values: list[Any]) -> IntArray:
    """A number for each distinct value of an argument that names groups of rows."""
    if not set(map(type, values)) <= {str, int}:
        for row, value in enumerate(values):
            if isinstance(value, torch.Tensor | np.ndarray) and value.ndim == 0:
                # A tensor's own hash tells which object it is.
                value = values[row] = value.item()
            if not _hashable(value):
                raise ValueError(f"{name}[{row}] is not hashable by value: {type(value).__name__}")
            if value != value:
                raise ValueError(f"{name}[{row}] is {value}, which equals nothing")
    return numbered(values)[1]


def _hashable(value: Any) -> bool:
    if isinstance(value, torch.Tensor) or (isinstance(value, tuple) and not all(map(_hashable, value))):
        return False
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _truths(name: str, values: list[Any]) -> BoolArray:
    if set(map(type, values)) != {bool}:
        for row, value in enumerate(values):
            if isinstance(value, torch.Tensor | np.ndarray) and value.ndim == 0:
                value = value.item()
            number = isinstance(value, bool | int | float | np.bool_ | np.number)
            if not number or value not in (0, 1):
                raise ValueError(f"{name}[{row}] must be a bool, got {shown(value)}")
            values[row] = bool(value)
    return np.array(values, dtype=bool)


def _masked_sums(values: TokenArray, policy: TokenArray) -> tuple[FloatArray, FloatArray]:
    """Per row: the sum of the values under the mask, and the number of mask-1 tokens; both (B,).

    Computed in row blocks that fit the cache; over the whole batch it would dominate and allocate another (B, L) array.
    It takes a few threads of its own: many small tensor operations stall on every barrier once another process keeps
    one of the cores busy (40 times slower on two cores).
    """
    rows, length = values.shape
    dtype = np.float64 if values.dtype == np.float64 else np.float32
    sums, counts = np.zeros((2, rows), dtype=dtype)
    ones = np.ones(length, dtype=dtype)
    odd: list[int] = []

    @np.errstate(invalid="ignore", over="ignore")
    def add_up(first: int, last: int) -> None:
        buffer = np.empty((_ROW_BLOCK, length), dtype=dtype)
        flags = np.empty((2, _ROW_BLOCK, length), dtype=bool)
        for start in range(first, last, _ROW_BLOCK):
            end = min(start + _ROW_BLOCK, last)
            block = buffer[: end - start]
            np.copyto(block, policy[start:end], casting="unsafe")
            # Of double precision 1e-50 is 0 in the block.
            if not _zero_or_one(policy[start:end] if policy.dtype == np.float64 else block, flags[:, : end - start]):
                odd.append(start)
            np.matmul(block, ones, out=counts[start:end])
            block *= values[start:end]
            np.matmul(block, ones, out=sums[start:end])

    threads = thread_count(rows // _ROW_BLOCK)
    bounds = np.linspace(0, rows, threads + 1).astype(int).tolist()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(add_up, bounds[:-1], bounds[1:]))
    if odd:
        block = policy[min(odd) : min(odd) + _ROW_BLOCK]
        row, token = np.argwhere((block != 0) & (block != 1))[0] + (min(odd), 0)
        raise ValueError(f"response_mask[{row}] must be 0/1, its entry {token} is {policy[row, token]}")
    return _finite_sums(sums.astype(np.float64), values, policy), counts.astype(np.float64)


def _zero_or_one(mask: TokenArray, flags: BoolArray) -> bool:
    if mask.dtype == bool:
        return True
    is_zero, is_one = flags
    return bool(np.logical_or(np.equal(mask, 0, out=is_zero), np.equal(mask, 1, out=is_one), out=is_zero).all())


def _finite_sums(sums: FloatArray, values: TokenArray, policy: TokenArray) -> FloatArray:
    """Rejects NaN or inf under the mask and ignores them outside. The sum of huge values may overflow, too."""
    for row in np.flatnonzero(~np.isfinite(sums)).tolist():
        under_mask = values[row][policy[row] != 0].astype(np.float64)
        if not np.isfinite(under_mask).all():
            token = np.flatnonzero((policy[row] != 0) & ~np.isfinite(values[row]))[0]
            raise ValueError(f"base[{row}, {token}] is {values[row, token]} under the response mask")
        sums[row] = under_mask.sum()
    return sums
