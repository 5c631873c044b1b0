"""The rule of `verl_tapo.rule.credit` as plain loops: slow, and easy to check.

This is the file to review. Nothing here is vectorised, parts are numbered as in the paper's rule, and a property test
holds the fast code to it on thousands of random batches. Rows are rollouts here.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from verl_tapo.rule.config import TapoConfig
from verl_tapo.rule.similarity import ABSENT, number_values, similarities
from verl_tapo.rule.steps import ToolStep


@dataclass
class Outcome:
    """The outcome of a step, with the fields of `verl_tapo.StepCredit`."""

    role: str = "none"
    gate: str = ""
    similarity: float = 0.0
    support: float = 0.0
    alpha: float = 0.0
    reference_advantage: float = 0.0
    transfer: float = 0.0
    forgiven: bool = False
    withheld: bool = False
    witnesses: set[int] = field(default_factory=set)
    """The most similar witness steps; the fast code names one of them."""


class _Group(NamedTuple):
    """A reference group, seen from a failing step."""

    similarity: float
    support: float
    advantage: float
    earliest_row: int
    members: list[int]


def call_similarity(u: ToolStep, v: ToolStep, cfg: TapoConfig) -> float:
    """``s(u, v)`` of two calls of one tool: the minimum over the parameters that count, 0 if only one call has one."""
    values = [1.0]
    for name in {**u.arguments, **v.arguments}:
        kernel = cfg.kernel(u.tool, name)
        given = [step.arguments[name] if _counts(step, name, cfg) else ABSENT for step in (u, v)]
        distinct, numbers = number_values(kernel, given)
        values.append(float(similarities(kernel, distinct, numbers[:1], numbers[1:])[0]))
    return min(values)


def _counts(step: ToolStep, name: str, cfg: TapoConfig) -> bool:
    return name in step.arguments and not cfg.kernel(step.tool, name, step.arguments).ignores


class Reference:
    """One batch. The arguments are those of `verl_tapo.transfer_credit`."""

    def __init__(
        self,
        base: torch.Tensor,
        response_mask: torch.Tensor,
        index: Sequence[Hashable],
        success: Sequence[bool],
        steps: Sequence[ToolStep],
        cfg: TapoConfig,
        similarity: Callable[[ToolStep, ToolStep, TapoConfig], float] = call_similarity,
        recognisable: Sequence[bool] | None = None,
    ) -> None:
        self.base, self.mask = base.tolist(), response_mask.tolist()
        self.index, self.success, self.steps, self.cfg = index, success, steps, cfg
        self.recognisable = [False] * len(base) if recognisable is None else recognisable
        self._similarity, self._dtype = similarity, base.dtype
        # a: the mean base advantage of a rollout's policy tokens.
        rows = zip(self.base, self.mask, strict=True)
        self.a = [_mean([x for x, m in zip(*row, strict=True) if m]) for row in rows]

    def transfer(self) -> tuple[torch.Tensor, list[Outcome]]:
        """Returns the corrected advantages (B, L) and the outcome of each step."""
        outcomes = [Outcome(role=self.role(step)) for step in self.steps]
        for step, outcome in zip(self.steps, outcomes, strict=True):
            if outcome.role == "failing":
                self.judge(step, outcome, [k for k, other in enumerate(outcomes) if other.role == "witness"])
        for step, outcome in zip(self.steps, outcomes, strict=True):
            outcome.forgiven = outcome.role == "failing" and self.forgiven(step)
            outcome.withheld = self.withheld(step.row)
        return self.corrected(outcomes), outcomes

    def role(self, step: ToolStep) -> str:
        """Parts 1 and 2; (9) a success whose reward is withheld is a failure."""
        if not step.ok or not self.takes_part(step):
            return "none"
        if self.counts_as_success(step.row):
            return "witness"
        failed = not self.success[step.row] or self.withheld(step.row)
        return "failing" if failed and self.a[step.row] < 0 else "none"

    def takes_part(self, step: ToolStep) -> bool:
        """Returns whether the step calls a declared tool. By default a call without a parameter
        that counts is no evidence."""
        counts = self.cfg.tools is not None or any(_counts(step, name, self.cfg) for name in step.arguments)
        return counts and self.cfg.takes_part(step.tool)

    def counts_as_success(self, row: int) -> bool:
        """(1) and (5): ``y`` and ``a > 0``; (9) not if its reward is withheld, and with ``grounding.witnesses`` only if
        it is not known to be ungrounded."""
        lucky = self.withheld(row) or (self.cfg.grounding.witnesses and self.grounded(row) is False)
        return self.success[row] and self.a[row] > 0 and not lucky

    def grounded(self, row: int) -> bool | None:
        """(9) Returns whether some tool's answer held an accepted answer; None if that is unknown."""
        sights = [step.seen for step in self.steps if step.row == row]
        if True in sights:
            return True
        return None if None in sights or not sights else False

    def forgiven(self, step: ToolStep) -> bool:
        """(9) ``grounding.own``: calls up to the first sight of an accepted answer lose their penalty."""
        sights = [other.turn[0] for other in self.steps if other.row == step.row and other.seen]
        return self.cfg.grounding.own and bool(sights) and step.turn[0] <= min(sights)

    def withheld(self, row: int) -> bool:
        """(9) ``grounding.luck``: a success that is known to have found nothing is a failure. One without calls has
        found nothing where an answer is recognisable, or a sibling's call shows that it is."""
        silent = all(step.row != row for step in self.steps)
        told = any(step.seen is not None for step in self.steps if self.index[step.row] == self.index[row])
        lucky = self.grounded(row) is False or (silent and (told or self.recognisable[row]))
        return self.cfg.grounding.luck and self.success[row] and lucky

    def earned(self, scores: Sequence[float]) -> list[float]:
        """(9) The scores from which the base advantages are to be computed: a withheld reward becomes that of the
        prompt group's failures, on average."""
        result = list(scores)
        for row, score in enumerate(scores):
            if self.withheld(row):
                siblings = [i for i in range(len(scores)) if self.index[i] == self.index[row]]
                result[row] = min(score, _mean([scores[i] for i in siblings if not self.success[i]]))
        return result

    def judge(self, failing: ToolStep, outcome: Outcome, witnesses: list[int]) -> None:
        """Parts 3 to 7, for one failing step."""
        witnesses = [k for k in witnesses if self.comparable(failing, self.steps[k])]
        if not witnesses:
            outcome.gate = "no_witness"
            return
        s = {k: self._similarity(failing, self.steps[k], self.cfg) for k in witnesses}
        # (6) The most similar group; ties go to the larger support, the larger advantage, the earliest row.
        groups = [self.described(members, s) for members in self.linked(witnesses)]
        best = max(groups, key=lambda g: (g.similarity, g.support, g.advantage, -g.earliest_row))
        outcome.similarity = best.similarity
        # (7)
        if best.similarity < self.cfg.theta:
            outcome.gate = "below_theta"
            outcome.witnesses = {k for k in witnesses if s[k] == best.similarity}
            return
        outcome.witnesses = {k for g in groups if g[:4] == best[:4] for k in g.members if s[k] == best.similarity}
        outcome.support, outcome.reference_advantage = best.support, best.advantage
        outcome.alpha = best.similarity * best.support
        if outcome.alpha < self.cfg.alpha_min:
            outcome.gate = "below_alpha"
            return
        outcome.gate = "corrected"
        outcome.transfer = self.cfg.beta * outcome.alpha * best.advantage

    def comparable(self, step: ToolStep, other: ToolStep) -> bool:
        """Returns whether two calls are of one tool and, unless ``scope="batch"``, of one prompt
        group."""
        return step.tool == other.tool and (self.cfg.scope == "batch" or self.index[step.row] == self.index[other.row])

    def linked(self, witnesses: list[int]) -> list[list[int]]:
        """(3) Connected components of the witness steps, linked if ``s >= theta``."""
        components, left = [], list(witnesses)
        while left:
            component, frontier = [], [left.pop(0)]
            while frontier:
                k = frontier.pop()
                component.append(k)
                near = [j for j in left if self._similarity(self.steps[k], self.steps[j], self.cfg) >= self.cfg.theta]
                left = [j for j in left if j not in near]
                frontier += near
            components.append(component)
        return components

    def described(self, members: list[int], s: dict[int, float]) -> _Group:
        """(4) and (5) of one reference group, and its similarity to the failing step."""
        holders = {self.steps[k].row for k in members}
        prompts = {self.index[i] for i in holders}
        successes = [i for i in range(len(self.a)) if self.counts_as_success(i) and self.index[i] in prompts]
        support = len(holders) / len(successes) if self.cfg.use_support else 1.0
        advantage = _mean([self.a[i] for i in sorted(holders)])
        return _Group(max(s[k] for k in members), support, advantage, min(holders), members)

    def corrected(self, outcomes: list[Outcome]) -> torch.Tensor:
        """(8) and (9), token by token. Of several steps that hold it, all must agree: the least transfer counts."""
        result = [list(row) for row in self.base]
        spans = [(s.row, *s.span(self.cfg.token_scope), o) for s, o in zip(self.steps, outcomes, strict=True)]
        for i, row in enumerate(result):
            unearned = self.withheld(i)
            for t, base in enumerate(row):
                holding = [outcome for holder, start, end, outcome in spans if holder == i and start <= t < end]
                if holding and base < 0 and self.mask[i][t]:
                    row[t] = self.lessened(base, holding)
                elif unearned and base > 0 and self.mask[i][t]:
                    row[t] = 0.0
        return torch.tensor(result, dtype=self._dtype)

    def lessened(self, penalty: float, holding: list[Outcome]) -> float:
        """A negative advantage after parts 8 and 9."""
        transfers = [outcome.transfer for outcome in holding if not outcome.forgiven]
        if not transfers:
            return 0.0
        if min(transfers) <= 0:
            return penalty
        value = penalty + min(transfers)
        return min(0.0, value) if self.cfg.clip else value


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
