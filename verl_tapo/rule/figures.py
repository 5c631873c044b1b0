"""What each figure of a batch means: its formula, its sentence, its range, and from where it pays to look.

The logger's metrics (`verl_tapo.rule.report`, `verl_tapo.trainer.grounding`, `verl_tapo.trainer.token_kinds`), the
audit's tables, its page and its findings, and ``docs/metrics.md`` take all that from here. A figure is a share or a
mean: one count over another. To add one, add it to `FIGURES`, and what it counts to `COUNTS` (of steps) or
`counts_of_rollouts` where that is not there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from verl_tapo.rule.arrays import BoolArray, FloatArray, IntArray, numbered
from verl_tapo.rule.roles import Gate, Role, is_matched
from verl_tapo.rule.steps import SEEN, UNKNOWN

ROUNDING = 1e-9
EQUAL = 1.0 - ROUNDING
"""Similarity from which a step is its witness's equal, and not only like it."""


class Facts(NamedTuple):
    """What the rule found, as columns. S steps."""

    tool: tuple[str, ...]
    ok: BoolArray  # (S,)
    seen: IntArray  # (S,) see `verl_tapo.rule.steps.SIGHTS`
    role: IntArray  # (S,) `Role`
    gate: IntArray  # (S,) `Gate`
    similarity: FloatArray  # (S,) and so on: see `verl_tapo.rule.report.StepCredit`
    support: FloatArray
    alpha: FloatArray
    reference_advantage: FloatArray
    transfer: FloatArray
    lucky: BoolArray
    """(S,) misassigned, and its witnesses are lucky, see `verl_tapo.rule.report.Lifts`"""
    forgiven: BoolArray

    @property
    def matched(self) -> BoolArray:
        """(S,) whether it has an equivalent call in a successful rollout: it is *misassigned*."""
        matched: BoolArray = is_matched(self.gate)
        return matched

    @property
    def corrected(self) -> BoolArray:
        """(S,) whether its credit is corrected."""
        corrected: BoolArray = self.gate == Gate.CORRECTED
        return corrected

    @property
    def inexact(self) -> BoolArray:
        """(S,) whether it is misassigned, and equal to none of its witnesses, only similar."""
        return self.matched & (self.similarity < EQUAL)


Counter: TypeAlias = Callable[[Any], Any]

COUNTS: dict[str, Counter] = {
    "calls": lambda f: np.ones(len(f.ok)),
    "failed_calls": lambda f: ~f.ok,
    "witness_steps": lambda f: f.role == Role.WITNESS,
    "failing_steps": lambda f: f.role == Role.FAILING,
    "no_witness_steps": lambda f: f.gate == Gate.NO_WITNESS,
    "below_theta_steps": lambda f: f.gate == Gate.BELOW_THETA,
    "below_alpha_steps": lambda f: f.gate == Gate.BELOW_ALPHA,
    "misassigned_steps": lambda f: f.matched,
    "corrected_steps": lambda f: f.corrected,
    "lucky_steps": lambda f: f.lucky,
    "inexact_steps": lambda f: f.inexact,
    "forgiven_steps": lambda f: f.forgiven,
    "told_answers": lambda f: f.ok & (f.seen != UNKNOWN),
    "found_answers": lambda f: f.ok & (f.seen == SEEN),
    "similarity_sum": lambda f: np.where(f.matched, f.similarity, 0.0),
    "support_sum": lambda f: np.where(f.matched, f.support, 0.0),
    "alpha_sum": lambda f: np.where(f.matched, f.alpha, 0.0),
    "reference_sum": lambda f: np.where(f.matched, f.reference_advantage, 0.0),
    "transfer_sum": lambda f: f.transfer,
}
"""What is counted, or summed up, over steps: a function of `Facts` to (S,). Sums of what is not 0 or 1 end in _sum."""


def counts_of(facts: Facts) -> dict[str, float]:
    """All `COUNTS` of some steps."""
    return {name: float(np.sum(count(facts))) for name, count in COUNTS.items()}


