"""Decides which calls are compared, and how. Equal calls become one node, and only nodes that can
match are compared."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from itertools import chain
from typing import NamedTuple

import numpy as np

from verl_tapo.rule.arrays import BoolArray, FloatArray, IntArray, numbered, span_positions
from verl_tapo.rule.config import TapoConfig
from verl_tapo.rule.inputs import Batch
from verl_tapo.rule.roles import Role
from verl_tapo.rule.similarity import ABSENT, Kernel, number_values, similarities
from verl_tapo.rule.steps import StepColumns
from verl_tapo.rule.values import shown

_LARGEST = 1 << 62  # number that is calculated with
_PAIR_BLOCK = 1_000_000  # pairs of calls compared at a time


class Parameter(NamedTuple):
    """One parameter of one tool."""

    name: Hashable
    kernel: Kernel
    values: list[Hashable]
    """Distinct, as the kernel prepared them."""
    of_call: IntArray
    """(N,) number of each node's value, see `verl_tapo.rule.similarity.number_values`."""


class Calls(NamedTuple):
    """The N distinct calls ("nodes") that can match at all, sorted by tool, scope and block."""

    of_step: IntArray
    """(S,) node of each step, -1 for steps that nothing can match."""
    cell: IntArray
    """(N,) tool and scope (a prompt group, or the batch): only calls of one cell are compared."""
    block: IntArray
    """(N,) cell, and the values of parameters that compare by equality: calls of others are unlike, 0."""
    tools: list[tuple[int, int, list[Parameter]]]
    """Each tool's nodes, [start, end), and its other parameters."""

    @property
    def number(self) -> int:
        """N"""
        return len(self.cell)

    def made_by(self, steps: IntArray) -> BoolArray:
        """(N,) which nodes are the call of one of the steps."""
        made = np.zeros(self.number, dtype=bool)
        made[self.of_step[steps]] = True
        return made


class Match(NamedTuple):
    """The best reference group ``G*`` of each of S steps."""

    similarity: FloatArray
    """(S,) ``m(f, G*)`` of a failing step. Below theta it is the best match with any witness; it is
    0 without a comparison."""
    reference_group: IntArray
    """(S,) the number of a failing step's ``G*``, -1 for none."""
    support: FloatArray
    """(S,) ``sup(G*)``, else 0."""
    reference_advantage: FloatArray
    """(S,) ``abar(G*)``, else 0."""
    witness: IntArray
    """(S,) the witness step most similar to a failing step, in ``G*`` if that has one; -1 without a
    witness."""
    group_of_witness: IntArray
    """(S,) the number of a witness step's own reference group, -1 for none."""

    @classmethod
    def of_steps(
        cls,
        calls: Calls,
        witness: IntArray,
        failing: IntArray,
        group_of_witness: IntArray,
        best: FloatArray,
        nearest: IntArray,
        chosen: IntArray,
        abar: FloatArray,
        sup: FloatArray,
    ) -> Match:
        """Expands the matches of nodes to the matches of steps.

        Args:
            calls: the nodes.
            witness, failing: steps.
            group_of_witness: reference groups of the witness steps.
            best, nearest, chosen: (N,) of failing nodes: best similarity, the witness node at it, and ``G*``; else -1.
            abar, sup: (N,) by reference group.
        """
        steps = len(calls.of_step)
        earliest_step = np.full(calls.number, steps)
        np.minimum.at(earliest_step, calls.of_step[witness], witness)
        similarity, support, reference = np.zeros((3, steps))
        reference_group, of_witness, nearest_step = np.full((3, steps), -1)
        of_witness[witness] = group_of_witness
        compared = failing[nearest[calls.of_step[failing]] >= 0]
        node = calls.of_step[compared]
        similarity[compared], nearest_step[compared] = best[node], earliest_step[nearest[node]]
        reference_group[compared] = chosen[node]
        found = compared[chosen[node] >= 0]
        support[found], reference[found] = sup[reference_group[found]], abar[reference_group[found]]
        return cls(similarity, reference_group, support, reference, nearest_step, of_witness)


