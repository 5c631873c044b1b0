"""The adapter to veRL's V0 trainer, which the asynchronous experiments still build on: ``compute_advantage``.

The batch holds everything there, but the estimator is handed little of it, and neither tokenizer nor logger are in
reach of the function. Hooks: the trainer's constructor (to know the trainer), ``compute_advantage`` (to lay the rollout
ready), ``compute_data_metrics`` (to add TAPO's metrics to the step's).
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from verl_tapo.rule.arrays import IntArray
from verl_tapo.settings import TapoSettings, load_settings
from verl_tapo.trainer.batch import base_input, rollout_from_batch
from verl_tapo.trainer.check import check_run
from verl_tapo.trainer.rollout import CURRENT, agent_names_of

_trainer: weakref.ref[Any] | None = None
_pending: dict[str, float] = {}


def init_hook(wrapped: Callable[..., Any], trainer: Any, args: Any, kwargs: Any) -> None:
    """Round ``RayPPOTrainer.__init__``: checks the configuration, and remembers the trainer."""
    global _trainer
    config = inspect.signature(wrapped).bind(*args, **kwargs).arguments["config"]
    check_run(config)
    wrapped(*args, **kwargs)
    _trainer = weakref.ref(trainer)


def compute_advantage_hook(wrapped: Callable[..., Any], _: Any, args: Any, kwargs: Any) -> Any:
    """Round ``compute_advantage(data, adv_estimator, ..., config)``; other estimators pass through untouched."""
    arguments = inspect.signature(wrapped).bind(*args, **kwargs).arguments
    if arguments["adv_estimator"] != "tapo" or CURRENT.get() is not None:
        return wrapped(*args, **kwargs)
    data, algorithm = arguments["data"], arguments["config"]
    if "response_mask" not in data.batch:
        from verl.trainer.ppo.ray_trainer import compute_response_mask

        data.batch["response_mask"] = compute_response_mask(data)
    trainer = None if _trainer is None else _trainer()
    context = {name: getattr(trainer, name, None) for name in ("tokenizer", "config")}
    context["step"] = getattr(trainer, "global_steps", None)
    context["agent_names"] = partial(agent_names_of, trainer)
    rollout = rollout_from_batch(
        load_settings(algorithm),
        algorithm,
        data.batch,
        data.non_tensor_batch,
        {**context, "metrics": {}, "fields": {}},
        base_advantages,
    )
    token = CURRENT.set(rollout)
    try:
        data = wrapped(*args, **kwargs)
    finally:
        CURRENT.reset(token)
    for name, value in rollout.fields.items():
        data.batch[name] = value
    _pending.update(rollout.metrics)
    return data


def base_advantages(
    settings: TapoSettings, algorithm: Any, batch: Mapping[str, Any], columns: Mapping[str, Any], chosen: IntArray
) -> tuple[torch.Tensor, torch.Tensor]:
    """Base advantages and returns of the chosen rows, (R, L) each, through V0's own function."""
    from verl.trainer.ppo.ray_trainer import compute_advantage

    data, options = base_input(settings, algorithm, batch, columns, chosen)
    data = compute_advantage(data, **options)
    return data.batch["advantages"], data.batch["returns"]


def compute_data_metrics_hook(wrapped: Callable[..., Any], _: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Round ``compute_data_metrics(batch, ...)``: adds the metrics of the advantages computed last."""
    metrics: dict[str, Any] = wrapped(*args, **kwargs)
    metrics.update(_pending)
    _pending.clear()
    return metrics
