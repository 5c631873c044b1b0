"""Part 9 of the rule [ours, off by default]: grounding in answers of tools that held an accepted
answer.

A step is *seen* if the whole answer of its tool held an accepted answer of the prompt. A rollout is
*grounded* if one of its steps is seen. It is *ungrounded* if it has steps and all are known not to
be seen. An unknown changes nothing.

A rollout without steps is neither. For ``luck`` it has *found nothing*, as an ungrounded one, where a tool could have
shown an accepted answer: else the way out of guessing after calls would be to guess without.

With ``luck`` a success that found nothing is a failure. What it `earned` is for the base estimator, which comes before
the rule: where most of a prompt's rollouts guess, only that tells the one that found the answer from them.
"""

from __future__ import annotations

import numpy as np

from verl_tapo.rule import figures
from verl_tapo.rule.arrays import BoolArray, FloatArray, IntArray
from verl_tapo.rule.config import TapoConfig
from verl_tapo.rule.inputs import Batch
from verl_tapo.rule.roles import Role
from verl_tapo.rule.steps import SEEN, UNKNOWN, UNSEEN


def grounded(holder: IntArray, seen: IntArray, rollouts: int) -> IntArray:
    """`SEEN` for a grounded rollout, `UNSEEN` for an ungrounded one, `UNKNOWN` for the others; (T,).

    Args:
        holder: (S,) the rollout that holds each step.
        seen: (S,) `SEEN`, `UNSEEN` or `UNKNOWN`.
        rollouts: T.
    """
    least, most = np.full(rollouts, SEEN), np.full(rollouts, UNKNOWN)
    np.minimum.at(least, holder, seen)
    np.maximum.at(most, holder, seen)
    return np.where((most == SEEN) | (least > UNKNOWN), most, UNKNOWN)


def shares(state: IntArray, success: BoolArray) -> dict[str, float]:
    """What is said of T rollouts by whether they are grounded; a share of none is left out.

    Args:
        state: (T,) see `grounded`.
        success: (T,) ``y``.

    Returns:
        ``told``: the share of which it can be told; of these, ``grounded_successes`` and ``grounded_failures``: of
        successes and failures those that are grounded, and ``never_found``: those that are not.
    """
    shared = figures.shares_of(figures.counts_of_grounding(state, success), figures.GROUNDING)
    return {name.removeprefix("grounding/"): share for name, share in shared.items()}


def successes(batch: Batch, lucky: BoolArray, cfg: TapoConfig) -> BoolArray:
    """(T,) the rollouts that make witnesses (part 1) and count in the support (part 5): neither ``lucky`` ones, see
    `withheld`, nor, with ``grounding.witnesses``, ungrounded ones."""
    won: BoolArray = batch.success & ~lucky & (batch.advantage > 0)
    return won & (_grounded(batch) != UNSEEN) if cfg.grounding.witnesses else won


def forgiven(batch: Batch, role: IntArray, cfg: TapoConfig) -> BoolArray:
    """(S,) the failing steps that lose their penalty: in a grounded rollout, those up to the first
    sight of the answer, including parallel calls of that turn (``grounding.own``)."""
    steps, rollouts = batch.steps, len(batch.group)
    if not cfg.grounding.own or not len(role):
        return np.zeros(len(role), dtype=bool)
    # Rows of a rollout follow one another, and turns within a row.
    moment = steps.row * (int(steps.turn.max()) + 1) + steps.turn[:, 0]
    first = np.full(rollouts, -1)
    order = np.argsort(-moment, kind="stable")
    order = order[steps.seen[order] == SEEN]
    first[batch.holder[order]] = moment[order]
    free: BoolArray = (role == Role.FAILING) & (moment <= first[batch.holder])
    return free


def withheld(batch: Batch, cfg: TapoConfig) -> BoolArray:
    """(T,) the successes that count as failures, because they are known to have found nothing (``grounding.luck``)."""
    if not cfg.grounding.luck:
        return np.zeros(len(batch.group), dtype=bool)
    return batch.success & found_nothing(batch.holder, batch.steps.seen, batch.group, batch.recognisable)


def found_nothing(holder: IntArray, seen: IntArray, group: IntArray, recognisable: BoolArray) -> BoolArray:
    """(T,) the rollouts that are known to have found nothing: ungrounded ones, and ones without steps where an answer
    is recognisable, or a step of their prompt group shows that it is.

    Args:
        holder, seen: see `grounded`.
        group: (T,) number of each rollout's prompt group, from 0 to less than T.
        recognisable: (T,) see `verl_tapo.transfer_credit`.
    """
    silent, told = np.ones(len(group), dtype=bool), np.zeros(len(group), dtype=bool)
    silent[holder] = False
    told[group[holder[seen != UNKNOWN]]] = True
    nothing: BoolArray = (grounded(holder, seen, len(group)) == UNSEEN) | (silent & (recognisable | told[group]))
    return nothing


def earned(scores: FloatArray, group: IntArray, success: BoolArray, nothing: BoolArray) -> FloatArray:
    """(T,) the scores for the base estimator under ``grounding.luck``: a success that found nothing earns what failures
    of its prompt group earn on average, 0 where none fails, and never more than before. [ours]

    Args:
        scores: (T,) of the reward function; NaN for a rollout that does not count.
        group: as in `found_nothing`.
        success: (T,) ``y``.
        nothing: (T,) see `found_nothing`.
    """
    failed = np.flatnonzero(~success & np.isfinite(scores))
    sums = np.bincount(group[failed], scores[failed], minlength=len(group))
    of_failures = sums / np.maximum(np.bincount(group[failed], minlength=len(group)), 1)
    return np.where(success & nothing, np.minimum(scores, of_failures[group]), scores)


def _grounded(batch: Batch) -> IntArray:
    return grounded(batch.holder, batch.steps.seen, len(batch.group))
