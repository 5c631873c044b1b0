"""The adapter to veRL's V1 trainer (TransferQueue), in all its trainer modes.

V1 hands an estimator only rewards, mask and uid. The hook around ``PPOTrainer._compute_advantage``
also fetches the rollout data and makes it available to the estimator; the stock method then runs
unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from verl_tapo.records import RECORD_KEY
from verl_tapo.rule.arrays import IntArray
from verl_tapo.settings import TapoSettings, load_settings
from verl_tapo.trainer import estimator
from verl_tapo.trainer.batch import base_input
from verl_tapo.trainer.check import check_run
from verl_tapo.trainer.estimator import baseline_metrics, rollout_metrics
from verl_tapo.trainer.rollout import (
    CURRENT,
    LOG_PROBS,
    RolloutBatch,
    Sampled,
    Sessions,
    Tokens,
    agent_loop_of,
    agent_names_of,
)
from verl_tapo.trainer.tool_metrics import check_rollouts
from verl_tapo.trainer.verl_parser import declared_tools

_NEEDED = ("uid", "response_mask", "rm_scores")
_PADDING_UID = re.compile("pad[0-9a-f]{32}")
_ROWS_LOOKED_AT = 16


def init_hook(wrapped: Callable[..., Any], trainer: Any, args: Any, kwargs: Any) -> None:
    """Round ``PPOTrainer.__init__(config)``: checks the configuration."""
    check_run(kwargs["config"] if "config" in kwargs else args[0])
    wrapped(*args, **kwargs)


def compute_advantage_hook(wrapped: Callable[..., Any], trainer: Any, args: Any, kwargs: Any) -> Any:
    """Round ``PPOTrainer._compute_advantage(batch, metrics)``; other estimators pass through untouched."""
    if trainer.config.algorithm.adv_estimator == "tapo":
        return _with_rollout(wrapped, trainer, *args, **kwargs)
    # Another estimator may be a baseline for TAPO, so its tools are measured too.
    if trainer.config.algorithm.get("tapo") is not None:
        _add_metrics(trainer, *args, **kwargs)
    return wrapped(*args, **kwargs)


def _add_metrics(trainer: Any, batch: Any, metrics: dict[str, Any]) -> None:
    settings = load_settings(trainer.config.algorithm)
    rollout, _ = fetch_rollout(trainer, batch, settings)
    _check_rollouts(trainer, batch, settings)
    metrics.update(rollout_metrics(rollout, settings))
    metrics.update(baseline_metrics(rollout, settings))


def _check_rollouts(trainer: Any, batch: Any, settings: TapoSettings) -> None:
    sessions = {
        key.rpartition("_")[0] for key, padding in zip(batch.keys, _padding(batch).tolist(), strict=True) if not padding
    }
    prompts = {session.rpartition("_")[0] for session in sessions}
    check_rollouts(
        len(sessions), len(prompts), int(trainer.config.actor_rollout_ref.rollout.n), settings.max_fault_rate
    )


def _column(data: Any, name: str, rows: int) -> list[Any]:
    """A column that need not be there, as B objects; it is taken out of ``data``."""
    stored = data.pop(name, None)
    if stored is None:
        return [None] * rows
    # Mappings of equal keys come as a stack, others as a list.
    return list(stored.tolist() if hasattr(stored, "tolist") else stored)


def _mappings(column: Sequence[Any]) -> list[dict[str, Any]]:
    return [dict(value) if isinstance(value, Mapping) else {} for value in column]


def check_batch(batch: Any, data: Any) -> None:
    """Checks what is relied on here and is no interface of veRL's: columns, keys, the tag of padding.

    Args:
        batch: veRL's ``KVBatchMeta``.
        data: what TransferQueue gave of it. It leaves out columns and rows that it does not have, in silence.

    Raises:
        ValueError: naming what is missing.
    """
    missing = [name for name in _NEEDED if name not in data]
    if missing:
        held = sorted(_fetch(batch.keys[:1], batch.partition_id, None).keys())
        raise _strange(f"a batch without the column {', '.join(missing)}; its first row has: {', '.join(held)}")
    if not len(data) == len(batch.keys) == len(batch.tags):
        raise _strange(f"a batch of {len(batch.keys)} keys and {len(batch.tags)} tags with data of {len(data)} rows")
    for key, uid, tag in zip(batch.keys, data["uid"], batch.tags, strict=True):
        prompt, *numbers = key.rsplit("_", 2)
        if len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
            raise _strange(f"the key {key!r}, which is not {{uid}}_{{session}}_{{output}}")
        if prompt != str(getattr(uid, "data", uid)):
            raise _strange(f"the key {key!r} for a row of the prompt uid={uid!r}, which it does not begin with")
        if _PADDING_UID.fullmatch(prompt) and not tag.get("is_padding", False):
            raise _strange(f"the padding row {key!r} without the tag is_padding; its tags: {', '.join(sorted(tag))}")


def _strange(what: str) -> ValueError:
    return ValueError(
        f"TAPO: veRL's trainer handed over {what}. This veRL differs from those that were tested; "
        f"`verl-tapo doctor` shows versions"
    )


def _fetch(keys: Sequence[str], partition_id: str, names: Sequence[str] | None) -> Any:
    import transfer_queue as tq

    return tq.kv_batch_get(keys=list(keys), partition_id=partition_id, select_fields=names and list(names))


def _tell_partial_columns(batch: Any, absent: Sequence[str]) -> None:
    """Warns, once, of columns that only some rows have: TransferQueue then leaves them out of all."""
    rows = np.unique(np.linspace(0, len(batch.keys) - 1, _ROWS_LOOKED_AT).astype(int))
    held = {
        name
        for row in rows
        if not batch.tags[row].get("is_padding", False)
        for name in _fetch([batch.keys[row]], batch.partition_id, ["uid", *absent]).keys()  # noqa: SIM118
    }
    for name in sorted(held):
        estimator.MONITOR.tell(
            f"column {name} of some rows",
            f"some rollouts have the column {name!r} and some have not, so that TransferQueue hands over none of it: "
            f"write it in every row, as None where there is nothing",
        )


def _sums(values: npt.NDArray[np.float64], offsets: IntArray) -> npt.NDArray[np.float64]:
    """The sum of each row's values; a row may have none."""
    sums = np.zeros(len(offsets) - 1)
    filled = np.flatnonzero(np.diff(offsets))
    sums[filled] = np.add.reduceat(values, offsets[:-1][filled]) if len(filled) else 0.0
    return sums


