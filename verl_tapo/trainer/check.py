"""Checks a run's configuration before hours of rollouts; the trainers' constructors and the doctor use it."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Any

from verl_tapo.calls.formats import NATIVE_FORMATS
from verl_tapo.records import RECORD_KEY
from verl_tapo.settings import TapoSettings, load_settings
from verl_tapo.step_records import check_folder
from verl_tapo.trainer.rollout import agent_loop_of, manager_of
from verl_tapo.trainer.tools_check import config_problems, declared_kernels, recording_warning, rule_problems

logger = logging.getLogger("verl_tapo")

# They need inputs that only their own code path in veRL gets, or know no prompt groups.
_NO_GROUP_ESTIMATORS = frozenset({"gae", "remax", "optimal_token_baseline", "tir_optimal_token_baseline"})


def check_run(config: Any) -> TapoSettings | None:
    """Checks the configuration of a run; None if the run does not use TAPO.

    Raises:
        ValueError: naming the setting, where TAPO would not run or would do nothing.
    """
    if config.algorithm.adv_estimator != "tapo":
        if config.algorithm.get("tapo") is not None and load_settings(config.algorithm).record_dir is not None:
            logger.warning(
                "TAPO: algorithm.tapo.record_dir is set, but algorithm.adv_estimator=%s: records are written by the "
                "estimator tapo only. Dump the rollouts with trainer.rollout_data_dir, and audit these",
                config.algorithm.adv_estimator,
            )
        return None
    declare_tools(config)
    settings = load_settings(config.algorithm)
    problems = find_problems(config, settings)
    if problems:
        raise ValueError("TAPO: " + "; ".join(problems))
    if settings.record_dir is not None:
        check_folder(settings.record_dir)
    for warning in find_warnings(config, settings):
        logger.warning("TAPO: %s", warning)
    return settings


def declare_tools(config: Any) -> None:
    """Fills ``algorithm.tapo.tools``, if it is null, with the kernels that the run's tool classes
    declare."""
    tapo = config.algorithm.get("tapo", None)
    if tapo is not None and tapo.get("tools", None) is not None:
        return
    declared = declared_kernels(config)
    if declared is not None:
        from omegaconf import OmegaConf

        OmegaConf.update(config, "algorithm.tapo.tools", declared, force_add=True)


def find_problems(config: Any, settings: TapoSettings) -> list[str]:
    """Returns what would keep TAPO from working in a run's configuration."""
    from verl.experimental.agent_loop.tool_parser import ToolParser
    from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY

    problems = []
    base = settings.base_estimator
    known = set(ADV_ESTIMATOR_REGISTRY) - _NO_GROUP_ESTIMATORS - {"tapo"}
    if base not in known:
        problems.append(
            f"algorithm.tapo.base_estimator={base} is no group estimator; known: {', '.join(sorted(known))}"
        )
    rollout = config.actor_rollout_ref.rollout
    tool_format = settings.tool_format or rollout.multi_turn.format
    if settings.step_source != "recorded" and tool_format not in {*NATIVE_FORMATS, *ToolParser._registry}:
        formats = ", ".join(sorted({*NATIVE_FORMATS, *ToolParser._registry}))
        problems.append(f"the tool format {tool_format!r} is not known; known: {formats}")
    tool_problems, tools = config_problems(config)
    problems += tool_problems
    if tools is not None:
        problems += rule_problems(settings.rule, tools)
    if settings.record_dir is not None:
        if settings.record_format == "parquet" and find_spec("pyarrow") is None:
            problems.append("algorithm.tapo.record_format=parquet needs pyarrow: pip install 'verl-tapo[audit]'")
        try:
            check_folder(settings.record_dir, make=False)
        except ValueError as error:
            problems.append(str(error))
    for name, kernel in {kernel.name: kernel for kernel in settings.rule.all_kernels()}.items():
        try:
            kernel.check()
        except Exception as error:
            problems.append(f"algorithm.tapo.tools: the kernel {name!r} would fail: {error}")
    return problems


def sources(config: Any, settings: TapoSettings) -> list[tuple[str, str]]:
    """Returns in words where a run's rollouts, their success and their tool calls come from."""
    rollout = config.actor_rollout_ref.rollout
    tool_format = settings.tool_format or rollout.multi_turn.format
    records, tokens = f"the records ({RECORD_KEY})", f"the tokens ({tool_format})"
    calls = {"recorded": records, "parsed": tokens}.get(settings.step_source, f"{records}, else {tokens}")
    return [
        ("rollouts from", manager_of(config) or f"veRL's agent loops ({agent_loop_of(config)} by default)"),
        (
            "success from",
            f"the reward's {settings.success_key!r}, else the score; {settings.success_threshold:g} or above",
        ),
        ("calls from", calls),
    ]


def find_warnings(config: Any, settings: TapoSettings) -> list[str]:
    """Returns what may leave TAPO without effect in a run's configuration."""
    rollout = config.actor_rollout_ref.rollout
    warnings = []
    if rollout.n < 2:
        warnings.append(
            f"actor_rollout_ref.rollout.n={rollout.n}: a prompt's only rollout has no successful sibling to learn from"
        )
    manager = manager_of(config)
    if manager is not None:
        warnings.append(
            f"actor_rollout_ref.rollout.agent.agent_loop_manager_class={manager} makes the rollouts, so that "
            f"default_agent_loop may have no effect, tapo_tool_agent's limits and records included. Success is its "
            f"rollouts' {settings.success_key!r} (in extra_fields, or in a column reward_extra_info or of that name), "
            f"else the score; calls are read from the tokens where no record {RECORD_KEY!r} comes. The first step's "
            f"log says what came"
        )
    elif rollout.get("agent", {}).get("default_agent_loop", None) == "single_turn_agent":
        warnings.append(
            "the default agent loop, single_turn_agent, calls no tools: TAPO has something to do only where the data "
            "set names a tool agent, or actor_rollout_ref.rollout.agent.default_agent_loop=tapo_tool_agent"
        )
    overridden = None if manager is not None else recording_warning(config)
    if overridden is not None:
        warnings.append(overridden)
    actor = config.actor_rollout_ref.get("actor", None) or {}
    loss = (actor.get("policy_loss", None) or {}).get("loss_mode", None)
    if loss == "gspo" and actor.get("loss_agg_mode", None) == "token-mean":
        warnings.append(
            "actor_rollout_ref.actor.policy_loss.loss_mode=gspo with veRL's default loss_agg_mode=token-mean weighs "
            "long rollouts more, which is not the paper's GSPO: "
            "actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean is"
        )
    if settings.rule.grounding.luck and (config.algorithm.get("filter_groups", None) or {}).get("enable", False):
        warnings.append(
            "algorithm.filter_groups.enable=true drops prompts whose rollouts all earn the same before grounding.luck "
            "tells guesses from answers that were found: where all are right, no guess is told. "
            "algorithm.filter_groups.enable=false leaves them in"
        )
    return warnings
