"""THE RULE: counterfactual credit transfer between tool calls (TAPO, arXiv 2606.05784), and nothing else.

Symbols, shapes and the numbering of the rule's eight parts follow the paper as quoted below; ``[paper]`` marks what
the paper states, ``[ours]`` what this project decided where the paper is silent. Every ``[ours]`` is a setting of
`verl_tapo.config.TapoConfig` or a tie-break.

``B`` rows, ``L`` response tokens, ``T`` trajectories (one a row, unless told otherwise), ``S`` tool-use steps.

1. Witness steps: ``ok`` steps of declared tools in trajectories with ``y`` and ``a > 0``.             [paper; ok: ours]
2. Failing steps: the same in trajectories with not ``y`` and ``a < 0``.                              [paper; ok: ours]
3. Reference groups: connected components of a prompt group's witness steps of one tool under
   ``s >= theta``.                                                                       [paper; components: ours]
4. ``abar(G)``: mean of ``a`` over the distinct trajectories that hold a step of G.              [paper; distinct: ours]
5. ``sup(G)``: share of the prompt group's successful trajectories that hold a step of G.                       [paper]
6. ``m(f, G) = max_w s(f, w)``; G* maximises it; ties: larger sup, larger abar, earliest row.       [paper; ties: ours]
7. ``alpha = m * sup(G*)``; nothing where ``m < theta`` or ``alpha < alpha_min``.                               [paper]
8. ``A' = min(0, A + beta * alpha * abar(G*))`` on the failing step's policy tokens with ``A < 0``.             [paper]

Everything else stays bit for bit as it was.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from verl_tapo.arrays import numbered, sorted_unique, span_positions, thread_count
from verl_tapo.config import TapoConfig
from verl_tapo.similarity import ABSENT, FloatArray, Kernel, number_values, similarities
from verl_tapo.steps import IntArray, StepColumns, ToolStep, described, shown, step_columns

BoolArray: TypeAlias = npt.NDArray[np.bool_]
Role: TypeAlias = Literal["witness", "failing", "none"]
Gate: TypeAlias = Literal["corrected", "below_alpha", "below_theta", "no_witness", ""]

_ROLES: tuple[Role, ...] = ("none", "witness", "failing")
_NONE, _WITNESS, _FAILING = range(3)
_GATES: tuple[Gate, ...] = ("", "no_witness", "below_theta", "below_alpha", "corrected")
_NO_GATE, _NO_WITNESS, _BELOW_THETA, _BELOW_ALPHA, _CORRECTED = range(5)

_ROUNDING = 1e-9
EQUAL = 1.0 - _ROUNDING
"""Similarity from which a step is its witness's equal, and not only like it."""
_LARGEST = 1 << 62  # number that is calculated with
_PAIR_BLOCK = 1_000_000  # pairs of calls compared at a time
_TOKEN_BLOCK = 1 << 16  # tokens corrected at a time
_NUMPY_FLOATS = frozenset({torch.float16, torch.float32, torch.float64})
_ROW_BLOCK = 16  # rows whose masked sums are taken at a time: small enough for the cache


@dataclass(frozen=True)
class StepCredit:
    """What the rule found for one tool-use step."""

    row: int
    tool: str
    role: Role
    gate: Gate
    """What became of a failing step; empty for the others."""
    similarity: float
    """``m(f, G*)``; the best similarity to any witness where below theta."""
    support: float
    alpha: float
    reference_advantage: float
    """``abar(G*)``"""
    transfer: float
    """``beta * alpha * abar(G*)`` of a corrected step, else 0. Tokens of a turn with several calls get the smallest."""
    witness: int | None
    """Number of the most similar witness step, in G* where there is one, else of all; None where none was compared."""


class Lifts(NamedTuple):
    """Whether witnesses mark what leads to success [ours]. R matched reference groups, S steps."""

    lift: FloatArray
    """(R,) mean of ``y - rate(prompt group)`` over the trajectories that hold one of the group's calls, witnesses and
    failing ones."""
    universal: BoolArray
    """(R,) whether every trajectory of the prompt groups concerned holds one; its lift is 0."""
    of_step: IntArray
    """(S,) which reference group is a step's ``G*``; -1 for none."""

    @property
    def lucky(self) -> BoolArray:
        """(R,) whether holding the call goes with no more success, although some siblings do without it."""
        lucky: BoolArray = (self.lift <= _ROUNDING) & ~self.universal
        return lucky


