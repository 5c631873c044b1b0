"""Says before Ray starts what cannot run on a CPU, or does not fit into memory."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from verl_tapo.cpu import BACKEND, ROLLOUT_NAME

logger = logging.getLogger(__name__)

GIB = 2**30
PROCESSES_GIB = 3.5
"""Resident memory of all of a run's processes before a model is loaded, as measured with one worker."""
WORKER_GIB = 1.2
"""The same of every further worker and its server."""
COPIES = 5
"""Float32 copies of the weights in memory: the actor's, their gradients, Adam's two moments, the
rollout's."""


def problems(config: Any, use_critic: bool = False) -> list[str]:
    """Returns one sentence for each problem of a configuration on a CPU.

    Args:
        config: veRL's, composed.
        use_critic: whether there is one.
    """
    found = []
    model, rollout = config.actor_rollout_ref.model, config.actor_rollout_ref.rollout
    if config.trainer.device != "cpu":
        found.append(f"trainer.device={config.trainer.device}: set cpu")
    if rollout.name != ROLLOUT_NAME and importlib.util.find_spec(str(rollout.name)) is None:
        found.append(
            f"actor_rollout_ref.rollout.name={rollout.name}, which is not installed: set {ROLLOUT_NAME} (needs no GPU)"
        )
    strategies = {"actor_rollout_ref.actor": config.actor_rollout_ref.actor.strategy}
    if use_critic:
        strategies["critic"] = config.critic.strategy
    for name, strategy in strategies.items():
        if strategy != "fsdp2":
            found.append(f"{name}.strategy={strategy}: only fsdp2 runs on a CPU")
    attention = model.override_config.get("attn_implementation", "flash_attention_2")
    if "flash" in attention:
        found.append(f"attention is {attention}: set +actor_rollout_ref.model.override_config.attn_implementation=sdpa")
    if model.use_remove_padding:
        found.append("actor_rollout_ref.model.use_remove_padding=True needs flash attention: set False")
    adapters = model.lora_rank > 0 or model.get("lora_adapter_path")
    if adapters and rollout.name == ROLLOUT_NAME and not model.lora.get("merge"):
        found.append(
            f"the rollout {ROLLOUT_NAME} takes whole weights, and LoRA adapters (actor_rollout_ref.model.lora_rank="
            f"{model.lora_rank}) would not reach it: set actor_rollout_ref.model.lora.merge=True"
        )
    ray = config.ray_kwargs.ray_init
    workers = _workers(config)
    backend = rollout.checkpoint_engine.backend
    if _separate(config) and backend != BACKEND:
        found.append(
            f"actor_rollout_ref.rollout.checkpoint_engine.backend={backend}: separate_async needs {BACKEND} on a CPU"
        )
    if not ray.get("address"):
        found += _slot_problems(ray.get("num_gpus") or 0, workers)
    return found


def _slot_problems(slots: int, workers: int) -> list[str]:
    """Ray refuses more slots than the GPUs that it is told of, also where they stand for processes."""
    found = []
    if slots < workers:
        found.append(
            f"Ray has {slots} slots for {workers} workers and would wait for ever: set "
            f"+ray_kwargs.ray_init.num_gpus={workers} (slots, not GPUs)"
        )
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None and len(named.split(",") if named else []) < slots:
        found.append(
            f"CUDA_VISIBLE_DEVICES={named!r} names fewer GPUs than Ray is to have slots ({slots}), and it would "
            f"refuse: unset it, or set {','.join(['-1'] * slots)}, which hides every GPU"
        )
    return found


def _separate(config: Any) -> bool:
    """Whether rollouts have servers of their own."""
    v1: Any = config.trainer.get("v1", None) or {}
    return bool(config.trainer.get("use_v1", False) and v1.get("trainer_mode", None) == "separate_async")


def _workers(config: Any) -> int:
    """Of the trainer, and of servers of their own."""
    rollout = config.actor_rollout_ref.rollout
    own = rollout.nnodes * rollout.n_gpus_per_node if _separate(config) else 0
    return int(config.trainer.n_gpus_per_node * config.trainer.nnodes + own)


def shortages(config: Any) -> list[str]:
    """Returns one sentence for each resource of this machine that a run may exceed."""
    import psutil  # type: ignore[import-untyped]

    found = []
    workers = _workers(config)
    weights = sum(file.stat().st_size for file in Path(config.actor_rollout_ref.model.path).glob("*.safetensors"))
    needed = PROCESSES_GIB + WORKER_GIB * (workers - 1) + COPIES * weights / GIB
    available = psutil.virtual_memory().available / GIB
    if available < needed:
        found.append(
            f"about {needed:.1f} GiB of memory are needed and {available:.1f} GiB are available "
            f"({workers} worker(s), {weights / GIB:.2f} GiB of weights)"
        )
    store = (config.ray_kwargs.ray_init.get("object_store_memory") or 0) / GIB
    shared = Path("/dev/shm")
    if shared.exists() and (free := shutil.disk_usage(shared).free / GIB) < store:
        found.append(
            f"/dev/shm has {free:.2f} GiB free, and Ray's object store is to have {store:.2f} GiB: Ray would use the "
            "disk instead, slowly (in a container: --shm-size; else: ray_kwargs.ray_init.object_store_memory)"
        )
    return found


def validate_hook(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Round ``validate_config``, which veRL calls before it starts Ray.

    Raises:
        ValueError: for a configuration that cannot run on a CPU.
    """

    def call(config: Any, use_reference_policy: bool, use_critic: bool) -> Any:
        if found := problems(config, use_critic):
            # In one line, which is what a log's reader looks for.
            raise ValueError("VERL_PLATFORM=cpu cannot run this (`--config-name cpu` has it all): " + "; ".join(found))
        for shortage in shortages(config):
            logger.warning("VERL_PLATFORM=cpu: %s", shortage)
        return wrapped(config=config, use_reference_policy=use_reference_policy, use_critic=use_critic)

    return call(*args, **kwargs)
