"""What the rule did: a record of each step, and figures of the batch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from verl_tapo.rule import figures
from verl_tapo.rule.arrays import BoolArray, FloatArray, IntArray, distinct_pairs
from verl_tapo.rule.figures import Facts, RolloutFacts
from verl_tapo.rule.inputs import Batch
from verl_tapo.rule.matching import Match
from verl_tapo.rule.roles import Gate, Role, is_matched

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

_TOOLS = 20
_NUMBERS = {name: gate for gate, name in _GATES.items()}


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
    """Its rollout's success counts as a failure, because it found nothing: ``grounding.luck``."""

    @property
    def matched(self) -> bool:
        """Whether it is misassigned: it has an equivalent call in a successful rollout."""
        return bool(is_matched(_NUMBERS[self.gate]))

    @property
    def compared(self) -> bool:
        """Whether its similarity to a witness is known."""
        return _NUMBERS[self.gate] > Gate.NO_WITNESS


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
        lucky: BoolArray = (self.lift <= figures.ROUNDING) & ~self.universal
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
        # (S,), and (T,)
        self._forgiven, self._withheld = forgiven, withheld
        self._steps: list[StepCredit] | None = None
        self.changed_tokens = changed_tokens
        """Number of tokens whose advantage was corrected, or withheld."""

    @property
    def advantage_of_row(self) -> FloatArray:
        """(B,) ``a`` of each row's trajectory."""
        return self._batch.advantage[self._batch.rollout_of_row]

    @property
    def withheld_of_row(self) -> BoolArray:
        """(B,) whether each row's success counts as a failure: ``grounding.luck``."""
        return self._withheld[self._batch.rollout_of_row]

    @property
    def recognisable_of_row(self) -> BoolArray:
        """(B,) see `verl_tapo.transfer_credit`."""
        return self._batch.recognisable[self._batch.rollout_of_row]

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
                    self._withheld[self._batch.holder].tolist(),
                    strict=True,
                )
            ]
        return self._steps

    def metrics(self) -> dict[str, float]:
        """Flat figures of this batch; every key starts with ``tapo/``, no value is NaN.

        `verl_tapo.rule.figures` says what each means.

        No name contains ``max``, ``min``, ``sum`` or ``total``: veRL's aggregator would not average it.
        """
        counts = self._counts()
        metrics = {f"tapo/{name}": value for name, value in figures.shares_of(counts, figures.FIGURES).items()}
        return {**metrics, **self._tool_metrics(counts["trajectories"])}

    @cached_property
    def facts(self) -> Facts:
        """What the rule found, as columns: what figures are reckoned from."""
        lifts, steps = self.lifts(), self._batch.steps
        lucky = np.append(lifts.lucky, False)[lifts.of_step]
        return Facts(
            steps.tool,
            steps.ok,
            steps.seen,
            self._role,
            self._gate,
            self._match.similarity,
            self._match.support,
            self._alpha,
            self._match.reference_advantage,
            self._transfer,
            lucky,
            self._forgiven,
        )

    def _counts(self) -> dict[str, float]:
        """What is counted over steps, rollouts, tokens and reference groups."""
        batch = self._batch
        real = batch.policy_tokens > 0
        misassigned, corrected = np.zeros_like(real), np.zeros_like(real)
        misassigned[batch.holder[self.facts.matched]] = True
        corrected[batch.holder[self.facts.corrected]] = True
        rollouts = RolloutFacts(
            batch.group[real],
            batch.success[real],
            batch.advantage[real],
            misassigned[real],
            corrected[real],
            self._withheld[real],
        )
        return {
            **figures.counts_of(self.facts),
            **figures.counts_of_rollouts(rollouts),
            **figures.counts_of_lift(self.lifts().lift),
            "changed_size": float(self.changed_tokens),
            "size": float(batch.policy_tokens.sum()),
        }

    def lifts(self) -> Lifts:
        """By how much trajectories that hold a matched reference group's call succeed more often than others."""
        return self._lifts

    @cached_property
    def _lifts(self) -> Lifts:
        batch, holder = self._batch, self._batch.holder
        real = batch.policy_tokens > 0
        size = np.bincount(batch.group, weights=real)
        rate = np.bincount(batch.group, weights=real & batch.success) / np.maximum(size, 1)
        matched = is_matched(self._gate)
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

    def _tool_metrics(self, trajectories: float) -> dict[str, float]:
        of_tool = [figure for figure in figures.FIGURES if figure.by_tool]
        counts = figures.counts_by_tool(self.facts)
        worked = {tool: of["calls"] - of["failed_calls"] for tool, of in counts.items()}
        metrics: dict[str, float] = {}
        # A model may invent any number of tool names: only those that worked, the most used ones, become curves.
        for tool in sorted(filter(worked.get, worked), key=lambda tool: (-worked[tool], tool))[:_TOOLS]:
            values = figures.shares_of({**counts[tool], "trajectories": trajectories}, of_tool)
            metrics.update({f"tapo/tool/{metric_word(tool)}/{name}": value for name, value in values.items()})
        return metrics


def metric_word(name: str) -> str:
    """A tool's name as a part of a metric's name: plain characters, and none of the words that make veRL's metrics
    aggregator take a maximum, minimum or sum instead of a mean (``summarise`` becomes ``s-ummarise``)."""
    plain = re.sub(r"[^A-Za-z0-9_.-]", "_", name)[:64]
    return re.sub(r"(?i)(m)(ax|in)|(s)(um)|(t)(otal)", lambda m: "-".join(g for g in m.groups() if g), plain)
