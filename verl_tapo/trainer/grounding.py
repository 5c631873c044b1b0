"""Metrics of how a batch's successes and failures are grounded, for any estimator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from verl_tapo.rule.arrays import numbered
from verl_tapo.rule.figures import FOUND
from verl_tapo.rule.grounding import grounded, shares
from verl_tapo.rule.report import metric_word
from verl_tapo.rule.steps import SIGHTS, ToolStep
from verl_tapo.trainer.rollout import RolloutBatch

_TOOLS = 20


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
    of_row = np.arange(len(success)) if rollout.sessions is None else numbered(rollout.sessions.of_row)[1]
    rollouts, first = np.unique(of_row[real], return_index=True)
    if not len(rollouts):
        return {}
    holder = np.array([of_row[step.row] for step in steps], dtype=np.int64)
    seen = np.array([SIGHTS[step.seen] for step in steps], dtype=np.int64)
    state = grounded(holder, seen, int(of_row.max()) + 1)[rollouts]
    metrics = {f"tapo/grounding/{name}": share for name, share in shares(state, success[real[first]]).items()}
    calls = Counter(step.tool for step in steps if step.ok and step.seen is not None)
    finds = Counter(step.tool for step in steps if step.ok and step.seen)
    # A model may invent any number of names: only the most used tools become curves.
    for tool, count in calls.most_common(_TOOLS):
        metrics[f"tapo/grounding/tool/{metric_word(tool)}/{FOUND.name}"] = finds[tool] / count
    return metrics
