"""A batch of rollouts as the estimator needs it, from any trainer."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from verl_tapo.calls.formats import Tools
from verl_tapo.rule.arrays import IntArray, numbered, span_positions
from verl_tapo.rule.values import shown, success_number
from verl_tapo.settings import TapoSettings

BaseEstimator: TypeAlias = Callable[[IntArray, torch.Tensor, torch.Tensor, Any], tuple[torch.Tensor, torch.Tensor]]
"""The trainer's own estimator: rows (R,), token-level rewards (B, L), response mask (B, L) and
index (B,) to base advantages and returns of those rows, (R, L) each."""


class Tokens(NamedTuple):
    """Response tokens of B rows, one after the other, without padding. N tokens."""

    ids: IntArray  # (N,)
    policy: IntArray  # (N,) 1 on tokens the policy generated, as the rollout left it
    offsets: IntArray  # (B + 1,)

    def rows(self, chosen: IntArray) -> Tokens:
        """The tokens of some rows only, given by ascending number."""
        if len(chosen) == len(self.offsets) - 1:
            return self
        lengths = np.diff(self.offsets)[chosen]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        where = span_positions(self.offsets[:-1][chosen], lengths)
        return Tokens(self.ids[where], self.policy[where], offsets)


LOG_PROBS = ("old_log_probs", "rollout_log_probs")
"""Columns of veRL's that hold the log-probs of sampled tokens, the preferred one first."""


class Sampled(NamedTuple):
    """How likely the response tokens of B rows were, one after the other, without padding. N tokens."""

    policy: IntArray  # (N,) 1 on tokens that the policy generated and is trained on
    log_probs: npt.NDArray[np.floating[Any]] | None  # (N,) natural logarithms; None if the trainer has none
    offsets: IntArray  # (B + 1,)


class Sessions(NamedTuple):
    """Trajectories of several rows (veRL: an agent loop with several outputs per session)."""

    of_row: Sequence[Hashable]  # (B,)
    final_row: IntArray  # (B,) row of the last output of each row's trajectory: it carries the reward
    output: IntArray  # (B,) number of each row among its trajectory's outputs, in their order

    @classmethod
    def from_keys(cls, keys: Sequence[str]) -> Sessions | None:
        """Reads veRL's keys ``{uid}_{session}_{output}``; None if every trajectory has one output."""
        parts = [key.rpartition("_") for key in keys]
        of_row = [session for session, _, _ in parts]
        if len(set(of_row)) == len(of_row):
            return None
        final: dict[str, tuple[int, int]] = {}
        for row, (session, _, output) in enumerate(parts):
            final[session] = max(final.get(session, (-1, -1)), (int(output), row))
        outputs = np.array([int(output) for _, _, output in parts])
        return cls(of_row, np.array([final[session][1] for session in of_row]), outputs)


