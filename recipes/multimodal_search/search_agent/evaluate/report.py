"""Results: per benchmark and per tool, as JSON and as a table."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from search_backends.evaluation.statistics import wilson
from search_backends.evaluation.tables import order, percent, table
from verl_tapo.calls.call import fault_of
from verl_tapo.rule.grounding import grounded, shares
from verl_tapo.rule.steps import SIGHTS
from verl_tapo.settings import TapoSettings

_EXECUTED = ("ok", "error", "timeout")
# The names in such calls are the model's own: they are no tools, whatever they spell.
_OF_NO_TOOL = ("malformed", "unknown_tool")


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.fsum(values) / len(values) if values else 0.0


def _steps(entry: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    steps: list[Mapping[str, Any]] = entry["tapo_steps"]["steps"]
    return steps


def _summary(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns a summary of some questions."""
    accuracy = _mean(entry["acc"] for entry in entries)
    executed = Counter(step["tool"] for entry in entries for step in _steps(entry) if step["status"] in _EXECUTED)
    return {
        "n": len(entries),
        "accuracy": accuracy,
        "interval": list(wilson(accuracy, len(entries))),
        "tool_calls": executed.total() / max(1, len(entries)),
        "tool_calls_by_tool": {tool: executed[tool] / len(entries) for tool in sorted(executed)},
        "turns": _mean(entry["turns"] for entry in entries),
        "prompt_tokens": _mean(entry["prompt_tokens"] for entry in entries),
        "completion_tokens": _mean(entry["completion_tokens"] for entry in entries),
        "seconds": _mean(entry["seconds"] for entry in entries),
        "model_faults": _mean(sum(fault_of(step) == "model" for step in _steps(entry)) for entry in entries),
        "grounding": _grounding(entries),
        "endings": dict(sorted(Counter(entry["ending"] for entry in entries).items())),
    }


