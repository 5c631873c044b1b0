"""Lets the workers of a run find one another on a machine without GPUs."""

from __future__ import annotations

import random
from typing import Any

PORTS = (20000, 30000)
"""Below the ports that Linux and macOS give to outgoing connections, above those that Ray gives to its workers."""


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
