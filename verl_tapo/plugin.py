"""The entry point that veRL loads (``verl.plugins``, or
``VERL_USE_EXTERNAL_MODULES=verl_tapo.plugin``). It holds no logic.

The estimator and the agent loop use veRL's registries. Where veRL has no extension point we hook,
each hook when its module is imported, never earlier: `HOOKS` lists them with their reasons. A hook
whose target has changed reports so and stays away. A run with ``adv_estimator=tapo`` then stops
with a clear error; every other run goes on unaffected.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from dataclasses import dataclass, field
from functools import partial
from typing import Any

TESTED_VERSIONS = ("0.8.0", "0.9.1")
PATCH_MARK = "ADV_CONTEXT_VERSION"
"""Name in ``verl.trainer.ppo.ray_trainer`` that says one of our patches is applied: veRL hands over the rollout data
itself then, and nothing is wrapped but the constructors."""
V0_TRAINER = "RayPPOTrainer"
"""Name of V0's trainer in the modules of its hooks. VeRL means to drop it: hooks into what is not there say nothing."""


@dataclass
class Hook:
    """One place where the plug-in changes veRL."""

    module: str
    target: str
    """Function or method, dotted; empty for a registration."""
    handler: str
    """``module:function`` in this package."""
    parameters: tuple[str, ...]
    """Parameters the target must have for the handler to make sense."""
    reason: str
    replaced_by_patch: bool = False
    serves: str = "adv_estimator=tapo"
    """The feature that does not work without this hook."""
    status: str = field(default="waiting for import", init=False)


HOOKS = [
    Hook("verl.trainer.ppo.core_algos", "", "verl_tapo.plugin:register_estimator", (), "veRL's estimator registry"),
    Hook(
        "verl.experimental.agent_loop.tool_agent_loop",
        "",
        "verl_tapo.plugin:register_agent_loop",
        (),
        "veRL's agent loop registry",
    ),
    Hook(
        "verl.trainer.ppo.v1.trainer_base",
        "PPOTrainer.__init__",
        "verl_tapo.trainer.v1:init_hook",
        ("self", "config"),
        "a bad algorithm.tapo must stop the run before the first rollout; V1 never validates algorithm",
    ),
    Hook(
        "verl.trainer.ppo.v1.trainer_base",
        "PPOTrainer._compute_advantage",
        "verl_tapo.trainer.v1:compute_advantage_hook",
        ("self", "batch", "metrics"),
        "V1 hands estimators neither responses nor extra fields (veRL PR 7473 would not either)",
        replaced_by_patch=True,
    ),
    Hook(
        "verl.trainer.ppo.ray_trainer",
        "RayPPOTrainer.__init__",
        "verl_tapo.trainer.v0:init_hook",
        ("self", "config", "tokenizer"),
        "the same early check; V0's compute_advantage has no way to the tokenizer",
    ),
    *(
        Hook(
            module,
            target,
            f"verl_tapo.trainer.v0:{target}_hook",
            parameters,
            reason,
            replaced_by_patch=True,
        )
        for module in ("verl.trainer.ppo.ray_trainer", "verl.experimental.separation.ray_trainer")
        for target, parameters, reason in (
            ("compute_advantage", ("data", "adv_estimator", "config"), "V0 hands rollout data to gdpo only (PR 7473)"),
            ("compute_data_metrics", ("batch",), "V0 has no way to add metrics of an estimator"),
        )
    ),
]