class _Trajectories(NamedTuple):
    """T trajectories."""

    of_row: IntArray  # (B,) trajectory of each row
    group: IntArray  # (T,) prompt group
    success: BoolArray  # (T,) y
    advantage: FloatArray  # (T,) a
    tokens: FloatArray  # (T,) number of policy tokens


class _Matches(NamedTuple):
    """The best reference group of each step (S,); only entries of failing steps mean anything."""

    similarity: FloatArray
    component: IntArray  # -1: none at theta or above
    support: FloatArray
    reference: FloatArray
    witness: IntArray  # the step number of the most similar witness, -1 for none
    witness_component: IntArray  # (S,) the reference group of each witness step in play, else -1


class CreditReport:
    """What `transfer_credit` did: `steps`, one record per given step in the given order, and `metrics()`."""

    def __init__(
        self,
        columns: StepColumns,
        trajectories: _Trajectories,
        role: IntArray,
        gate: IntArray,
        matches: _Matches,
        alpha: FloatArray,
        transfer: FloatArray,
        changed_tokens: int,
    ) -> None:
        self._columns, self._trajectories, self._role, self._gate = columns, trajectories, role, gate
        self._matches, self._alpha, self._transfer = matches, alpha, transfer
        self._steps: list[StepCredit] | None = None
        self.changed_tokens = changed_tokens
        """Number of tokens whose advantage was corrected."""

    @property
    def advantage_of_row(self) -> FloatArray:
        """(B,) ``a`` of each row's trajectory."""
        return self._trajectories.advantage[self._trajectories.of_row]

    @property
    def steps(self) -> list[StepCredit]:
        """One record per given step, in the given order."""
        if self._steps is None:
            self._steps = [
                StepCredit(row, tool, _ROLES[role], _GATES[gate], m, sup, alpha, abar, add, w if w >= 0 else None)
                for row, tool, role, gate, m, sup, alpha, abar, add, w in zip(
                    self._columns.row.tolist(),
                    self._columns.tool,
                    self._role.tolist(),
                    self._gate.tolist(),
                    self._matches.similarity.tolist(),
                    self._matches.support.tolist(),
                    self._alpha.tolist(),
                    self._matches.reference.tolist(),
                    self._transfer.tolist(),
                    self._matches.witness.tolist(),
                    strict=True,
                )
            ]
        return self._steps

    def metrics(self) -> dict[str, float]:
        """Flat figures of this batch; every key starts with ``tapo/``, no value is NaN.

        Shares have all failing steps (or failing trajectories, or policy tokens) as their denominator, 0 where there
        are none. Means over matched or corrected steps are left out where there are no such steps. *Misassigned*
        is a failing step with an equivalent call in a successful rollout (``m >= theta``), whether or not it passed
        the confidence gate [paper]. *Lift* is the mean of `lifts` over the matched reference groups, *lucky* the share
        of misassigned steps whose witnesses are, *inexact* the share whose best witness is similar and not equal.

        No name contains ``max``, ``min``, ``sum`` or ``total``: veRL's aggregator would not average it.
        """
        t, role, gate = self._trajectories, self._role, self._gate
        failing, matched, corrected = role == _FAILING, gate >= _BELOW_ALPHA, gate == _CORRECTED
        holder = t.of_row[self._columns.row]
        real = t.tokens > 0
        failed = real & ~t.success & (t.advantage < 0)
        metrics = {
            "tapo/misassigned_trajectories": _share(len(np.unique(holder[matched])), failed.sum()),
            "tapo/misassigned_steps": _share(matched.sum(), failing.sum()),
            "tapo/corrected_trajectories": _share(len(np.unique(holder[corrected])), failed.sum()),
            "tapo/corrected_steps": _share(corrected.sum(), failing.sum()),
            "tapo/token_share": _share(self.changed_tokens, t.tokens.sum()),
            "tapo/steps_per_trajectory": _share(len(role), real.sum()),
            "tapo/failed_calls": _share((~self._columns.ok).sum(), len(role)),
            "tapo/successes_per_group": _share((real & t.success).sum(), len(np.unique(t.group[real]))),
        }
        if matched.any():
            similarity = self._matches.similarity[matched]
            metrics["tapo/similarity"] = float(similarity.mean())
            metrics["tapo/inexact_steps"] = float((similarity < EQUAL).mean())
            metrics["tapo/support"] = float(self._matches.support[matched].mean())
            metrics["tapo/alpha"] = float(self._alpha[matched].mean())
            metrics["tapo/reference_advantage"] = float(self._matches.reference[matched].mean())
            lifts = self.lifts()
            metrics["tapo/lift"] = float(lifts.lift.mean())
            metrics["tapo/lucky_steps"] = float(lifts.lucky[lifts.of_step[matched]].mean())
        if corrected.any():
            metrics["tapo/transfer"] = float(self._transfer[corrected].mean())
        metrics.update(self._tool_metrics(failing, matched, corrected, real.sum()))
        return metrics

    def lifts(self) -> Lifts:
        """By how much trajectories that hold a matched reference group's call succeed more often than others."""
        t = self._trajectories
        holder = t.of_row[self._columns.row]
        real = t.tokens > 0
        size = np.bincount(t.group, weights=real)
        rate = np.bincount(t.group, weights=real & t.success) / np.maximum(size, 1)
        matched = self._gate >= _BELOW_ALPHA
        component = np.where(matched, self._matches.component, self._matches.witness_component)
        groups = np.unique(component[matched])
        number = np.searchsorted(groups, component)
        chosen = np.isin(component, groups)
        held, holders = _distinct_pairs(number[chosen], holder[chosen])
        prompts, of_prompt = _distinct_pairs(held, t.group[holders])
        count = np.bincount(held)
        return Lifts(
            np.bincount(held, weights=t.success[holders] - rate[t.group[holders]]) / count,
            count == np.bincount(prompts, weights=size[of_prompt]),
            np.where(matched, number, -1),
        )

    def _tool_metrics(
        self, failing: BoolArray, matched: BoolArray, corrected: BoolArray, trajectories: int
    ) -> dict[str, float]:
        metrics: dict[str, float] = {}
        tools = np.array(self._columns.tool, dtype=object)
        worked, counts = np.unique(tools[self._columns.ok].astype(str), return_counts=True)
        # A model may invent any number of tool names: only those that worked, the most used ones, become curves.
        for tool in worked[np.argsort(-counts, kind="stable")][:20]:
            of_tool = tools == tool
            name = f"tapo/tool/{metric_word(str(tool))}"
            metrics[f"{name}/steps_per_trajectory"] = _share(of_tool.sum(), trajectories)
            metrics[f"{name}/failed_calls"] = _share((of_tool & ~self._columns.ok).sum(), of_tool.sum())
            metrics[f"{name}/misassigned_steps"] = _share((of_tool & matched).sum(), (of_tool & failing).sum())
            metrics[f"{name}/corrected_steps"] = _share((of_tool & corrected).sum(), (of_tool & failing).sum())
            if (of_tool & matched).any():
                similarity = self._matches.similarity[of_tool & matched]
                metrics[f"{name}/similarity"] = float(similarity.mean())
                metrics[f"{name}/inexact_steps"] = float((similarity < EQUAL).mean())
            if (of_tool & corrected).any():
                metrics[f"{name}/transfer"] = float(self._transfer[of_tool & corrected].mean())
        return metrics


