"""Arrays: their types, and some things that array code here needs in several places."""

from __future__ import annotations

import os
from collections.abc import Hashable, Sequence
from typing import TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

BoolArray: TypeAlias = npt.NDArray[np.bool_]
FloatArray: TypeAlias = npt.NDArray[np.float64]
IntArray: TypeAlias = npt.NDArray[np.int64]

_Key = TypeVar("_Key", bound=Hashable)
_THREADS = 4  # at the most; more do not make memory faster


def thread_count(tasks: int) -> int:
    """Returns how many threads should share ``tasks`` pieces of array work, at least 1."""
    return max(1, min(_THREADS, os.cpu_count() or 1, tasks))


def span_positions(starts: IntArray, lengths: IntArray) -> IntArray:
    """The positions in the spans ``[starts[k], starts[k] + lengths[k])``, one span after the other."""
    ends = lengths.cumsum()
    positions = np.arange(ends[-1] if len(ends) else 0)
    positions += np.repeat(starts - (ends - lengths), lengths)
    return positions


def sorted_unique(values: IntArray) -> IntArray:
    """The distinct values, rising. NumPy 2.3 and later hash them instead, which takes twenty times as long."""
    values = np.sort(values)
    new = np.append(True, values[1:] != values[:-1])
    distinct: IntArray = values[new[: len(values)]]
    return distinct


def numbered(values: Sequence[_Key]) -> tuple[dict[_Key, int], IntArray]:
    """A number for each distinct value, in the order in which they come, and the numbers of all ``values``."""
    number = {value: position for position, value in enumerate(dict.fromkeys(values))}
    return number, np.fromiter(map(number.__getitem__, values), np.int64, len(values))


def distinct_pairs(first: IntArray, second: IntArray) -> tuple[IntArray, IntArray]:
    """The K distinct pairs of non-negative numbers ``(first[k], second[k])``, sorted."""
    width = int(second.max(initial=0)) + 1
    left, right = np.divmod(sorted_unique(first * width + second), width)
    return left, right


def link(component: IntArray, left: IntArray, right: IntArray) -> None:
    """Joins the components of ``left[k]`` and ``right[k]``, in place; the least member names a component."""
    while len(left):
        a, b = component[left], component[right]
        apart = a != b
        if not apart.any():
            return
        np.minimum.at(component, np.maximum(a[apart], b[apart]), np.minimum(a[apart], b[apart]))
        while not np.array_equal(component, shorter := component[component]):
            component[:] = shorter
