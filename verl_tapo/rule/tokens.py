"""Parts 8 and 9 of the rule on tokens: the corrected tokens, and the size of the correction."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from verl_tapo.rule.arrays import BoolArray, FloatArray, IntArray, sorted_unique, span_positions, thread_count
from verl_tapo.rule.config import TapoConfig
from verl_tapo.rule.inputs import Batch, TokenArray
from verl_tapo.rule.steps import StepColumns

# Tokens corrected at a time: small arrays stay in the cache.
_TOKEN_BLOCK = 1 << 16


def correct_tokens(advantages: TokenArray, batch: Batch, transfer: FloatArray, cfg: TapoConfig) -> int:
    """Part 8: adds each step's transfer, (S,), to the negative advantages, (B, L), of its policy tokens, in place.

    An infinite transfer makes them 0, with ``cfg.clip`` or without.

    Returns:
        The number of tokens corrected.
    """
    rows, spans, amount = _segments(batch.steps, transfer, cfg)
    if not len(rows):
        return 0
    width = advantages.shape[1]
    values, policy = advantages.reshape(-1), batch.policy.reshape(-1)
    amount = amount.astype(values.dtype)
    lengths = spans[:, 1] - spans[:, 0]
    starts = rows * width + spans[:, 0]

    def change(first: int, last: int) -> int:
        where = span_positions(starts[first:last], lengths[first:last])
        old = values.take(where)
        concerned = (old < 0) & (policy.take(where) != 0)
        new = np.repeat(amount[first:last], lengths[first:last])
        new += old
        if cfg.clip:
            np.minimum(new, 0, out=new)
        else:
            new[np.isinf(new)] = 0
        values[where] = np.where(concerned, new, old)
        return int(np.count_nonzero(concerned))

    # Segments share no token, so that blocks of them can go side by side.
    blocks = np.flatnonzero(np.diff(lengths.cumsum() // _TOKEN_BLOCK, prepend=-1)).tolist()
    with ThreadPoolExecutor(thread_count(len(blocks))) as pool:
        return sum(pool.map(change, blocks, [*blocks[1:], len(rows)]))


def withhold_rewards(advantages: TokenArray, batch: Batch, withheld: BoolArray) -> int:
    """Part 9: makes the positive advantages, (B, L), of such rollouts' policy tokens 0, in place; ``withheld`` is (T,).

    Returns:
        The number of tokens changed.
    """
    changed = 0
    for row in np.flatnonzero(withheld[batch.rollout_of_row]).tolist():
        unearned = (advantages[row] > 0) & (batch.policy[row] != 0)
        advantages[row][unearned] = 0
        changed += int(np.count_nonzero(unearned))
    return changed


def _segments(steps: StepColumns, transfer: FloatArray, cfg: TapoConfig) -> tuple[IntArray, IntArray, FloatArray]:
    """Returns disjoint token spans and the transfer to add in each: (K,) rows, (K, 2) spans, (K,)
    transfers, all > 0.

    A token in several steps' spans gets the smallest of their transfers, 0 for a step without one:
    a turn with parallel calls is corrected only as far as its weakest call [ours].
    """
    spans = steps.span(cfg.token_scope)
    gaining = sorted_unique(steps.row[transfer > 0])
    taken = np.flatnonzero(np.isin(steps.row, gaining) & (spans[:, 0] < spans[:, 1]))
    if not len(taken):
        return np.zeros(0, np.int64), np.zeros((0, 2), np.int64), np.zeros(0)
    taken = taken[np.lexsort((spans[taken, 1], spans[taken, 0], steps.row[taken]))]
    # (K, 3): row, start, end; sorted.
    keys = np.column_stack([steps.row[taken], spans[taken]])
    first = np.flatnonzero(np.append(True, (keys[1:] != keys[:-1]).any(1)))
    amount = np.minimum.reduceat(transfer[taken], first)
    keys = keys[first]
    overlaps = np.flatnonzero((keys[1:, 0] == keys[:-1, 0]) & (keys[1:, 1] < keys[:-1, 2]))
    if len(overlaps):
        keys, amount = _split_overlaps(keys, amount, set(keys[overlaps, 0].tolist()))
    positive = amount > 0
    return keys[positive, 0], keys[positive, 1:], amount[positive]


def _split_overlaps(keys: IntArray, amount: FloatArray, rows: set[int]) -> tuple[IntArray, FloatArray]:
    """Cuts the spans of ``rows`` at each other's ends, so that the pieces are disjoint."""
    apart = ~np.isin(keys[:, 0], list(rows))
    pieces: list[tuple[int, int, int]] = []
    amounts: list[float] = []
    for row in sorted(rows):
        of_row = np.flatnonzero(keys[:, 0] == row)
        cuts = np.unique(keys[of_row, 1:])
        for start, end in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
            covering = of_row[(keys[of_row, 1] <= start) & (keys[of_row, 2] >= end)]
            if len(covering):
                pieces.append((row, start, end))
                amounts.append(float(amount[covering].min()))
    split = np.array(pieces, dtype=np.int64).reshape(-1, 3)
    return np.concatenate([keys[apart], split]), np.concatenate([amount[apart], np.array(amounts)])
