"""The ``tapo`` advantage estimator: base advantages, tool-use steps, credit transfer, metrics."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from verl_tapo.answers.evidence import evidence_of, ground_truth_of
from verl_tapo.calls.parsing import ToolCallParser, parse_steps
from verl_tapo.records import recorded_steps
from verl_tapo.rule.credit import transfer_credit
from verl_tapo.rule.report import CreditReport
from verl_tapo.rule.steps import ToolStep, build_tool_mask
from verl_tapo.settings import TapoSettings, load_settings
from verl_tapo.step_records import StepRecorder, StepSnapshot
from verl_tapo.trainer.grounding import earned_rewards, grounding_metrics, recognisable_answers
from verl_tapo.trainer.monitor import RunMonitor
from verl_tapo.trainer.rollout import CURRENT, LOG_PROBS, RolloutBatch
from verl_tapo.trainer.token_kinds import token_metrics
from verl_tapo.trainer.tool_metrics import check_outage, executed_tools, odd_reward_parts, reward_metrics, tool_metrics
from verl_tapo.trainer.verl_parser import cached_parser

logger = logging.getLogger("verl_tapo")

TOOL_MASK_FIELD = "tapo_tool_mask"
MONITOR = RunMonitor()


def make_parser(rollout: RolloutBatch, settings: TapoSettings) -> ToolCallParser:
    """The parser of the run's tool format.

    Raises:
        ValueError: where the trainer handed over no tokenizer, or no format is known.
    """
    tool_format = settings.tool_format or rollout.tool_format
    if rollout.tokenizer is None or not tool_format:
        missing = "tokenizer" if rollout.tokenizer is None else "tool format"
        raise ValueError(
            f"TAPO cannot find tool calls in the tokens: the trainer handed over no {missing}. Record the calls with "
            f"the agent loop tapo_tool_agent, or set algorithm.tapo.tool_format; `verl-tapo doctor` shows the hooks."
        )
    return cached_parser(tool_format, rollout.tokenizer, rollout.tools)


def find_steps(rollout: RolloutBatch, settings: TapoSettings) -> list[ToolStep]:
    """Returns the tool-use steps of a batch's real rows, recorded or parsed, by row."""
    steps: list[ToolStep] = []
    real = np.flatnonzero(~rollout.padding)
    recorded = []
    if settings.step_source != "parsed":
        recorded = [row for row in real.tolist() if isinstance(rollout.records[row], Mapping)]
    if settings.step_source == "recorded" and len(recorded) < len(real):
        raise ValueError(
            f"algorithm.tapo.step_source=recorded, but {len(real) - len(recorded)} of {len(real)} rollouts have no "
            f"record: set actor_rollout_ref.rollout.agent.default_agent_loop=tapo_tool_agent, and the data set's "
            f"agent_name, if it has one, to it as well"
        )
    malformed = 0
    for row in recorded:
        record = rollout.records[row]
        malformed += sum(step.get("status") == "malformed" for step in record["steps"])
        steps += recorded_steps(
            record, row, int(rollout.lengths[row]), settings.image_parameters, settings.image_index_base
        )
    rest = np.setdiff1d(real, recorded)
    unanswered = 0
    if len(rest):
        parser = make_parser(rollout, settings)
        tokens = rollout.tokens()
        if tokens is None:
            raise ValueError(
                f"TAPO: {len(rest)} rollouts have no record of tool calls, and no responses to find them in"
            )
        # Padding rows hold no calls, so removing them would only copy all tokens.
        if not recorded:
            rest = np.arange(len(rollout.padding))
        chosen = tokens.rows(rest)
        parsed = parse_steps(
            parser,
            chosen.ids,
            chosen.policy,
            chosen.offsets,
            rest,
            error_markers=settings.error_markers,
            image_parameters=settings.image_parameters,
            image_index_base=settings.image_index_base,
            prompt_images=lambda row: _prompt_images(rollout, parser, row),
            evidence=lambda row: evidence_of(ground_truth_of(rollout.reward_model(row))),
        )
        steps += [step for step in parsed.steps if not rollout.padding[step.row]]
        malformed += parsed.malformed
        unanswered = parsed.unanswered
    rollout.metrics["tapo/recorded_rollouts"] = len(recorded) / max(len(real), 1)
    trajectories = max(len(rollout.final_rows(real)), 1)
    rollout.metrics["tapo/malformed_calls_per_trajectory"] = malformed / trajectories
    rollout.metrics["tapo/unanswered_calls_per_trajectory"] = unanswered / trajectories
    return steps


