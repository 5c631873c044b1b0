"""Limits on a trajectory's calls, the answers to refused and failed calls, and control tokens.

Training (`verl_tapo.rollout.tool_agent`) and evaluation take it from here, so that a model meets the same limits in the
same words.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

ALL_TOOLS = "all"
"""The name in ``max_calls`` under which calls of any tool are counted."""
STOCK_ERRORS = ("Unknown function '", "Invalid JSON in arguments for '", "Error executing tool '")
"""The beginnings of the answers to failed calls in veRL's stock loop (``tool_agent_loop.py``,
``_call_tool``)."""
NOT_EXECUTED_PREFIX = "[tool call not executed]"
"""The beginning of an answer to a call that `tapo_tool_agent` did not execute."""

TOOL_MARKERS = tuple(
    f"<{slash}{name}>"
    for name in ("tool_call", "tool_response", "seed:tool_call", "minimax:tool_call")
    for slash in ("", "/")
)
"""Markers of formats whose models write them as plain text, without tokens of their own."""
ANY_CONTROL = re.compile(
    "|".join([r"<\|[^|<>\s]{1,40}\|>", r"</?(?:tools|image|video|im_start|im_end|s)>", *map(re.escape, TOOL_MARKERS)])
)
"""Control tokens of common chat templates and processors, for use without a tokenizer."""


@dataclass(frozen=True)
class CallLimits:
    """Limits of a trajectory.

    Raises:
        ValueError: naming the setting, for a value out of range.
    """

    max_calls: Mapping[str, int] = field(default_factory=dict)
    """The maximal number of calls per trajectory, by tool name, >= 0; ``all`` counts the calls of
    every tool."""
    max_parallel_calls: int = 1
    """Well-formed calls that a turn may make, >= 1."""
    max_malformed_turns: int = 3
    """Turns of nothing but malformed calls that are answered before the trajectory ends, >= 0."""
    tool_timeout_s: float = 60.0
    """Seconds after which a tool's call counts as failed, > 0."""

    def __post_init__(self) -> None:
        timeout = self.tool_timeout_s
        if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout < math.inf:
            raise ValueError(f"tool_timeout_s must be a positive number, got {timeout!r}")
        if not isinstance(self.max_calls, Mapping):
            raise ValueError(f"max_calls must map tools to numbers, got {self.max_calls!r}")
        numbers = {f"max_calls.{tool}": (number, 0) for tool, number in self.max_calls.items()}
        numbers["max_malformed_turns"] = self.max_malformed_turns, 0
        numbers["max_parallel_calls"] = self.max_parallel_calls, 1
        for name, (number, least) in numbers.items():
            if isinstance(number, bool) or not isinstance(number, int) or number < least:
                raise ValueError(f"{name} must be a whole number >= {least}, got {number!r}")


def with_own_limits(max_calls: Mapping[str, int] | None, tools: Mapping[str, Any]) -> dict[str, int]:
    """Returns the tools' own limits (the attribute ``max_calls``, if it is not None), overridden by
    ``max_calls``.

    Raises:
        ValueError: ``max_calls`` is no mapping, or names no tool.
    """
    if max_calls is not None and not isinstance(max_calls, Mapping):
        raise ValueError(f"max_calls must map tools to numbers, got {max_calls!r}")
    own = {name: getattr(tool, "max_calls", None) for name, tool in tools.items()}
    unknown = set(max_calls or {}) - {ALL_TOOLS, *tools}
    if unknown:
        known = ", ".join([ALL_TOOLS, *tools])
        raise ValueError(f"max_calls names {sorted(map(str, unknown))[0]!r}; known: {known}")
    return {**{name: number for name, number in own.items() if number is not None}, **(max_calls or {})}


class CallCount:
    """The calls of one trajectory, counted against its limits."""

    def __init__(self, limits: CallLimits) -> None:
        self._limits = limits
        self._made: Counter[str] = Counter()
        self._malformed_turns = 0

    def count_or_refuse(self, tool: str, number: int) -> str | None:
        """Returns why a call exceeds a limit. None means that it may be made, and counts it.

        Args:
            tool: its name.
            number: the number of well-formed calls before it in the turn.
        """
        parallel = self._limits.max_parallel_calls
        if number >= parallel:
            return f"Limit of calls per turn reached ({parallel}). Make this call in the next turn."
        for name, made, what in ((tool, self._made[tool], tool), (ALL_TOOLS, self._made.total(), "tool")):
            limit = self._limits.max_calls.get(name)
            if limit is not None and made >= limit:
                return f"Limit of {what} calls reached ({limit}). Continue without further {what} calls."
        self._made[tool] += 1
        return None

    def ends(self, problems: Sequence[str | None]) -> bool:
        """Returns whether a turn ends the trajectory, because too many turns held nothing but
        malformed calls.

        Args:
            problems: for each of its calls what is wrong with it, None for a well-formed one.
        """
        self._malformed_turns += bool(problems) and all(problems)
        return self._malformed_turns > self._limits.max_malformed_turns


def refused(why: str) -> str:
    """The answer to a call that was not executed."""
    return f"{NOT_EXECUTED_PREFIX} {why}"


def unreadable(problem: str) -> str:
    """The answer to a malformed call."""
    return refused(f"Malformed call: {problem}. Fix it and try again.")


def unknown_tool(tool: str, tools: Iterable[str]) -> str:
    """The answer to a call of a tool that is not there, as veRL's own loop has it."""
    return f"{STOCK_ERRORS[0]}{tool}'. Available tools: {list(tools)}"


def invalid_json(tool: str, why: str) -> str:
    """The answer to a call whose arguments are not JSON, in the words of veRL's own loop."""
    return f"{STOCK_ERRORS[1]}{tool}': {why}"


def failed(tool: str, why: str) -> str:
    """The answer to a call that failed, as veRL's own loop begins it."""
    return f"{STOCK_ERRORS[2]}{tool}': {why}"


def control_pattern(tokens: Iterable[str]) -> re.Pattern[str]:
    """Finds a tokenizer's control tokens, and tool markers, which would be read as answers."""
    found = {token for token in {*tokens, *TOOL_MARKERS} if len(token.strip()) > 2}
    return re.compile("|".join(re.escape(token) for token in sorted(found, key=len, reverse=True)))


def strip_control(text: str, pattern: re.Pattern[str] = ANY_CONTROL) -> str:
    """Text that is safe in a prompt: without what ``pattern`` finds, and with a question mark for each half of a
    surrogate pair, which tokenizers refuse. A literal image token or end of turn in a web page would break the prompt.
    """
    text = text.encode("utf-8", "replace").decode()
    # Removing one may join another.
    while (stripped := pattern.sub("", text)) != text:
        text = stripped
    return text
