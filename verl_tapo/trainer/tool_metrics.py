"""How a batch's tools fared, by the records of ``tapo_tool_agent``: metrics, and the end of a run without tools.

Metrics (all shares are of calls; one set for each tool that was executed):

- ``tools/calls_per_trajectory``, ``tools/malformed``, ``tools/unknown_tool``, ``tools/over_limit``
- ``tools/infrastructure_faults``: of executed calls
- ``reward/<part>``: the mean of every number that the reward function returns (veRL logs them in validation only)
- ``tools/<tool>/``: ``calls_per_trajectory``, ``ok``, ``model_faults``, ``infrastructure_faults``, ``latency_s``,
  ``latency_p95_s``, ``answer_tokens``, and the mean of every number the tool itself returns as a metric (a cache hit,
  say)

Names that would make veRL's aggregator take a maximum, minimum or sum are written by `verl_tapo.credit.metric_word`.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from verl_tapo.credit import metric_word
from verl_tapo.records import fault_of

_EXECUTED = ("ok", "error", "timeout")
_LATENCY_QUANTILE = 0.95


class ToolOutage(RuntimeError):
    """Too many tool calls got no answer through no fault of the model: training on would teach it to do without."""


class RolloutOutage(RuntimeError):
    """Too many rollouts are missing: veRL fills up the batch with rows of nothing, and would train on what is left."""


def check_rollouts(sessions: int, prompts: int, each: int, max_fault_rate: float | None) -> None:
    """Ends the run where rollouts got lost, as when an inference server died.

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


def tool_metrics(records: Sequence[Any]) -> dict[str, float]:
    """Metrics of B trajectories' records (their plain form; None where there is none); empty where no calls are.

    Args:
        records: of real rows only, no padding.
    """
    known = [record for record in records if isinstance(record, Mapping)]
    steps = [step for record in known for step in record["steps"]]
    if not steps:
        return {}
    statuses = Counter(step["status"] for step in steps)
    metrics = {
        f"tools/{status}": statuses[status] / len(steps) for status in ("malformed", "unknown_tool", "over_limit")
    }
    metrics["tools/calls_per_trajectory"] = len(steps) / len(known)
    executed: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for step in steps:
        if step["status"] in _EXECUTED:
            executed[step["tool"]].append(step)
    for tool, calls in executed.items():
        for name, value in _of_tool(calls).items():
            metrics[f"tools/{metric_word(tool)}/{metric_word(name)}"] = value
        metrics[f"tools/{metric_word(tool)}/calls_per_trajectory"] = len(calls) / len(known)
    metrics["tools/infrastructure_faults"] = _fault_rate([call for calls in executed.values() for call in calls])
    return metrics


def reward_metrics(infos: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The mean of every number in B trajectories' ``reward_extra_info``; of real rows only."""
    parts: dict[str, list[float]] = defaultdict(list)
    for info in infos:
        for name, value in info.items():
            if isinstance(value, bool | int | float | np.number) and math.isfinite(value):
                parts[f"reward/{metric_word(name)}"].append(float(value))
    return {name: float(np.mean(values)) for name, values in parts.items()}


def check_outage(metrics: Mapping[str, float], max_fault_rate: float | None) -> None:
    """Ends the run where tools are down.

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


def _fault_rate(calls: Sequence[Mapping[str, Any]]) -> float:
    return sum(fault_of(call) == "infrastructure" for call in calls) / max(len(calls), 1)


def _of_tool(calls: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    own: dict[str, list[float]] = defaultdict(list)
    for call in calls:
        for name, value in (call.get("metrics") or {}).items():
            if isinstance(value, bool | int | float) and math.isfinite(value):
                own[name].append(float(value))
    latencies = [call["latency_s"] for call in calls]
    return {
        **{name: float(np.mean(values)) for name, values in own.items()},
        "ok": sum(call["status"] == "ok" for call in calls) / len(calls),
        "model_faults": sum(fault_of(call) == "model" for call in calls) / len(calls),
        "infrastructure_faults": _fault_rate(calls),
        "latency_s": float(np.mean(latencies)),
        "latency_p95_s": float(np.quantile(latencies, _LATENCY_QUANTILE)),
        "answer_tokens": float(np.mean([call.get("answer_tokens", 0) for call in calls])),
    }
