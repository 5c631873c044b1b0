"""The settings in ``reward.custom_reward_function.reward_kwargs``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from search_backends.answers.judge import JudgeSettings
from search_backends.providers.base import Settings

Match: TypeAlias = Literal["exact", "substring", "f1", "judge"]

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # TAPO's paper: the outcome alone.
    "outcome": {},
    "mmsearch_r1": {"weights": {"accuracy": 0.9, "format": 0.1}, "penalty": "once"},
    "sensenova_mars": {"weights": {"accuracy": 1.0, "format": 0.5}, "tool_errors_cost_format": True},
    "deepeyes": {"weights": {"accuracy": 0.8, "format": 0.2, "tool_bonus": 1.2}, "counted_tools": None},
}


class Weights(Settings):
    """Weights of the parts of the score; at least one is not 0."""

    accuracy: float = Field(default=1.0, ge=0, le=100)
    """The weight of ``acc``, times the penalty."""
    format: float = Field(default=0.0, ge=0, le=100)
    tool_bonus: float = Field(default=0.0, ge=0, le=100)
    """Added if the answer is right and a tool was used."""


class RewardSettings(Settings):
    """Settings of the reward."""

    match: Annotated[
        tuple[Match, ...],
        Field(min_length=1),
        BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
    ] = ("exact", "substring")
    """Each alone makes an answer right; the judge is only asked about answers that the rules do not find right."""
    f1_threshold: float = Field(0.8, gt=0, le=1)
    substring_ratio: float = Field(3.0, ge=1, le=100)
    """An answer that contains an accepted answer may have at most this many times its words."""
    weights: Weights = Weights()
    penalty: Literal["none", "once", "per_call"] = "none"
    """``once``: tool calls make a right answer worth less. ``per_call``: each call does."""
    penalty_factor: float = Field(0.9, gt=0, le=1)
    counted_tools: tuple[str, ...] | None = ("text_search", "image_search")
    """Tools that penalty and bonus are about. None: all."""
    think: bool = False
    """If true, the format asks for a thought before the answer."""
    tool_errors_cost_format: bool = False
    """If true, calls over a limit, and those that fail through the model's fault, cost the format
    score. Unreadable calls always do."""
    judge: JudgeSettings | None = None


_KindT = TypeVar("_KindT", bound=BaseModel)


def read_settings(config: Mapping[str, Any]) -> RewardSettings:
    """Returns the settings in ``config``, which override those of its ``preset`` (default:
    outcome).

    Raises:
        ValueError: One is missing, unknown or out of range.
    """
    own = dict(config)
    name = own.pop("preset", "outcome")
    if name not in PRESETS:
        raise ValueError(f"reward_kwargs.preset is {name!r}; known: {', '.join(PRESETS)}")
    preset = dict(PRESETS[name])
    weights = own.pop("weights", None) or {}
    if isinstance(weights, Mapping):
        weights = {**preset.pop("weights", {}), **weights}
    merged = {**preset, **own, "weights": _checked(Weights, "weights.", weights)}
    if own.get("judge") is not None:
        merged["judge"] = _checked(JudgeSettings, "judge.", own["judge"])
    settings = _checked(RewardSettings, "", merged, "preset")
    if not any(dict(settings.weights).values()):
        raise ValueError("reward_kwargs.weights are all 0: there would be nothing to learn")
    if "judge" in settings.match and settings.judge is None:
        raise ValueError("reward_kwargs.match names judge: reward_kwargs.judge must say which (model, base_url)")
    return settings


def _checked(kind: type[_KindT], where: str, config: Any, *more: str) -> _KindT:
    known = ", ".join([*kind.model_fields, *more])
    if not isinstance(config, Mapping):
        raise ValueError(f"reward_kwargs.{where[:-1]} must be a mapping of {known}; got {config!r}")
    try:
        return kind(**config)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        name = where + ".".join(map(str, problem["loc"]))
        raise ValueError(f"reward_kwargs.{name}: {problem['msg']}; known: {known}") from None
