"""The prompt groups most worth reading, as the report shows them."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from verl_tapo.audit.analysis import JudgedCall, StepAnalysis
from verl_tapo.audit.batches import evidence_for
from verl_tapo.audit.model import Trajectory
from verl_tapo.step_records import json_value

RESULT_CHARS = 2000
"""Shown of a tool's answer."""
_AROUND = 300  # characters before and behind an accepted answer
_INTEREST = {"corrected": 1.0, "below_alpha": 0.5, "below_theta": 0.25, "no_witness": 0.05}


class Browse:
    """Keeps the ``limit`` groups with the most to see; the texts of others are let go."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._heap: list[tuple[float, int, dict[str, Any]]] = []
        self._seen = 0

    def add(self, analysis: StepAnalysis) -> None:
        if not self._limit:
            return
        calls: dict[int, list[JudgedCall]] = defaultdict(list)
        for judged in analysis.calls:
            calls[judged.place[0]].append(judged)
        groups: dict[str, list[int]] = defaultdict(list)
        for row, trajectory in enumerate(analysis.batch.trajectories):
            groups[trajectory.group].append(row)
        for uid, rows in groups.items():
            self._seen += 1
            interest = round(sum(_INTEREST.get(j.credit.gate, 0.0) for row in rows for j in calls[row]), 6)
            if len(self._heap) == self._limit and interest <= self._heap[0][0]:
                continue
            group = _group(analysis, uid, rows, calls, interest)
            keep = heapq.heappush if len(self._heap) < self._limit else heapq.heapreplace
            keep(self._heap, (interest, -self._seen, group))

    def groups(self) -> list[dict[str, Any]]:
        """The most interesting first; of equal ones, the earlier."""
        return [group for _, _, group in sorted(self._heap, key=lambda item: item[:2], reverse=True)]


def _group(
    analysis: StepAnalysis, uid: str, rows: Sequence[int], calls: dict[int, list[JudgedCall]], interest: float
) -> dict[str, Any]:
    members = [analysis.batch.trajectories[row] for row in rows]
    numbers = {row: number for number, row in enumerate(rows)}
    return {
        "step": analysis.batch.step,
        "uid": uid,
        "prompt": members[0].prompt,
        "ground_truth": members[0].ground_truth,
        "interest": interest,
        "trajectories": [
            _trajectory(trajectory, [_call(judged, analysis, numbers) for judged in calls[row]])
            for row, trajectory in zip(rows, members, strict=True)
        ],
    }


def _trajectory(trajectory: Trajectory, calls: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "name": trajectory.name,
        "score": trajectory.score,
        "success": trajectory.success,
        "grounded": trajectory.grounded,
        "advantage": trajectory.advantage,
        "text": trajectory.text,
        "calls": calls,
    }


def _call(judged: JudgedCall, analysis: StepAnalysis, numbers: dict[int, int]) -> dict[str, Any]:
    call, credit = judged.call, judged.credit
    witness = None
    if credit.witness is not None:
        row, number = analysis.calls[credit.witness].place
        if row in numbers:  # under scope=batch it may be of another group
            witness = {"trajectory": numbers[row], "call": number}
    result = call.result or ""
    place = evidence_for(judged.holder.ground_truth).place_in(result) if call.seen else None
    return {
        "tool": call.tool,
        "arguments": json_value(call.arguments),
        "result": _excerpt(result, place),
        "seen": call.seen,
        "found": None if place is None else result[slice(*place)],
        "ok": call.ok,
        "status": call.status,
        "role": credit.role,
        "gate": credit.gate,
        "matched": credit.matched,
        "similarity": credit.similarity if credit.compared else None,
        "support": credit.support if credit.matched else None,
        "alpha": credit.alpha if credit.matched else None,
        "reference_advantage": credit.reference_advantage if credit.matched else None,
        "lift": judged.lift,
        "lucky": judged.lucky,
        "inexact": judged.inexact,
        "transfer": credit.transfer,
        "before": judged.holder.advantage,
        "after": judged.after,
        "span": call.span,
        "call_span": call.call_span,
        "witness": witness,
    }


def _excerpt(result: str, place: tuple[int, int] | None) -> str:
    """The beginning of a tool's answer, and what stands around the accepted answer further on."""
    shown = min(len(result), RESULT_CHARS)
    text = result[:shown]
    if place is not None and place[1] > shown:
        around = slice(max(shown, place[0] - _AROUND), place[1] + _AROUND)
        text = f"{text} … {result[around]}"
        shown += len(result[around])
    return text if shown == len(result) else f"{text} … ({len(result) - shown:,} more characters)"
