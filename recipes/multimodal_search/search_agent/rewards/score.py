"""The reward of a trajectory, from its parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from search_agent.rewards.settings import RewardSettings
from search_backends.answers.judge import MAX_ANSWER_CHARS, Judge, NoVerdict
from search_backends.answers.reply import read_reply
from verl_tapo.answers.accepted import Range, accepted_answers
from verl_tapo.answers.matching import Tokens, exact, f1, in_range, substring, tokens
from verl_tapo.calls.call import fault_of
from verl_tapo.records import RECORD_KEY

MAX_COMPARED_CHARS = 100_000
"""Longer ones are no answers, unless an accepted one is as long: they are not read."""


@dataclass(frozen=True)
class _Verdict:
    right: bool = False
    f1: float = 0.0
    judge_used: bool = False
    judge_failed: bool = False


class Reward:
    """A reward function with its settings and, if they name one, its judge.

    Raises:
        ValueError: See `Judge`.
    """

    def __init__(self, settings: RewardSettings, router_address: str | None = None) -> None:
        self._settings = settings
        self._judge: Judge | None = None
        if settings.judge is not None and "judge" in settings.match:
            self._judge = Judge(settings.judge, router_address)

    async def score(self, solution: str, ground_truth: Any, extra_info: Mapping[str, Any]) -> dict[str, float]:
        """See the package.

        Raises:
            ValueError: The row has no accepted answer, or no question where the judge needs it.
            JudgeOutage
        """
        settings = self._settings
        accepted = accepted_answers(ground_truth)
        record = extra_info.get(RECORD_KEY)
        calls: Sequence[Mapping[str, Any]] = record["steps"] if isinstance(record, Mapping) else ()
        reply = read_reply(solution, None if record is None else calls, think=settings.think)
        verdict = await self._compare(reply.answer, accepted, extra_info.get("question"))
        faults = [fault_of(call) for call in calls]
        acc = float(verdict.right)
        formatted = float(reply.well_formed and not self._is_spoilt(calls))
        penalty = self._penalty(calls) if verdict.right else 1.0
        weights = settings.weights
        bonus = weights.tool_bonus * acc * self._used_a_tool(calls)
        return {
            "score": weights.accuracy * acc * penalty + weights.format * formatted + bonus,
            "acc": acc,
            "format": formatted,
            "answered": float(reply.answer is not None),
            "f1": verdict.f1,
            "penalty": penalty,
            "tool_calls": float(len(calls)),
            "model_faults": float(faults.count("model")),
            "infrastructure_faults": float(faults.count("infrastructure")),
            "judge_used": float(verdict.judge_used),
            "judge_failed": float(verdict.judge_failed),
        }

    async def check_judge(self) -> str | None:
        """Asks the judge a question and returns its identity; None without a judge.

        Raises:
            InfrastructureError: The judge does not answer, or not as it should.
        """
        return None if self._judge is None else await self._judge.check()

    async def close(self) -> None:
        """Closes the judge's connections and cache."""
        if self._judge is not None:
            await self._judge.close()

    async def _compare(self, answer: str | None, accepted: Sequence[str | Range], question: Any) -> _Verdict:
        if self._judge is not None:
            self._judge.require()
            if not isinstance(question, str) or not question:
                raise ValueError(
                    "the judge needs the question: extra_info has none (search_agent.data.prepare adds it)"
                )
        if answer is None or len(answer) > max(MAX_COMPARED_CHARS, 10 * max(len(str(text)) for text in accepted)):
            return _Verdict()
        given = tokens(answer)
        candidates = [tokens(text) for text in accepted if isinstance(text, str)]
        within = any(in_range(answer, *text) for text in accepted if isinstance(text, Range))
        overlap = max([float(within), *(f1(given, candidate) for candidate in candidates)])
        match = self._settings.match
        right = (
            (within and match != ("judge",))
            or ("exact" in match and any(exact(given, candidate) for candidate in candidates))
            or ("f1" in match and overlap >= self._settings.f1_threshold)
            or ("substring" in match and any(self._contains(given, candidate) for candidate in candidates))
        )
        if right or self._judge is None or len(answer) > MAX_ANSWER_CHARS:
            return _Verdict(right, overlap)
        try:
            verdict = await self._judge.is_right(str(question), list(map(str, accepted)), answer)
        except NoVerdict:  # the rules have said no, unless there are none
            stand_in = match == ("judge",) and (within or any(exact(given, candidate) for candidate in candidates))
            return _Verdict(stand_in, overlap, judge_failed=True)
        return _Verdict(verdict, overlap, judge_used=True)

    def _contains(self, given: Tokens, candidate: Tokens) -> bool:
        return substring(given, candidate, self._settings.substring_ratio)

    def _counts(self, call: Mapping[str, Any]) -> bool:
        return self._settings.counted_tools is None or call["tool"] in self._settings.counted_tools

    def _penalty(self, calls: Sequence[Mapping[str, Any]]) -> float:
        """The factor for the calls that were answered."""
        count = sum(call["status"] == "ok" and self._counts(call) for call in calls)
        uses = {"none": 0, "once": min(count, 1), "per_call": count}[self._settings.penalty]
        return float(self._settings.penalty_factor**uses)

    def _used_a_tool(self, calls: Sequence[Mapping[str, Any]]) -> bool:
        """Returns whether a counted tool answered, or failed only because of its back end."""
        return any(
            self._counts(call) and (call["status"] == "ok" or fault_of(call) == "infrastructure") for call in calls
        )

    def _is_spoilt(self, calls: Sequence[Mapping[str, Any]]) -> bool:
        """Returns whether calls cost the format score."""
        if self._settings.tool_errors_cost_format:
            return any(fault_of(call) == "model" for call in calls)
        return any(call["status"] in ("malformed", "unknown_tool") for call in calls)