def takes_part(steps: StepColumns, cfg: TapoConfig) -> BoolArray:
    """(S,) True for steps of a declared tool. By default they must also have a parameter that
    counts: two calls without any are no evidence [ours]."""
    declared = {tool: cfg.takes_part(tool) for tool in set(steps.tool)}
    part = np.array([declared[tool] for tool in steps.tool], dtype=bool)
    if cfg.tools is None:
        doubtful = {name for name in set(chain.from_iterable(steps.arguments)) if cfg.may_ignore("", name)}
        for step, arguments in enumerate(steps.arguments):
            if doubtful.issuperset(arguments):
                part[step] &= not all(cfg.kernel("", name, arguments).ignores for name in arguments)
    return part


def distinct_calls(batch: Batch, role: IntArray, cfg: TapoConfig) -> Calls:
    """The calls of the tools and scopes that have both witnesses and failing steps."""
    code, tool = numbered(batch.steps.tool)
    group = batch.group[batch.holder]
    cell = tool if cfg.scope == "batch" else tool * (group.max(initial=0) + 1) + group
    contested = np.intersect1d(cell[role == Role.WITNESS], cell[role == Role.FAILING])
    in_play = np.flatnonzero(np.isin(cell, contested) & (role != Role.NONE))
    in_play = in_play[np.argsort(cell[in_play], kind="stable")]
    bounds = np.searchsorted(tool[in_play], np.arange(len(code) + 1)).tolist()

    of_step = np.full(len(role), -1)
    cells: list[IntArray] = [np.zeros(0, dtype=np.int64)]
    blocks: list[IntArray] = [np.zeros(0, dtype=np.int64)]
    tools: list[tuple[int, int, list[Parameter]]] = []
    nodes = 0
    for name, start, end in zip(code, bounds[:-1], bounds[1:], strict=True):
        steps = in_play[start:end]
        parameters = _parameters(batch.steps, steps, name, cfg)
        compared = [parameter for parameter in parameters if not parameter.kernel.identity_only]
        block, _ = _combined([cell[steps], *(p.of_call for p in parameters if p.kernel.identity_only)])
        # Sorted by block, and so by cell.
        node, first = _combined([block, *(p.of_call for p in compared)])
        of_step[steps] = nodes + node
        cells.append(cell[steps[first]])
        # A tool has no more blocks than nodes, so that numbers of blocks do not meet either.
        blocks.append(nodes + block[first])
        tools.append((nodes, nodes + len(first), [p._replace(of_call=p.of_call[first]) for p in compared]))
        nodes += len(first)
    return Calls(of_step, np.concatenate(cells), np.concatenate(blocks), tools)


def _combined(columns: list[IntArray]) -> tuple[IntArray, IntArray]:
    """(K,) numbers from 0 of the distinct combinations of K entries of the columns, in the columns' order, and the
    position where each combination comes first."""
    number: IntArray = np.zeros(len(columns[0]), dtype=np.int64)
    size = 1
    for column in columns:
        low = int(column.min(initial=0))
        span = int(column.max(initial=0)) - low + 1
        if size * span > _LARGEST:
            number = np.unique(number, return_inverse=True)[1]
            size = len(number)
        number, size = number * span + (column - low), size * span
    _, first, number = np.unique(number, return_index=True, return_inverse=True)
    return number, first


def _parameters(columns: StepColumns, steps: IntArray, tool: str, cfg: TapoConfig) -> list[Parameter]:
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
            parameters.append(Parameter(name, kernel, *number_values(kernel, given)))
        except ValueError as error:
            raise ValueError(f"tool {tool!r}, parameter {shown(name)}: {error}") from error
    return parameters


def compared_pairs(calls: Calls, is_witness: BoolArray) -> Iterator[tuple[IntArray, IntArray, FloatArray]]:
    """Compares every call with the witnesses of its block. One witness of another block represents
    the rest, at 0.

    Yields:
        Nodes (P,), witness nodes (P,), and their similarities (P,); all pairs of one node come together.
    """
    witnesses = np.flatnonzero(is_witness)
    # Both rise.
    of_cell, of_block = calls.cell[witnesses], calls.block[witnesses]
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


def _similarities(left: IntArray, right: IntArray, parameters: list[Parameter]) -> FloatArray:
    """(P,) ``s(u, v)`` of pairs of calls: the minimum over the parameters; 0 if only one call has a
    parameter; 1 for calls without parameters."""
    result = np.ones(len(left))
    for name, kernel, values, of_call in parameters:
        try:
            np.minimum(result, similarities(kernel, values, of_call[left], of_call[right]), out=result)
        except ValueError as error:
            raise ValueError(f"parameter {shown(name)}: {error}") from error
    return result
