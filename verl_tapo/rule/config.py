"""The rule's settings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeAlias, get_args

from verl_tapo.rule.checks import check_bool, check_choice, check_number, check_text, hint
from verl_tapo.rule.names import BOX_PARAMETERS, acquires_information, default_kernel
from verl_tapo.rule.similarity import Kernel, KernelSpec, make_kernel
from verl_tapo.rule.steps import TokenScope
from verl_tapo.rule.values import shown

Scope: TypeAlias = Literal["group", "batch"]


@dataclass(frozen=True)
class Grounding:
    """What follows where a tool's answer held an accepted answer of the prompt, or none did; see
    `verl_tapo.rule.grounding`. [ours]"""

    witnesses: bool = False
    """Successes in which no tool's answer held an accepted answer are no witnesses, and do not count in the support."""
    own: bool = False
    """In a failing rollout the calls up to the one whose answer held an accepted answer lose their penalty."""
    luck: bool = False
    """Calls of a success in which no tool's answer held an accepted answer earn no reward. It lowers advantages."""

    def __post_init__(self) -> None:
        for switch in fields(self):
            check_bool(f"grounding.{switch.name}", getattr(self, switch.name))

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any] | None) -> Grounding:
        """From plain containers; None is all off.

        Raises:
            ValueError: naming the switch, for an unknown one or a value that is no truth value.
        """
        if mapping is not None and not isinstance(mapping, Mapping):
            raise ValueError(f"grounding must be a block of switches, got {shown(mapping)}")
        known = {switch.name for switch in fields(cls)}
        for name in mapping or {}:
            if name not in known:
                named = name if isinstance(name, str) else shown(name)
                raise ValueError(f"grounding.{named}: unknown setting{hint(named, known)}")
        return cls(**(mapping or {}))


@dataclass(frozen=True)
class TapoConfig:
    """The rule's settings. Defaults are the paper's where it states them.

    Raises:
        ValueError: naming the setting, for a value out of range, an unknown kernel or bad kernel options.
    """

    beta: float = 0.8
    """Scale of the transfer, >= 0; 0 turns TAPO off. [paper: 0.8 was the best of those tried]"""
    theta: float = 0.8
    """Similarity from which on two calls are the same action, in [0, 1]. [paper has it; the value is ours]"""
    alpha_min: float = 0.2
    """Confidence below which nothing is transferred, in [0, 1]. [paper has it; the value is ours]"""
    token_scope: TokenScope = "step"
    """``step``: the whole assistant turn that made the call; ``call``: the call's own tokens. [ours]"""
    scope: Scope = "group"
    """``group``: witnesses among the rollouts of the same prompt; ``batch``: in the whole batch. [ours]"""
    use_support: bool = True
    """False sets the support factor to 1. [paper's ablation]"""
    clip: bool = True
    """False drops the cut-off at 0. [paper's ablation]"""
    tools: Mapping[str, Mapping[str, KernelSpec]] | None = None
    """Information-acquisition tools with their parameters' kernels, ``{tool: {parameter: kernel}}``; a parameter not
    named compares as ``exact``. None decides by name, see `acquires_information` and `default_kernel`, and calls
    without any parameter that counts are left out. [ours]"""
    grounding: Grounding = Grounding()
    """Switches for credit by what the tools' answers held; all are off by default. [ours]"""
    _kernels: dict[str, dict[str, Kernel]] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        check_number("beta", self.beta, math.inf)
        check_number("theta", self.theta, 1.0)
        check_number("alpha_min", self.alpha_min, 1.0)
        check_choice("token_scope", self.token_scope, get_args(TokenScope))
        check_choice("scope", self.scope, get_args(Scope))
        check_bool("use_support", self.use_support)
        check_bool("clip", self.clip)
        if not isinstance(self.grounding, Grounding):
            raise ValueError(f"grounding must be a Grounding, got {shown(self.grounding)}")
        if self.tools is None:
            return
        if not isinstance(self.tools, Mapping):
            raise ValueError(f"tools must map tool names to their parameters' kernels, got {shown(self.tools)}")
        if not self.tools:
            raise ValueError(
                "tools names no tool, so that nothing would be corrected: null decides by name, beta=0 turns TAPO off"
            )
        for tool, parameters in self.tools.items():
            check_text("tools: a tool's name", tool, "a text")
            if parameters is not None and not isinstance(parameters, Mapping):
                raise ValueError(f"tools[{tool!r}] must map parameters to kernels, got {shown(parameters)}")
            try:
                for name, spec in (parameters or {}).items():
                    check_text("a parameter's name", name, "a text")
                    self._kernels.setdefault(tool, {})[name] = make_kernel(spec)
            except ValueError as error:
                raise ValueError(f"tools[{tool!r}]: {error}") from None

    def takes_part(self, tool: str) -> bool:
        """Whether ``tool`` is a declared information-acquisition tool."""
        return acquires_information(tool) if self.tools is None else tool in self.tools

    def kernel(self, tool: str, parameter: Any, beside: Iterable[Any] = ()) -> Kernel:
        """What compares ``parameter`` of ``tool``, a tool that takes part, in a call with the parameters ``beside``."""
        if self.tools is not None:
            return self._kernels.get(tool, {}).get(parameter, _BY_NAME["exact"])
        return _BY_NAME[default_kernel(parameter, beside)]

    def all_kernels(self) -> list[Kernel]:
        """The kernels that may be asked."""
        if self.tools is None:
            return list(_BY_NAME.values())
        return [kernel for kernels in self._kernels.values() for kernel in kernels.values()]

    def may_ignore(self, tool: str, parameter: Any) -> bool:
        """Whether ``parameter`` counts in no call, or not in all."""
        return self.kernel(tool, parameter, BOX_PARAMETERS).ignores


_BY_NAME = {name: make_kernel(name) for name in ("text", "iou", "exact", "ignore")}
