"""Makes a `RolloutBatch` from a padded batch with per-sample columns: veRL's V0 `DataProto`, or the
rollout data that a patched veRL (PR 7473, our patches) gives to estimators.

Of veRL it imports what V0 and V1 share, and neither trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

from verl_tapo.records import RECORD_KEY
from verl_tapo.rule.arrays import IntArray
from verl_tapo.settings import TapoSettings
from verl_tapo.trainer.rollout import LOG_PROBS, RolloutBatch, Sampled, Sessions, Tokens, agent_loop_of
from verl_tapo.trainer.verl_parser import declared_tools

BaseAdvantages: TypeAlias = Callable[
    [TapoSettings, Any, Mapping[str, Any], Mapping[str, Any], IntArray], tuple[torch.Tensor, torch.Tensor]
]
"""Settings, veRL's ``algorithm``, tensors, columns and the numbers of R rows to their base advantages
and returns, (R, L) each."""


def rollout_from_batch(
    settings: TapoSettings,
    algorithm: Any,
    batch: Mapping[str, Any],
    columns: Mapping[str, Any],
    context: Mapping[str, Any],
    base_advantages: BaseAdvantages,
) -> RolloutBatch:
    """The rollout in a padded batch.

    Args:
        settings: ``algorithm.tapo``.
        algorithm: veRL's ``algorithm`` configuration.
        batch: tensors: ``token_level_rewards``, ``response_mask``, and where present ``token_level_scores``,
            ``responses``, ``prompts``, ``attention_mask``, ``rollout_mask`` (the response mask before rollout
            correction), ``old_log_probs`` or ``rollout_log_probs``.
        columns: arrays of B objects: ``uid``, and where present the tool records, the reward's extra info (its keys as
            columns, or one column ``reward_extra_info``), ``keys`` (veRL's ``{uid}_{session}_{output}``) and
            ``is_padding``.
        context: ``tokenizer``, ``config`` (the whole trainer configuration), ``step`` (its number) and dicts
            ``metrics`` and ``fields`` to fill, where known; ``agent_names`` as in `RolloutBatch`.
        base_advantages: the trainer's own: that of `verl_tapo.trainer.v0` or of `verl_tapo.trainer.v1`.
    """
    rewards, mask = batch["token_level_rewards"], batch["response_mask"]
    rows, length = mask.shape
    scores = batch.get("token_level_scores", None)
    scores = (rewards if scores is None else scores).sum(-1).double().cpu().numpy()
    padding = np.asarray(columns.get("is_padding", np.zeros(rows)), dtype=bool)
    keys = columns.get("keys")
    attention = batch.get("attention_mask", None)
    lengths = np.full(rows, length)
    if attention is not None:
        lengths = attention[:, -length:].sum(-1).cpu().numpy().astype(np.int64)
    rollout_mask = batch.get("rollout_mask", None)

    def tokens() -> Tokens | None:
        if rollout_mask is None and _rejects_tokens(algorithm):
            _refuse_to_parse()
        return _tokens(batch, mask if rollout_mask is None else rollout_mask, lengths)

    config = context.get("config")
    return RolloutBatch(
        base=lambda rows, rewards, mask, index: base_advantages(
            settings, algorithm, {**batch, "token_level_rewards": rewards}, columns, rows
        ),
        scores=scores,
        reward_infos=_reward_infos(settings, columns, rows),
        records=list(columns.get(RECORD_KEY, [None] * rows)),
        tokens=tokens,
        prompt_ids=lambda row: _prompt(batch, row),
        reward_model=lambda row: columns["reward_model"][row] if "reward_model" in columns else None,
        lengths=lengths,
        padding=padding,
        sampled=lambda: _sampled(batch, lengths),
        sessions=None if keys is None else Sessions.from_keys(list(keys)),
        keys=keys,
        step=context.get("step"),
        tokenizer=context.get("tokenizer"),
        tool_format=None if config is None else config.actor_rollout_ref.rollout.multi_turn.format,
        tools=None if config is None else declared_tools(config.actor_rollout_ref.rollout.multi_turn),
        metrics=context.get("metrics", {}),
        fields=context.get("fields", {}),
        agent_loop=None if config is None else agent_loop_of(config),
        agent_names=lambda: columns["agent_name"] if "agent_name" in columns else context.get("agent_names", tuple)(),
    )


def _rejects_tokens(algorithm: Any) -> bool:
    """Returns whether rollout correction removes single tokens from the response mask."""
    correction = algorithm.get("rollout_correction", None)
    return correction is not None and "token" in str(correction.get("rollout_rs", None) or "")


def _refuse_to_parse() -> None:
    raise ValueError(
        "TAPO cannot parse tool calls here: rollout_correction.rollout_rs rejects single tokens, and veRL's V0 trainer "
        "keeps no response mask from before that, so assistant turns cannot be told apart. Record the calls with the "
        "agent loop tapo_tool_agent, or use the V1 trainer."
    )


def _reward_infos(settings: TapoSettings, columns: Mapping[str, Any], rows: int) -> Sequence[Mapping[str, Any]]:
    # a colocated reward model's extra info comes as columns of its own, beside what the agent loop wrote
    values = columns.get(settings.success_key)
    infos = [{}] * rows if values is None else [{settings.success_key: value} for value in values]
    nested = columns.get("reward_extra_info", [None] * rows)
    return [{**info, **more} if isinstance(more, Mapping) else info for info, more in zip(infos, nested, strict=True)]


def _tokens(batch: Mapping[str, Any], mask: torch.Tensor, lengths: IntArray) -> Tokens | None:
    responses = batch.get("responses", None)
    if responses is None:
        return None
    valid = np.arange(mask.shape[1]) < lengths[:, None]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Tokens(responses.cpu().numpy()[valid], mask.cpu().numpy()[valid], offsets)


def _sampled(batch: Mapping[str, Any], lengths: IntArray) -> Sampled:
    mask = batch["response_mask"]
    valid = np.arange(mask.shape[1]) < lengths[:, None]
    given = (batch.get(name, None) for name in LOG_PROBS)
    log_probs = next((found for found in given if found is not None and found.shape == mask.shape), None)
    return Sampled(
        mask.cpu().numpy()[valid],
        None if log_probs is None else log_probs.float().cpu().numpy()[valid],
        np.concatenate([[0], np.cumsum(lengths)]),
    )


def _prompt(batch: Mapping[str, Any], row: int) -> list[int]:
    prompts = batch.get("prompts", None)
    return [] if prompts is None else [int(token) for token in prompts[row].tolist()]


def base_input(
    settings: TapoSettings, algorithm: Any, batch: Mapping[str, Any], columns: Mapping[str, Any], chosen: IntArray
) -> tuple[Any, dict[str, Any]]:
    """The chosen rows as a ``DataProto``, and the options of the trainer's own function of advantages."""
    from tensordict import TensorDict
    from verl.protocol import DataProto

    data = DataProto(
        batch=TensorDict({name: batch[name] for name in batch.keys()}, batch_size=len(batch["response_mask"])),  # noqa: SIM118
        non_tensor_batch={name: np.asarray(columns[name], dtype=object) for name in columns},
    )
    if len(chosen) < len(data):
        data = data.select_idxs(chosen)
    options = dict(
        adv_estimator=settings.base_estimator,
        gamma=algorithm.get("gamma", 1.0),
        lam=algorithm.get("lam", 1.0),
        norm_adv_by_std_in_grpo=algorithm.get("norm_adv_by_std_in_grpo", True),
        config=algorithm,
    )
    return data, options
