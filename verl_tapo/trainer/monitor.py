"""The plug-in's console output: a line in each training step, and once each the defaults it chose,
the tools that take part, and what never occurred or is missing."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from verl_tapo.rule import figures
from verl_tapo.rule.checks import hint
from verl_tapo.rule.config import TapoConfig
from verl_tapo.rule.names import acquires_information, default_kernel
from verl_tapo.rule.report import CreditReport, metric_word
from verl_tapo.rule.steps import ToolStep
from verl_tapo.settings import TapoSettings

logger = logging.getLogger("verl_tapo")

LUCKY_SHARE = 0.9
"""Share of successes that counted as failures above which that is reported [a guess]: hardly any reward is left."""
STEPLESS_BATCHES = 3
"""Batches without a single tool-use step after which that is reported: the run is plain base estimation then."""


def _say(message: str) -> None:
    """Logs at INFO and makes sure that it is shown: in veRL's processes no handler shows less than
    a warning."""
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    if not logger.hasHandlers():
        logger.addHandler(logging.StreamHandler())
    logger.info("TAPO: %s", message)


class RunMonitor:
    """Observes a run from its first batch on, and reports to its console."""

    def __init__(self) -> None:
        self.batches = 0
        self.seen: Counter[str] = Counter()
        self.parameters: dict[str, set[str]] = {}
        """The parameters seen in calls of the tools in ``algorithm.tapo.tools``."""
        self.executed: set[str] = set()
        """Tools that were, by their records."""
        self._credited: set[str] = set()
        self._successes = self._lucky = 0
        self._told: set[str] = set()

    def first(self, key: str) -> bool:
        """Returns whether this is the first time that it is asked about the key."""
        new = key not in self._told
        self._told.add(key)
        return new

    def tell(self, key: str, message: str) -> None:
        """Warns, once for each key."""
        if self.first(key):
            logger.warning("TAPO: %s", message)

    def say_sources(self, rollouts: int, metrics: Mapping[str, float], settings: TapoSettings) -> None:
        """Reports once, of the first batch's rollouts, where their success and their calls come from."""
        if not self.first("the first batch"):
            return
        scored = round(metrics["tapo/success_from_score"] * rollouts)
        recorded = round(metrics["tapo/recorded_rollouts"] * rollouts)
        _say(
            f"of {rollouts} rollouts, success is the reward's {settings.success_key!r} in {rollouts - scored} and the "
            f"score in {scored} (at {settings.success_threshold:g} or above); calls were recorded in {recorded} and "
            f"are read from the tokens in {rollouts - recorded}"
        )

    def look(self, steps: Sequence[ToolStep], settings: TapoSettings) -> None:
        """Takes note of one batch's steps."""
        self.batches += 1
        rule = settings.rule
        if rule.tools is None:
            self._explain_defaults(steps, rule)
        elif self.batches == 1:
            _say(f"tools that take part: {shown_kernels(rule.tools)}; parameters not named: exact")
        self.seen.update(step.tool for step in steps)
        if self.batches == STEPLESS_BATCHES and not self.seen:
            self.tell(
                "no steps",
                f"not a single tool call was found in {self.batches} batches, so nothing is corrected. Check "
                f"actor_rollout_ref.rollout.multi_turn.format, or algorithm.tapo.tool_format, and the rollouts.",
            )
        if rule.tools is None or not settings.patience or self.batches > settings.patience:
            return
        for step in steps:
            if step.tool in rule.tools:
                self.parameters.setdefault(step.tool, set()).update(map(str, step.arguments))
        if self.batches == settings.patience:
            self._report_unseen(rule.tools)

    def watch_luck(self, successes: int, lucky: int, settings: TapoSettings) -> None:
        """Takes note of one batch's successes, and of how many ``grounding.luck`` made failures of; after `look`."""
        self._successes += successes
        self._lucky += lucky
        if self.batches == settings.patience and self._lucky > LUCKY_SHARE * self._successes:
            self.tell(
                "luck",
                f"algorithm.tapo.grounding.luck made failures of {self._lucky} of {self._successes} successes in "
                f"{self.batches} batches, so hardly anything is rewarded. Read some with `verl-tapo audit`, filter "
                f"'Grounding: ungrounded': if they do not guess, the tools word the answers otherwise, or the model "
                f"knows them; then turn it off",
            )

    def _report_unseen(self, tools: Mapping[str, Any]) -> None:
        for tool in sorted(set(tools) - set(self.seen)):
            others = [name for name, _ in self.seen.most_common(10)]
            self.tell(
                f"unseen {tool}",
                f"the tool {tool!r} of algorithm.tapo.tools was never called in {self.batches} batches; "
                f"tools that were: {', '.join(others) or 'none'}{_meant(tool, others)}",
            )
        for tool, present in sorted(self.parameters.items()):
            for parameter in sorted(set(tools[tool] or {}) - present):
                self.tell(
                    f"unseen {tool} {parameter}",
                    f"no call of {tool!r} in {self.batches} batches had the parameter {parameter!r} of "
                    f"algorithm.tapo.tools; they had: "
                    f"{', '.join(sorted(present)[:10]) or 'none'}{_meant(str(parameter), present)}",
                )

    def _explain_defaults(self, steps: Sequence[ToolStep], rule: TapoConfig) -> None:
        for step in steps:
            if step.tool in self._told or not step.ok:
                continue
            if acquires_information(step.tool):
                compared = {name: default_kernel(name, step.arguments) for name in step.arguments}
                kernels = ", ".join(f"{name}={kernel}" for name, kernel in compared.items()) or "no parameters"
                decision = f"takes part, compared by {kernels} (others: exact)"
                if all(kernel == "ignore" for kernel in compared.values()):
                    decision += "; calls like this one, without a parameter that counts, do not"
            else:
                decision = "is left out: its name says that it ends the rollout, or runs, makes or changes things"
            self.tell(step.tool, f"algorithm.tapo.tools is not set; by its name the tool {step.tool!r} {decision}")

    def silent_tools(self, steps: Sequence[ToolStep], metrics: Mapping[str, float]) -> dict[str, float]:
        """Zeros for tools that had metrics of the rule before and were not called in this batch: no gaps in curves."""
        called = {step.tool for step in steps}
        shares = [figure for figure in figures.FIGURES if figure.by_tool and figure.of_nothing is not None]
        zeros = {
            f"tapo/tool/{metric_word(tool)}/{figure.name}": figure.of_nothing or 0.0
            for tool in self._credited - called
            for figure in shares
        }
        self._credited |= {tool for tool in called if f"tapo/tool/{metric_word(tool)}/failed_calls" in metrics}
        return {name: value for name, value in zeros.items() if name not in metrics}

    def sum_up(self, report: CreditReport, step: int | None, part: int) -> None:
        """Reports the outcome of one batch's calls."""
        counts = figures.counts_of(report.facts)
        failing, misassigned, corrected = (
            int(counts[f"{name}_steps"]) for name in ("failing", "misassigned", "corrected")
        )
        where = f"batch {self.batches}" if step is None else f"step {step}" + (f", batch {part + 1}" if part else "")
        _say(
            f"{where}: {len(report.facts.ok)} calls, {failing} failing, {misassigned} misassigned, "
            f"{corrected} corrected"
        )

    def check_records(
        self, records: Sequence[Any], agent_loop: str | None, agent_names: Callable[[], Iterable[Any]]
    ) -> None:
        """Warns if rollouts come without a record although the recording agent loop is the default.

        Args:
            records: the records of real rows.
            agent_loop: the default agent loop, where it is known.
            agent_names: returns the data set's column ``agent_name``; empty without one.
        """
        missing = sum(not isinstance(record, Mapping) for record in records)
        if agent_loop != RECORDING_LOOP or not missing or "unrecorded" in self._told:
            return
        others = sorted({str(name) for name in agent_names()} - {RECORDING_LOOP})
        self.tell("unrecorded", f"{missing} of {len(records)} rollouts came without a record. {unrecorded(others)}")