@dataclass
class RolloutBatch:
    """One batch of B rows, as an adapter hands it to `verl_tapo.trainer.estimator`."""

    base: BaseEstimator
    scores: npt.NDArray[np.float64]
    """(B,) reward of each row, before any KL penalty."""
    reward_infos: Sequence[Mapping[str, Any]]
    """B mappings: the reward function's extra info."""
    records: Sequence[Any]
    """B records of `verl_tapo.records`; None if the agent loop wrote none."""
    tokens: Callable[[], Tokens | None]
    """The response tokens, None if the trainer has none. It is called only if steps have to be parsed."""
    prompt_ids: Callable[[int], Sequence[int]]
    """The prompt's token ids of a row. It is called only if an image argument has to be resolved."""
    lengths: IntArray
    """(B,) number of response tokens."""
    padding: npt.NDArray[np.bool_]
    """(B,) rows that are no real samples."""
    sampled: Callable[[], Sampled | None] = lambda: None
    """The log-probs of the response tokens; None if they cannot be had, mask included."""
    sessions: Sessions | None = None
    """Groups the rows that are outputs of one trajectory, for loops that return several. None: each
    row is one."""
    keys: Sequence[str] | None = None
    """(B,) veRL's ``{uid}_{session}_{output}``; None if the trainer has none."""
    reward_model: Callable[[int], Any] = lambda row: None
    """The data set's column ``reward_model`` of a row, which holds the ground truth. It is called
    only of rollouts without a record."""
    step: int | None = None
    """The number of the training step; None if the trainer does not give it."""
    part: int = 0
    """Number of the batch within the training step."""
    tokenizer: Any = None
    tool_format: str | None = None
    """The tool format the rollout is configured for."""
    tools: Tools | None = None
    """The tools' names and the parameters that each requires; None if the configuration does not say."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Filled by the estimator, for the trainer's logger."""
    fields: dict[str, torch.Tensor] = field(default_factory=dict)
    """(B, L) tensors, filled by the estimator, to be written to the batch."""
    agent_loop: str | None = None
    """The default agent loop; None if the trainer's configuration names none."""
    agent_names: Callable[[], Iterable[Any]] = tuple
    """The data set's column ``agent_name``, which overrides the default loop. It is asked for only
    where rollouts have no record."""
    unreadable: str | None = None
    """A success value that is not a number, if `success` met one."""

    def trajectory_of_row(self) -> IntArray:
        """(B,) number of each row's trajectory."""
        return np.arange(len(self.padding)) if self.sessions is None else numbered(self.sessions.of_row)[1]

    def final_rows(self, rows: IntArray) -> IntArray:
        """The last output of each trajectory that has one of these rows, each once, by number."""
        return np.unique(rows if self.sessions is None else self.sessions.final_row[rows])

    def success(self, settings: TapoSettings) -> npt.NDArray[np.bool_]:
        """(B,) success ``y``: the reward info's ``success_key``, else the score, at ``success_threshold`` or above.

        Raises:
            ValueError: where a ``success_key`` that was set on purpose is in no row's reward info.
        """
        values = self.scores.copy()
        known = unreadable = 0
        real = int((~self.padding).sum())
        for row, info in enumerate(self.reward_infos):
            value = info.get(settings.success_key)
            if value is None:
                continue
            known += not self.padding[row]
            values[row] = success_number(value)
            if math.isnan(values[row]) and not self.padding[row]:
                unreadable += 1
                self.unreadable = shown(value)
        if real and not known and settings.success_key != TapoSettings.success_key:
            keys = sorted({str(key) for info in self.reward_infos for key in info})
            raise ValueError(
                f"algorithm.tapo.success_key={settings.success_key!r} is in no row's reward info; "
                f"the reward function returned: {', '.join(keys) or 'nothing besides the score'}"
            )
        self.metrics["tapo/success_from_score"] = 1.0 - known / max(real, 1)
        self.metrics["tapo/success_unreadable"] = unreadable / max(real, 1)
        succeeded: npt.NDArray[np.bool_] = (values >= settings.success_threshold) & ~self.padding  # NaN: no success
        return succeeded


def agent_loop_of(config: Any) -> str | None:
    """Returns the default agent loop in a trainer's whole configuration.

    None where it names none, and where a manager of its own decides what runs.
    """
    agent = config.actor_rollout_ref.rollout.get("agent", None)
    if agent is None or manager_of(config) is not None:
        return None
    loop: str | None = agent.get("default_agent_loop", None)
    return loop


def manager_of(config: Any) -> str | None:
    """Returns the class that makes the rollouts in place of veRL's agent loops (uni-agent's, say), or None."""
    agent = config.actor_rollout_ref.rollout.get("agent", None) or {}
    manager: str | None = agent.get("agent_loop_manager_class", None)
    return manager


def agent_names_of(trainer: Any) -> list[str]:
    """Returns the column ``agent_name`` of the first rows of a trainer's data set; empty if it is
    unknown."""
    try:
        column = trainer.train_dataset.dataframe.select_columns("agent_name")  # without the rows' images
        return sorted(set(map(str, column[:_ROWS_LOOKED_AT]["agent_name"])))
    except Exception:  # no such column, or a data set of another kind
        return []


_ROWS_LOOKED_AT = 1000


CURRENT: ContextVar[RolloutBatch | None] = ContextVar("tapo_rollout", default=None)
"""The batch whose advantages are being computed, set by the trainer's adapter."""
