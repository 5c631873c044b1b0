"""TAPO's configuration: the rule's own (`TapoConfig`) and what the veRL adapters need besides (`TapoSettings`).

In a run both come from one flat block of veRL's Hydra configuration, ``algorithm.tapo``; every knob with its default
and a sentence stands in ``verl_tapo/conf/tapo.yaml``.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeAlias, get_args

from verl_tapo.similarity import Kernel, KernelSpec, make_kernel, read_number
from verl_tapo.steps import TokenScope, check_token_scope, shown

Scope: TypeAlias = Literal["group", "batch"]
StepSource: TypeAlias = Literal["auto", "recorded", "parsed"]
RecordFormat: TypeAlias = Literal["jsonl", "parquet"]

# --- What is decided by name [ours], while ``tools`` is None ----------------------------------------------------------

# Names of parameters, without case, underscores and hyphens: `searchQuery` and `search_query` are one.
TEXT_PARAMETERS = frozenset(
    """
    q query queries querylist querystring querytext subqueries subquery textquery userquery
    search searchkeyword searchkeywords searchqueries searchquery searchstring searchterm searchterms searchtext
    keyword keywordlist keywords prompt prompts question questions subquestion subquestions
    """.split()
)
"""They hold words to search for."""
BOX_PARAMETERS = frozenset(
    "bbox bbox2d boundingbox boundingbox2d box box2d cropbbox cropbox rect rectangle roi".split()
)
"""They hold a region of an image."""
REMARK_PARAMETERS = frozenset("explanation justification rationale reason reasoning thought thoughts".split())
"""What the model says about its call, which no answer depends on: they do not count."""
BOX_REMARK_PARAMETERS = frozenset("caption comment description goal intent label labels note purpose".split())
"""The same beside a region of an image. Elsewhere they may say what is looked for."""

# Words in the names of tools. Those that act run, make or change things, or have a state: their answers do not depend
# on the call alone, and the same call is not the same action.
_ACTING = frozenset(
    """
    append bash buy cancel checkout click clicks codeinterpreter commit create creates dblclick delete deletes deploy
    drag draw drawing edit editing editor edits finalanswer generate generates generation generative generator hover
    idle insert inserts install interpret interpreter keyboard kill login logout modify mouse noop notify overwrite
    patch pay powershell purchase push pythoninterpreter remove removes rename replace replaces scroll scrolls send
    sequentialthinking shell sleep swipe tap terminal think thinking tmux transfer update updates upload wait write
    writes
    """.split()
)
# These say the same, or that the tool ends the rollout, unless another word says that it looks something up: `answer`
# but not `answer_lookup`, `run_command` but not `run_search`.
_ACTING_ALONE = frozenset(
    """
    add answer answers apply back book clear close cmd code coding command commands complete completed completion
    computer conclude console copy cp done drop end evaluate exchange exec execute executes execution executor exit
    fill final finalize finish finished focus forward input inputs ipython jupyter key keys message mkdir move msg mv
    order post press put python quit reapply reply respond response return rm run runs save script select set stop
    submission submit submits tab tabs take terminate terminates thought thoughts todo type types typing
    """.split()
)
_LOOKING = frozenset(
    """
    browse check crop detail details detect fetch fetcher find finder get history info information list look lookup ocr
    queries query read reader retrieval retrieve retriever search searcher searches show status view viewer visit zoom
    """.split()
)
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")


def acquires_information(tool: str) -> bool:
    """Whether a tool takes part when ``tools`` is None: its name does not say that it ends the rollout, or runs, makes
    or changes things."""
    words = {word.lower() for word in _WORD.findall(tool)}
    return words.isdisjoint(_ACTING) and (words.isdisjoint(_ACTING_ALONE) or not words.isdisjoint(_LOOKING))


def default_kernel(parameter: str, beside: Iterable[str] = ()) -> str:
    """The kernel of a parameter when ``tools`` is None, by its name.

    Args:
        parameter: its name.
        beside: names of all the call's parameters.
    """
    name = _plain(parameter)
    if name in TEXT_PARAMETERS:
        return "text"
    if name in BOX_PARAMETERS:
        return "iou"
    about_a_box = name in BOX_REMARK_PARAMETERS and not BOX_PARAMETERS.isdisjoint(map(_plain, beside))
    return "ignore" if about_a_box or name in REMARK_PARAMETERS else "exact"


def _plain(name: Any) -> str:
    return name.lower().replace("_", "").replace("-", "") if isinstance(name, str) else ""


# --- Checks ----------------------------------------------------------------------------------------------------------


def _is_number(value: Any) -> bool:
    """Whether a value is a number that a float can hold: finite, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and read_number(value) is not None