def _padding(batch: Any) -> npt.NDArray[np.bool_]:
    return np.array([bool(tag.get("is_padding", False)) for tag in batch.tags])


def _with_rollout(wrapped: Callable[..., Any], trainer: Any, batch: Any, metrics: dict[str, Any]) -> Any:
    import transfer_queue as tq
    from tensordict import TensorDict
    from verl.workers.utils.padding import response_to_nested

    settings = load_settings(trainer.config.algorithm)
    rollout, response_mask = fetch_rollout(trainer, batch, settings)
    _check_rollouts(trainer, batch, settings)
    token = CURRENT.set(rollout)
    try:
        batch = wrapped(batch, metrics)
    finally:
        CURRENT.reset(token)
    if rollout.fields:
        fields = {name: response_to_nested(value, response_mask) for name, value in rollout.fields.items()}
        batch = tq.kv_batch_put(
            keys=batch.keys, partition_id=batch.partition_id, fields=TensorDict(fields, batch_size=len(batch))
        )
    metrics.update(rollout.metrics)
    return batch


def base_advantages(
    settings: TapoSettings, algorithm: Any, batch: Mapping[str, Any], columns: Mapping[str, Any], chosen: IntArray
) -> tuple[torch.Tensor, torch.Tensor]:
    """Base advantages and returns of the chosen rows, (R, L) each, by V1's own rule for several
    outputs per session; ``columns`` hold ``keys``."""
    data, options = base_input(settings, algorithm, batch, columns, chosen)
    data = _verls_utils().compute_advantage_for_multi_trajectories(data, list(data.non_tensor_batch["keys"]), **options)
    return data.batch["advantages"], data.batch["returns"]


def _verls_utils() -> Any:
    """The module with that rule; before 0.9 it is the synchronous trainer's own."""
    try:
        from verl.trainer.ppo.v1 import utils
    except ImportError:
        from verl.trainer import main_ppo_sync as utils
    return utils


