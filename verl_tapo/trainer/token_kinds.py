"""How likely the tokens were that the policy sampled, by what they are: calls, thoughts before calls, answers.

A policy whose calls become certain while its answers do not has frozen its tool use; one that
calls no more has no tokens of calls. The trainer has all log-probs already: nothing is computed
but means.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from verl_tapo.rule.arrays import IntArray, numbered
from verl_tapo.rule.figures import NLL, TOKEN_KINDS, TOKEN_SHARES, shares_of
from verl_tapo.rule.steps import ToolStep
from verl_tapo.trainer.rollout import Sampled, Sessions

_NO_KIND = -1
_CALL, _THOUGHT, _ANSWER = range(len(TOKEN_KINDS))


def token_metrics(
    sampled: Sampled, steps: Sequence[ToolStep], padding: npt.NDArray[np.bool_], sessions: Sessions | None
) -> dict[str, float]:
    """Mean negative log-probs and shares of the policy's tokens by their kind, ``tapo/nll/`` and ``tapo/tokens/``.

    A log-prob that is not finite is left out of its mean, and a mean of none is left out.

    Args:
        sampled: N tokens of B rows.
        steps: S tool-use steps of real rows; all of them, executed or not.
        padding: (B,) rows that are no real samples.
        sessions: of rows that are outputs of one rollout; None: each row is one.
    """
    policy = sampled.policy != 0
    kinds = _kinds(sampled, steps, padding, sessions)[policy]
    log_probs = None if sampled.log_probs is None else sampled.log_probs[policy]
    counts = {"policy_tokens": float(np.count_nonzero(kinds != _NO_KIND))}
    for number, name in enumerate(TOKEN_KINDS):
        own = kinds == number
        counts[f"{name}_tokens"] = float(np.count_nonzero(own))
        if log_probs is not None:
            number_known, total = _sum_of_finite(log_probs[own])
            counts[f"{name}_with_log_prob"], counts[f"{name}_nll_sum"] = float(number_known), -total
    figures = [*NLL.values(), *TOKEN_SHARES.values()]
    return {f"tapo/{name}": value for name, value in shares_of(counts, figures).items()}


def _sum_of_finite(values: npt.NDArray[np.floating[Any]]) -> tuple[int, float]:
    """Returns how many values are finite, and their sum."""
    total = float(values.sum(dtype=np.float64))
    # The usual case needs no second look.
    return (len(values), total) if math.isfinite(total) else _sum_of_finite(values[np.isfinite(values)])


def _kinds(
    sampled: Sampled, steps: Sequence[ToolStep], padding: npt.NDArray[np.bool_], sessions: Sessions | None
) -> npt.NDArray[np.int8]:
    """Returns the kind of each token, (N,), as if the policy had generated all of them."""
    starts, ends = sampled.offsets[:-1].tolist(), sampled.offsets[1:].tolist()
    thoughts = _thoughts(np.diff(sampled.offsets), steps, sessions).tolist()
    kind = np.full(len(sampled.policy), _NO_KIND, dtype=np.int8)
    for row in np.flatnonzero(~padding).tolist():
        last = starts[row] + thoughts[row]
        kind[starts[row] : last], kind[last : ends[row]] = _THOUGHT, _ANSWER
    last_call: dict[tuple[int, int], int] = {}
    for step in steps:
        start, end = starts[step.row] + step.call[0], starts[step.row] + step.call[1]
        kind[start : min(end, ends[step.row])] = _CALL
        turn = step.row, starts[step.row] + step.turn[1]
        last_call[turn] = max(last_call.get(turn, 0), end)
    # Behind a turn's last call there is its end: to call is to end the turn.
    for (row, end), start in last_call.items():
        kind[start : min(end, ends[row])] = _CALL
    return kind


def _thoughts(lengths: IntArray, steps: Sequence[ToolStep], sessions: Sessions | None) -> IntArray:
    """Returns how many of each row's tokens, (B,), stand before the end of its rollout's last turn with a call."""
    within = np.zeros(len(lengths), dtype=np.int64)
    for step in steps:
        within[step.row] = max(within[step.row], step.turn[1])
    if sessions is not None:
        # What comes before the last output with a call comes before that call.
        of_row, calls = numbered(sessions.of_row)[1], within > 0
        last = np.full(int(of_row.max(initial=-1)) + 1, -1)
        np.maximum.at(last, of_row[calls], sessions.output[calls])
        before = sessions.output < last[of_row]
        within[before] = lengths[before]
    return np.minimum(within, lengths)
