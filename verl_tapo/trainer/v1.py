"""The adapter to veRL's V1 trainer (TransferQueue), in all its trainer modes.

V1 hands an estimator only rewards, mask and uid. The hook around ``PPOTrainer._compute_advantage``
also fetches the rollout data and makes it available to the estimator; the stock method then runs
unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from verl_tapo.records import RECORD_KEY
from verl_tapo.settings import TapoSettings, load_settings
from verl_tapo.trainer.batch import base_advantages
from verl_tapo.trainer.check import check_run
from verl_tapo.trainer.estimator import baseline_grounding, rollout_metrics
from verl_tapo.trainer.rollout import CURRENT, RolloutBatch, Sessions, Tokens, agent_loop_of, agent_names_of
from verl_tapo.trainer.tool_metrics import check_rollouts
from verl_tapo.trainer.verl_parser import declared_tools


def init_hook(wrapped: Callable[..., Any], trainer: Any, args: Any, kwargs: Any) -> None:
    """Round ``PPOTrainer.__init__(config)``: checks the configuration."""
    check_run(kwargs["config"] if "config" in kwargs else args[0])
    wrapped(*args, **kwargs)


def compute_advantage_hook(wrapped: Callable[..., Any], trainer: Any, args: Any, kwargs: Any) -> Any:
    """Round ``PPOTrainer._compute_advantage(batch, metrics)``; other estimators pass through untouched."""
    if trainer.config.algorithm.adv_estimator == "tapo":
        return _with_rollout(wrapped, trainer, *args, **kwargs)
    # Another estimator may be a baseline for TAPO, so its tools are measured too.
    if trainer.config.algorithm.get("tapo") is not None:
        _add_metrics(trainer, *args, **kwargs)
    return wrapped(*args, **kwargs)


def _add_metrics(trainer: Any, batch: Any, metrics: dict[str, Any]) -> None:
    settings = load_settings(trainer.config.algorithm)
    _check_rollouts(trainer, batch, settings)
    rollout, _ = fetch_rollout(trainer, batch, settings)
    metrics.update(
        rollout_metrics(
            rollout.records,
            rollout.reward_infos,
            rollout.padding,
            settings,
            rollout.agent_loop,
            rollout.agent_names,
        )
    )
    metrics.update(baseline_grounding(rollout, settings))


def _check_rollouts(trainer: Any, batch: Any, settings: TapoSettings) -> None:
    sessions = {
        key.rpartition("_")[0] for key, padding in zip(batch.keys, _padding(batch).tolist(), strict=True) if not padding
    }
    prompts = {session.rpartition("_")[0] for session in sessions}
    check_rollouts(
        len(sessions), len(prompts), int(trainer.config.actor_rollout_ref.rollout.n), settings.max_fault_rate
    )


def _extra_fields(data: Any, rows: int) -> list[dict[str, Any]]:
    stored = data.pop("extra_fields").tolist() if "extra_fields" in data else [None] * rows
    return [fields if isinstance(fields, dict) else {} for fields in stored]


def _reward_infos(extra: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    infos = [fields.get("reward_extra_info") for fields in extra]
    return [dict(info) if isinstance(info, Mapping) else {} for info in infos]


def _padding(batch: Any) -> npt.NDArray[np.bool_]:
    return np.array([bool(tag.get("is_padding", False)) for tag in batch.tags])


def _with_rollout(wrapped: Callable[..., Any], trainer: Any, batch: Any, metrics: dict[str, Any]) -> Any:
    import transfer_queue as tq
    from tensordict import TensorDict
    from verl.workers.utils.padding import response_to_nested

    settings = load_settings(trainer.config.algorithm)
    _check_rollouts(trainer, batch, settings)
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


def fetch_rollout(trainer: Any, batch: Any, settings: TapoSettings) -> tuple[RolloutBatch, torch.Tensor]:
    """The rollout of a V1 batch out of TransferQueue, and its (B, nested) response mask."""
    import transfer_queue as tq

    def get(*names: str) -> Any:
        return tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=list(names))

    data = get("response_mask", "rm_scores", "extra_fields", settings.success_key)
    response_mask = data["response_mask"]
    offsets = response_mask.offsets().cpu().numpy().astype(np.int64)
    extra = _extra_fields(data, len(batch))
    infos = _reward_infos(extra)
    # A colocated reward model writes its extra info into separate fields.
    if settings.success_key in data:
        column = data.pop(settings.success_key).tolist()
        infos = [{settings.success_key: value, **info} for value, info in zip(column, infos, strict=True)]

    def tokens() -> Tokens | None:
        stored = get("responses")
        if "responses" not in stored:
            return None
        return Tokens(stored["responses"].values().cpu().numpy(), response_mask.values().cpu().numpy(), offsets)

    @cache
    def prompts() -> list[list[int]]:
        return [prompt.tolist() for prompt in get("prompts")["prompts"].unbind()]

    @cache
    def reward_models() -> list[Any]:
        stored = get("reward_model").pop("reward_model", None)
        if stored is None:
            return [None] * len(batch)
        # Mappings of equal keys come as a stack, others as a list.
        return list(stored.tolist() if hasattr(stored, "tolist") else stored)

    algorithm = trainer.config.algorithm
    rollout = RolloutBatch(
        base=lambda chosen, rewards, mask, index: base_advantages(
            settings,
            algorithm,
            {"token_level_rewards": rewards, "response_mask": mask},
            {"uid": index, "keys": batch.keys},
            chosen,
        ),
        scores=np.add.reduceat(data["rm_scores"].values().double().cpu().numpy(), offsets[:-1]),
        reward_infos=infos,
        records=[fields.get(RECORD_KEY) for fields in extra],
        tokens=tokens,
        prompt_ids=lambda row: prompts()[row],
        reward_model=lambda row: reward_models()[row],
        lengths=np.diff(offsets),
        padding=_padding(batch),
        sessions=Sessions.from_keys(batch.keys),
        keys=batch.keys,
        step=getattr(trainer, "global_steps", None),
        part=getattr(trainer, "local_trigger_step", 0),
        tokenizer=trainer.tokenizer,
        tool_format=trainer.config.actor_rollout_ref.rollout.multi_turn.format,
        agent_loop=agent_loop_of(trainer.config),
        agent_names=partial(agent_names_of, trainer),
        tools=declared_tools(trainer.config.actor_rollout_ref.rollout.multi_turn),
    )
    return rollout, response_mask
