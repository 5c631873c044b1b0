"""The rule on one training step's trajectories, and what there is to say about it, as counts that can be added up.

The rule is `verl_tapo.transfer_credit` itself, on a batch of one cell per turn: under a group estimator every token
of a rollout has the same advantage, so that cells say as much as tokens do. What a turn with parallel calls gets, and
the cut-off at 0, is reckoned here, for other settings too.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from verl_tapo.audit.model import Call, StepBatch, Trajectory
from verl_tapo.rule import figures as meaning
from verl_tapo.rule.config import TapoConfig
from verl_tapo.rule.credit import transfer_credit
from verl_tapo.rule.figures import Facts, RolloutFacts
from verl_tapo.rule.report import CreditReport, StepCredit
from verl_tapo.rule.steps import SIGHTS, ToolStep


class Counts(defaultdict[str, float]):
    """Named sums."""

    def __init__(self, **values: float) -> None:
        super().__init__(float, values)

    def add(self, other: Mapping[str, float]) -> None:
        for name, value in other.items():
            self[name] += value


class JudgedCall(NamedTuple):
    """A call, and what the rule says of it."""

    holder: Trajectory
    place: tuple[int, int]
    """Number of its trajectory in the step, and its own there."""
    call: Call
    credit: StepCredit
    lift: float | None
    """Of its reference group; None where it has none."""
    lucky: bool
    """Whether its witnesses are, see `verl_tapo.rule.report.Lifts.lucky`."""
    only_success: bool
    """Whether its prompt group has one success, whose lift is never below 0: nothing tells there whether it is luck."""
    inexact: bool
    """Whether it is misassigned, and equal to none of its witnesses, only similar."""
    after: float
    """Advantage of its tokens under TAPO."""
    changed: bool


@dataclass
class StepAnalysis:
    """One training step, judged."""

    batch: StepBatch
    cfg: TapoConfig
    calls: list[JudgedCall]
    lifts: list[tuple[str, float]]
    """Tool and lift of each matched reference group."""
    facts: Facts | None = None
    """What the rule found for `calls`; None where there are no trajectories."""
    withheld: frozenset[int] = frozenset()
    """Numbers of the trajectories whose success counts as a failure: ``grounding.luck``."""

    def changed_size(self) -> int:
        """Policy tokens with another advantage, as far as the calls tell."""
        return _changed_size(self.calls, dict(enumerate(self.batch.trajectories)), self.cfg, self.withheld)

    def counts(self) -> Counts:
        """All that can be counted; see `figures`."""
        trajectories = self.batch.trajectories
        counts = tally(self.calls, dict(enumerate(trajectories)), self.cfg, self.withheld)
        if self.facts is not None:
            counts.add(meaning.counts_of(self.facts))
        counts.add(meaning.counts_of_lift(np.array([lift for _, lift in self.lifts])))
        recorded = [trajectory.changed for trajectory in trajectories]
        if None not in recorded:
            counts["changed_size"] = sum(filter(None, recorded))
        groups: dict[str, list[Trajectory]] = defaultdict(list)
        for trajectory in trajectories:
            groups[trajectory.group].append(trajectory)
        for members in groups.values():
            right = sum(trajectory.success for trajectory in members)
            counts["single_groups"] += len(members) == 1
            counts["all_right_groups"] += right == len(members)
            counts["all_wrong_groups"] += right == 0
            one_sided = right in (0, len(members))
            counts["one_sided_scored_groups"] += one_sided and len({trajectory.score for trajectory in members}) > 1
        return counts

    def tool_counts(self) -> dict[str, Counts]:
        """The same for each tool, of its calls and the trajectories that made one."""
        by_tool: dict[str, list[JudgedCall]] = defaultdict(list)
        for judged in self.calls:
            by_tool[judged.call.tool].append(judged)
        counts = {tool: tally(calls, _holders(calls), self.cfg, self.withheld) for tool, calls in by_tool.items()}
        for tool, sums in meaning.counts_by_tool(self.facts).items() if self.facts is not None else ():
            counts[tool].add(sums)
        lifts: dict[str, list[float]] = defaultdict(list)
        for tool, lift in self.lifts:
            lifts[tool].append(lift)
        for tool, of_tool in lifts.items():
            counts[tool].add(meaning.counts_of_lift(np.array(of_tool)))
        return counts


def _holders(calls: Iterable[JudgedCall]) -> dict[int, Trajectory]:
    return {judged.place[0]: judged.holder for judged in calls}


def _changed_size(
    calls: Iterable[JudgedCall], holders: Mapping[int, Trajectory], cfg: TapoConfig, withheld: frozenset[int]
) -> int:
    unearned = {number: t.size for number, t in holders.items() if number in withheld and t.advantage > 0}
    whole = sum(unearned.values())
    partly = [judged for judged in calls if judged.changed and judged.place[0] not in unearned]
    if cfg.token_scope == "call":
        return whole + sum(judged.call.call_size for judged in partly)
    return whole + sum({(judged.place[0], judged.call.turn): judged.call.turn_size for judged in partly}.values())


def tally(
    calls: Sequence[JudgedCall], holders: Mapping[int, Trajectory], cfg: TapoConfig, withheld: frozenset[int]
) -> Counts:
    """Counts of some calls and their trajectories, besides `verl_tapo.rule.figures.COUNTS`.

    Args:
        calls: of one training step.
        holders: the trajectories by their numbers in the step.
        cfg: the rule's settings.
        withheld: numbers of the trajectories whose success counts as a failure.
    """
    trajectories = list(holders.values())
    state = np.array([SIGHTS[t.grounded] for t in trajectories], dtype=np.int64)
    success = np.array([t.success for t in trajectories], dtype=bool)
    misassigned = {judged.place[0] for judged in calls if judged.credit.matched}
    corrected = {judged.place[0] for judged in calls if judged.credit.gate == "corrected"}
    facts = RolloutFacts(
        np.array([t.group for t in trajectories], dtype=object),
        success,
        np.array([t.advantage for t in trajectories], dtype=np.float64),
        np.array([number in misassigned for number in holders], dtype=bool),
        np.array([number in corrected for number in holders], dtype=bool),
        np.array([number in withheld for number in holders], dtype=bool),
    )
    counts = Counts(
        size=sum(t.size for t in trajectories),
        changed_size=_changed_size(calls, holders, cfg, withheld),
        penalty=-sum(t.advantage * t.size for t, fails in zip(trajectories, facts.failing, strict=True) if fails),
        penalty_removed=_removed(calls, cfg),
    )
    counts.add({**meaning.counts_of_rollouts(facts), **meaning.counts_of_grounding(state, success)})
    for judged in calls:
        counts["malformed_calls"] += judged.call.status == "malformed"
        counts["unanswered_calls"] += judged.call.status == "unanswered"
        counts["only_success_steps"] += judged.credit.matched and judged.only_success
    return counts


def _removed(calls: Iterable[JudgedCall], cfg: TapoConfig) -> float:
    """By how much the sum of failing rollouts' advantages over their tokens rises."""
    rise: dict[tuple[int, ...], float] = {}
    for judged in calls:
        if judged.changed and judged.holder.advantage < 0:
            whole = cfg.token_scope == "step"
            place = (judged.place[0], judged.call.turn) if whole else (*judged.place, -1)
            size = judged.call.turn_size if whole else judged.call.call_size
            rise[place] = (judged.after - judged.holder.advantage) * size
    return sum(rise.values())


