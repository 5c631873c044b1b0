"""The platform ``cpu`` for veRL's registry (``VERL_PLATFORM=cpu``).

Ray is told that it has GPUs (``ray_kwargs.ray_init.num_gpus``): veRL places one worker on each, so
here it is the number of processes.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any

import torch
from verl.plugin.platform.platform_base import PlatformBase

_PEAK_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes; of ru_maxrss


def _peak_memory(*_: Any, **__: Any) -> int:
    """The process's largest resident size so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _PEAK_UNIT


def _memory(*_: Any, **__: Any) -> tuple[int, int]:
    """Free and total memory of the machine, bytes."""
    import psutil  # type: ignore[import-untyped]

    memory = psutil.virtual_memory()
    return memory.available, memory.total


class _CpuModule(ModuleType):
    """``torch.cpu`` with the functions that veRL uses of ``torch.cuda``."""

    def __init__(self) -> None:
        super().__init__("torch.cpu", torch.cpu.__doc__)
        self.memory_allocated = self.memory_reserved = _peak_memory
        self.max_memory_allocated = self.max_memory_reserved = _peak_memory
        self.mem_get_info = _memory
        self.empty_cache = self.ipc_collect = self.reset_peak_memory_stats = lambda *args, **kwargs: None
        self.manual_seed = self.manual_seed_all = torch.manual_seed
        self.get_rng_state = lambda *args: torch.get_rng_state()
        self.set_rng_state = lambda state, *args: torch.set_rng_state(state)
        self.get_device_name = lambda *args: "CPU"

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)


class CpuPlatform(PlatformBase):  # type: ignore[misc]
    """A CPU as veRL's device."""

    _module = _CpuModule()

    @property
    def device_name(self) -> str:
        return "cpu"

    @property
    def vendor_name(self) -> str:
        return "cpu"

    @property
    def device_module(self) -> ModuleType:
        return self._module

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        return False  # only where VERL_PLATFORM asks for it, never found by itself

    def current_device(self) -> Any:
        return "cpu"  # veRL hands it to `Tensor.to`, for which a number would be a GPU

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        return

    def synchronize(self, device_index: int | None = None) -> None:
        return

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        return

    def empty_cache(self) -> None:
        return

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"  # what Ray sets for its resource "GPU"

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

    def is_ipc_supported(self) -> bool:
        return False

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        with nullcontext():
            yield

    def profiler_start(self) -> None:
        return

    def profiler_stop(self) -> None:
        return

    def cudart(self) -> Any:
        return None
