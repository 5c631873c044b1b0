"""The order of a batch's rows.

TransferQueue lists rollouts as they finish, and the order decides which rows share a micro-batch: two runs with the
same rollouts would differ by rounding. Here the rows follow the prompts as they were sent, then the rollouts' numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def in_prompt_order(rows: Mapping[str, T], prompts: Mapping[str, Any]) -> dict[str, T]:
    """Sorts a partition's rows.

    Args:
        rows: the rows by key, ``{uid of the prompt}_{rollout}_{output}``.
        prompts: the prompts by uid, in their order.
    """
    position = {uid: number for number, uid in enumerate(prompts)}

    def place(key: str) -> tuple[int, list[int]]:
        uid, *numbers = key.split("_")
        return position.get(uid, len(position)), [int(number) for number in numbers]

    return {key: rows[key] for key in sorted(rows, key=place)}


def materialize_hook(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Round ``ReplayBuffer._materialize_batch``."""

    def call(partition_id: str, selected_prompt_uids: list[str], partition_snapshot: dict[str, Any]) -> Any:
        rows = in_prompt_order(partition_snapshot, instance.prompt_global_steps[partition_id])
        return wrapped(partition_id, selected_prompt_uids, rows)

    return call(*args, **kwargs)
