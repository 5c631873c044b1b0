"""Adds the CPU's parts to veRL's registries. Each function is called when veRL's module is
imported."""

from __future__ import annotations

from typing import Any

from verl_tapo.cpu import ROLLOUT_NAME


def register_platform(platform_manager: Any) -> None:
    """``VERL_PLATFORM=cpu``."""
    from verl_tapo.cpu.platform import CpuPlatform

    platform_manager.PlatformRegistry.register(platform="cpu")(CpuPlatform)


def register_engines(_: Any) -> None:
    """``strategy=fsdp2`` only: FSDP1 needs a device with a number."""
    from verl.workers.engine.base import EngineRegistry

    from verl_tapo.cpu.engine import CpuEngineWithLMHead, CpuEngineWithValueHead

    EngineRegistry.register("language_model", "fsdp2", "cpu")(CpuEngineWithLMHead)
    EngineRegistry.register("value_model", "fsdp2", "cpu")(CpuEngineWithValueHead)


def register_replica(replica: Any) -> None:
    """``rollout.name=transformers``, the trainer's side."""

    def load() -> Any:
        from verl_tapo.cpu.replica import TransformersReplica

        return TransformersReplica

    replica.RolloutReplicaRegistry.register(ROLLOUT_NAME, load)


def register_rollout(base: Any) -> None:
    """``rollout.name=transformers``, the workers' side; veRL has no function for that."""
    base._ROLLOUT_REGISTRY[(ROLLOUT_NAME, "async")] = "verl_tapo.cpu.replica.TransformersRollout"
