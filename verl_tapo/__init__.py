"""TAPO (Tool-Aware Policy Optimization, arXiv 2606.05784) for veRL: counterfactual credit for tool calls."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from verl_tapo.rule.config import TapoConfig
    from verl_tapo.rule.credit import transfer_credit
    from verl_tapo.rule.report import CreditReport, StepCredit
    from verl_tapo.rule.similarity import Kernel, register_kernel
    from verl_tapo.rule.steps import ToolStep, build_tool_mask
    from verl_tapo.settings import TapoSettings

__version__ = "0.1.0"

# Imported on first use: veRL loads the plug-in, and with it this package, in every process of a run.
_HOMES = {
    "CreditReport": "rule.report",
    "Kernel": "rule.similarity",
    "StepCredit": "rule.report",
    "TapoConfig": "rule.config",
    "TapoSettings": "settings",
    "ToolStep": "rule.steps",
    "build_tool_mask": "rule.steps",
    "register_kernel": "rule.similarity",
    "transfer_credit": "rule.credit",
}

__all__ = [
    "CreditReport",
    "Kernel",
    "StepCredit",
    "TapoConfig",
    "TapoSettings",
    "ToolStep",
    "__version__",
    "build_tool_mask",
    "register_kernel",
    "transfer_credit",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
