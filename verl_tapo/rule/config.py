"""The rule's settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeAlias, get_args

from verl_tapo.rule.checks import Knobs, choice, hint, knob, number, text, truth
from verl_tapo.rule.names import BOX_PARAMETERS, acquires_information, default_kernel
from verl_tapo.rule.similarity import Kernel, KernelSpec, make_kernel
from verl_tapo.rule.steps import TokenScope
from verl_tapo.rule.values import shown

Scope: TypeAlias = Literal["group", "batch"]


@dataclass(frozen=True)
class Grounding(Knobs):
    """What the rule does if a tool's answer held an accepted answer of the prompt, or none did; see
    `verl_tapo.rule.grounding`. [ours]

    Raises:
        ValueError: naming the switch, for a value that is no truth value.
    """

    block = "grounding."

    witnesses: bool = knob(
        False,
        """If true, successes in which no tool's answer held an accepted answer are no witnesses, and do not count in
        the support.""",
        truth,
    )
    own: bool = knob(
        False,
        "If true, a failing rollout's calls up to the first whose answer held an accepted answer lose their penalty.",
        truth,
    )
    luck: bool = knob(
        False,
        """If true, a success in which no tool's answer held an accepted answer counts as a failure, also one without
        calls. Answers that many texts hold anyway (yes, a year) and rollouts without tools are left alone. The base
        advantages are computed from what remains of the rewards.""",
        truth,
    )

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any] | None) -> Grounding:
        """Reads the settings from plain containers; None turns everything off.

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


def _grounding(name: str, value: Any) -> None:
    if not isinstance(value, Grounding):
        raise ValueError(f"{name} must be a Grounding, got {shown(value)}")


def _tools(name: str, value: Any) -> None:
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"{name} must map tool names to their parameters' kernels, got {shown(value)}")
    if value is not None and not value:
        raise ValueError(
            "tools names no tool, so that nothing would be corrected: null decides by name, beta=0 turns TAPO off"
        )


@dataclass(frozen=True)
class TapoConfig(Knobs):
    """The rule's settings. The defaults are the paper's if it states them.

    Raises:
        ValueError: naming the setting, for a value out of range, an unknown kernel or bad kernel options.
    """

    beta: float = knob(
        0.8,
        "Scale of the transfer, >= 0; 0 turns TAPO off, except `grounding`. [paper: 0.8 was the best of those tried]",
        number(),
    )
    theta: float = knob(
        0.8,
        "The least similarity at which two calls are the same action, 0 to 1. [paper has it; the value is ours]",
        number(1),
    )
    alpha_min: float = knob(
        0.2,
        """Confidence (similarity times support) below which nothing is transferred, 0 to 1. [paper has it; the value is
        ours]""",
        number(1),
    )
    token_scope: TokenScope = knob(
        "step",
        """Corrected tokens: "step" is the whole assistant turn that made the call, "call" the call's own tokens.
        [ours]""",
        choice(*get_args(TokenScope)),
    )
    scope: Scope = knob(
        "group",
        'Which rollouts give witnesses: "group", those of the same prompt; "batch", all. [ours]',
        choice(*get_args(Scope)),
    )
    use_support: bool = knob(
        True,
        "Weight the transfer by the share of successful rollouts that hold the call; false is the paper's ablation.",
        truth,
    )
    clip: bool = knob(True, "Never lift an advantage past 0; false is the paper's ablation (unstable there).", truth)
    tools: Mapping[str, Mapping[str, KernelSpec]] | None = knob(
        None,
        """Information-acquisition tools and how their parameters compare, {tool: {parameter: kernel}}. Kernels: exact,
        text, iou, {kernel: number, scale: S}, embedding, ignore. Parameters that are not named: exact. null takes what
        the tools' classes declare (an attribute `kernels`, {parameter: kernel}, or None to stay out). Otherwise names
        decide, and the log says so once for each tool [ours]. Tools stay out if their names say that they end the
        rollout, or run, make or change things (finish, answer, python, click, write_file ...). Parameters named like
        a query, keyword, question or prompt compare as text, those named like a box as iou. A reason or thought is
        ignored, and so is a label beside a box. Calls without any argument that counts are left out.""",
        _tools,
    )
    grounding: Grounding = knob(
        Grounding(),
        """What the rule does if a tool's answer held an accepted answer of the prompt, or none did. Unknown cases
        (yes, a colour, a year; no ground truth; images) change nothing. [ours]""",
        _grounding,
    )
    _kernels: dict[str, dict[str, Kernel]] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        for tool, parameters in (self.tools or {}).items():
            _TEXT("tools: a tool's name", tool)
            if parameters is not None and not isinstance(parameters, Mapping):
                raise ValueError(f"tools[{tool!r}] must map parameters to kernels, got {shown(parameters)}")
            try:
                for name, spec in (parameters or {}).items():
                    _TEXT("a parameter's name", name)
                    self._kernels.setdefault(tool, {})[name] = make_kernel(spec)
            except ValueError as error:
                raise ValueError(f"tools[{tool!r}]: {error}") from None

    def takes_part(self, tool: str) -> bool:
        """Returns whether ``tool`` is a declared information-acquisition tool."""
        return acquires_information(tool) if self.tools is None else tool in self.tools

    def kernel(self, tool: str, parameter: Any, beside: Iterable[Any] = ()) -> Kernel:
        """Returns the kernel for ``parameter`` of ``tool``, which must take part, in a call with
        the parameters ``beside``."""
        if self.tools is not None:
            return self._kernels.get(tool, {}).get(parameter, _BY_NAME["exact"])
        return _BY_NAME[default_kernel(parameter, beside)]

    def all_kernels(self) -> list[Kernel]:
        """The kernels that may be asked."""
        if self.tools is None:
            return list(_BY_NAME.values())
        return [kernel for kernels in self._kernels.values() for kernel in kernels.values()]

    def may_ignore(self, tool: str, parameter: Any) -> bool:
        """Returns whether ``parameter`` is ignored in all calls, or in some."""
        return self.kernel(tool, parameter, BOX_PARAMETERS).ignores


_TEXT = text("a text")
_BY_NAME = {name: make_kernel(name) for name in ("text", "iou", "exact", "ignore")}
