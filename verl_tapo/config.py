"""TAPO's configuration: the rule's own (`TapoConfig`) and what the veRL adapters need besides (`TapoSettings`).

In a run both come from one flat block of veRL's Hydra configuration, ``algorithm.tapo``; every knob with its default
and a sentence stands in ``verl_tapo/conf/tapo.yaml``.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeAlias, get_args

from verl_tapo.similarity import Exact, Kernel, KernelSpec, make_kernel
from verl_tapo.steps import TokenScope, check_token_scope

Scope: TypeAlias = Literal["group", "batch"]
StepSource: TypeAlias = Literal["auto", "recorded", "parsed"]
RecordFormat: TypeAlias = Literal["jsonl", "parquet"]

# The default decision by name [ours], used while ``tools`` is None.
TEXT_PARAMETERS = frozenset({"query", "queries", "q", "question", "keywords"})
BOX_PARAMETERS = frozenset({"bbox", "bbox_2d", "box"})
# Words in a tool's name that say it runs or makes things: not an information-acquisition tool.
_ACTING = re.compile(r"(python|exec|shell|bash|interpret|generat|edit|draw).*|code|codeinterpreter")
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")


def acquires_information(tool: str) -> bool:
    """Whether a tool takes part when ``tools`` is None: its name does not say that it runs or makes things."""
    return not any(_ACTING.fullmatch(word.lower()) for word in _WORD.findall(tool))


def default_kernel(parameter: str) -> str:
    """The kernel of a parameter when ``tools`` is None, by the parameter's name."""
    name = parameter.lower()
    if name in TEXT_PARAMETERS:
        return "text"
    return "iou" if name in BOX_PARAMETERS else "exact"


def _check_number(name: str, value: Any, upper: float) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not 0 <= value <= upper:
        span = f"in [0, {upper:g}]" if math.isfinite(upper) else ">= 0"
        raise ValueError(f"{name} must be a number {span}, got {value!r}")


