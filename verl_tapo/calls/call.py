"""A tool call: its written form, its outcome, and whose fault a missing answer is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

MALFORMED = "(malformed)"
"""Tool name of a call that could not be parsed."""

Fault: TypeAlias = Literal["model", "infrastructure"]

CallStatus: TypeAlias = Literal[
    "ok",  # executed and answered
    "error",  # the tool raised, or answered with an error
    "timeout",  # no answer in time
    "unknown_tool",  # no tool of that name
    "malformed",  # the call could not be parsed
    "over_limit",  # more calls than allowed, in the turn or in the trajectory
    "not_executed",  # the trajectory ended before the call was run
]


class Call(NamedTuple):
    """One call as an assistant turn holds it."""

    tool: str
    """The name of the called tool; `MALFORMED` if the call could not be parsed."""
    arguments: dict[str, Any]
    """The parsed arguments; empty if the call is malformed."""
    start: int
    """Where the call begins in the turn, opening marker included: in bytes of the text, or in tokens."""
    end: int
    """Where the call ends, closing marker included."""
    error: str | None
    """Why the call is malformed, in a few words; None if it is well-formed."""
    dropped: bool
    """True if veRL's parser would not return the call."""

    @property
    def span(self) -> tuple[int, int]:
        """``(start, end)``, half-open."""
        return self.start, self.end


def fault_of(step: Mapping[str, Any]) -> Fault | None:
    """Returns whose fault it is that a recorded call (its plain form) has no answer; None if it has
    one or was not made.

    A failed tool is at fault itself, unless it says otherwise: ``{"fault": "model"}`` among its metrics.
    """
    status = step["status"]
    if status in ("malformed", "unknown_tool", "over_limit"):
        return "model"
    if status == "error":
        return "model" if (step.get("metrics") or {}).get("fault") == "model" else "infrastructure"
    return "infrastructure" if status == "timeout" else None