def _share(part: Any, whole: Any) -> float:
    return float(part) / float(whole) if whole else 0.0


def metric_word(name: str) -> str:
    """A tool's name as a part of a metric's name: plain characters, and none of the words that make veRL's metrics
    aggregator take a maximum, minimum or sum instead of a mean (``summarise`` becomes ``s-ummarise``)."""
    plain = re.sub(r"[^A-Za-z0-9_.-]", "_", name)[:64]
    return re.sub(r"(?i)(m)(ax|in)|(s)(um)|(t)(otal)", lambda m: "-".join(g for g in m.groups() if g), plain)


def transfer_credit(
    base: torch.Tensor,
    response_mask: torch.Tensor,
    index: Sequence[Hashable] | npt.NDArray[Any],
    success: Sequence[bool] | npt.NDArray[Any] | torch.Tensor,
    steps: Sequence[ToolStep],
    cfg: TapoConfig | None = None,
    *,
    trajectory: Sequence[Hashable] | npt.NDArray[Any] | None = None,
) -> tuple[torch.Tensor, CreditReport]:
    """Applies TAPO's credit transfer to a batch of base advantages.

    Args:
        base: (B, L) floating-point advantages of the base estimator; not modified. Values outside the mask are
            neither read nor changed.
        response_mask: (B, L) 0/1, 1 on tokens the policy generated.
        index: B hashables, the prompt group of each row (veRL's ``uid``); rows of a group need not be contiguous.
        success: B bools, ``y``.
        steps: S tool-use steps in any order.
        cfg: the rule's settings; None takes the defaults.
        trajectory: B hashables, which trajectory each row belongs to, for agent loops that return a trajectory as
            several rows; None: each row is one. Rows of a trajectory share prompt group and success.

    Returns:
        A new (B, L) tensor of ``base``'s dtype and device, and the report.

    Raises:
        ValueError: naming the argument and the first offending row or step: a wrong type, shapes that disagree, a mask
            that is not 0/1, a non-finite base advantage under the mask, a success that is no bool, an index that is
            not hashable by value, or a bad step (see `verl_tapo.steps.step_columns`).
    """
    cfg = TapoConfig() if cfg is None else cfg
    if not isinstance(cfg, TapoConfig):
        raise ValueError(f"cfg must be a TapoConfig, got {type(cfg).__name__}")
    _check_tensors(base, response_mask)
    columns = step_columns(steps, *base.shape)
    trajectories = _trajectories(base, response_mask, index, success, trajectory)

    holder = trajectories.of_row[columns.row]  # (S,)
    eligible = columns.ok & _taking_part(columns, cfg)
    y, a = trajectories.success[holder], trajectories.advantage[holder]
    role = np.full(len(steps), _NONE)
    role[eligible & y & (a > 0)] = _WITNESS  # (1)
    role[eligible & ~y & (a < 0)] = _FAILING  # (2)

    # The result's copy is memory's work, matching is the interpreter's: they go side by side.
    with ThreadPoolExecutor(1) as beside:
        copying = beside.submit(_as_array(base).copy, "C")
        matches = _match(columns, trajectories, role, cfg)  # (3) to (6)
    compared = (role == _FAILING) & np.isfinite(matches.similarity)
    matches = matches._replace(similarity=np.where(compared, matches.similarity, 0.0))
    found = compared & (matches.component >= 0)
    alpha = np.where(found, matches.similarity * matches.support, 0.0)  # (7)
    corrected = found & (alpha >= cfg.alpha_min)
    gate = np.full(len(steps), _NO_GATE)
    gate[role == _FAILING] = _NO_WITNESS
    gate[compared] = _BELOW_THETA
    gate[found] = _BELOW_ALPHA
    gate[corrected] = _CORRECTED

    transfer = np.where(corrected, cfg.beta * alpha * matches.reference, 0.0)
    values = copying.result()
    changed = _lift_advantages(values, _as_array(response_mask), columns, transfer, cfg)  # (8)
    advantages = torch.from_numpy(values).to(base.device, base.dtype)
    return advantages, CreditReport(columns, trajectories, role, gate, matches, alpha, transfer, changed)


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
                value = values[row] = value.item()  # a tensor's own hash tells which object it is
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