def _prompt_images(rollout: RolloutBatch, parser: ToolCallParser, row: int) -> list[str]:
    """Identities of a prompt's images: the rollouts of one prompt share them."""
    ids = rollout.prompt_ids(row)
    prompt = hash(tuple(ids))
    return [f"prompt {prompt} image {number}" for number in range(parser.count_images(ids))]


def rollout_metrics(rollout: RolloutBatch, settings: TapoSettings) -> dict[str, float]:
    """Metrics of the tools of a batch, from its records, and of the parts of its rewards.

    Of a session with several outputs all calls count, but its reward once: that of its last output.

    Raises:
        ToolOutage: where too many calls failed.
    """
    real = np.flatnonzero(~rollout.padding)
    known = [rollout.records[int(row)] for row in real]
    rewards = [rollout.reward_infos[int(row)] for row in rollout.final_rows(real)]
    MONITOR.check_records(known, rollout.agent_loop, rollout.agent_names)
    MONITOR.executed |= executed_tools(known)
    recorded = real[[isinstance(record, Mapping) for record in known]]
    metrics = tool_metrics(known, MONITOR.executed, trajectories=len(rollout.final_rows(recorded)))
    check_outage(metrics, settings.max_fault_rate)
    for name, (count, example) in odd_reward_parts(rewards).items():
        MONITOR.tell(
            f"reward part {name}",
            f"the reward's part {name!r} is no finite number in {count} of {len(rewards)} rollouts ({example}, say), "
            f"which are left out of its mean",
        )
    return {**metrics, **reward_metrics(rewards)}


def baseline_metrics(rollout: RolloutBatch, settings: TapoSettings) -> dict[str, float]:
    """Returns `grounding_metrics` and `token_metrics` under another estimator. Without findable calls
    it is empty, and the log says so once."""
    success = rollout.success(settings)
    if rollout.sessions is not None:
        success = success[rollout.sessions.final_row]
    try:
        steps = find_steps(rollout, settings)
    except ValueError as error:
        MONITOR.tell("calls are not found", f"there are no metrics tapo/grounding, tapo/nll and tapo/tokens: {error}")
        return {}
    return {**grounding_metrics(rollout, success, steps), **_sampled_metrics(rollout, steps)}


def _sampled_metrics(rollout: RolloutBatch, steps: Sequence[ToolStep]) -> dict[str, float]:
    """Returns `token_metrics` of a batch. Without log-probs they lack ``tapo/nll``, and the log says
    so once."""
    sampled = rollout.sampled()
    if sampled is None or sampled.log_probs is None:
        MONITOR.tell(
            "no log-probs",
            f"there are no metrics tapo/nll: the batch has neither {' nor '.join(LOG_PROBS)}",
        )
    return {} if sampled is None else token_metrics(sampled, steps, rollout.padding, rollout.sessions)


