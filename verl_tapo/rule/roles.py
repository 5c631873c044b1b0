"""The rule's names for a step and for the outcome of a failing step."""

from __future__ import annotations

from enum import IntEnum
from typing import Any


class Role(IntEnum):
    """Parts 1 and 2 of the rule."""

    NONE = 0
    WITNESS = 1
    FAILING = 2


class Gate(IntEnum):
    """Part 7: the outcome of a failing step. Each value says more than those before it."""

    NONE = 0
    """The step is not a failing step."""
    NO_WITNESS = 1
    BELOW_THETA = 2
    BELOW_ALPHA = 3
    CORRECTED = 4


def is_matched(gate: Any) -> Any:
    """Whether a step of that `Gate` has an equivalent call in a successful rollout: it is *misassigned* [paper].

    Args:
        gate: one, or an array of them.
    """
    return gate >= Gate.BELOW_ALPHA