def counts_by_tool(facts: Facts) -> dict[str, dict[str, float]]:
    """All `COUNTS` of each tool's steps."""
    number, of_step = numbered(facts.tool)
    sums = {name: np.bincount(of_step, count(facts), len(number)).tolist() for name, count in COUNTS.items()}
    return {tool: {name: values[place] for name, values in sums.items()} for tool, place in number.items()}


class RolloutFacts(NamedTuple):
    """What the rule found of rollouts, as columns. T rollouts."""

    group: npt.NDArray[Any]
    """(T,) the prompt group."""
    success: BoolArray
    """(T,) ``y``"""
    advantage: FloatArray
    """(T,) ``a``"""
    misassigned: BoolArray
    """(T,) whether one of its steps is."""
    corrected: BoolArray
    """(T,) whether one of its steps is."""
    withheld: BoolArray
    """(T,) whether its success counts as a failure: ``grounding.luck``."""

    @property
    def failing(self) -> BoolArray:
        """(T,) whether it failed, or counts as a failure, and is punished."""
        failing: BoolArray = (~self.success | self.withheld) & (self.advantage < 0)
        return failing


def counts_of_rollouts(facts: RolloutFacts) -> dict[str, float]:
    """Those of rollouts; `counts_of_grounding` has the rest."""
    of = {
        "trajectories": np.ones_like(facts.success),
        "successes": facts.success,
        "failing_trajectories": facts.failing,
        "misassigned_trajectories": facts.misassigned,
        "correctable_trajectories": facts.corrected,
        "withheld_trajectories": facts.withheld,
    }
    return {"prompts": float(len(np.unique(facts.group))), **_sums(of)}


def counts_of_lift(lift: FloatArray) -> dict[str, float]:
    """Those of reference groups.

    Args:
        lift: (R,) see `verl_tapo.rule.report.Lifts`.
    """
    return {"reference_groups": float(len(lift)), "lift_sum": float(np.sum(lift))}


def counts_of_grounding(state: IntArray, success: BoolArray) -> dict[str, float]:
    """Of T rollouts, by whether they are grounded.

    Args:
        state: (T,) see `verl_tapo.rule.grounding.grounded`.
        success: (T,) ``y``.
    """
    told, found = state != UNKNOWN, state == SEEN
    of = {
        "trajectories": np.ones_like(told),
        "told_trajectories": told,
        "never_found_trajectories": told & ~found,
        "told_successes": told & success,
        "grounded_successes": told & success & found,
        "told_failures": told & ~success,
        "grounded_failures": told & ~success & found,
    }
    return _sums(of)


def _sums(of: Mapping[str, BoolArray]) -> dict[str, float]:
    return {name: float(rollouts.sum()) for name, rollouts in of.items()}


@dataclass(frozen=True)
class Figure:
    """One figure."""

    name: str
    """Of the metric, behind ``tapo/``."""
    part: str
    """The count that is divided."""
    whole: str
    """The count it is divided by."""
    meaning: str
    """In ``docs/metrics.md``."""
    span: Literal["0 to 1", "-1 to 1", "0 or more"] = "0 to 1"
    of_nothing: float | None = 0.0
    """Its value where the whole is 0; None: it is left out."""
    by_tool: bool = False
    """Whether there is a metric for each tool."""
    unit: Literal["share", "number", "points"] = "share"
    """How it is written."""
    column: str = ""
    """What heads it in the audit's tables by tool and by training step."""
    tables: frozenset[str] = frozenset({"terminal", "page"})
    """The tables that it is in, where it has a column."""
    beyond: float | None = None
    """The audit says something where it is more than that. The thresholds are ours: where it pays to look."""
    sentence: str = ""
    """On the audit's page, behind the share."""
    label: str = ""
    """In the audit's overview, before the share; "note" stands behind it."""
    note: str = ""

    def of(self, counts: Mapping[str, float]) -> float | None:
        """Its value; None where there is nothing to divide by."""
        whole = counts.get(self.whole)
        return counts.get(self.part, 0.0) / whole if whole else None

    def read(self, published: Mapping[str, Any]) -> float | None:
        """Its value in what an audit publishes: counts, means, and shares of what it publishes no count of."""
        if self.unit == "share" and self.part in published:
            return self.of(published)
        value: float | None = published.get(self.name)
        return value


