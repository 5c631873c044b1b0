"""What the examination takes from a run's configuration, and what it finds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from omegaconf import OmegaConf
from verl.tools.schemas import OpenAIFunctionToolSchema

from verl_tapo.trainer.monitor import RECORDING_LOOP

Rows: TypeAlias = list[tuple[str, str]]
FORMAT_SETTING = "actor_rollout_ref.rollout.multi_turn.format"
TEMPLATE_SETTING = "actor_rollout_ref.model.custom_chat_template"

_LONGEST = 100  # characters of a text that are shown
_MADE_UP = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "Searches. Made up by the doctor.",
        "parameters": {
            "type": "object",
            "properties": {"query": {"type": "string", "description": "What to look for."}},
            "required": ["query"],
        },
    },
}


@dataclass
class Report:
    """What was found, in sections of rows for a reader."""

    sections: list[tuple[str, Rows]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """What keeps a run from starting, or calls from being found."""
    warnings: list[str] = field(default_factory=list)


class Run(NamedTuple):
    """What a run's configuration says of its conversations."""

    tool_format: str
    schemas: list[Any]
    """Of the tools, veRL's objects."""
    template_options: Mapping[str, Any]
    prompt_length: int
    """Tokens."""
    parallel: int
    """Calls that a turn may make."""
    records: bool
    """Whether the recording agent loop is the default."""
    made_up: bool
    """Whether no tools are configured."""

    @property
    def tools(self) -> list[dict[str, Any]]:
        """The tools' schemas as veRL hands them to the chat template."""
        return [schema.model_dump(exclude_unset=True, exclude_none=True) for schema in self.schemas]

    @property
    def names(self) -> list[str]:
        """The names of the tools."""
        return [schema.function.name for schema in self.schemas]


def run_of(config: Any, schemas: Sequence[Any] | None) -> Run:
    """Reads a composed configuration.

    Args:
        config: the trainer's.
        schemas: of the run's tools, veRL's objects; None or empty if there are none.
    """
    rollout, data = config.actor_rollout_ref.rollout, config.get("data", {})
    tapo = config.algorithm.get("tapo", None) or {}
    options = data.get("apply_chat_template_kwargs", None) or {}
    return Run(
        tool_format=tapo.get("tool_format", None) or rollout.multi_turn.format,
        schemas=list(schemas or [OpenAIFunctionToolSchema.model_validate(_MADE_UP)]),
        template_options=OmegaConf.to_container(options, resolve=True) if options else {},
        prompt_length=int(rollout.get("prompt_length", None) or data.get("max_prompt_length", 512)),
        parallel=int(rollout.multi_turn.get("max_parallel_calls", None) or 1),
        records=(rollout.get("agent", None) or {}).get("default_agent_loop", None) == RECORDING_LOOP,
        made_up=not schemas,
    )


def shown(text: str, longest: int = _LONGEST) -> str:
    """A text in one line, its middle left out where it is long."""
    text = repr(text)[1:-1]
    return text if len(text) <= longest else f"{text[: longest // 2]} ... {text[-longest // 2 :]}"


def printable(text: str) -> str:
    """A text with an escape for each character that cannot be printed."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def listed(names: Sequence[str], most: int = 8) -> str:
    """Names, the first ``most`` of them."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