def fetch_rollout(trainer: Any, batch: Any, settings: TapoSettings) -> tuple[RolloutBatch, torch.Tensor]:
    """The rollout of a V1 batch out of TransferQueue, and its (B, nested) response mask."""

    def get(*names: str) -> Any:
        return _fetch(batch.keys, batch.partition_id, names)

    # VeRL's agent loops write `extra_fields`; uni-agent makes a column of each of them. A colocated
    # reward model writes each part of its extra info as a column.
    flat = ("reward_extra_info", RECORD_KEY, settings.success_key)
    data = get(*_NEEDED, "extra_fields", *flat)
    check_batch(batch, data)
    response_mask = data["response_mask"]
    offsets = response_mask.offsets().cpu().numpy().astype(np.int64)
    absent = [name for name in flat if name not in data]
    if "extra_fields" not in data and absent and estimator.MONITOR.first("columns of the first batch"):
        _tell_partial_columns(batch, absent)
    extra = _mappings(_column(data, "extra_fields", len(batch)))
    inner = _mappings([fields.get("reward_extra_info") for fields in extra])
    outer = _mappings(_column(data, "reward_extra_info", len(batch)))
    records = _column(data, RECORD_KEY, len(batch))
    values = _column(data, settings.success_key, len(batch))

    def tokens() -> Tokens | None:
        stored = get("responses")
        if "responses" not in stored:
            return None
        return Tokens(stored["responses"].values().cpu().numpy(), response_mask.values().cpu().numpy(), offsets)

    def sampled() -> Sampled:
        stored, policy = get(*LOG_PROBS), response_mask.values().cpu().numpy()
        given = (torch.cat(list(stored[name].unbind())) for name in LOG_PROBS if name in stored)
        log_probs = next((found for found in given if len(found) == len(policy)), None)
        return Sampled(policy, None if log_probs is None else log_probs.float().cpu().numpy(), offsets)

    @cache
    def prompts() -> list[list[int]]:
        return [prompt.tolist() for prompt in get("prompts")["prompts"].unbind()]

    @cache
    def reward_models() -> list[Any]:
        return _column(get("reward_model"), "reward_model", len(batch))

    algorithm = trainer.config.algorithm
    rollout = RolloutBatch(
        base=lambda chosen, rewards, mask, index: base_advantages(
            settings,
            algorithm,
            {"token_level_rewards": rewards, "response_mask": mask},
            {"uid": index, "keys": batch.keys},
            chosen,
        ),
        scores=_sums(data["rm_scores"].values().double().cpu().numpy(), offsets),
        reward_infos=[
            {**({} if value is None else {settings.success_key: value}), **one, **other}
            for value, one, other in zip(values, inner, outer, strict=True)
        ],
        records=[
            fields.get(RECORD_KEY) if record is None else record for record, fields in zip(records, extra, strict=True)
        ],
        tokens=tokens,
        prompt_ids=lambda row: prompts()[row],
        reward_model=lambda row: reward_models()[row],
        lengths=np.diff(offsets),
        padding=_padding(batch),
        sampled=sampled,
        sessions=Sessions.from_keys(batch.keys),
        keys=batch.keys,
        step=getattr(trainer, "global_steps", None),
        part=getattr(trainer, "local_trigger_step", 0),
        tokenizer=trainer.tokenizer,
        tool_format=trainer.config.actor_rollout_ref.rollout.multi_turn.format,
        agent_loop=agent_loop_of(trainer.config),
        agent_names=partial(agent_names_of, trainer),
        tools=declared_tools(trainer.config.actor_rollout_ref.rollout.multi_turn),
        metrics=_weights_apart(batch),
    )
    return rollout, response_mask


def _weights_apart(batch: Any) -> dict[str, float]:
    """By how many training steps the weights differ that a prompt's rollouts were sampled with, on average.

    Asynchronous trainers mix them. The tags hold the steps of each rollout's first and last token.
    """
    prompts: dict[str, list[int]] = {}
    for key, tag in zip(batch.keys, batch.tags, strict=True):
        if not tag.get("is_padding", False):
            steps = (tag.get("min_global_steps"), tag.get("max_global_steps"))
            prompts.setdefault(key.rsplit("_", 2)[0], []).extend(step for step in steps if step is not None)
    apart = [max(steps) - min(steps) for steps in prompts.values() if steps]
    return {"tapo/weights_apart": float(np.mean(apart))} if apart else {}