CPU_HOOKS = [
    Hook(
        "verl.plugin.platform.platform_manager",
        "",
        "verl_tapo.cpu.registration:register_platform",
        (),
        "veRL's platform registry",
    ),
    Hook(
        "verl.workers.engine.fsdp.transformer_impl",
        "",
        "verl_tapo.cpu.registration:register_engines",
        (),
        "veRL's engine registry; its FSDP engines are registered for cuda and npu",
    ),
    Hook(
        "verl.workers.rollout.replica",
        "",
        "verl_tapo.cpu.registration:register_replica",
        (),
        "veRL's registry of rollout replicas",
    ),
    Hook(
        "verl.workers.rollout.base",
        "",
        "verl_tapo.cpu.registration:register_rollout",
        (),
        "veRL's registry of the workers' side of a rollout",
    ),
    Hook(
        "verl.utils.config",
        "validate_config",
        "verl_tapo.cpu.check:validate_hook",
        ("config", "use_reference_policy", "use_critic"),
        "a configuration for a GPU must stop the run before Ray starts; veRL has no check of a platform's own",
    ),
    Hook(
        "verl.utils.distributed",
        "initialize_global_process_group_ray",
        "verl_tapo.cpu.distributed:process_group_hook",
        ("timeout_second", "backend"),
        "veRL asks torch for the backends cpu:gloo,cpu:gloo, which it refuses",
    ),
    Hook(
        "verl.single_controller.ray.base",
        "RayWorkerGroup.__init__",
        "verl_tapo.cpu.distributed:worker_group_hook",
        ("self", "kwargs"),
        "veRL's master port is one that the system gives to the next connection: every ninth start failed",
    ),
    Hook(
        "verl.trainer.ppo.v1.replay_buffer",
        "ReplayBuffer._materialize_batch",
        "verl_tapo.cpu.order:materialize_hook",
        ("self", "partition_id", "selected_prompt_uids", "partition_snapshot"),
        "rows come in the order in which rollouts finish: the same rollouts would train to other weights",
    ),
    Hook(
        "verl.utils.fsdp_utils",
        "fsdp2_sharded_save_to_cpu",
        "verl_tapo.cpu.engine:save_hook",
        ("model",),
        "veRL keeps weights by `.cpu()`, which is no copy on a CPU: separate_async would restore what it trained since",
    ),
    Hook(
        "verl.utils.dataset.rl_dataset",
        "RLHFDataset._process_multi_modal_info",
        "verl_tapo.cpu.images:process_hook",
        ("messages", "image_patch_size", "config"),
        "veRL reads images with qwen-vl-utils, which needs torchvision",
    ),
    *(
        Hook(
            f"transformers.models.{family}.processing_{family}",
            "",
            "verl_tapo.cpu.processor:leave_out_video",
            (),
            "a Qwen-VL processor needs torchvision for its video part, and veRL goes on without a processor",
        )
        for family in ("qwen2_5_vl", "qwen3_vl")
    ),
]
"""The CPU platform's hooks into veRL; they are in `HOOKS` only under ``VERL_PLATFORM=cpu``."""

for _hook in CPU_HOOKS:
    _hook.serves = "VERL_PLATFORM=cpu"
if os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu":  # as veRL reads it
    HOOKS += CPU_HOOKS
    # With its default of 8 threads TransferQueue warns in every transfer that the machine has fewer cores: most lines
    # of a run's log. Set before Ray starts, so that Ray's processes inherit it.
    os.environ.setdefault("TQ_NUM_THREADS", "1")


def complain(message: str) -> None:
    """Prints to stderr what veRL would hide in a DEBUG log."""
    print(f"[verl-tapo] {message}", file=sys.stderr, flush=True)


def _resolve(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def register_estimator(core_algos: Any) -> None:
    """Registers ``tapo`` with veRL; the estimator's own module is imported when it is first called."""

    def tapo(
        token_level_rewards: Any,
        response_mask: Any,
        index: Any = None,
        config: Any = None,
        non_tensor_batch: Any = None,
        batch: Any = None,
        adv_context: Any = None,
        **kwargs: Any,
    ) -> Any:
        from verl_tapo.trainer.estimator import compute_tapo_advantage

        return compute_tapo_advantage(
            token_level_rewards, response_mask, index, config, non_tensor_batch, batch, adv_context
        )

    core_algos.register_adv_est("tapo")(tapo)


def register_agent_loop(_: Any) -> None:
    """Registers ``tapo_tool_agent`` with veRL, by importing the module that does."""
    importlib.import_module("verl_tapo.rollout.tool_agent")


def _install(hook: Hook, module: Any) -> None:
    try:
        if not hook.target:
            _resolve(hook.handler)(module)
            hook.status = "registered"
            return
        if hook.replaced_by_patch and _patched():
            hook.status = "not needed: veRL is patched"
            return
        if hook.handler.startswith("verl_tapo.trainer.v0:") and not hasattr(module, V0_TRAINER):
            hook.status = "not needed: this veRL has no V0 trainer"
            return
        target = module
        for name in hook.target.split("."):
            target = getattr(target, name)
        present = inspect.signature(target).parameters
        missing = [name for name in hook.parameters if name not in present]
        if missing:
            raise TypeError(f"{hook.target} has no parameter {', '.join(missing)}")

        def handled(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
            return _resolve(hook.handler)(wrapped, instance, args, kwargs)

        from wrapt import wrap_function_wrapper

        wrap_function_wrapper(module, hook.target, handled)
        hook.status = "active"
    except Exception as error:
        hook.status = f"FAILED: {type(error).__name__}: {error}"
        target = f"{hook.module}.{hook.target}" if hook.target else hook.module
        complain(f"cannot hook into {target}: {error}. {hook.serves} will not run; `verl-tapo doctor` shows more.")


def _patched() -> bool:
    ray_trainer = sys.modules.get("verl.trainer.ppo.ray_trainer")
    return hasattr(ray_trainer, PATCH_MARK)


def _load() -> None:
    import wrapt

    for hook in HOOKS:
        # If the module is already imported, this calls back at once.
        wrapt.when_imported(hook.module)(partial(_install, hook))


try:
    _load()
except Exception:
    complain("the plug-in failed to load:\n" + traceback.format_exc())
    raise
