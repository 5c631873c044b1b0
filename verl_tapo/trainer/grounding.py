"""Grounding in the trainer: the rewards that ``grounding.luck`` leaves, and metrics for any estimator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from verl_tapo.answers.evidence import evidence_of, ground_truth_of
from verl_tapo.rule.arrays import BoolArray, IntArray, numbered
from verl_tapo.rule.figures import FOUND
from verl_tapo.rule.grounding import earned, found_nothing, grounded, shares
from verl_tapo.rule.report import metric_word
from verl_tapo.rule.steps import SIGHTS, ToolStep
from verl_tapo.trainer.rollout import RolloutBatch

_TOOLS = 20
_WITHOUT_TOOLS = "single_turn_agent"


def recognisable_answers(rollout: RolloutBatch) -> BoolArray:
    """(B,) the rows of rollouts whose tools could have shown an accepted answer, see `verl_tapo.transfer_credit`.

    A record says so. Without records the ground truth does, unless some rows go to a loop without tools: which ones
    they are, the batch does not tell.
    """
    of_row = rollout.trajectory_of_row()
    told = np.zeros(len(of_row), dtype=bool)
    if any(isinstance(record, Mapping) for record in rollout.records):
        for row, record in enumerate(rollout.records):
            told[of_row[row]] |= isinstance(record, Mapping) and record.get("recognisable") is True
    elif _WITHOUT_TOOLS not in (set(rollout.agent_names()) or {rollout.agent_loop}):
        for row in np.flatnonzero(~rollout.padding).tolist():
            told[of_row[row]] |= evidence_of(ground_truth_of(rollout.reward_model(row))).tells
    recognisable: BoolArray = told[of_row] & ~rollout.padding
    return recognisable


def earned_rewards(
    rollout: RolloutBatch,
    success: npt.NDArray[np.bool_],
    steps: Sequence[ToolStep],
    rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: Sequence[Hashable],
    recognisable: BoolArray,
) -> torch.Tensor:
    """The token-level rewards for the base estimator under ``grounding.luck``, see `verl_tapo.rule.grounding.earned`.

    Without a success that found nothing they are ``rewards`` itself. Else what it does not earn is subtracted at the
    token that holds its reward, so that penalties of other tokens (KL) remain.

    Args:
        rollout: B rows.
        success: (B,) ``y`` as each row has it.
        steps: S tool-use steps, of real rows.
        rewards, response_mask: (B, L).
        index: (B,) prompt groups.
        recognisable: (B,) see `recognisable_answers`.
    """
    of_row = rollout.trajectory_of_row()
    last = np.arange(len(of_row)) if rollout.sessions is None else rollout.sessions.final_row
    # (T,) the row that holds each trajectory's reward.
    final = last[np.unique(of_row, return_index=True)[1]]
    counts = np.isfinite(rewards[final].sum(-1).double().cpu().numpy()) & ~rollout.padding[final]
    group, scores = numbered(index)[1][final], np.where(counts, rollout.scores[final], np.nan)
    nothing = found_nothing(*_sights(steps, of_row), group, recognisable[final])
    unearned = scores - earned(scores, group, success[final], nothing)
    concerned = np.flatnonzero(unearned > 0)
    if not len(concerned):
        return rewards
    row = torch.from_numpy(final[concerned]).to(rewards.device)
    # The last token that has a reward, or is the policy's.
    relevant = (rewards[row] != 0) | (response_mask[row] != 0)
    token = rewards.shape[1] - 1 - relevant.flip(1).int().argmax(1)
    lowered = rewards.clone()
    # In double precision: scores of a group that differ by a rounding error would get advantages.
    left = rewards[row, token].double() - torch.from_numpy(unearned[concerned]).to(rewards.device)
    lowered[row, token] = left.to(rewards.dtype)
    return lowered


def _sights(steps: Sequence[ToolStep], of_row: IntArray) -> tuple[IntArray, IntArray]:
    """(S,) the trajectory that holds each step, and what its tool's answer held."""
    holder = np.array([of_row[step.row] for step in steps], dtype=np.int64)
    return holder, np.array([SIGHTS[step.seen] for step in steps], dtype=np.int64)


def grounding_metrics(
    rollout: RolloutBatch, success: npt.NDArray[np.bool_], steps: Sequence[ToolStep]
) -> dict[str, float]:
    """Shares of rollouts in which a tool's answer held an accepted answer, see `verl_tapo.rule.grounding`.

    Only rollouts that can be decided count; a share of none is left out. All names begin with
    ``tapo/grounding/``.

    Args:
        rollout: B rows.
        success: (B,) ``y`` of each row's rollout.
        steps: S tool-use steps, of real rows.
    """
    real = np.flatnonzero(~rollout.padding)
    of_row = rollout.trajectory_of_row()
    rollouts, first = np.unique(of_row[real], return_index=True)
    if not len(rollouts):
        return {}
    holder, seen = _sights(steps, of_row)
    state = grounded(holder, seen, int(of_row.max()) + 1)[rollouts]
    metrics = {f"tapo/grounding/{name}": share for name, share in shares(state, success[real[first]]).items()}
    calls = Counter(step.tool for step in steps if step.ok and step.seen is not None)
    finds = Counter(step.tool for step in steps if step.ok and step.seen)
    # A model may invent any number of names: only the most used tools become curves.
    for tool, count in calls.most_common(_TOOLS):
        metrics[f"tapo/grounding/tool/{metric_word(tool)}/{FOUND.name}"] = finds[tool] / count
    return metrics
