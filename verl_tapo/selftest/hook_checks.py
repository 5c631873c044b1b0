"""The plug-in's hooks into the installed veRL."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from functools import partial

from verl_tapo.plugin import HOOKS, Hook
from verl_tapo.selftest.check import Check, Failed, Skipped


def hook_checks() -> Iterator[Check]:
    """Checks of each hook that it is in place."""
    for hook in HOOKS:
        yield Check(f"hook {hook.module}{'.' if hook.target else ''}{hook.target}", partial(_in_place, hook))
    yield Check("veRL's registry has this estimator under the name tapo", _registered)


def _in_place(hook: Hook) -> str:
    try:
        importlib.import_module(hook.module)
    except ModuleNotFoundError as error:
        if str(error.name).startswith("verl."):
            raise Skipped(f"this veRL has no {error.name}") from None
        raise Failed(f"{error.name} is not installed: pip install 'verl-tapo[verl]'") from None
    if hook.status.startswith("FAILED"):
        raise Failed(hook.status)
    return hook.status


def _registered() -> str:
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn

    module = get_adv_estimator_fn("tapo").__module__
    if module != "verl_tapo.plugin":
        raise Failed(f"it is registered by {module}")
    return "as it registers it"