_TERMINAL, _PAGE = frozenset({"terminal"}), frozenset({"page"})

FIGURES: list[Figure] = [
    Figure(
        "failed_calls",
        "failed_calls",
        "calls",
        "share of calls without a usable answer, malformed ones included; they neither give nor get credit",
        by_tool=True,
        column="failed",
        beyond=0.2,
    ),
    Figure(
        "misassigned_steps",
        "misassigned_steps",
        "failing_steps",
        "share of failing steps that have an equivalent call (`theta`) in a successful rollout",
        by_tool=True,
        column="misassigned",
    ),
    Figure(
        "corrected_steps",
        "corrected_steps",
        "failing_steps",
        "share of failing steps that pass `alpha_min` as well, so that their credit is corrected",
        by_tool=True,
        column="corrected",
    ),
    Figure(
        "misassigned_trajectories",
        "misassigned_trajectories",
        "failing_trajectories",
        "share of failing rollouts with a misassigned step",
    ),
    Figure(
        "corrected_trajectories",
        "correctable_trajectories",
        "failing_trajectories",
        "share of failing rollouts with a corrected step",
    ),
    Figure(
        "lucky_steps",
        "lucky_steps",
        "misassigned_steps",
        "share of misassigned steps whose call goes with no more success, although some siblings do without it",
        of_nothing=None,
        column="lucky",
        tables=_TERMINAL,
        # At most 0.05 in healthy worlds, 0.16 where successes are guesses (docs/evidence.md).
        beyond=0.1,
    ),
    Figure(
        "similarity",
        "similarity_sum",
        "misassigned_steps",
        "mean similarity of misassigned steps to their reference group, `theta` at least",
        of_nothing=None,
        by_tool=True,
        unit="number",
        column="similarity",
    ),
    Figure(
        "inexact_steps",
        "inexact_steps",
        "misassigned_steps",
        "share of misassigned steps that equal no witness and are only similar to one",
        of_nothing=None,
        by_tool=True,
        beyond=0.2,
    ),
    Figure(
        "support",
        "support_sum",
        "misassigned_steps",
        "mean share of the prompt's successful rollouts that made the call, over misassigned steps",
        of_nothing=None,
        unit="number",
        column="support",
    ),
    Figure(
        "alpha",
        "alpha_sum",
        "misassigned_steps",
        "mean confidence of misassigned steps: similarity times support",
        of_nothing=None,
        unit="number",
        column="alpha",
        tables=_PAGE,
    ),
    Figure(
        "reference_advantage",
        "reference_sum",
        "misassigned_steps",
        "mean advantage of the successful rollouts they are matched with, in units of the base advantage",
        span="0 or more",
        of_nothing=None,
        unit="number",
    ),
    Figure(
        "transfer",
        "transfer_sum",
        "corrected_steps",
        "mean of what is added to a corrected step's advantage, before the cut-off at 0",
        span="0 or more",
        of_nothing=None,
        by_tool=True,
        unit="number",
    ),
    Figure(
        "token_share",
        "changed_size",
        "size",
        "share of all policy tokens whose advantage was changed",
        column="tokens",
        tables=_TERMINAL,
    ),
    Figure(
        "lift",
        "lift_sum",
        "reference_groups",
        "how much more often rollouts with a matched call succeed than their prompt group, mean over reference groups",
        span="-1 to 1",
        of_nothing=None,
        unit="points",
        column="lift",
    ),
    Figure(
        "successes_per_group",
        "successes",
        "prompts",
        "successful rollouts of a prompt",
        span="0 or more",
        unit="number",
    ),
    Figure(
        "steps_per_trajectory",
        "calls",
        "trajectories",
        "tool calls of a rollout, failed ones and those of tools that take no part included",
        span="0 or more",
        by_tool=True,
        unit="number",
    ),
    Figure(
        "grounding/forgiven_steps",
        "forgiven_steps",
        "failing_steps",
        "share of failing steps that lost their penalty; 0 but for `grounding.own`",
    ),
    Figure(
        "grounding/withheld_trajectories",
        "withheld_trajectories",
        "trajectories",
        "share of rollouts whose success counts as a failure; 0 but for `grounding.luck`",
    ),
]
"""Those of the rule, in the order of their columns."""

