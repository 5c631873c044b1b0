"""The adapter to veRL's V1 trainer (TransferQueue), in all its trainer modes.

V1 hands an estimator rewards, mask and uid only. The hook round ``PPOTrainer._compute_advantage`` fetches the rollout
data besides and lays it ready for the estimator; the stock method then runs as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from verl_tapo.config import TapoSettings
from verl_tapo.records import RECORD_KEY
from verl_tapo.steps import IntArray
from verl_tapo.trainer.check import check_run
from verl_tapo.trainer.estimator import load_settings
from verl_tapo.trainer.rollout import CURRENT, Rollout, Sessions, Tokens


def init_hook(wrapped: Callable[..., Any], trainer: Any, args: Any, kwargs: Any) -> None:
    """Round ``PPOTrainer.__init__(config)``: checks the configuration."""
    check_run(kwargs["config"] if "config" in kwargs else args[0])
    wrapped(*args, **kwargs)


def compute_advantage_hook(wrapped: Callable[..., Any], trainer: Any, args: Any, kwargs: Any) -> Any:
    """Round ``PPOTrainer._compute_advantage(batch, metrics)``; other estimators pass through untouched."""
    if trainer.config.algorithm.adv_estimator != "tapo":
        return wrapped(*args, **kwargs)
    return _with_rollout(wrapped, trainer, *args, **kwargs)


def _with_rollout(wrapped: Callable[..., Any], trainer: Any, batch: Any, metrics: dict[str, Any]) -> Any:
    import transfer_queue as tq
    from tensordict import TensorDict
    from verl.workers.utils.padding import response_to_nested

    settings = load_settings(trainer.config.algorithm)
    rollout, response_mask = fetch_rollout(trainer, batch, settings)
    token = CURRENT.set(rollout)
    try:
        batch = wrapped(batch, metrics)
    finally:
        CURRENT.reset(token)
    if rollout.fields:
        fields = {name: response_to_nested(value, response_mask) for name, value in rollout.fields.items()}
        batch = tq.kv_batch_put(
            keys=batch.keys, partition_id=batch.partition_id, fields=TensorDict(fields, batch_size=len(batch))
        )
    metrics.update(rollout.metrics)
    return batch


def fetch_rollout(trainer: Any, batch: Any, settings: TapoSettings) -> tuple[Rollout, torch.Tensor]:
    """The rollout of a V1 batch out of TransferQueue, and its (B, nested) response mask."""
    import transfer_queue as tq

    names = ["uid", "response_mask", "responses", "rm_scores", "extra_fields", settings.success_key]
    data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=names)
    response_mask = data["response_mask"]
    offsets = response_mask.offsets().cpu().numpy().astype(np.int64)
    rows = len(batch)
    stored = data.pop("extra_fields").tolist() if "extra_fields" in data else [None] * rows
    extra: list[dict[str, Any]] = [fields if isinstance(fields, dict) else {} for fields in stored]
    infos: list[dict[str, Any]] = [fields.get("reward_extra_info") or {} for fields in extra]
    if settings.success_key in data:  # a colocated reward model writes its extra info as fields of their own
        column = data.pop(settings.success_key).tolist()
        infos = [{settings.success_key: value, **info} for value, info in zip(column, infos, strict=True)]
    padding = np.array([bool(tag.get("is_padding", False)) for tag in batch.tags])

    def tokens() -> Tokens | None:
        if "responses" not in data:
            return None
        return Tokens(data["responses"].values().cpu().numpy(), response_mask.values().cpu().numpy(), offsets)

    def prompt_ids(row: int) -> list[int]:
        prompt = tq.kv_batch_get(keys=[batch.keys[row]], partition_id=batch.partition_id, select_fields=["prompts"])
        return [int(token) for token in prompt["prompts"].values().tolist()]

    rollout = Rollout(
        base=lambda *given: _base(trainer, settings, batch.keys, *given),
        scores=np.add.reduceat(data["rm_scores"].values().double().cpu().numpy(), offsets[:-1]),
        reward_infos=infos,
        records=[fields.get(RECORD_KEY) for fields in extra],
        tokens=tokens,
        prompt_ids=prompt_ids,
        lengths=np.diff(offsets),
        padding=padding,
        sessions=Sessions.from_keys(batch.keys),
        tokenizer=trainer.tokenizer,
        tool_format=trainer.config.actor_rollout_ref.rollout.multi_turn.format,
    )
    return rollout, response_mask


def _base(
    trainer: Any,
    settings: TapoSettings,
    keys: list[str],
    rows: IntArray,
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The base estimator as V1 runs it, its rule for several outputs per session included."""
    from tensordict import TensorDict
    from verl.protocol import DataProto
    from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories

    algorithm = trainer.config.algorithm
    tensors = {"token_level_rewards": token_level_rewards, "response_mask": response_mask}
    data = DataProto(
        batch=TensorDict(tensors, batch_size=len(response_mask)),
        non_tensor_batch={"uid": np.asarray(index, dtype=object)},
    )
    if len(rows) < len(response_mask):
        data = data.select_idxs(rows)
        keys = [keys[row] for row in rows.tolist()]
    data = compute_advantage_for_multi_trajectories(
        data,
        batch_keys=keys,
        adv_estimator=settings.base_estimator,
        gamma=algorithm.gamma,
        lam=algorithm.lam,
        num_repeat=trainer.config.actor_rollout_ref.rollout.n,
        norm_adv_by_std_in_grpo=algorithm.get("norm_adv_by_std_in_grpo", True),
        config=algorithm,
    )
    return data.batch["advantages"], data.batch["returns"]