def _grounding(entries: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Returns whether the tools' answers held an accepted answer, as in training's metrics ``tapo/grounding/``."""
    sights = [(row, SIGHTS[step.get("seen")]) for row, entry in enumerate(entries) for step in _steps(entry)]
    holder, seen = np.array(sights, dtype=np.int64).reshape(-1, 2).T
    success = np.array([entry["acc"] >= TapoSettings.success_threshold for entry in entries], dtype=bool)
    return shares(grounded(holder, seen, len(entries)), success)


def _of_tool(steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns a summary of the calls of a tool, including those of failed attempts."""
    executed = [step for step in steps if step["status"] in _EXECUTED]
    faults = Counter(fault_of(step) for step in executed)
    fetched = sum(step["status"] == "ok" for step in executed)
    hits = [step["metrics"]["cache_hit"] for step in executed if "cache_hit" in step["metrics"]]
    told = [step["seen"] for step in executed if step["status"] == "ok" and step.get("seen") is not None]
    return {
        "calls": len(executed),
        "found": _mean(told) if told else None,
        "fetch_success": fetched / (fetched + faults["infrastructure"]) if fetched + faults["infrastructure"] else None,
        "model_faults": sum(fault_of(step) == "model" for step in steps),
        "infrastructure_faults": faults["infrastructure"],
        "cache_hits": _mean(hits) if hits else None,
        "latency_s": _mean(step["latency_s"] for step in executed),
    }


def results(
    entries: Sequence[Mapping[str, Any]], failures: Iterable[Mapping[str, Any]], undone: int, about: Mapping[str, Any]
) -> dict[str, Any]:
    """The results, plain.

    Args:
        entries: finished questions.
        failures: attempts that failed: their tool calls count for the tools.
        undone: the number of questions that are not finished.
        about: label, settings, versions.
    """
    by_benchmark: dict[str, list[Mapping[str, Any]]] = {}
    for entry in entries:
        by_benchmark.setdefault(entry["data_source"], []).append(entry)
    benchmarks = {name: _summary(by_benchmark[name]) for name in order(by_benchmark)}
    by_tool: dict[str, list[Mapping[str, Any]]] = {}
    of_no_tool: Counter[str] = Counter()
    attempts = list(failures)
    for steps in (*(_steps(entry) for entry in entries), *(attempt["steps"] for attempt in attempts)):
        for step in steps:
            if step["status"] in _OF_NO_TOOL:
                of_no_tool[step["status"]] += 1
            else:
                by_tool.setdefault(step["tool"], []).append(step)
    return {
        **about,
        "average": _mean(summary["accuracy"] for summary in benchmarks.values()),
        "undone": undone,
        "failed_attempts": len(attempts),
        "calls_of_no_tool": of_no_tool["unknown_tool"],
        "malformed_calls": of_no_tool["malformed"],
        "all": _summary(entries),
        "benchmarks": benchmarks,
        "tools": {name: _of_tool(by_tool[name]) for name in sorted(by_tool)},
    }


def _grounding_table(found: Mapping[str, Any]) -> list[str]:
    """Returns the table of the tools' findings by benchmark; empty if they are unknown."""
    if not found["all"]["grounding"].get("told"):
        return []
    summaries = {**found["benchmarks"], "**all**": found["all"]}
    names = ("told", "grounded_successes", "grounded_failures", "never_found")
    rows = [[name, *(percent(of["grounding"].get(each)) for each in names)] for name, of in summaries.items()]
    return [
        table(["benchmark", "told", "grounded successes", "grounded failures", "never found"], rows),
        "Grounded: a tool's answer held an accepted answer, in per cent of the questions of which that can be told. A "
        "failure that is grounded is a reading problem, what is never found a search problem; a success that is not "
        "grounded was guessed, or known.",
    ]


def markdown(found: Mapping[str, Any]) -> str:
    """`results` for people."""
    tools = sorted(found["tools"])
    benchmarks = found["benchmarks"]

    def line(name: str, summary: Mapping[str, Any], accuracy: str, interval: str) -> list[str]:
        by_tool = summary["tool_calls_by_tool"]
        calls = (f"{value:.2f}" for value in (summary["tool_calls"], *(by_tool.get(tool, 0.0) for tool in tools)))
        return [name, str(summary["n"]), accuracy, interval, *calls, f"{summary['turns']:.2f}"]

    rows = []
    for name, summary in benchmarks.items():
        low, high = summary["interval"]
        rows.append(line(name, summary, percent(summary["accuracy"]), f"{percent(low)} to {percent(high)}"))
    rows.append(line("**average**", found["all"], f"**{percent(found['average'])}**", ""))
    head = ["benchmark", "questions", "accuracy", "95 % interval", "tool calls", *tools, "turns"]
    parts = [f"# {found['label']}", table(head, rows)]
    parts.append(
        "Accuracy in per cent; the average is of the benchmarks, every one counting the same. "
        "Tool calls and turns are for a question; in the last line, of all questions."
    )
    if found["undone"]:
        parts.append(
            f"**{found['undone']} question(s) are not done**: a server or back end failed (`failures.jsonl`). They are "
            "not counted above; the same command does them."
        )
    if tools:
        parts.append(
            table(
                ["tool", "calls", "fetched", "found the answer", "from the cache", "model's faults", "seconds"],
                [
                    [
                        name,
                        str(of["calls"]),
                        percent(of["fetch_success"]),
                        percent(of["found"]),
                        percent(of["cache_hits"]),
                        str(of["model_faults"]),
                        f"{of['latency_s']:.2f}",
                    ]
                    for name, of in found["tools"].items()
                ],
            )
        )
        parts.append(
            "Fetched: calls that were answered, of those that the model made correctly, in per cent. Found the answer: "
            "answers that held an accepted answer."
        )
    everything = found["all"]
    parts += _grounding_table(found)
    endings = ", ".join(f"{name} {count}" for name, count in everything["endings"].items())
    parts.append(
        f"Endings: {endings or 'none'}. Tokens for a question: {everything['prompt_tokens']:.0f} read, "
        f"{everything['completion_tokens']:.0f} written. Malformed calls: {found['malformed_calls']}; "
        f"calls of tools that do not exist: {found['calls_of_no_tool']}."
    )
    settings = "\n".join(f"- {name}: `{value}`" for name, value in {**found["settings"], **found["versions"]}.items())
    parts.append(f"## Settings\n\n{settings}")
    return "\n\n".join(parts) + "\n"
