"""The results of a benchmark part, and the timing functions."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Fact:
    """A single figure, with the bound that we set ourselves ("" without one)."""

    name: str
    figure: str
    bound: str = ""


@dataclass(frozen=True)
class Sweep:
    """Costs of growing work. The first of ``costs`` is ours, the second is the alternative's."""

    grows: str
    """The quantity that grows."""
    fixed: str
    """The quantities that stay fixed."""
    unit: str
    sizes: list[int]
    costs: dict[str, list[float]]
    """The cost at each size in ``unit``, by what was measured; less is better."""

    def ratios(self) -> list[float]:
        """Our cost in that of the alternative."""
        ours, alternative, *_ = self.costs.values()
        return [cost / other for cost, other in zip(ours, alternative, strict=True)]


@dataclass(frozen=True)
class Part:
    """All that was measured of one part."""

    title: str
    text: str
    """A description of what is compared, in Markdown."""
    sweeps: list[Sweep] = field(default_factory=list)
    facts: list[Fact] = field(default_factory=list)


def medians(*functions: Callable[[], Any], repeats: int) -> list[float]:
    """Returns the median seconds of each function. They are called in turn, after one warm-up call,
    so that changes in the machine's load affect all alike."""
    times: list[list[float]] = [[] for _ in functions]
    for function in functions:
        function()
    for _ in range(repeats):
        for function, taken in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def sweep(
    grows: str,
    fixed: str,
    sizes: list[int],
    make: Callable[[int], Mapping[str, Callable[[], Any]]],
    repeats: int,
    each: Callable[[int], float] = lambda size: 1,
) -> Sweep:
    """Milliseconds at each size.

    Args:
        make: gives what is measured at a size, by name.
        each: the number of things at a size that a cost is divided by.
    """
    costs: dict[str, list[float]] = {}
    for size in sizes:
        functions = make(size)
        for name, seconds in zip(functions, medians(*functions.values(), repeats=repeats), strict=True):
            costs.setdefault(name, []).append(1000 * seconds / each(size))
    return Sweep(grows, fixed, "ms", sizes, costs)