_COUNTED = (
    "prompts trajectories successes failing_trajectories misassigned_trajectories correctable_trajectories calls "
    "only_success_steps malformed_calls unanswered_calls single_groups all_right_groups all_wrong_groups "
    "reference_groups told_trajectories told_successes grounded_successes told_failures grounded_failures "
    "never_found_trajectories withheld_trajectories"
).split()
_SHARES = {
    "success_rate": ("successes", "trajectories"),
    "token_share": ("changed_size", "size"),
    "penalty_removed": ("penalty_removed", "penalty"),
}


def figures(counts: Mapping[str, float]) -> dict[str, float | None]:
    """Counts as they are, shares and means derived from them; None where there is nothing to divide by.

    - those of `verl_tapo.rule.figures`: the counts of its shares, and the others' values
    - ``only_success_steps``: misassigned steps of prompt groups with one success, where no witness can be told lucky
    - ``penalty_removed``: of the sum of failing rollouts' negative advantages over their tokens, the part taken away
    """
    counted = dict.fromkeys([*_COUNTED, *(name for name in meaning.COUNTS if not name.endswith("_sum"))])
    return {
        **{name: int(counts.get(name, 0)) for name in counted},
        **{figure.name: figure.of(counts) for figure in meaning.FIGURES if figure.unit != "share"},
        **{
            name: counts.get(part, 0) / counts[whole] if counts.get(whole) else None
            for name, (part, whole) in _SHARES.items()
        },
    }