def _check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}")


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
    named compares as ``exact``. None decides by name, see `acquires_information` and `default_kernel`. [ours]"""
    _kernels: dict[str, dict[str, Kernel]] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        _check_number("beta", self.beta, math.inf)
        _check_number("theta", self.theta, 1.0)
        _check_number("alpha_min", self.alpha_min, 1.0)
        check_token_scope(self.token_scope)
        _check_choice("scope", self.scope, get_args(Scope))
        _check_bool("use_support", self.use_support)
        _check_bool("clip", self.clip)
        if self.tools is None:
            return
        if not isinstance(self.tools, Mapping):
            raise ValueError(f"tools must map tool names to their parameters' kernels, got {self.tools!r}")
        for tool, parameters in self.tools.items():
            if parameters is not None and not isinstance(parameters, Mapping):
                raise ValueError(f"tools[{tool!r}] must map parameters to kernels, got {parameters!r}")
            try:
                self._kernels[tool] = {name: make_kernel(spec) for name, spec in (parameters or {}).items()}
            except ValueError as error:
                raise ValueError(f"tools[{tool!r}]: {error}") from None

    def takes_part(self, tool: str) -> bool:
        """Whether ``tool`` is a declared information-acquisition tool."""
        return acquires_information(tool) if self.tools is None else tool in self.tools

    def kernel(self, tool: str, parameter: str) -> Kernel:
        """The kernel that compares ``parameter`` of ``tool``, a tool that takes part. One instance each, kept."""
        kernels = self._kernels.setdefault(tool, {})
        if parameter not in kernels:
            kernels[parameter] = make_kernel(default_kernel(parameter)) if self.tools is None else Exact()
        return kernels[parameter]


@dataclass(frozen=True)
class TapoSettings:
    """All of ``algorithm.tapo``: the rule, and how a run feeds it.

    Raises:
        ValueError: naming the setting, for a value out of range.
    """

    rule: TapoConfig = field(default_factory=TapoConfig)
    base_estimator: str = "grpo"
    """The registered group estimator whose advantages are corrected."""
    success_key: str = "acc"
    """Key of the reward function's extra info that says whether a rollout succeeded."""
    success_threshold: float = 0.5
    """A rollout succeeded where that value, or the score where the key is missing, is at least this."""
    step_source: StepSource = "auto"
    """``recorded``: by the agent loop ``tapo_tool_agent``; ``parsed``: out of the tokens; ``auto``: recorded, else
    parsed, row by row."""
    tool_format: str | None = None
    """Tool-call format to parse; None takes ``actor_rollout_ref.rollout.multi_turn.format``."""
    error_markers: tuple[str, ...] = ()
    """Texts a failing tool's answer starts with, besides those of veRL's own loop; such calls get no credit."""
    image_parameters: tuple[str, ...] = ("image", "images", "image_index", "image_idx", "image_id", "img", "img_idx")
    """Call parameters that hold an index of an image: compared by the image's content, not by the index."""
    image_index_base: int | None = None
    """Whether image indices count from 0 or from 1; None: not known, so two indices are the same image only where
    both readings agree."""
    write_tool_mask: bool = True
    """Write the tool mask to the batch, as the field ``tapo_tool_mask``."""
    patience: int = 20
    """Training steps after which a tool named in ``tools`` that never occurred is reported; 0: never."""
    max_fault_rate: float | None = None
    """Share of a step's recorded tool calls that may fail through no fault of the model, and of its prompts' rollouts
    that may be missing (V1); beyond it the run ends. None: no limit."""
    record_dir: str | None = None
    """Folder for a file of records in every training step, see `verl_tapo.step_records`; None: none are written."""
    record_format: RecordFormat = "jsonl"
    """Of these files: ``jsonl`` (compressed) or ``parquet``."""
    record_keep: int = 0
    """How many of the newest steps' files stay; 0: all."""

    def __post_init__(self) -> None:
        for name in ("base_estimator", "success_key"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ValueError(f"{name} must be a non-empty string, got {getattr(self, name)!r}")
        if self.base_estimator == "tapo":
            raise ValueError("base_estimator must be another estimator than 'tapo' itself, 'grpo' for example")
        threshold = self.success_threshold
        if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not math.isfinite(threshold):
            raise ValueError(f"success_threshold must be a finite number, got {threshold!r}")
        _check_choice("step_source", self.step_source, get_args(StepSource))
        if self.tool_format is not None and not isinstance(self.tool_format, str):
            raise ValueError(f"tool_format must be a tool parser's name or null, got {self.tool_format!r}")
        for name in ("error_markers", "image_parameters"):
            texts = getattr(self, name)
            if isinstance(texts, str) or not all(isinstance(item, str) and item for item in texts):
                raise ValueError(f"{name} must be a list of non-empty strings, got {getattr(self, name)!r}")
        _check_choice("image_index_base", self.image_index_base, (None, 0, 1))
        _check_bool("write_tool_mask", self.write_tool_mask)
        for name in ("patience", "record_keep"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} must be a whole number >= 0, got {value!r}")
        if self.record_dir is not None and (not isinstance(self.record_dir, str) or not self.record_dir):
            raise ValueError(f"record_dir must be a folder or null, got {self.record_dir!r}")
        _check_choice("record_format", self.record_format, get_args(RecordFormat))
        rate = self.max_fault_rate
        if rate is not None and (isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate <= 1):
            raise ValueError(f"max_fault_rate must be null or a number from 0 to 1, got {rate!r}")

    def to_mapping(self) -> dict[str, Any]:
        """All settings as the flat block that `from_mapping` takes."""
        rule = {f.name: getattr(self.rule, f.name) for f in fields(TapoConfig) if f.init}
        return {**rule, **{f.name: getattr(self, f.name) for f in fields(self) if f.name != "rule"}}

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any] | None) -> TapoSettings:
        """Settings from the flat block ``algorithm.tapo`` (plain containers; None is all defaults).

        Raises:
            ValueError: for an unknown key (with the closest known one), or a value out of range.
        """
        if mapping is None:
            mapping = {}
        if not isinstance(mapping, Mapping):
            raise ValueError(f"algorithm.tapo must be a block of settings, got {mapping!r}")
        rule = {f.name for f in fields(TapoConfig) if f.init}
        known = rule | ({f.name for f in fields(cls)} - {"rule"})
        for key in mapping:
            if key not in known:
                close = difflib.get_close_matches(str(key), known, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known))}"
                raise ValueError(f"algorithm.tapo.{key}: unknown setting{hint}")
        values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in mapping.items()}
        try:
            config = TapoConfig(**{key: value for key, value in values.items() if key in rule})
            return cls(rule=config, **{key: value for key, value in values.items() if key not in rule})
        except ValueError as error:
            raise ValueError(f"algorithm.tapo.{error}") from None
