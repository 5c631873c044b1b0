"""VeRL's FSDP2 engines for the device ``cpu``."""

from __future__ import annotations

import copy
import random
from typing import Any

from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead, FSDPEngineWithValueHead

PORTS = (20000, 30000)
"""Below the ports that Linux and macOS give to outgoing connections, above those that Ray gives to its workers."""


class _CpuEngine:
    """What differs from a GPU."""

    engine_config: Any

    def _build_fsdp_module(self, module: Any) -> Any:
        # A reference policy would be offloaded to pinned memory of the CPU: there is none without an accelerator.
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


def process_group_hook(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Round ``initialize_global_process_group_ray``."""

    def call(timeout_second: Any = None, backend: Any = None) -> Any:
        return wrapped(timeout_second=timeout_second, backend=backend or "gloo")

    return call(*args, **kwargs)


def worker_group_hook(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Round ``RayWorkerGroup.__init__``."""
    if kwargs.get("master_port_range") is None:
        first, end = PORTS
        kwargs = {**kwargs, "master_port_range": [random.SystemRandom().randrange(first, (first + end) // 2), end]}
    return wrapped(*args, **kwargs)