TOLD = Figure(
    "grounding/told",
    "told_trajectories",
    "trajectories",
    "share of rollouts of which it can be told",
    of_nothing=None,
    label="grounding can be told",
    note="of rollouts: did a tool find the answer?",
)
GROUNDED_SUCCESSES = Figure(
    "grounding/grounded_successes",
    "grounded_successes",
    "told_successes",
    "share of successes, of those told, that are grounded; the others guessed, or knew",
    of_nothing=None,
    # The audit speaks where more than this share of the successes is ungrounded.
    beyond=0.5,
    sentence="of the successes had found the answer; the others guessed, or knew",
    label="  successes that are grounded",
    note="the others guessed, or knew",
)
GROUNDED_FAILURES = Figure(
    "grounding/grounded_failures",
    "grounded_failures",
    "told_failures",
    "share of failures that are grounded: the answer was found and not used, a reading problem",
    of_nothing=None,
    beyond=0.3,
    sentence="of the failures had found the answer and did not give it: a reading problem",
    label="  failures that are grounded",
    note="found and not given: reading",
)
NEVER_FOUND = Figure(
    "grounding/never_found",
    "never_found_trajectories",
    "told_trajectories",
    "share of rollouts, of those told, in which no tool's answer held one: a search problem",
    of_nothing=None,
    beyond=0.5,
    sentence="of the rollouts never found it: a search problem",
    label="  never found",
    note="in no tool's answer: searching",
)
GROUNDING = [TOLD, GROUNDED_SUCCESSES, GROUNDED_FAILURES, NEVER_FOUND]
"""Those of `counts_of_grounding`, for any estimator."""

FOUND = Figure(
    "found",
    "found_answers",
    "told_answers",
    "share of the tool's answers that held an accepted answer",
    of_nothing=None,
    column="answer found",
)
"""For each tool, ``tapo/grounding/tool/<tool>/found``."""


TOKEN_KINDS = {
    "calls": "calls, what ends their turn included",
    "thoughts": "thoughts before calls: in a rollout with calls, whatever else stands before the end of its last turn "
    "with one",
    "answers": "answers: what comes after the last turn with a call; in a rollout without calls, everything",
}
"""The kinds of tokens that a policy samples. Each of its tokens is of one kind."""

NLL = {
    kind: Figure(
        f"nll/{kind}",
        f"{kind}_nll_sum",
        f"{kind}_with_log_prob",
        f"mean negative log-prob, in nats a token, of {what}",
        span="0 or more",
        of_nothing=None,
        unit="number",
    )
    for kind, what in TOKEN_KINDS.items()
}
TOKEN_SHARES = {
    kind: Figure(
        f"tokens/{kind}",
        f"{kind}_tokens",
        "policy_tokens",
        f"share of all policy tokens that are {re.split('[:,]', what)[0]}",
    )
    for kind, what in TOKEN_KINDS.items()
}
"""`NLL` and these are of `verl_tapo.trainer.token_kinds`, for any estimator."""


def shares_of(counts: Mapping[str, float], figures: list[Figure]) -> dict[str, float]:
    """The values of figures by their names; what is of nothing is left out where the figure says so."""
    values = {}
    for figure in figures:
        value = figure.of(counts)
        value = figure.of_nothing if value is None else value
        if value is not None:
            values[figure.name] = value
    return values


def named(name: str) -> Figure:
    """The figure of the rule of that name."""
    return next(figure for figure in FIGURES if figure.name == name)


def columns(table: Literal["terminal", "page"]) -> list[Figure]:
    """The figures that are columns of the audit's tables by tool and by training step, there."""
    return [figure for figure in (FOUND, *FIGURES) if figure.column and table in figure.tables]
