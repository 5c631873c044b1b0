"""All settings in ``algorithm.tapo``: those of the rule, and those of a run.

In a run it is one block of veRL's Hydra configuration. Its file is generated from this module and
`verl_tapo.rule.config`::

    python -m verl_tapo.settings > verl_tapo/conf/tapo.yaml
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import Field, asdict, dataclass, field, fields
from typing import Any, Literal, TypeAlias, get_args

from verl_tapo.rule.checks import Knobs, choice, finite, hint, knob, number, text, texts, truth, whole
from verl_tapo.rule.config import Grounding, TapoConfig
from verl_tapo.rule.values import shown

StepSource: TypeAlias = Literal["auto", "recorded", "parsed"]
RecordFormat: TypeAlias = Literal["jsonl", "parquet"]


def _base_estimator(name: str, value: Any) -> None:
    text("a non-empty string")(name, value)
    if value == "tapo":
        raise ValueError(f"{name} must be another estimator than 'tapo' itself, 'grpo' for example")


def _rule(name: str, value: Any) -> None:
    if not isinstance(value, TapoConfig):
        raise ValueError(f"{name} must be a TapoConfig, got {type(value).__name__}")


@dataclass(frozen=True)
class TapoSettings(Knobs):
    """All of ``algorithm.tapo``.

    Raises:
        ValueError: naming the setting, for a value out of range.
    """

    rule: TapoConfig = field(default_factory=TapoConfig, metadata={"check": _rule})
    base_estimator: str = knob(
        "grpo", "The registered group estimator whose advantages are corrected.", _base_estimator
    )
    success_key: str = knob(
        "acc",
        """Key in the reward function's returned dict that says whether a rollout succeeded. Without the key the score
        decides.""",
        text("a non-empty string"),
    )
    success_threshold: float = knob(0.5, "A rollout succeeded if that value is at least this.", finite)
    step_source: StepSource = knob(
        "auto",
        """"recorded": from the records of the agent loop tapo_tool_agent; "parsed": from the tokens; "auto": recorded
        if there is a record, else parsed.""",
        choice(*get_args(StepSource)),
    )
    tool_format: str | None = knob(
        None,
        "Tool-call format to parse; null takes actor_rollout_ref.rollout.multi_turn.format.",
        text("a tool parser's name or null", null=True),
    )
    error_markers: tuple[str, ...] = knob(
        (),
        "Texts that begin a failing tool's answer, besides those of veRL's own loop; such calls get no credit.",
        texts,
    )
    image_parameters: tuple[str, ...] = knob(
        ("image", "images", "image_index", "image_idx", "image_id", "img", "img_idx"),
        "Call parameters that hold the index of an image. They are compared by the image, not by the index.",
        texts,
    )
    image_index_base: int | None = knob(
        None,
        """The first index of an image, 0 or 1. null: unknown; two calls are then equal only if both readings agree.""",
        choice(None, 0, 1),
    )
    write_tool_mask: bool = knob(True, "Write the tool mask to the batch, as the field tapo_tool_mask.", truth)
    patience: int = knob(
        20,
        """Training steps after which unused tools of `tools` are reported, and a luck that leaves hardly any reward; 0:
        never.""",
        whole,
    )
    max_fault_rate: float | None = knob(
        None,
        """End the run if more than this share of a step's tool calls, recorded by tapo_tool_agent, failed for
        infrastructure reasons (a search service that is down), or of its rollouts is missing (an inference server that
        died), 0 to 1. null: no limit. It holds under other estimators too, except in a veRL changed by patches/.""",
        number(1, null=True),
    )
    record_dir: str | None = knob(
        None,
        """A folder for a file of records in every training step, which `verl-tapo audit` reads; null: none. It must be
        the records' own folder: only records of a repeated step are replaced, and a folder with other files of such
        names is refused.""",
        text("a folder or null", null=True),
    )
    record_format: RecordFormat = knob(
        "jsonl", "The format of these files: jsonl (compressed) or parquet.", choice(*get_args(RecordFormat))
    )
    record_keep: int = knob(0, "The number of newest steps whose files are kept; 0: all.", whole)

    def to_mapping(self) -> dict[str, Any]:
        """All settings as the block that `from_mapping` takes."""
        rule = {f.name: getattr(self.rule, f.name) for f in fields(TapoConfig) if f.init}
        rule["grounding"] = asdict(self.rule.grounding)
        return {**rule, **{f.name: getattr(self, f.name) for f in fields(self) if f.name != "rule"}}

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any] | None) -> TapoSettings:
        """Settings from the block ``algorithm.tapo`` (plain containers; None is all defaults).

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


class _Loaded:
    """The settings of this process's run; kept while the configuration stays the same (kernels may hold models)."""

    raw: Any = None
    settings: TapoSettings | None = None


def load_settings(algorithm: Any) -> TapoSettings:
    """The settings in the ``tapo`` block of veRL's ``algorithm`` configuration (a DictConfig, mapping or dataclass).

    Raises:
        ValueError: for an unknown key or a value out of range.
    """
    raw: Any = None
    if algorithm is not None:
        raw = algorithm.get("tapo", None) if hasattr(algorithm, "get") else getattr(algorithm, "tapo", None)
    if type(raw).__module__.startswith("omegaconf"):
        from omegaconf import OmegaConf

        raw = OmegaConf.to_container(raw, resolve=True)
    if _Loaded.settings is None or _Loaded.raw != raw:
        _Loaded.raw, _Loaded.settings = raw, TapoSettings.from_mapping(raw)
    return _Loaded.settings


# --- conf/tapo.yaml -------------------------------------------------------------------------------------------------

_HEAD = """\
# veRL's own PPO configuration with TAPO switched on, and every knob of TAPO present:
#   python -m verl.trainer.main_ppo --config-name tapo algorithm.tapo.beta=0.5 ...
# (verl_tapo puts this folder on Hydra's search path.) With veRL's own configuration instead, write
#   algorithm.adv_estimator=tapo +algorithm.tapo.beta=0.5
# [paper]: as the paper has it. [ours]: decided here, because the paper leaves it open.
# Made by `python -m verl_tapo.settings`: change defaults, sentences and ranges there.
defaults:
  - ppo_trainer
  - _self_

algorithm:
  adv_estimator: tapo

  tapo:
"""
_WIDTH = 120


def as_yaml() -> str:
    """The text of ``conf/tapo.yaml``."""
    knobs = [each for each in (*fields(TapoConfig), *fields(TapoSettings)) if "sentence" in each.metadata]
    return _HEAD + "\n".join(line for each in knobs for line in ("", *_lines(each, 4))) + "\n"


def _lines(each: Field[Any], indent: int) -> Iterator[str]:
    import yaml

    margin = " " * indent
    comment = f"{margin}# "
    yield from textwrap.wrap(
        each.metadata["sentence"],
        _WIDTH,
        initial_indent=comment,
        subsequent_indent=comment,
        break_on_hyphens=False,
    )
    if isinstance(each.default, Knobs):
        yield f"{margin}{each.name}:"
        for inner in fields(each.default):  # type: ignore[arg-type]
            yield ""
            yield from _lines(inner, indent + 2)
        return
    value = list(each.default) if isinstance(each.default, tuple) else each.default
    text = yaml.safe_dump({each.name: value}, default_flow_style=True, width=10 * _WIDTH)
    yield margin + text.strip()[1:-1]


if __name__ == "__main__":
    print(as_yaml(), end="")
