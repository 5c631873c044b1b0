"""Metrics of a batch's tools, from the records of ``tapo_tool_agent``, and the end of a run without
working tools.

Metrics (all shares are of calls; one set for each tool that was executed):

- ``tools/calls_per_trajectory``, ``tools/malformed``, ``tools/unknown_tool``, ``tools/over_limit``
- ``tools/infrastructure_faults``, ``tools/abandoned``: of executed calls
- ``reward/<part>``: the mean of every number that the reward function returns (veRL logs them in validation only)
- ``tools/<tool>/``: ``calls_per_trajectory``, ``ok``, ``model_faults``, ``infrastructure_faults``, ``latency_s``,
  ``latency_p95_s``, ``answer_tokens``, and the mean of every number the tool itself returns as a metric (a cache hit,
  say); of a tool that was executed before and is not now the shares, which are 0, and no means

Names that would make veRL's aggregator take a maximum, minimum or sum are changed by `metric_word`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from numbers import Number
from typing import Any

import numpy as np

from verl_tapo.calls.call import Fault, fault_of
from verl_tapo.rule.report import metric_word
from verl_tapo.rule.values import finite_number, shown

_EXECUTED = ("ok", "error", "timeout")
_LATENCY_QUANTILE = 0.95


class ToolOutage(RuntimeError):
    """Too many tool calls got no answer through no fault of the model: training on would teach it to do without."""


class RolloutOutage(RuntimeError):
    """Too many rollouts are missing. VeRL fills the batch with empty rows and would train on the
    rest."""


def check_rollouts(sessions: int, prompts: int, each: int, max_fault_rate: float | None) -> None:
    """Ends the run if rollouts got lost, for example because an inference server died.

    Args:
        sessions: rollouts that came.
        prompts: prompts they are of.
        each: rollouts a prompt should have.
        max_fault_rate: share that may be missing; None: no limit.

    Raises:
        RolloutOutage: where more are.
    """
    missing = 1 - sessions / (prompts * each) if prompts else 1.0
    if max_fault_rate is not None and missing > max_fault_rate:
        raise RolloutOutage(
            f"{missing:.0%} of the rollouts of this step's prompts never came ({sessions} of {prompts * each} did); "
            f"algorithm.tapo.max_fault_rate allows {max_fault_rate:.0%}. Their errors stand above in the log: look for "
            f"an inference server that died. Resume from the last checkpoint; this step was not trained on."
        )


def executed_tools(records: Sequence[Any]) -> set[str]:
    """Returns the tools that were executed, from B records in their plain form (None for a
    trajectory without one)."""
    known = [record for record in records if isinstance(record, Mapping)]
    return {step["tool"] for record in known for step in record["steps"] if step["status"] in _EXECUTED}


def tool_metrics(
    records: Sequence[Any], tools: Collection[str] = (), *, trajectories: int | None = None
) -> dict[str, float]:
    """Returns metrics from B records in their plain form (None for a trajectory without one); empty
    without a record.

    Args:
        records: the records of real rows only, without padding.
        tools: those that were executed in earlier batches: they have metrics where they are not called, too.
        trajectories: how many the records are of; None: each is of one.
    """
    known = [record for record in records if isinstance(record, Mapping)]
    if not known:
        return {}
    trajectories = len(known) if trajectories is None else trajectories
    steps = [step for record in known for step in record["steps"]]
    executed: dict[str, list[Mapping[str, Any]]] = {tool: [] for tool in sorted({*tools, *executed_tools(known)})}
    for step in steps:
        if step["status"] in _EXECUTED:
            executed[step["tool"]].append(step)
    metrics = {
        f"tools/{status}": _share(sum(step["status"] == status for step in steps), steps)
        for status in ("malformed", "unknown_tool", "over_limit")
    }
    metrics["tools/calls_per_trajectory"] = len(steps) / trajectories
    for tool, calls in executed.items():
        for name, value in _of_tool(calls).items():
            metrics[f"tools/{metric_word(tool)}/{metric_word(name)}"] = value
        metrics[f"tools/{metric_word(tool)}/calls_per_trajectory"] = len(calls) / trajectories
    everything = [call for calls in executed.values() for call in calls]
    metrics["tools/infrastructure_faults"] = _faults(everything, "infrastructure")
    metrics["tools/abandoned"] = _share(sum(bool(call.get("abandoned")) for call in everything), everything)
    return metrics


def reward_metrics(infos: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The mean of every finite number in B trajectories' ``reward_extra_info``; of real rows only."""
    parts: dict[str, list[float]] = defaultdict(list)
    for info in infos:
        for name, value in info.items():
            number = finite_number(value)
            if number is not None:
                parts[f"reward/{metric_word(str(name))}"].append(number)
    return {name: _mean(values) for name, values in parts.items()}


def odd_reward_parts(infos: Sequence[Mapping[str, Any]]) -> dict[str, tuple[int, str]]:
    """For each metric with a value that is not finite or exceeds a float, returns how often, and an
    example."""
    odd: dict[str, tuple[int, str]] = {}
    for info in infos:
        for name, value in info.items():
            if isinstance(value, Number) and finite_number(value) is None:
                odd[str(name)] = odd.get(str(name), (0, ""))[0] + 1, shown(value)
    return odd


def check_outage(metrics: Mapping[str, float], max_fault_rate: float | None) -> None:
    """Ends the run if tools are down.

    Raises:
        ToolOutage: where more executed calls than ``max_fault_rate`` (None: no limit) failed through no fault of the
            model.
    """
    rate = metrics.get("tools/infrastructure_faults", 0.0)
    if max_fault_rate is None or rate <= max_fault_rate:
        return
    suffix = "/infrastructure_faults"
    tools = {key.split("/")[1]: value for key, value in metrics.items() if key.endswith(suffix) and key.count("/") == 2}
    shares = ", ".join(f"{tool} {share:.0%}" for tool, share in sorted(tools.items(), key=lambda item: -item[1]))
    raise ToolOutage(
        f"{rate:.0%} of this step's executed tool calls got no answer through no fault of the model ({shares}); "
        f"algorithm.tapo.max_fault_rate allows {max_fault_rate:.0%}. Bring the tools' back ends up again and resume "
        f"from the last checkpoint; this step was not trained on."
    )


def _share(part: int, whole: Sequence[Any]) -> float:
    return part / max(len(whole), 1)


def _mean(values: Sequence[float]) -> float:
    try:
        return math.fsum(values) / len(values)
    except OverflowError:  # the sum of finite numbers need not be one
        return math.fsum(value / len(values) for value in values)


def _faults(calls: Sequence[Mapping[str, Any]], fault: Fault) -> float:
    return _share(sum(fault_of(call) == fault for call in calls), calls)


def _of_tool(calls: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    own: dict[str, list[float]] = defaultdict(list)
    for call in calls:
        for name, value in (call.get("metrics") or {}).items():
            number = finite_number(value)
            if number is not None:
                own[name].append(number)
    metrics = {name: _mean(values) for name, values in own.items()}
    metrics["ok"] = _share(sum(call["status"] == "ok" for call in calls), calls)
    metrics["model_faults"] = _faults(calls, "model")
    metrics["infrastructure_faults"] = _faults(calls, "infrastructure")
    if calls:
        latencies = [call["latency_s"] for call in calls]
        metrics["latency_s"] = float(np.mean(latencies))
        metrics["latency_p95_s"] = float(np.quantile(latencies, _LATENCY_QUANTILE))
        metrics["answer_tokens"] = float(np.mean([call.get("answer_tokens", 0) for call in calls]))
    return metrics
