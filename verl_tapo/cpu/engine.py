"""VeRL's FSDP2 engines for the device ``cpu``."""

from __future__ import annotations

import copy
from typing import Any

from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead, FSDPEngineWithValueHead


class _CpuEngine:
    """The differences from a GPU engine."""

    engine_config: Any

    def _build_fsdp_module(self, module: Any) -> Any:
        # A reference policy would be offloaded to pinned CPU memory, which does not exist without an accelerator.
        config = self.engine_config
        self.engine_config = copy.copy(config)
        for name in ("forward_only", "offload_policy"):
            object.__setattr__(self.engine_config, name, False)
        try:
            return super()._build_fsdp_module(module)  # type: ignore[misc]
        finally:
            self.engine_config = config


class CpuEngineWithLMHead(_CpuEngine, FSDPEngineWithLMHead):  # type: ignore[misc]
    """Actor and reference policy."""


class CpuEngineWithValueHead(_CpuEngine, FSDPEngineWithValueHead):  # type: ignore[misc]
    """Critic."""


def save_hook(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Round ``fsdp2_sharded_save_to_cpu``: copies what it returns."""
    state, spec = wrapped(*args, **kwargs)
    return {name: (tensor.clone(), of) for name, (tensor, of) in state.items()}, spec
