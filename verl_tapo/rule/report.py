"""What the rule did: a record of each step, and figures of the batch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from verl_tapo.rule.arrays import BoolArray, FloatArray, IntArray, distinct_pairs
from verl_tapo.rule.inputs import Batch
from verl_tapo.rule.matching import Match
from verl_tapo.rule.roles import Gate, Role

RoleName: TypeAlias = Literal["witness", "failing", "none"]
GateName: TypeAlias = Literal["corrected", "below_alpha", "below_theta", "no_witness", ""]

_ROLES: dict[int, RoleName] = {Role.NONE: "none", Role.WITNESS: "witness", Role.FAILING: "failing"}
_GATES: dict[int, GateName] = {
    Gate.NONE: "",
    Gate.NO_WITNESS: "no_witness",
    Gate.BELOW_THETA: "below_theta",
    Gate.BELOW_ALPHA: "below_alpha",
    Gate.CORRECTED: "corrected",
}

_ROUNDING = 1e-9
EQUAL = 1.0 - _ROUNDING
"""Similarity from which a step is its witness's equal, and not only like it."""


@dataclass(frozen=True)
class StepCredit:
    """What the rule found for one tool-use step."""

    row: int
    tool: str
    role: RoleName
    gate: GateName
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
    forgiven: bool = False
    """It lost its penalty, because its answer or a later one held an accepted answer: ``grounding.own``."""
    withheld: bool = False
    """It earns no reward, because its rollout's success is ungrounded: ``grounding.luck``."""


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


class CreditReport:
    """What `transfer_credit` did: `steps`, one record per given step in the given order, and `metrics()`."""

    def __init__(
        self,
        batch: Batch,
        role: IntArray,
        gate: IntArray,
        match: Match,
        alpha: FloatArray,
        transfer: FloatArray,
        forgiven: BoolArray,
        withheld: BoolArray,
        changed_tokens: int,
    ) -> None:
        # Without the mask, which is as large as the batch.
        self._batch = batch._replace(policy=batch.policy[:0])
        self._role, self._gate, self._match = role, gate, match
        self._alpha, self._transfer = alpha, transfer
        self._forgiven, self._withheld = forgiven, withheld
        self._steps: list[StepCredit] | None = None
        self.changed_tokens = changed_tokens
        """Number of tokens whose advantage was corrected, or withheld."""

    @property
    def advantage_of_row(self) -> FloatArray:
        """(B,) ``a`` of each row's trajectory."""
        return self._batch.advantage[self._batch.rollout_of_row]

    @property
    def steps(self) -> list[StepCredit]:
        """One record per given step, in the given order."""
        if self._steps is None:
            self._steps = [
                StepCredit(
                    row, tool, _ROLES[role], _GATES[gate], m, sup, alpha, abar, add, w if w >= 0 else None, free, lucky
                )
                for row, tool, role, gate, m, sup, alpha, abar, add, w, free, lucky in zip(
                    self._batch.steps.row.tolist(),
                    self._batch.steps.tool,
                    self._role.tolist(),
                    self._gate.tolist(),
                    self._match.similarity.tolist(),
                    self._match.support.tolist(),
                    self._alpha.tolist(),
                    self._match.reference_advantage.tolist(),
                    self._transfer.tolist(),
                    self._match.witness.tolist(),
                    self._forgiven.tolist(),
                    self._withheld.tolist(),
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
        batch, role, gate = self._batch, self._role, self._gate
        failing, matched, corrected = role == Role.FAILING, gate >= Gate.BELOW_ALPHA, gate == Gate.CORRECTED
        holder = batch.holder
        real = batch.policy_tokens > 0
        failed = real & ~batch.success & (batch.advantage < 0)
        metrics = {
            "tapo/misassigned_trajectories": _share(len(np.unique(holder[matched])), failed.sum()),
            "tapo/misassigned_steps": _share(matched.sum(), failing.sum()),
            "tapo/corrected_trajectories": _share(len(np.unique(holder[corrected])), failed.sum()),
            "tapo/corrected_steps": _share(corrected.sum(), failing.sum()),
            "tapo/token_share": _share(self.changed_tokens, batch.policy_tokens.sum()),
            "tapo/steps_per_trajectory": _share(len(role), real.sum()),
            "tapo/failed_calls": _share((~self._batch.steps.ok).sum(), len(role)),
            "tapo/grounding/forgiven_steps": _share(self._forgiven.sum(), failing.sum()),
            "tapo/grounding/withheld_steps": _share(self._withheld.sum(), len(role)),
            "tapo/successes_per_group": _share((real & batch.success).sum(), len(np.unique(batch.group[real]))),
        }
        if matched.any():
            similarity = self._match.similarity[matched]
            metrics["tapo/similarity"] = float(similarity.mean())
            metrics["tapo/inexact_steps"] = float((similarity < EQUAL).mean())
            metrics["tapo/support"] = float(self._match.support[matched].mean())
            metrics["tapo/alpha"] = float(self._alpha[matched].mean())
            metrics["tapo/reference_advantage"] = float(self._match.reference_advantage[matched].mean())
            lifts = self.lifts()
            metrics["tapo/lift"] = float(lifts.lift.mean())
            metrics["tapo/lucky_steps"] = float(lifts.lucky[lifts.of_step[matched]].mean())
        if corrected.any():
            metrics["tapo/transfer"] = float(self._transfer[corrected].mean())
        metrics.update(self._tool_metrics(failing, matched, corrected, real.sum()))
        return metrics

    def lifts(self) -> Lifts:
        """By how much trajectories that hold a matched reference group's call succeed more often than others."""
        batch, holder = self._batch, self._batch.holder
        real = batch.policy_tokens > 0
        size = np.bincount(batch.group, weights=real)
        rate = np.bincount(batch.group, weights=real & batch.success) / np.maximum(size, 1)
        matched = self._gate >= Gate.BELOW_ALPHA
        component = np.where(matched, self._match.reference_group, self._match.group_of_witness)
        groups = np.unique(component[matched])
        number = np.searchsorted(groups, component)
        chosen = np.isin(component, groups)
        held, holders = distinct_pairs(number[chosen], holder[chosen])
        prompts, of_prompt = distinct_pairs(held, batch.group[holders])
        count = np.bincount(held)
        return Lifts(
            np.bincount(held, weights=batch.success[holders] - rate[batch.group[holders]]) / count,
            count == np.bincount(prompts, weights=size[of_prompt]),
            np.where(matched, number, -1),
        )

    def _tool_metrics(
        self, failing: BoolArray, matched: BoolArray, corrected: BoolArray, trajectories: int
    ) -> dict[str, float]:
        metrics: dict[str, float] = {}
        tools = np.array(self._batch.steps.tool, dtype=object)
        worked, counts = np.unique(tools[self._batch.steps.ok].astype(str), return_counts=True)
        # A model may invent any number of tool names: only those that worked, the most used ones, become curves.
        for tool in worked[np.argsort(-counts, kind="stable")][:20]:
            of_tool = tools == tool
            name = f"tapo/tool/{metric_word(str(tool))}"
            metrics[f"{name}/steps_per_trajectory"] = _share(of_tool.sum(), trajectories)
            metrics[f"{name}/failed_calls"] = _share((of_tool & ~self._batch.steps.ok).sum(), of_tool.sum())
            metrics[f"{name}/misassigned_steps"] = _share((of_tool & matched).sum(), (of_tool & failing).sum())
            metrics[f"{name}/corrected_steps"] = _share((of_tool & corrected).sum(), (of_tool & failing).sum())
            if (of_tool & matched).any():
                similarity = self._match.similarity[of_tool & matched]
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