def _meant(name: str, known: Collection[str]) -> str:
    closest = hint(name, known)
    return closest if "did you mean" in closest else ""


RECORDING_LOOP = "tapo_tool_agent"


def unrecorded(agent_names: Sequence[str]) -> str:
    """Explains why rollouts would come without a record under the recording default, and what to
    do. ``agent_names`` are the loops in the data set's rows other than the recording one; empty if
    unknown."""
    setting = f"actor_rollout_ref.rollout.agent.default_agent_loop={RECORDING_LOOP}"
    if agent_names:
        names = ", ".join(map(repr, agent_names[:5]))
        why = f"{setting} is overridden: the data set's rows name the agent loop {names} in their column agent_name"
    else:
        why = f"{setting} is set, but another agent loop ran; look for a column agent_name in the data"
    return (
        f"{why}. Drop the column, or write {RECORDING_LOOP} in it, or give that name the recording loop by "
        f"rollout.agent.agent_loop_config_path (see verl_tapo/conf/agent_loop.yaml). Without records the calls are "
        f"parsed, with no timeout, no latency, no faults and no metrics under tools/"
    )


def shown_kernels(tools: Mapping[str, Any]) -> str:
    """``algorithm.tapo.tools`` in words."""
    shown = []
    for tool, parameters in tools.items():
        kernels = [
            f"{name}={spec.get('kernel') if isinstance(spec, Mapping) else spec}"
            for name, spec in (parameters or {}).items()
        ]
        shown.append(f"{tool} ({', '.join(kernels)})" if kernels else tool)
    return ", ".join(shown) or "none"
