"""``rollout.checkpoint_engine.backend=ray``: weights go to servers of their own through Ray's object store.

``trainer_mode=separate_async`` needs such a way, since its servers share no process with the actor; those that veRL has
need a GPU's network. VeRL imports this module by ``checkpoint_engine.custom_backend_module`` of ``conf/on_cpu.yaml``.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any, TypeAlias

import ray
import torch
from verl.checkpoint_engine.base import CheckpointEngine, CheckpointEngineRegistry

from verl_tapo.cpu import BACKEND
from verl_tapo.cpu.replica import in_parts

Part: TypeAlias = "dict[str, torch.Tensor] | None"


class Mailbox:
    """A Ray actor that holds the parts of one update, in order, until all have read them."""

    def __init__(self) -> None:
        self._parts: list[Part] = []
        self._more = asyncio.Condition()

    async def put(self, part: Part) -> None:
        """Takes the next part; None for the end."""
        async with self._more:
            self._parts.append(part)
            self._more.notify_all()

    async def get(self, number: int) -> Part:
        """Returns a part, once it is there."""
        async with self._more:
            await self._more.wait_for(lambda: number < len(self._parts))
        return self._parts[number]

    async def clear(self) -> None:
        """Forgets the parts."""
        self._parts.clear()


@CheckpointEngineRegistry.register(BACKEND)
class RayCheckpointEngine(CheckpointEngine):  # type: ignore[misc]
    """One end of the way: of an actor's worker, or of a server's.

    Args:
        bucket_size: bytes after which a part is sent.
        is_master: whether it is the actor's first worker, which sends.
    """

    def __init__(self, bucket_size: int, is_master: bool = False) -> None:
        self._bucket_size, self._is_master = bucket_size, is_master
        self._mailbox: Any = None

    def prepare(self) -> Any:
        """Returns the mailbox, if it is the sender's."""
        if self._is_master and self._mailbox is None:
            self._mailbox = ray.remote(Mailbox).options(num_cpus=0, max_concurrency=1000).remote()
        return self._mailbox if self._is_master else None

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[Any]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """Gives everyone the sender's mailbox."""
        mailbox = next(each for each in metadata if each is not None)
        return {"mailbox": [mailbox] * actor_wg_world_size}, {"mailbox": [mailbox] * rollout_world_size}

    def init_process_group(self, mailbox: Any) -> None:
        """Takes the mailbox."""
        self._mailbox = mailbox

    def finalize(self) -> None:
        """Empties the mailbox after an update."""
        if self._is_master:
            ray.get(self._mailbox.clear.remote())

    @torch.no_grad()
    async def send_weights(
        self, weights: Iterable[tuple[str, torch.Tensor]], global_steps: int | None = None
    ) -> dict[str, float]:
        """Sends all weights. Every worker of the actor iterates, because gathering a weight needs them all."""
        async for part in in_parts(weights, self._bucket_size, self._is_master):
            await self._mailbox.put.remote(part)
        if self._is_master:
            await self._mailbox.put.remote(None)
        return {}

    async def receive_weights(self, global_steps: int | None = None) -> AsyncIterator[tuple[str, torch.Tensor]]:
        """Yields all weights of an update."""
        number = 0
        while (part := await self._mailbox.get.remote(number)) is not None:
            for name, tensor in part.items():
                yield name, tensor
            number += 1
