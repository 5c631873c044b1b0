"""What the audit works on, wherever it was read: one training step's trajectories with their tool calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from verl_tapo.rule.grounding import grounded
from verl_tapo.rule.steps import SEEN, SIGHTS, UNSEEN

Span: TypeAlias = tuple[int, int]


class Problem(NamedTuple):
    """Something that was not read."""

    file: str
    line: int | None
    """Counted from 1; None where it is about the file."""
    reason: str


@dataclass
class Call:
    """One tool call of a trajectory."""

    tool: str
    arguments: Mapping[str, Any]
    """As the model wrote them."""
    compared: Mapping[str, Any]
    """As the rule compares them: with identities in place of image indices."""
    turn: int
    """Number of the assistant turn that made it; parallel calls share one."""
    ok: bool
    status: str
    """A `verl_tapo.records.CallStatus`; ``unanswered`` for a call in a text that no answer follows."""
    turn_size: int
    """Policy tokens of its turn (characters, where the trajectory was read from text)."""
    call_size: int
    span: Span | None = None
    """Of the turn, in characters of the trajectory's text."""
    call_span: Span | None = None
    result: str | None = None
    """The tool's answer."""
    seen: bool | None = None
    """Whether the tool's answer held an accepted answer; None where that cannot be told."""
    recorded_gate: str | None = None
    """What training made of it (`verl_tapo.rule.report.StepCredit.gate`); None where that is not known."""


@dataclass
class Trajectory:
    """One rollout."""

    name: str
    group: str
    """Its prompt group."""
    score: float
    success: bool
    advantage: float
    """``a``, of the base estimator."""
    size: int
    """Policy tokens (characters, where it was read from text)."""
    calls: list[Call]
    text: str = ""
    prompt: str = ""
    ground_truth: Any = None
    judged: float | None = None
    """What was compared with ``success_threshold``; None where that is not known."""
    unclear: bool = False
    """Whether its text does not show where the policy's turns end, see `verl_tapo.audit.text.TextCalls`."""
    recognisable: bool = False
    """Whether a tool could have shown an accepted answer, see `verl_tapo.transfer_credit`."""
    changed: int | None = None
    """Policy tokens whose advantage TAPO changed in training; None where that is not known."""

    @cached_property
    def grounded(self) -> bool | None:
        """Whether one of its tools found an accepted answer; None where that cannot be told."""
        seen = np.array([SIGHTS[call.seen] for call in self.calls], dtype=np.int64)
        state = int(grounded(np.zeros_like(seen), seen, 1)[0])
        return {SEEN: True, UNSEEN: False}.get(state)


@dataclass
class StepBatch:
    """The trajectories of one training step."""

    step: int
    trajectories: list[Trajectory]
    settings: Mapping[str, Any] | None = None
    """``algorithm.tapo`` as it was in training; None where that is not known."""
    again: int = 0
    """How many other files hold the step, too."""
