"""``actor_rollout_ref.rollout.name=transformers``: makes the server known to veRL, and transfers the weights."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterable
from typing import Any

import ray
import torch
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica
from verl.workers.rollout.utils import ensure_async_iterator

from verl_tapo.cpu import ROLLOUT_NAME


def server_name(replica_rank: int, suffix: str = "") -> str:
    """Returns the name of the Ray actor."""
    return f"{ROLLOUT_NAME}_server_{replica_rank}{suffix}"


async def in_parts(
    weights: Iterable[tuple[str, torch.Tensor]], limit: int, leads: bool
) -> AsyncIterator[dict[str, torch.Tensor]]:
    """Yields weights in parts of at least ``limit`` bytes, but for the last; to one that does not lead, none.

    Every rank iterates, because gathering a weight needs them all.
    """
    part: dict[str, torch.Tensor] = {}
    size = 0
    async for name, tensor in ensure_async_iterator(weights):
        if not leads:
            continue
        part[name] = tensor.detach()
        size += tensor.nbytes
        if size >= limit:
            yield part
            part, size = {}, 0
    if part:
        yield part


class TransformersReplica(RolloutReplica):  # type: ignore[misc]
    """One server; ``tensor_model_parallel_size`` workers share it, the model is never split."""

    async def launch_servers(self) -> None:
        """Starts the server on the node of the first worker."""
        from verl_tapo.cpu.server import TransformersServer

        if self.is_reward_model or self.is_teacher_model:
            raise NotImplementedError("the transformers rollout serves the policy only, no reward or teacher models")
        node = await self.workers[0].__ray_call__.remote(lambda worker: ray.get_runtime_context().get_node_id())
        name = server_name(self.replica_rank, self.name_suffix)
        server = (
            ray.remote(TransformersServer)
            .options(
                name=name,
                num_cpus=0,
                max_concurrency=self.max_concurrency,
                scheduling_strategy=ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=False),
            )
            .remote(self.config, self.model_config, self.replica_rank)
        )
        await server.set_global_steps.remote(0)  # raises here what its constructor raised
        self.servers = [server]
        # Nothing listens at this address; the name only identifies the server.
        self._server_handle, self._server_address = server, name

    def rollout_worker_use_gpu(self) -> bool:
        return False


class TransformersRollout(BaseRollout):  # type: ignore[misc]
    """Runs in each training worker and hands the actor's weights to the replica's server."""

    def __init__(self, config: Any, model_config: Any, device_mesh: Any, replica_rank: int = -1) -> None:
        super().__init__(config, model_config, device_mesh)
        workers = (
            self.config.tensor_model_parallel_size
            * self.config.data_parallel_size
            * self.config.pipeline_model_parallel_size
        )
        rank = int(os.environ["RANK"])
        self.replica_rank = rank // workers if replica_rank == -1 else replica_rank
        self.leads = rank % workers == 0

    async def resume(self, tags: list[str]) -> None:
        """Nothing was released."""

    async def release(self) -> None:
        """Nothing is released."""

    @torch.no_grad()
    async def update_weights(
        self,
        weights: Iterable[tuple[str, torch.Tensor]],
        global_steps: int | None = None,
        wire_format: str = "named_tensors",
        peft_config: Any = None,
        **_: Any,
    ) -> None:
        """Sends the weights in parts of ``checkpoint_engine.update_weights_bucket_megabytes``.

        Raises:
            NotImplementedError: for LoRA adapters or weight deltas.
        """
        if wire_format != "named_tensors" or peft_config is not None:
            raise NotImplementedError(
                "the transformers rollout takes full weights: set actor_rollout_ref.model.lora.merge=True, and "
                "checkpoint_engine.backend=naive"
            )
        limit = self.config.checkpoint_engine.update_weights_bucket_megabytes << 20
        server: Any = ray.get_actor(server_name(self.replica_rank)) if self.leads else None
        if server:
            await server.begin_update.remote()
        async for part in in_parts(weights, limit, self.leads):
            await server.update_weights.remote(part)
        if server:
            await server.end_update.remote(global_steps)