def estimate(
    rollout: RolloutBatch,
    settings: TapoSettings,
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and returns, (B, L) each; fills ``rollout.metrics`` and ``rollout.fields``.

    With ``grounding.luck`` the base estimator gets the rewards of `earned_rewards`.

    Rows with a NaN or infinite reward are excluded from the base estimation, so that they do not
    poison their group, and get advantage 0. So do rows for which the base estimator itself yields
    such values (some give them for the standard deviation of a group of one). Both are counted and
    reported.

    Args:
        rollout: B rows.
        settings: ``algorithm.tapo``.
        token_level_rewards: (B, L) as the trainer hands them to estimators.
        response_mask: (B, L) 0/1, after any rejection by rollout correction.
        index: (B,) prompt groups.

    Raises:
        ValueError: where not one row has a finite reward.
    """
    start = time.perf_counter()
    finite = np.isfinite(token_level_rewards.sum(-1).double().cpu().numpy())
    usable = np.flatnonzero(finite)
    if not len(usable):
        raise ValueError("TAPO: no row of the batch has a finite reward; check the reward function")
    success, calls = rollout.success(settings) & finite, find_steps(rollout, settings)
    found = time.perf_counter()
    recognisable = None
    if settings.rule.grounding.luck:
        recognisable = recognisable_answers(rollout)
        token_level_rewards = earned_rewards(
            rollout, success, calls, token_level_rewards, response_mask, index, recognisable
        )
    if len(usable) == len(finite):
        base, returns = rollout.base(usable, token_level_rewards, response_mask, index)
    else:
        base, returns = torch.zeros_like(token_level_rewards), torch.zeros_like(token_level_rewards)
        rows = torch.from_numpy(usable)
        base[rows], returns[rows] = rollout.base(usable, token_level_rewards, response_mask, index)
    base, returns, poisoned = _without_nan(base, returns)
    dropped = ~finite | poisoned
    lost = np.flatnonzero(dropped & ~rollout.padding)
    if len(lost):
        logger.warning(
            "TAPO: %d rows have a reward or a base advantage that is not finite, the first is row %d (uid %s): "
            "their advantage is set to 0",
            len(lost),
            int(lost[0]),
            index[int(lost[0])],
        )
    based = time.perf_counter()
    success &= ~dropped
    if rollout.unreadable is not None:
        MONITOR.tell(
            "unreadable success",
            f"in {rollout.metrics['tapo/success_unreadable']:.0%} of the rollouts the reward's "
            f"{settings.success_key!r} is no number ({rollout.unreadable}, say): these count as failures",
        )
    if rollout.sessions is not None:
        success = success[rollout.sessions.final_row]
    steps = [step for step in calls if not dropped[step.row]]
    advantages, report = transfer_credit(
        base,
        response_mask,
        index,
        success,
        steps,
        settings.rule,
        trajectory=None if rollout.sessions is None else rollout.sessions.of_row,
        recognisable=recognisable,
    )
    if settings.write_tool_mask:
        rollout.fields[TOOL_MASK_FIELD] = build_tool_mask(
            steps, response_mask, settings.rule.token_scope, dtype=torch.int32
        )
    done = time.perf_counter()
    ended = rollout.final_rows(np.flatnonzero(~rollout.padding))
    MONITOR.look(steps, settings)
    MONITOR.watch_luck(int(success[ended].sum()), int(report.withheld_of_row[ended].sum()), settings)
    MONITOR.say_sources(int((~rollout.padding).sum()), rollout.metrics, settings)
    rollout.metrics.update(report.metrics())
    rollout.metrics.update(grounding_metrics(rollout, success, steps))
    rollout.metrics.update(_sampled_metrics(rollout, calls))
    rollout.metrics.update(MONITOR.silent_tools(steps, rollout.metrics))
    rollout.metrics.update(rollout_metrics(rollout, settings))
    MONITOR.sum_up(report, rollout.step, rollout.part)
    rollout.metrics["tapo/success_rate"] = float(success[ended].mean()) if len(ended) else 0.0
    rollout.metrics["tapo/dropped_rows"] = float(len(lost))
    rollout.metrics["tapo/ms/steps"] = (found - start) * 1e3
    rollout.metrics["tapo/ms/base"] = (based - found) * 1e3
    rollout.metrics["tapo/ms/credit"] = (done - based) * 1e3
    if settings.record_dir is not None:
        _record(rollout, settings, base, advantages, response_mask, index, success, steps, report)
    return advantages, returns


class _RecorderCache:
    """The process's recorder, and the last step it was given."""

    settings: TapoSettings | None = None
    recorder: StepRecorder | None = None
    step = 0


def _record(
    rollout: RolloutBatch,
    settings: TapoSettings,
    base: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    index: Any,
    success: npt.NDArray[np.bool_],
    steps: Sequence[ToolStep],
    report: CreditReport,
) -> None:
    """Hands the step to the recorder. If the trainer does not give the step's number, steps are counted."""
    if _RecorderCache.recorder is None or _RecorderCache.settings is not settings:
        _RecorderCache.settings = settings
        _RecorderCache.recorder = StepRecorder(str(settings.record_dir), settings.record_format, settings.record_keep)
    recorder = _RecorderCache.recorder
    _RecorderCache.step = rollout.step if rollout.step is not None else _RecorderCache.step + 1
    rollout.metrics["tapo/records_lost"] = recorder.lost
    recorder.take(
        StepSnapshot(
            step=_RecorderCache.step,
            part=rollout.part,
            settings=settings,
            metrics=dict(rollout.metrics),
            keys=rollout.keys,
            index=index,
            trajectory=rollout.trajectory_of_row(),
            scores=rollout.scores,
            success=success,
            padding=rollout.padding,
            lengths=rollout.lengths,
            response_mask=response_mask,
            changed=(advantages != base).sum(-1).cpu().numpy(),
            steps=steps,
            report=report,
            records=rollout.records,
        )
    )


def _without_nan(base: torch.Tensor, returns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Base and returns with 0 in rows that hold a value that is not finite, and which rows these are, (B,)."""
    if bool(torch.isfinite(base.sum())):
        return base, returns, np.zeros(len(base), dtype=bool)
    bad = ~torch.isfinite(base).all(-1)
    keep = ~bad[:, None]
    return torch.where(keep, base, 0.0), torch.where(keep, returns, 0.0), bad.cpu().numpy()


def compute_tapo_advantage(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: Any = None,
    config: Any = None,
    non_tensor_batch: Mapping[str, Any] | None = None,
    batch: Mapping[str, Any] | None = None,
    adv_context: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The estimator ``tapo``: what ``register_adv_est("tapo")`` registers.

    Args:
        token_level_rewards: (B, L) rewards, after any KL penalty.
        response_mask: (B, L) 0/1.
        index: (B,) prompt groups (``uid``).
        config: veRL's ``algorithm`` configuration; its block ``tapo`` are the settings.
        non_tensor_batch, batch: the rollout data, from a veRL that hands them to estimators (veRL PR 7473, or a patch
            of ``patches/``).
        adv_context: what our patches hand over besides: tokenizer, trainer configuration, metrics and fields to fill.
        kwargs: whatever else a trainer offers to estimators; not used.

    Returns:
        Advantages and returns, (B, L) each. Returns are the base estimator's.

    Raises:
        RuntimeError: where neither a hook of the plug-in nor veRL itself handed over the rollout data.
        ValueError: for bad settings.
    """
    settings = load_settings(config)
    rollout = CURRENT.get()
    if rollout is None:
        if batch is None or non_tensor_batch is None:
            raise RuntimeError(
                "TAPO's estimator was called without rollout data: its hook into this trainer is not in place, and "
                "this veRL does not hand rollout data to estimators. Run `verl-tapo doctor`; see patches/README.md."
            )
        from verl_tapo.trainer.batch import rollout_from_batch

        # Only V1 has keys.
        if "keys" in non_tensor_batch:
            from verl_tapo.trainer.v1 import base_advantages
        else:
            from verl_tapo.trainer.v0 import base_advantages
        rollout = rollout_from_batch(settings, config, batch, non_tensor_batch, adv_context or {}, base_advantages)
    return estimate(rollout, settings, token_level_rewards, response_mask, index)