def success_number(value: Any) -> float:
    """A success value as a number, also where it is written as a text; NaN where it is neither number nor truth value.

    Beyond the range of floats it is infinite.
    """
    try:
        if isinstance(value, str):
            value = {"true": 1.0, "false": 0.0}.get(value.strip().lower(), value)
        elif hasattr(value, "item"):
            value = value.item()  # of NumPy, of torch, or an array of one number
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
    except Exception:  # no number, or whatever a foreign object raises
        return math.nan


def _check_number(name: str, value: Any, upper: float) -> None:
    if not _is_number(value) or not 0 <= value <= upper:
        span = f"in [0, {upper:g}]" if math.isfinite(upper) else ">= 0"
        raise ValueError(f"{name} must be a number {span}, got {shown(value)}")


def _check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    # By type as well: true is no 1.
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {shown(value)}")


def _check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {shown(value)}")


def hint(name: Any, known: Collection[str]) -> str:
    """The end of a message on an unknown name: the known one that was meant, as it seems, else all."""
    close = difflib.get_close_matches(str(name), known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known)) or 'none'}"


def _check_text(name: str, value: Any, what: str) -> None:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} must be {what}, got {shown(value)}")


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
            raise ValueError(f"tools must map tool names to their parameters' kernels, got {shown(self.tools)}")
        if not self.tools:
            raise ValueError(
                "tools names no tool, so that nothing would be corrected: null decides by name, beta=0 turns TAPO off"
            )
        for tool, parameters in self.tools.items():
            _check_text("tools: a tool's name", tool, "a text")
            if parameters is not None and not isinstance(parameters, Mapping):
                raise ValueError(f"tools[{tool!r}] must map parameters to kernels, got {shown(parameters)}")
            try:
                for name, spec in (parameters or {}).items():
                    _check_text("a parameter's name", name, "a text")
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
        if not isinstance(self.rule, TapoConfig):
            raise ValueError(f"rule must be a TapoConfig, got {type(self.rule).__name__}")
        for name in ("base_estimator", "success_key"):
            _check_text(name, getattr(self, name), "a non-empty string")
        if self.base_estimator == "tapo":
            raise ValueError("base_estimator must be another estimator than 'tapo' itself, 'grpo' for example")
        if not _is_number(self.success_threshold):
            raise ValueError(f"success_threshold must be a finite number, got {shown(self.success_threshold)}")
        _check_choice("step_source", self.step_source, get_args(StepSource))
        if self.tool_format is not None:
            _check_text("tool_format", self.tool_format, "a tool parser's name or null")
        for name in ("error_markers", "image_parameters"):
            texts = getattr(self, name)
            if not isinstance(texts, list | tuple) or not all(isinstance(item, str) and item for item in texts):
                raise ValueError(
                    f"{name} must be a list of non-empty strings, got {shown(texts)}; [] where there are none"
                )
        _check_choice("image_index_base", self.image_index_base, (None, 0, 1))
        _check_bool("write_tool_mask", self.write_tool_mask)
        for name in ("patience", "record_keep"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} must be a whole number >= 0, got {shown(value)}")
        if self.record_dir is not None:
            _check_text("record_dir", self.record_dir, "a folder or null")
        _check_choice("record_format", self.record_format, get_args(RecordFormat))
        rate = self.max_fault_rate
        if rate is not None and (not _is_number(rate) or not 0 <= rate <= 1):
            raise ValueError(f"max_fault_rate must be null or a number from 0 to 1, got {shown(rate)}")

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
            raise ValueError(f"algorithm.tapo must be a block of settings, got {shown(mapping)}")
        rule = {f.name for f in fields(TapoConfig) if f.init}
        known = rule | ({f.name for f in fields(cls)} - {"rule"})
        for key in mapping:
            if key not in known:
                raise ValueError(f"algorithm.tapo.{key}: unknown setting{hint(key, known)}")
        values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in mapping.items()}
        try:
            config = TapoConfig(**{key: value for key, value in values.items() if key in rule})
            return cls(rule=config, **{key: value for key, value in values.items() if key not in rule})
        except ValueError as error:
            raise ValueError(f"algorithm.tapo.{error}") from None
