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
    """What became of a step; the fields of `verl_tapo.StepCredit`."""

    role: str = "none"
    gate: str = ""
    similarity: float = 0.0
    support: float = 0.0
    alpha: float = 0.0
    reference_advantage: float = 0.0
    transfer: float = 0.0
    witnesses: set[int] = field(default_factory=set)
    """The most similar witness steps, of which the fast code names one."""


class _Group(NamedTuple):
    """A reference group, seen from a failing step."""

    similarity: float
    support: float
    advantage: float
    earliest_row: int
    members: list[int]


def call_similarity(u: ToolStep, v: ToolStep, cfg: TapoConfig) -> float:
    """``s(u, v)`` of two calls of one tool: the minimum over the parameters that count; 0 where only one has one."""
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
    """One batch; the arguments are those of `verl_tapo.transfer_credit`."""

    def __init__(
        self,
        base: torch.Tensor,
        response_mask: torch.Tensor,
        index: Sequence[Hashable],
        success: Sequence[bool],
        steps: Sequence[ToolStep],
        cfg: TapoConfig,
        similarity: Callable[[ToolStep, ToolStep, TapoConfig], float] = call_similarity,
    ) -> None:
        self.base, self.mask, self.index, self.success = base, response_mask, index, success
        self.steps, self.cfg = steps, cfg
        self._similarity = similarity
        # a: the mean base advantage of a rollout's policy tokens.
        self.a = [
            _mean([float(x) for x, m in zip(base[i], response_mask[i], strict=True) if m]) for i in range(len(base))
        ]

    def transfer(self) -> tuple[torch.Tensor, list[Outcome]]:
        """The corrected advantages (B, L), and what became of each step."""
        outcomes = [Outcome(role=self.role(step)) for step in self.steps]
        for step, outcome in zip(self.steps, outcomes, strict=True):
            if outcome.role == "failing":
                self.judge(step, outcome, [k for k, other in enumerate(outcomes) if other.role == "witness"])
        return self.corrected([outcome.transfer for outcome in outcomes]), outcomes

    def role(self, step: ToolStep) -> str:
        """Parts 1 and 2."""
        # By default a call without any parameter that counts is no evidence of anything.
        counts = self.cfg.tools is not None or any(_counts(step, name, self.cfg) for name in step.arguments)
        if not (step.ok and counts and self.cfg.takes_part(step.tool)):
            return "none"
        y, a = self.success[step.row], self.a[step.row]
        return "witness" if y and a > 0 else "failing" if not y and a < 0 else "none"

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
        """Whether two calls are of one tool, and of one prompt group unless ``scope="batch"``."""
        return step.tool == other.tool and (self.cfg.scope == "batch" or self.index[step.row] == self.index[other.row])

    def linked(self, witnesses: list[int]) -> list[list[int]]:
        """(3) Connected components of the witness steps, linked where ``s >= theta``."""
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
        successes = [i for i, y in enumerate(self.success) if y and self.a[i] > 0 and self.index[i] in prompts]
        support = len(holders) / len(successes) if self.cfg.use_support else 1.0
        advantage = _mean([self.a[i] for i in sorted(holders)])
        return _Group(max(s[k] for k in members), support, advantage, min(holders), members)

    def corrected(self, transfers: list[float]) -> torch.Tensor:
        """(8) A token in several steps' spans takes the smallest of their transfers."""
        result = self.base.clone()
        for i in range(result.shape[0]):
            spans = [
                (s.span(self.cfg.token_scope), x) for s, x in zip(self.steps, transfers, strict=True) if s.row == i
            ]
            for t in range(result.shape[1]):
                covering = [x for (start, end), x in spans if start <= t < end]
                if covering and min(covering) > 0 and self.mask[i, t] and self.base[i, t] < 0:
                    value = self.base[i, t] + torch.tensor(min(covering), dtype=self.base.dtype)
                    result[i, t] = min(value, torch.zeros_like(value)) if self.cfg.clip else value
        return result


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
