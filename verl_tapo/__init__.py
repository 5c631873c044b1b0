"""TAPO (Tool-Aware Policy Optimization, arXiv 2606.05784) for veRL: counterfactual credit for tool calls."""

from verl_tapo.config import TapoConfig, TapoSettings
from verl_tapo.credit import CreditReport, StepCredit, transfer_credit
from verl_tapo.similarity import Kernel, register_kernel
from verl_tapo.steps import ToolStep, build_tool_mask

__version__ = "0.1.0"

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
