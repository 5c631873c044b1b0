"""Adds up the steps of a run to the audit's result."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

import numpy as np

from verl_tapo.audit.advice import Tally, find_warnings
from verl_tapo.audit.analysis import Counts, Setting, StepAnalysis, Sweep, figures
from verl_tapo.audit.browse import Browse
from verl_tapo.audit.model import StepBatch
from verl_tapo.audit.sources import Problems
from verl_tapo.settings import TapoSettings
from verl_tapo.step_records import json_value

RESULT_VERSION = 1
_BINS = 20
_PLOTTED = 3000  # calls in the plot of support and alpha
_PLOTTED_GATES = ("corrected", "below_alpha", "below_theta")
_SCALAR_SETTINGS = ("beta", "theta", "alpha_min", "token_scope", "scope", "use_support", "clip", "tools")


class Sample:
    """An even sample of bounded size: every k-th of what comes, k doubling as more comes."""

    def __init__(self, limit: int) -> None:
        self.limit, self._every, self._seen = limit, 1, 0
        self.items: list[Any] = []

    def add(self, item: Any) -> None:
        if self._seen % self._every == 0:
            self.items.append(item)
            if len(self.items) > self.limit:
                self.items = self.items[::2]
                self._every *= 2
        self._seen += 1


class Collector:
    """Takes a run's steps in turn and holds what the report needs of them."""

    def __init__(self, settings: TapoSettings, sweep: Iterable[Setting], browse: int) -> None:
        self._settings = settings
        self._steps: dict[int, Counts] = {}
        self._totals = Counts()
        self._tools: dict[str, Counts] = defaultdict(Counts)
        self._histogram = {gate: np.zeros(_BINS, dtype=np.int64) for gate in _PLOTTED_GATES}
        self._sample = Sample(_PLOTTED)
        self._sweep = Sweep(settings.rule, sweep)
        self._browse = Browse(browse)
        self._tally = Tally()

    def add(self, analysis: StepAnalysis) -> None:
        batch, counts = analysis.batch, analysis.counts()
        self._tally.repeated_steps += batch.again
        self._steps.setdefault(batch.step, Counts()).add(counts)
        self._totals.add(counts)
        for tool, of_tool in analysis.tool_counts().items():
            self._tools[tool].add(of_tool)
        self._plot(analysis)
        self._note(batch)
        self._sweep.add(batch)
        self._browse.add(analysis)

    def _plot(self, analysis: StepAnalysis) -> None:
        theta = analysis.cfg.theta
        for judged in analysis.calls:
            credit = judged.credit
            if credit.gate in self._histogram:
                self._histogram[credit.gate][min(_BINS - 1, int(credit.similarity * _BINS))] += 1
                self._tally.near_theta += theta - 0.1 <= credit.similarity < theta
                if credit.matched:
                    self._sample.add([credit.support, credit.similarity, credit.gate])

    def _note(self, batch: StepBatch) -> None:
        if batch.settings is None:  # read from text
            calls = [call for trajectory in batch.trajectories for call in trajectory.calls]
            self._tally.told_by_history += sum(call.compared is not call.arguments for call in calls)
            judged = [trajectory.judged for trajectory in batch.trajectories if trajectory.judged is not None]
            self._tally.judged = (min([self._tally.judged[0], *judged]), max([self._tally.judged[1], *judged]))
            self._tally.unclear += sum(trajectory.unclear for trajectory in batch.trajectories)
            self._tally.calling += sum(bool(trajectory.calls) for trajectory in batch.trajectories)

    def disagree(self, calls: int) -> None:
        """Takes note of calls that were recorded with another outcome."""
        self._tally.disagreements += calls

    def result(
        self,
        *,
        title: str,
        sources: Sequence[str],
        left_out: Sequence[str],
        problems: Problems,
        base_estimator: str,
        recorded_steps: int,
        replaced_kernels: Sequence[str],
    ) -> dict[str, Any]:
        """The audit as JSON can hold it, see `verl_tapo.audit.Audit.result`."""
        rule = _rule(self._settings)
        self._tally.replaced_kernels = replaced_kernels
        tools = sorted(self._tools.items(), key=lambda item: (-item[1]["calls"], item[0]))
        warnings = find_warnings(self._totals, dict(tools), self._tally, self._settings, problems)
        return {
            "version": RESULT_VERSION,
            "title": title,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "sources": list(sources),
            "left_out": list(left_out),
            "settings": {**rule, "base_estimator": base_estimator, "recorded_steps": recorded_steps},
            "steps": [{"step": step, **figures(counts)} for step, counts in sorted(self._steps.items())],
            "totals": figures(self._totals),
            "tools": {tool: figures(counts) for tool, counts in tools},
            "similarity_histogram": {
                "edges": [number / _BINS for number in range(_BINS + 1)],
                **{gate: counts.tolist() for gate, counts in self._histogram.items()},
            },
            "support_alpha": self._sample.items,
            "sweeps": self._sweep.rows(),
            "warnings": warnings,
            "problems": [problem._asdict() for problem in problems.listed()],
            "skipped": problems.skipped,
            "groups": self._browse.groups(),
        }


def _rule(settings: TapoSettings) -> dict[str, Any]:
    """The rule's settings, as JSON can hold them."""
    rule = settings.rule
    scalars = {name: json_value(getattr(rule, name)) for name in _SCALAR_SETTINGS}
    return {**scalars, "grounding": asdict(rule.grounding)}