_Floats: TypeAlias = npt.NDArray[np.float64]
_Ints: TypeAlias = npt.NDArray[np.int64]


class _Cells(NamedTuple):
    """A step's calls for the rule, a row of one token a turn. C calls; B rows, one more for each silent rollout."""

    base: torch.Tensor  # (B, 1)
    holder: list[int]
    """(B,) number of each row's trajectory."""
    steps: list[ToolStep]
    """(C,)"""
    turn: _Ints
    """(C,) number of each call's turn, in order; calls of one turn follow each other."""


def _cells(trajectories: Sequence[Trajectory]) -> _Cells:
    holder: list[int] = []
    steps: list[ToolStep] = []
    turns: list[tuple[int, int]] = []
    for number, trajectory in enumerate(trajectories):
        for call in trajectory.calls:
            if turns[-1:] != [(number, call.turn)]:
                holder.append(number)
            turns.append((number, call.turn))
            steps.append(ToolStep(len(holder) - 1, call.tool, call.compared, (0, 1), (0, 1), call.ok, call.seen))
        if not trajectory.calls:
            holder.append(number)
    base = torch.tensor([[trajectories[number].advantage] for number in holder], dtype=torch.float64)
    begins = np.array([turn != before for turn, before in zip(turns, [None, *turns], strict=False)], dtype=np.int64)
    return _Cells(base, holder, steps, begins.cumsum() - 1)


def _apply(cells: _Cells, trajectories: Sequence[Trajectory], cfg: TapoConfig) -> CreditReport:
    groups = [trajectories[number].group for number in cells.holder]
    success = [trajectories[number].success for number in cells.holder]
    recognisable = [trajectories[number].recognisable for number in cells.holder]
    mask = torch.ones_like(cells.base, dtype=torch.int64)
    return transfer_credit(
        cells.base, mask, groups, success, cells.steps, cfg, trajectory=cells.holder, recognisable=recognisable
    )[1]


class _Outcome(NamedTuple):
    """What the rule made of C calls."""

    corrected: npt.NDArray[np.bool_]
    alpha: _Floats
    transfer: _Floats
    forgiven: npt.NDArray[np.bool_]


def _outcome(steps: Sequence[StepCredit]) -> _Outcome:
    return _Outcome(
        np.array([credit.gate == "corrected" for credit in steps], dtype=bool),
        np.array([credit.alpha for credit in steps]),
        np.array([credit.transfer for credit in steps]),
        np.array([credit.forgiven for credit in steps], dtype=bool),
    )


def _changed(before: _Floats, transfer: _Floats, of: _Outcome, unit: _Ints, clip: bool) -> _Floats:
    """The advantages (C,) after the calls' transfers, of which each unit (a turn, or a call) gets the smallest; a
    forgiven call's is unlimited."""
    if not len(unit):
        return before
    first = np.unique(unit, return_index=True)[1]
    least = np.minimum.reduceat(np.where(of.forgiven, np.inf, transfer), first)[unit]
    lifted = np.where(np.isinf(least), 0.0, before + least)
    after: _Floats = np.where(least > 0, np.minimum(lifted, 0.0) if clip else lifted, before)
    return after


def _withheld(cells: _Cells, report: CreditReport) -> frozenset[int]:
    return frozenset(number for number, none in zip(cells.holder, report.withheld_of_row, strict=True) if none)


