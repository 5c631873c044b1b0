"""The record of a trajectory's tool calls, as `tapo_tool_agent` writes it to ``extra_fields["tapo_steps"]``.

A record is one plain dict per trajectory. It is plain, so that it crosses veRL's TransferQueue, Ray
and JSON dumps unharmed. It is a dict, because veRL V0 packs lists of equal length into broken
object arrays::

    {"version": 1,
     "images": ["<identity>", ...],            # every image of the trajectory, in order, prompt images first
     "recognisable": True,                     # it had tools, whose answers could have shown an accepted answer
     "steps": [{"tool": "zoom", "arguments": {...}, "turn": [s, e], "call": [cs, ce], "ok": True,
                "status": "ok", "latency_s": 0.12, "images_at_hand": 1, "produced": [1], "metrics": {...},
                "seen": False}, ...]}

Spans are half-open, in response tokens, before the cut at ``response_length``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from verl_tapo.calls.call import CallStatus
from verl_tapo.calls.images import Images, resolve_images
from verl_tapo.rule.steps import ToolStep

RECORD_KEY = "tapo_steps"
RECORD_VERSION = 1


@dataclass
class CallRecord:
    """One tool call."""

    tool: str
    arguments: dict[str, Any]
    turn: tuple[int, int]
    call: tuple[int, int]
    status: CallStatus = "not_executed"
    latency_s: float = 0.0
    images_at_hand: int = 0
    """The number of the trajectory's images that existed when the call was made."""
    produced: list[int] = field(default_factory=list)
    """Positions in the trajectory's images of those this call returned."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """The third value that the tool's ``execute`` returned. `fault_of` reads its key ``fault``."""
    answer_tokens: int = 0
    """Response tokens of the answer; those of parallel calls are shared out evenly."""
    seen: bool | None = None
    """True if the whole answer held an accepted answer of the prompt; None if that is unknown."""
    abandoned: bool = False
    """The tool was still running when the trajectory ended, although its time was up: nothing could stop it."""

    @property
    def ok(self) -> bool:
        return self.status == "ok"


@dataclass
class TrajectoryRecord:
    """All tool calls of one trajectory, in the order they were made."""

    steps: list[CallRecord] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    recognisable: bool = False
    """Whether it had tools, and an accepted answer would be recognised in theirs."""

    def to_dict(self) -> dict[str, Any]:
        """The plain form, see the module's docstring."""
        steps = [
            {**asdict(step), "turn": list(step.turn), "call": list(step.call), "ok": step.ok} for step in self.steps
        ]
        return {
            "version": RECORD_VERSION,
            "images": list(self.images),
            "recognisable": self.recognisable,
            "steps": steps,
        }


def recorded_steps(
    record: Mapping[str, Any], row: int, length: int, image_parameters: Iterable[str], image_index_base: int | None
) -> list[ToolStep]:
    """The tool-use steps of one trajectory's record.

    Args:
        record: the plain form of a `TrajectoryRecord`.
        row: the trajectory's row in the batch.
        length: its number of response tokens; spans are cut there, and steps beyond are left out.
        image_parameters, image_index_base: see `verl_tapo.calls.images.resolve_images`.

    Raises:
        ValueError: for a record of another version.
    """
    if record.get("version") != RECORD_VERSION:
        raise ValueError(f"row {row}: {RECORD_KEY} has version {record.get('version')!r}, expected {RECORD_VERSION}")
    images, parameters = Images(record["images"]), frozenset(image_parameters)
    steps = []
    for step in record["steps"]:
        (start, end), (call_start, call_end) = step["turn"], step["call"]
        if start >= length:
            continue
        arguments = step["arguments"]
        if not parameters.isdisjoint(arguments):
            arguments = resolve_images(arguments, parameters, images, image_index_base, step["images_at_hand"])
        turn = (start, min(end, length))
        call = (min(call_start, length), min(call_end, length))
        steps.append(ToolStep(row, step["tool"], arguments, turn, call, step["ok"], step.get("seen")))
    return steps