def _truths(values: list[Any]) -> BoolArray:
    if set(map(type, values)) != {bool}:
        for row, value in enumerate(values):
            if isinstance(value, torch.Tensor | np.ndarray) and value.ndim == 0:
                value = value.item()
            number = isinstance(value, bool | int | float | np.bool_ | np.number)
            if not number or value not in (0, 1):
                raise ValueError(f"success[{row}] must be a bool, got {shown(value)}")
            values[row] = bool(value)
    return np.array(values, dtype=bool)


def _trajectories(
    base: torch.Tensor, response_mask: torch.Tensor, index: Any, success: Any, trajectory: Any
) -> _Trajectories:
    """Advantage ``a``, success ``y`` and prompt group of every trajectory."""
    rows = len(base)
    group = _codes("index", _of_rows("index", index, rows))
    y = _truths(_of_rows("success", success, rows))
    of_row: IntArray = np.arange(rows)
    if trajectory is not None:
        of_row = _codes("trajectory", _of_rows("trajectory", trajectory, rows))
    _, first = np.unique(of_row, return_index=True)
    for name, values in (("index", group), ("success", y)):
        differs = np.flatnonzero(values != values[first][of_row])
        if len(differs):
            raise ValueError(f"{name}[{differs[0]}] differs from that of an earlier row of the same trajectory")
    sums, counts = _masked_sums(base, response_mask)
    tokens = np.bincount(of_row, weights=counts, minlength=len(first)).astype(np.float64)
    advantage = np.bincount(of_row, weights=sums, minlength=len(first)) / np.maximum(tokens, 1.0)
    return _Trajectories(of_row, group[first], y[first], advantage, tokens)