def analyse(batch: StepBatch, cfg: TapoConfig) -> StepAnalysis:
    """Judges every call of a training step.

    Raises:
        ValueError: where the rule refuses a call, see `verl_tapo.transfer_credit`.
    """
    trajectories = batch.trajectories
    if not trajectories:
        return StepAnalysis(batch, cfg, [], [])
    cells = _cells(trajectories)
    report = _apply(cells, trajectories, cfg)
    lifts = report.lifts()
    lucky, lift, inexact = lifts.lucky.tolist(), lifts.lift.tolist(), report.facts.inexact.tolist()
    places = [(number, place) for number, t in enumerate(trajectories) for place in range(len(t.calls))]
    before = np.array([trajectories[number].advantage for number, _ in places])
    unit = cells.turn if cfg.token_scope == "step" else np.arange(len(places))
    outcome = _outcome(report.steps)
    after = _changed(before, outcome.transfer, outcome, unit, cfg.clip).tolist()
    calls = []
    tools: dict[int, str] = {}
    successes = Counter(t.group for t in trajectories if t.success)
    rows = zip(places, report.steps, lifts.of_step.tolist(), inexact, after, strict=True)
    for place, credit, group, alike, value in rows:
        holder = trajectories[place[0]]
        gain, luck = (lift[group], lucky[group]) if group >= 0 else (None, False)
        single = successes[holder.group] == 1 and cfg.scope == "group"
        value = min(value, 0.0) if credit.withheld else value
        call, changed = holder.calls[place[1]], value != holder.advantage
        tools[group] = call.tool
        credit = replace(credit, row=place[0])
        calls.append(JudgedCall(holder, place, call, credit, gain, luck, single, alike, value, changed))
    of_groups = [(tools[group], value) for group, value in enumerate(lift)]
    return StepAnalysis(batch, cfg, calls, of_groups, report.facts, _withheld(cells, report))


class Setting(NamedTuple):
    """One combination of a sweep."""

    beta: float
    theta: float
    alpha_min: float


class Sweep:
    """What other settings would do, summed up over the steps added.

    Args:
        cfg: the settings in use; of a sweep's settings, all but the three.
        settings: to be tried.
    """

    def __init__(self, cfg: TapoConfig, settings: Iterable[Setting]) -> None:
        self._cfg = cfg
        self.counts: dict[Setting, Counts] = {setting: Counts() for setting in settings}
        """For each setting: ``corrected_steps``, ``changed_size``, ``size``, and ``after_sum`` over corrected calls."""
        # Made once: a configuration's kernels may hold a model.
        self._at = {s.theta: replace(cfg, theta=s.theta, alpha_min=0.0, beta=1.0) for s in self.counts}

    def add(self, batch: StepBatch) -> None:
        """The costly part, comparing the calls, is done once for each theta."""
        cells = _cells(batch.trajectories)
        whole = self._cfg.token_scope == "step"
        calls = [call for t in batch.trajectories for call in t.calls]
        size = sum(t.size for t in batch.trajectories)
        before = np.array([t.advantage for t in batch.trajectories for _ in t.calls])
        sizes = np.array([call.turn_size if whole else call.call_size for call in calls], dtype=np.int64)
        unit = cells.turn if whole else np.arange(len(calls))
        first = np.unique(unit, return_index=True)[1]
        for theta, cfg in self._at.items():
            report = _apply(cells, batch.trajectories, cfg) if calls else None
            of = _outcome(report.steps if report else [])
            withheld = [batch.trajectories[number] for number in _withheld(cells, report)] if report else []
            unearned = sum(trajectory.size for trajectory in withheld if trajectory.advantage > 0)
            for setting, counts in self.counts.items():
                if setting.theta != theta:
                    continue
                corrected = of.corrected & (of.alpha >= setting.alpha_min)
                counts["size"] += size
                counts["changed_size"] += unearned
                if corrected.any() or of.forgiven.any():
                    transfer = np.where(corrected, setting.beta * of.transfer, 0.0)
                    after = _changed(before, transfer, of, unit, cfg.clip)
                    counts["corrected_steps"] += int(corrected.sum())
                    counts["after_sum"] += float(after[corrected].sum())
                    counts["changed_size"] += int(sizes[first[after[first] != before[first]]].sum())

    def rows(self) -> list[dict[str, float | None]]:
        """One row for each setting; ``mean_lifted_advantage``: the corrected calls' advantage under it."""
        return [
            {
                **setting._asdict(),
                "corrected_steps": int(counts["corrected_steps"]),
                "token_share": counts["changed_size"] / counts["size"] if counts["size"] else None,
                "mean_lifted_advantage": (
                    counts["after_sum"] / counts["corrected_steps"] if counts["corrected_steps"] else None
                ),
            }
            for setting, counts in self.counts.items()
        ]


def star(cfg: TapoConfig, betas: Iterable[float], thetas: Iterable[float], alphas: Iterable[float]) -> list[Setting]:
    """The settings in use, with one of the three changed at a time."""
    used = Setting(cfg.beta, cfg.theta, cfg.alpha_min)
    changed = [
        *(used._replace(beta=value) for value in betas),
        *(used._replace(theta=value) for value in thetas),
        *(used._replace(alpha_min=value) for value in alphas),
    ]
    return sorted({used, *changed})
