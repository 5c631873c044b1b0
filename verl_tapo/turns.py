"""Plain turns in bulk: most assistant turns make one call, spelled with marker tokens, and get one answer. Those are
found for a whole batch by array operations; `verl_tapo.parsing` goes through everything else turn by turn.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from verl_tapo.arrays import sorted_unique, thread_count
from verl_tapo.steps import IntArray

_CHUNK = 1 << 17  # tokens


class PlainTurns(NamedTuple):
    """T turns, in order; positions in the flat batch."""

    row: IntArray  # (T,) which of the rows
    start: IntArray
    end: IntArray
    opening: IntArray  # of the call
    closing: IntArray
    answer: IntArray  # where the answer's marker stands, -1 for none
    stop: IntArray  # where the observation ends


def in_pieces(function: Callable[[int, int], IntArray], start: int, stop: int) -> list[IntArray]:
    """What ``function(start, stop)`` gives for pieces of ``[start, stop)`` that stay in the cache; in a few threads."""
    starts = range(start, stop, _CHUNK)
    threads = thread_count(len(starts))
    share = -(-len(starts) // threads)

    def work(thread: int) -> list[IntArray]:
        return [function(at, min(at + _CHUNK, stop)) for at in starts[thread * share : (thread + 1) * share]]

    with ThreadPoolExecutor(threads) as pool:
        return [piece for pieces in pool.map(work, range(threads)) for piece in pieces]


def run_bounds(mask: IntArray, bounds: IntArray) -> IntArray:
    """Where runs of equal mask begin, row by row, and the last one's end; rows are ``[bounds[r], bounds[r + 1])``."""
    first, last = int(bounds[0]), int(bounds[-1])

    def changes(start: int, stop: int) -> IntArray:
        values = mask[start : min(stop + 1, last)]  # with the first token of the next piece
        return np.flatnonzero(values[1:] != values[:-1]) + (start + 1)

    found = np.concatenate([bounds[:0], *in_pieces(changes, first, last)])
    # There may be other values than 0 and 1.
    found = found[(mask[found] != 0) != (mask[found - 1] != 0)]
    return sorted_unique(np.concatenate([bounds, found]))


def plain_turns(
    bounds: IntArray,
    runs: IntArray,
    position: IntArray,
    opening: npt.NDArray[np.bool_],
    closing: npt.NDArray[np.bool_],
    answer: npt.NDArray[np.bool_],
    odd: npt.NDArray[np.bool_],
) -> tuple[PlainTurns, npt.NDArray[np.bool_]]:
    """The turns of the rows that have none but plain ones, and which rows those are, (R,).

    Args:
        bounds: (R + 1,) of the rows.
        runs: see `run_bounds`.
        position: (K,) positions of markers, rising, within the rows.
        opening, closing: (K,) those of calls, in policy tokens.
        answer: (K,) those of answers, in observations.
        odd: (K,) those that make a row one to look at closely.
    """
    run = np.searchsorted(runs, position, side="right") - 1
    row = np.searchsorted(bounds, position, side="right") - 1
    count = len(runs) - 1

    def per_run(which: npt.NDArray[np.bool_]) -> tuple[IntArray, IntArray]:
        place = np.full(count + 1, -1)
        place[run[which]] = position[which]
        return np.bincount(run[which], minlength=count + 1), place

    opens, opened = per_run(opening)
    closes, closed = per_run(closing)
    answers, answered = per_run(answer)
    turn = np.flatnonzero(opens[:count] + closes[:count])
    row_of_turn = np.searchsorted(bounds, runs[turn], side="right") - 1
    # The observation is the next run, unless the row ends there.
    followed = runs[turn + 1] < bounds[row_of_turn + 1]
    after = np.where(followed, turn + 1, count)  # the last entry stands for none: no markers in it
    plain = (opens[turn] == 1) & (closes[turn] == 1) & (opened[turn] < closed[turn]) & (answers[after] < 2)
    rows = np.ones(len(bounds) - 1, dtype=bool)
    rows[row_of_turn[~plain]] = False
    rows[row[odd]] = False
    kept = rows[row_of_turn]
    turn, after, row_of_turn, followed = turn[kept], after[kept], row_of_turn[kept], followed[kept]
    end = runs[turn + 1]
    stop = np.where(followed, runs[np.minimum(after + 1, count)], end)
    return PlainTurns(row_of_turn, runs[turn], end, opened[turn], closed[turn], answered[after], stop), rows
