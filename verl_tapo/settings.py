"""All of ``algorithm.tapo``: the rule's settings, and how a run feeds it.

In a run it is one flat block of veRL's Hydra configuration; every knob with its default and a sentence stands in
``verl_tapo/conf/tapo.yaml``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, TypeAlias, get_args

from verl_tapo.rule.checks import check_bool, check_choice, check_text, hint, is_number
from verl_tapo.rule.config import Grounding, TapoConfig
from verl_tapo.rule.values import shown

StepSource: TypeAlias = Literal["auto", "recorded", "parsed"]
RecordFormat: TypeAlias = Literal["jsonl", "parquet"]


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
            check_text(name, getattr(self, name), "a non-empty string")
        if self.base_estimator == "tapo":
            raise ValueError("base_estimator must be another estimator than 'tapo' itself, 'grpo' for example")
        if not is_number(self.success_threshold):
            raise ValueError(f"success_threshold must be a finite number, got {shown(self.success_threshold)}")
        check_choice("step_source", self.step_source, get_args(StepSource))
        if self.tool_format is not None:
            check_text("tool_format", self.tool_format, "a tool parser's name or null")
        for name in ("error_markers", "image_parameters"):
            texts = getattr(self, name)
            if not isinstance(texts, list | tuple) or not all(isinstance(item, str) and item for item in texts):
                raise ValueError(
                    f"{name} must be a list of non-empty strings, got {shown(texts)}; [] where there are none"
                )
        check_choice("image_index_base", self.image_index_base, (None, 0, 1))
        check_bool("write_tool_mask", self.write_tool_mask)
        for name in ("patience", "record_keep"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} must be a whole number >= 0, got {shown(value)}")
        if self.record_dir is not None:
            check_text("record_dir", self.record_dir, "a folder or null")
        check_choice("record_format", self.record_format, get_args(RecordFormat))
        rate = self.max_fault_rate
        if rate is not None and (not is_number(rate) or not 0 <= rate <= 1):
            raise ValueError(f"max_fault_rate must be null or a number from 0 to 1, got {shown(rate)}")

    def to_mapping(self) -> dict[str, Any]:
        """All settings as the flat block that `from_mapping` takes."""
        rule = {f.name: getattr(self.rule, f.name) for f in fields(TapoConfig) if f.init}
        rule["grounding"] = asdict(self.rule.grounding)
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
            values["grounding"] = Grounding.from_mapping(values.get("grounding"))
            config = TapoConfig(**{key: value for key, value in values.items() if key in rule})
            return cls(rule=config, **{key: value for key, value in values.items() if key not in rule})
        except ValueError as error:
            raise ValueError(f"algorithm.tapo.{error}") from None
