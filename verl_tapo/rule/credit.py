"""TAPO's credit transfer (arXiv 2606.05784): the rule, and nothing else.

A call that failed to pay off in one rollout may have paid off in another rollout of the same prompt. The rule finds
such *witnesses* and gives back part of the penalty, never more than the penalty itself:

    1. Witness steps    calls of successful rollouts: y and a > 0.                                          [paper]
    2. Failing steps    calls of failed rollouts: not y and a < 0.                                          [paper]
                        Both: only declared tools, only calls that were answered (ok).                      [ours]
    3. Reference group  witness steps of one prompt group and one tool, linked where s >= theta.            [paper]
                        "Linked" means connected components, so that no order of rows matters.              [ours]
    4. abar(G)          mean of a over the rollouts that hold a step of G,                                  [paper]
                        each of which counts once.                                                          [ours]
    5. sup(G)           share of the prompt group's successful rollouts that hold a step of G.              [paper]
    6. m(f, G*)         the best similarity of failing step f to any reference group;                       [paper]
                        ties go to the larger sup, then the larger abar, then the earliest row.             [ours]
    7. alpha            m * sup(G*); nothing happens where m < theta or alpha < alpha_min.                  [paper]
    8. A'               min(0, A + beta * alpha * abar(G*)) on the step's policy tokens with A < 0.         [paper]
    9. Grounding        what follows where a tool's answer held an accepted answer, or none did; off by     [ours]
                        default: `grounding`.

Everything else stays bit for bit as it was. B rows, L tokens, T rollouts, S steps, N distinct calls ("nodes").

`verl_tapo.rule.reference` is the same rule as plain loops; a property test holds the two together. Elsewhere: `inputs`
checks and reads the arguments, `matching` compares calls, `tokens` does part 8, `report` says what happened.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from verl_tapo.rule.arrays import BoolArray, FloatArray, IntArray, distinct_pairs, link
from verl_tapo.rule.config import TapoConfig
from verl_tapo.rule.grounding import forgiven, successes, withheld
from verl_tapo.rule.inputs import Batch, copied, read_batch
from verl_tapo.rule.matching import Match, compared_pairs, distinct_calls, takes_part
from verl_tapo.rule.report import CreditReport
from verl_tapo.rule.roles import Gate, Role
from verl_tapo.rule.steps import ToolStep
from verl_tapo.rule.tokens import correct_tokens, withhold_rewards


def transfer_credit(
    base: torch.Tensor,
    response_mask: torch.Tensor,
    index: Sequence[Hashable] | npt.NDArray[Any],
    success: Sequence[bool] | npt.NDArray[Any] | torch.Tensor,
    steps: Sequence[ToolStep],
    cfg: TapoConfig | None = None,
    *,
    trajectory: Sequence[Hashable] | npt.NDArray[Any] | None = None,
    recognisable: Sequence[bool] | npt.NDArray[Any] | torch.Tensor | None = None,
) -> tuple[torch.Tensor, CreditReport]:
    """Applies TAPO's credit transfer to a batch of base advantages.

    Args:
        base: (B, L) base advantages, floating point; not modified. Values outside the mask are not read nor changed.
        response_mask: (B, L) 0/1, 1 on tokens the policy generated.
        index: B hashables, the prompt group of each row (veRL's ``uid``); rows of a group need not be contiguous.
        success: B bools, ``y``.
        steps: S tool-use steps in any order.
        cfg: the rule's settings; None takes the defaults.
        trajectory: B hashables, which rollout each row belongs to, for agent loops that return a rollout as several
            rows; None: each row is one. Rows of a rollout share prompt group, success and ``recognisable``.
        recognisable: B bools, whether the answer of a tool could have shown that it holds an accepted answer. With
            ``grounding.luck`` a rollout without steps has found nothing then. None: only a sibling's step tells.

    Returns:
        The corrected advantages, a new (B, L) tensor of ``base``'s dtype and device, and the report.

    Raises:
        ValueError: naming the argument and the first offending row or step: a wrong type, shapes that disagree, a mask
            that is not 0/1, a non-finite base advantage under the mask, a flag that is no bool, an index that is
            not hashable by value, or a bad step (see `verl_tapo.rule.steps.step_columns`).
    """
    cfg = TapoConfig() if cfg is None else cfg
    if not isinstance(cfg, TapoConfig):
        raise ValueError(f"cfg must be a TapoConfig, got {type(cfg).__name__}")
    batch = read_batch(base, response_mask, index, success, steps, trajectory, recognisable)
    declared, lucky = takes_part(batch.steps, cfg), withheld(batch, cfg)
    won = successes(batch, lucky, cfg)
    role = _roles(batch, declared, won, lucky)
    with copied(base) as copy:
        match = _match(batch, role, won, cfg)
    alpha = match.similarity * match.support
    gate = _gates(role, match, alpha, cfg)
    transfer = np.where(gate == Gate.CORRECTED, cfg.beta * alpha * match.reference_advantage, 0.0)
    advantages, free = copy(), forgiven(batch, role, cfg)
    changed = correct_tokens(advantages, batch, np.where(free, np.inf, transfer), cfg)
    changed += withhold_rewards(advantages, batch, lucky)
    report = CreditReport(batch, role, gate, match, alpha, transfer, free, lucky, changed)
    return torch.from_numpy(advantages).to(base.device, base.dtype), report


def _roles(batch: Batch, declared: BoolArray, won: BoolArray, lucky: BoolArray) -> IntArray:
    """Parts 1 and 2: the role of each step, (S,); a success by luck is a failure (9)."""
    holder = batch.holder
    failures = (~batch.success | lucky) & (batch.advantage < 0)
    eligible = batch.steps.ok & declared
    role = np.full(len(eligible), Role.NONE)
    role[eligible & won[holder]] = Role.WITNESS
    role[eligible & failures[holder]] = Role.FAILING
    return role


def _match(batch: Batch, role: IntArray, won: BoolArray, cfg: TapoConfig) -> Match:
    """Parts 3 to 6: the best reference group of each failing step."""
    # Equal calls are one node: rollouts of a prompt repeat each other, so this is most of the speed.
    calls = distinct_calls(batch, role, cfg)
    witness = np.flatnonzero((role == Role.WITNESS) & (calls.of_step >= 0))
    failing = np.flatnonzero((role == Role.FAILING) & (calls.of_step >= 0))
    is_witness, is_failing = calls.made_by(witness), calls.made_by(failing)

    # (3) Of a witness node: the least node of its reference group.
    component = np.arange(calls.number)
    # (6) Of a failing node: the best similarity to any witness, a witness node at it, and the pairs of failing and
    # witness nodes at it, if that is theta or more. All pairs of a node come in one block.
    best, nearest = np.full(calls.number, -np.inf), np.full(calls.number, -1)
    tied: list[IntArray] = [np.zeros((2, 0), np.int64)]
    for node, other, similarity in compared_pairs(calls, is_witness):
        near = similarity >= cfg.theta
        edge = near & is_witness[node] & (node != other)
        link(component, node[edge], other[edge])
        np.maximum.at(best, node[is_failing[node]], similarity[is_failing[node]])
        is_best = is_failing[node] & (similarity == best[node])
        nearest[node[is_best]] = other[is_best]
        tied.append(np.stack([node, other])[:, near & is_best])
    reference_group = component[calls.of_step[witness]]
    abar, sup, earliest = _reference_groups(batch, calls.number, won, witness, reference_group, cfg)

    failing_node, witness_node = np.concatenate(tied, axis=1)
    candidate = component[witness_node]
    order = np.lexsort((earliest[candidate], -abar[candidate], -sup[candidate], failing_node))
    node, first = np.unique(failing_node[order], return_index=True)
    # (6) G* of a failing node, and its nearest witness there.
    chosen = np.full(calls.number, -1)
    chosen[node], nearest[node] = candidate[order][first], witness_node[order][first]
    return Match.of_steps(calls, witness, failing, reference_group, best, nearest, chosen, abar, sup)


def _reference_groups(
    batch: Batch, nodes: int, won: BoolArray, witness: IntArray, reference_group: IntArray, cfg: TapoConfig
) -> tuple[FloatArray, FloatArray, IntArray]:
    """Parts 4 and 5 for all reference groups, (N,) by their least node: abar, sup, and the earliest row."""
    holder = batch.holder[witness]
    # A rollout that makes a call twice counts once.
    held, rollout = distinct_pairs(reference_group, holder)
    holders = np.bincount(held, minlength=nodes)
    abar = np.bincount(held, batch.advantage[rollout], nodes) / np.maximum(holders, 1)
    # Of several prompts only under scope="batch".
    spread, prompt = distinct_pairs(reference_group, batch.group[holder])
    successful = np.bincount(batch.group, won)
    sup = holders / np.maximum(np.bincount(spread, successful[prompt], nodes), 1)
    earliest = np.full(nodes, np.iinfo(np.int64).max)
    np.minimum.at(earliest, reference_group, batch.steps.row[witness])
    return abar, sup if cfg.use_support else np.ones(nodes), earliest


def _gates(role: IntArray, match: Match, alpha: FloatArray, cfg: TapoConfig) -> IntArray:
    """Part 7: the gate of each step, (S,). Later lines override earlier ones."""
    found = match.reference_group >= 0
    gate = np.full(len(role), Gate.NONE)
    gate[role == Role.FAILING] = Gate.NO_WITNESS
    gate[match.witness >= 0] = Gate.BELOW_THETA
    gate[found] = Gate.BELOW_ALPHA
    gate[found & (alpha >= cfg.alpha_min)] = Gate.CORRECTED
    return gate