def _as_array(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """The tensor as an array: a view of its memory, a copy only where NumPy cannot have one."""
    tensor = tensor.detach().cpu().resolve_neg()
    small = tensor.is_floating_point() and tensor.dtype not in _NUMPY_FLOATS
    return (tensor.float() if small else tensor).numpy()


def _masked_sums(base: torch.Tensor, mask: torch.Tensor) -> tuple[FloatArray, FloatArray]:
    """Per row: the sum of ``base`` under the mask, and the number of mask-1 tokens; both (B,).

    As a whole-batch expression this would cost more than everything else here together, and another (B, L) tensor. So
    it goes by blocks of rows, in a buffer that stays in the cache, in a few threads of its own: many small tensor
    operations stall on every barrier once another process keeps one of the cores busy (40 times slower on two cores).
    """
    rows, length = base.shape
    values, policy = _as_array(base), _as_array(mask)
    dtype = np.float64 if values.dtype == np.float64 else np.float32
    sums, counts = np.zeros((2, rows), dtype=dtype)
    ones = np.ones(length, dtype=dtype)
    odd: list[int] = []  # first rows of blocks whose mask is not 0/1

    @np.errstate(invalid="ignore", over="ignore")
    def add_up(first: int, last: int) -> None:
        buffer = np.empty((_ROW_BLOCK, length), dtype=dtype)
        is_zero, is_one = np.empty((2, _ROW_BLOCK, length), dtype=bool)
        for start in range(first, last, _ROW_BLOCK):
            end = min(start + _ROW_BLOCK, last)
            block, zero, one = (array[: end - start] for array in (buffer, is_zero, is_one))
            np.copyto(block, policy[start:end], casting="unsafe")
            if policy.dtype != bool:
                exact = policy[start:end] if policy.dtype == np.float64 else block  # 1e-50 is 0 in single precision
                np.logical_or(np.equal(exact, 0, out=zero), np.equal(exact, 1, out=one), out=zero)
                if not zero.all():
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
    result = sums.astype(np.float64)
    # NaN or inf: under the mask an error, outside it nothing to us; a sum of huge values may overflow, too.
    for row in np.flatnonzero(~np.isfinite(result)).tolist():
        under_mask = values[row][policy[row] != 0].astype(np.float64)
        if not np.isfinite(under_mask).all():
            token = np.flatnonzero((policy[row] != 0) & ~np.isfinite(values[row]))[0]
            raise ValueError(f"base[{row}, {token}] is {values[row, token]} under the response mask")
        result[row] = under_mask.sum()
    return result, counts.astype(np.float64)


def _taking_part(columns: StepColumns, cfg: TapoConfig) -> BoolArray:
    """(S,) which steps are of a declared tool. By default also: have a parameter that counts, for two calls without
    any are no evidence of anything [ours]."""
    declared = {tool: cfg.takes_part(tool) for tool in set(columns.tool)}
    taking_part = np.array([declared[tool] for tool in columns.tool], dtype=bool)
    if cfg.tools is None:
        doubtful = {name for name in set(chain.from_iterable(columns.arguments)) if cfg.may_ignore("", name)}
        for step, arguments in enumerate(columns.arguments):
            if doubtful.issuperset(arguments):
                taking_part[step] &= not all(cfg.kernel("", name, arguments).ignores for name in arguments)
    return taking_part


class _Parameter(NamedTuple):
    """One parameter of one tool."""

    name: Hashable
    kernel: Kernel
    values: list[Hashable]  # distinct, as the kernel prepared them
    of_call: IntArray  # (N,) number of each node's value, see `verl_tapo.similarity.number_values`


class _Calls(NamedTuple):
    """The distinct calls ("nodes") that can match at all, sorted by tool, scope and block."""

    of_step: IntArray  # (S,) node of each step, -1 for steps not in play
    cell: IntArray  # (N,) tool and scope (a prompt group, or the batch): only calls of one cell are compared
    block: IntArray  # (N,) cell, and the values of parameters that compare by equality: calls of others are unlike, 0
    tools: list[tuple[int, int, list[_Parameter]]]  # each tool's nodes, [start, end), and its other parameters


def _match(columns: StepColumns, t: _Trajectories, role: IntArray, cfg: TapoConfig) -> _Matches:
    """Parts 3 to 6 of the rule: reference groups, their advantage and support, and each failing step's best one."""
    holder = t.of_row[columns.row]
    calls = _distinct_calls(columns, t.group[holder], role, cfg)
    nodes = len(calls.cell)
    in_play = np.flatnonzero((role == _WITNESS) & (calls.of_step >= 0))
    failing = np.flatnonzero((role == _FAILING) & (calls.of_step >= 0))
    is_witness, is_failing = np.zeros(nodes, dtype=bool), np.zeros(nodes, dtype=bool)
    is_witness[calls.of_step[in_play]], is_failing[calls.of_step[failing]] = True, True

    component = np.arange(nodes)  # (3): of a witness node, the least node of its reference group
    best = np.full(nodes, -np.inf)  # of a failing node, the best similarity to any witness
    closest = np.full(nodes, -1)  # of a failing node, a witness node at that similarity
    ties: list[IntArray] = [np.zeros((2, 0), dtype=np.int64)]  # (failing node, witness node) at that similarity
    for left, right, similarity in _compared_pairs(calls, is_witness):
        near = similarity >= cfg.theta
        linked = near & is_witness[left] & (left != right)
        _link(component, left[linked], right[linked])
        mine = is_failing[left]
        np.maximum.at(best, left[mine], similarity[mine])
        mine &= similarity == best[left]
        closest[left[mine]] = right[mine]
        ties.append(np.stack([left, right])[:, near & mine])

    # (4) and (5), for all reference groups at once.
    group = component[calls.of_step[in_play]]
    held = _distinct_pairs(group, holder[in_play])  # distinct (reference group, trajectory) pairs
    holders = np.bincount(held[0], minlength=nodes)
    reference = np.bincount(held[0], weights=t.advantage[held[1]], minlength=nodes) / np.maximum(holders, 1)
    winners = np.bincount(t.group, weights=t.success & (t.advantage > 0))
    spread = _distinct_pairs(group, t.group[holder[in_play]])  # (reference group, prompt group) pairs
    pool = np.bincount(spread[0], weights=winners[spread[1]], minlength=nodes)
    support = holders / np.maximum(pool, 1) if cfg.use_support else np.ones(nodes)
    earliest = np.full(nodes, np.iinfo(np.int64).max)
    np.minimum.at(earliest, group, columns.row[in_play])

    # (6), for all failing calls at once: the first in the order of the ties.
    chosen = np.full(nodes, -1)
    call, witness = np.concatenate(ties, axis=1)
    candidate = component[witness]
    order = np.lexsort((earliest[candidate], -reference[candidate], -support[candidate], call))
    calls_tied, first = np.unique(call[order], return_index=True)
    chosen[calls_tied] = candidate[order][first]
    closest[calls_tied] = witness[order][first]
    earliest_step = np.full(nodes, len(role))
    np.minimum.at(earliest_step, calls.of_step[in_play], in_play)

    similarity, matched = np.full(len(role), -np.inf), np.full(len(role), -1)
    similarity[failing] = best[calls.of_step[failing]]
    nearest, compared = np.full(len(role), -1), failing[closest[calls.of_step[failing]] >= 0]
    nearest[compared] = earliest_step[closest[calls.of_step[compared]]]
    matched[failing] = chosen[calls.of_step[failing]]
    witness_component = np.full(len(role), -1)
    witness_component[in_play] = group
    has = matched >= 0
    sup, abar = np.zeros(len(role)), np.zeros(len(role))
    sup[has], abar[has] = support[matched[has]], reference[matched[has]]
    return _Matches(similarity, matched, sup, abar, nearest, witness_component)


def _distinct_pairs(first: IntArray, second: IntArray) -> IntArray:
    """(2, K) the distinct pairs of non-negative ``(first[k], second[k])``, sorted."""
    width = int(second.max(initial=0)) + 1
    return np.stack(np.divmod(sorted_unique(first * width + second), width))


def _distinct_calls(columns: StepColumns, group: IntArray, role: IntArray, cfg: TapoConfig) -> _Calls:
    """Equal calls become one node, within the tools and scopes that have both witnesses and failing steps."""
    code, tool = numbered(columns.tool)
    place = tool if cfg.scope == "batch" else tool * (group.max(initial=0) + 1) + group
    contested = np.intersect1d(place[role == _WITNESS], place[role == _FAILING])
    in_play = np.flatnonzero(np.isin(place, contested) & (role != _NONE))
    in_play = in_play[np.argsort(place[in_play], kind="stable")]
    bounds = np.searchsorted(tool[in_play], np.arange(len(code) + 1)).tolist()

    of_step = np.full(len(role), -1)
    cells: list[IntArray] = [np.zeros(0, dtype=np.int64)]
    blocks: list[IntArray] = [np.zeros(0, dtype=np.int64)]
    tools: list[tuple[int, int, list[_Parameter]]] = []
    nodes = 0
    for name, start, end in zip(code, bounds[:-1], bounds[1:], strict=True):
        steps = in_play[start:end]
        parameters = _parameters(columns, steps, name, cfg)
        compared = [parameter for parameter in parameters if not parameter.kernel.identity_only]
        block, _ = _combined([place[steps], *(p.of_call for p in parameters if p.kernel.identity_only)])
        node, first = _combined([block, *(p.of_call for p in compared)])  # sorted by block, and so by cell
        of_step[steps] = nodes + node
        cells.append(place[steps[first]])
        blocks.append(nodes + block[first])  # a tool has no more blocks than nodes
        tools.append((nodes, nodes + len(first), [p._replace(of_call=p.of_call[first]) for p in compared]))
        nodes += len(first)
    return _Calls(of_step, np.concatenate(cells), np.concatenate(blocks), tools)


def _combined(columns: list[IntArray]) -> tuple[IntArray, IntArray]:
    """(K,) numbers from 0 of the distinct combinations of K entries of the columns, in the columns' order, and the
    position where each combination comes first."""
    number, size = np.zeros(len(columns[0]), dtype=np.int64), 1
    for column in columns:
        low = int(column.min(initial=0))
        span = int(column.max(initial=0)) - low + 1
        if size * span > _LARGEST:
            number = np.unique(number, return_inverse=True)[1]
            size = len(number)
        number, size = number * span + (column - low), size * span
    _, first, number = np.unique(number, return_index=True, return_inverse=True)
    return number, first


def _parameters(columns: StepColumns, steps: IntArray, tool: str, cfg: TapoConfig) -> list[_Parameter]:
    """The parameters of one tool that count, with each step's value as a number."""
    calls = [columns.arguments[step] for step in steps.tolist()]
    parameters = []
    for name in dict.fromkeys(chain.from_iterable(calls)):
        kernel = cfg.kernel(tool, name)
        if kernel.ignores:
            continue
        given = [call.get(name, ABSENT) for call in calls]
        if cfg.may_ignore(tool, name):
            given = [ABSENT if cfg.kernel(tool, name, call).ignores else call.get(name, ABSENT) for call in calls]
        try:
            parameters.append(_Parameter(name, kernel, *number_values(kernel, given)))
        except ValueError as error:
            raise ValueError(f"tool {tool!r}, parameter {shown(name)}: {error}") from error
    return parameters


def _compared_pairs(calls: _Calls, is_witness: BoolArray) -> Iterator[tuple[IntArray, IntArray, FloatArray]]:
    """Compares every call with the witnesses of its block; one witness of another block stands for all others, at 0.

    Yields nodes (P,), witness nodes (P,), and their similarities (P,); all pairs of one node come together.
    """
    witnesses = np.flatnonzero(is_witness)
    of_cell, of_block = calls.cell[witnesses], calls.block[witnesses]  # both rise
    low = np.searchsorted(of_block, calls.block, side="left")
    partners = np.searchsorted(of_block, calls.block, side="right") - low
    # Where a cell has witnesses of several blocks, its first or its last one is a stranger.
    first = np.searchsorted(of_cell, calls.cell, side="left")
    last = np.searchsorted(of_cell, calls.cell, side="right") - 1
    stranger = witnesses[np.where(of_block[first] != calls.block, first, last)] if len(witnesses) else first
    strange = calls.block[stranger] != calls.block
    for start, end, parameters in calls.tools:
        pairs_before = np.cumsum(partners[start:end]) - partners[start:end]
        portions = np.flatnonzero(np.diff(pairs_before // _PAIR_BLOCK, prepend=-1)) + start
        for begin, stop in zip(portions.tolist(), [*portions[1:].tolist(), end], strict=False):
            nodes = np.arange(begin, stop)
            left = np.repeat(nodes, partners[nodes])
            right = witnesses[span_positions(low[nodes], partners[nodes])]
            similarity = _similarities(left - start, right - start, parameters)
            nodes = nodes[strange[nodes]]
            yield (
                np.concatenate([left, nodes]),
                np.concatenate([right, stranger[nodes]]),
                np.concatenate([similarity, np.zeros(len(nodes))]),
            )


def _similarities(left: IntArray, right: IntArray, parameters: list[_Parameter]) -> FloatArray:
    """(P,) ``s(u, v)`` of pairs of calls: the minimum over the parameters; 0 where only one call has a parameter;
    1 for calls without parameters.
    """
    result = np.ones(len(left))
    for name, kernel, values, of_call in parameters:
        try:
            np.minimum(result, similarities(kernel, values, of_call[left], of_call[right]), out=result)
        except ValueError as error:
            raise ValueError(f"parameter {shown(name)}: {error}") from error
    return result


def _link(component: IntArray, left: IntArray, right: IntArray) -> None:
    """Joins the components of ``left[k]`` and ``right[k]``, in place; the least member names a component."""
    while len(left):
        a, b = component[left], component[right]
        apart = a != b
        if not apart.any():
            return
        np.minimum.at(component, np.maximum(a[apart], b[apart]), np.minimum(a[apart], b[apart]))
        while not np.array_equal(component, shorter := component[component]):
            component[:] = shorter


def _segments(columns: StepColumns, transfer: FloatArray, cfg: TapoConfig) -> tuple[IntArray, IntArray, FloatArray]:
    """Disjoint token spans with what is to be added there: (K,) rows, (K, 2) spans, (K,) transfers, all > 0.

    A token in several steps' spans takes the smallest of their transfers, 0 for a step without one: a turn with
    parallel calls is corrected only as far as its weakest call [ours].
    """
    spans = columns.span(cfg.token_scope)
    gaining = sorted_unique(columns.row[transfer > 0])
    steps = np.flatnonzero(np.isin(columns.row, gaining) & (spans[:, 0] < spans[:, 1]))
    if not len(steps):
        return np.zeros(0, np.int64), np.zeros((0, 2), np.int64), np.zeros(0)
    steps = steps[np.lexsort((spans[steps, 1], spans[steps, 0], columns.row[steps]))]
    keys = np.column_stack([columns.row[steps], spans[steps]])  # (K, 3): row, start, end; sorted
    first = np.flatnonzero(np.append(True, (keys[1:] != keys[:-1]).any(1)))
    amount = np.minimum.reduceat(transfer[steps], first)
    keys = keys[first]
    overlaps = np.flatnonzero((keys[1:, 0] == keys[:-1, 0]) & (keys[1:, 1] < keys[:-1, 2]))
    if len(overlaps):
        keys, amount = _split_overlaps(keys, amount, set(keys[overlaps, 0].tolist()))
    positive = amount > 0
    return keys[positive, 0], keys[positive, 1:], amount[positive]


def _split_overlaps(keys: IntArray, amount: FloatArray, rows: set[int]) -> tuple[IntArray, FloatArray]:
    """Cuts the spans of ``rows`` at each other's ends, so that the pieces are disjoint."""
    apart = ~np.isin(keys[:, 0], list(rows))
    pieces: list[tuple[int, int, int]] = []
    amounts: list[float] = []
    for row in sorted(rows):
        mine = np.flatnonzero(keys[:, 0] == row)
        cuts = np.unique(keys[mine, 1:])
        for start, end in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
            covering = mine[(keys[mine, 1] <= start) & (keys[mine, 2] >= end)]
            if len(covering):
                pieces.append((row, start, end))
                amounts.append(float(amount[covering].min()))
    split = np.array(pieces, dtype=np.int64).reshape(-1, 3)
    return np.concatenate([keys[apart], split]), np.concatenate([amount[apart], np.array(amounts)])


def _lift_advantages(
    advantages: npt.NDArray[Any],
    policy: npt.NDArray[Any],
    columns: StepColumns,
    transfer: FloatArray,
    cfg: TapoConfig,
) -> int:
    """Part 8 of the rule, in place on (B, L) ``advantages``; returns the number of tokens changed."""
    rows, spans, amount = _segments(columns, transfer, cfg)
    if not len(rows):
        return 0
    width = advantages.shape[1]
    values, policy = advantages.reshape(-1), policy.reshape(-1)
    amount = amount.astype(values.dtype)
    lengths = spans[:, 1] - spans[:, 0]
    starts = rows * width + spans[:, 0]

    def lift(first: int, last: int) -> int:
        where = span_positions(starts[first:last], lengths[first:last])
        old = values.take(where)
        negative = (old < 0) & (policy.take(where) != 0)
        new = np.repeat(amount[first:last], lengths[first:last])
        new += old
        if cfg.clip:
            np.minimum(new, 0, out=new)
        values[where] = np.where(negative, new, old)
        return int(np.count_nonzero(negative))

    # Block by block of segments, which share no token: small arrays stay in the cache.
    blocks = np.flatnonzero(np.diff(lengths.cumsum() // _TOKEN_BLOCK, prepend=-1)).tolist()
    with ThreadPoolExecutor(thread_count(len(blocks))) as pool:
        return sum(pool.map(lift, blocks, [*blocks[1:], len(rows)]))
