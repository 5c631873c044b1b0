"""veRL's agent loops on a script instead of a model: the loop, the tools and the tokens are real, and nothing is
inferred.

The doctor rolls out a conversation so that it examines what veRL's own builders make of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf
from verl.experimental.agent_loop.agent_loop import DictConfigWrap, ToolListWrap
from verl.workers.rollout.replica import TokenOutput

QUESTION = ({"role": "user", "content": "Where is Paris?"},)


class ScriptedModel:
    """Answers with the script's turns, token by token as the tokenizer would have them."""

    def __init__(self, tokenizer: Any, script: Sequence[str], ending: str = "<|im_end|>") -> None:
        self.turns = [tokenizer.encode(turn + ending, add_special_tokens=False) for turn in script]
        self.prompts: list[list[int]] = []

    async def generate(self, *, prompt_ids: Sequence[int], **_: Any) -> TokenOutput:
        """Returns the next turn, as veRL's inference engines return theirs."""
        self.prompts.append(list(prompt_ids))
        ids = self.turns[len(self.prompts) - 1]
        extra = {"min_global_steps": 7, "max_global_steps": 7}
        return TokenOutput(token_ids=ids, log_probs=[-0.5] * len(ids), extra_fields=extra)


def _config(data: Mapping[str, Any], limits: Mapping[str, Any]) -> Any:
    multi_turn = {
        "max_user_turns": None,
        "max_assistant_turns": None,
        "max_parallel_calls": 1,
        "max_tool_response_length": 3000,
        "tool_response_truncate_side": "right",
        "format": "hermes",
    }
    rollout: dict[str, Any] = {"prompt_length": 4000, "response_length": 4000, "full_determinism": False}
    multi_turn |= {name: value for name, value in limits.items() if name not in rollout}
    rollout |= {name: value for name, value in limits.items() if name in rollout}
    rollout["multi_turn"] = multi_turn
    return OmegaConf.create({"actor_rollout_ref": {"rollout": rollout}, "data": dict(data), "algorithm": {}})


def scripted(
    cls: Callable[..., Any],
    tokenizer: Any,
    tools: Sequence[Any],
    script: Sequence[str],
    settings: Mapping[str, Any] | None = None,
    *,
    model_type: str | None = "qwen2",
    ending: str = "<|im_end|>",
    processor: Any = None,
    dataset: Any = None,
    data: Mapping[str, Any] | None = None,
    columns: Mapping[str, Any] | None = None,
    **limits: Any,
) -> tuple[Callable[[], Coroutine[Any, Any, Any]], ScriptedModel]:
    """An agent loop on a scripted model, as a coroutine function, and the model; see `run_scripted`."""
    config = _config(data or {}, limits)
    model = ScriptedModel(tokenizer, script, ending)

    async def run() -> Any:
        loop = cls(
            trainer_config=DictConfigWrap(config),
            server_manager=model,
            tokenizer=tokenizer,
            processor=processor,
            dataset_cls=dataset,
            data_config=DictConfigWrap(config.data),
            hf_model_type=model_type,
            tools=ToolListWrap(list(tools)),
            **(settings or {}),
        )
        return await loop.run({}, **{"raw_prompt": [dict(message) for message in QUESTION], **(columns or {})})

    return run, model


def run_scripted(cls: Callable[..., Any], *args: Any, **options: Any) -> tuple[Any, ScriptedModel]:
    """One trajectory of an agent loop: its output, and the model.

    Args:
        cls: the loop's class.
        args: tokenizer; tools; script, the assistant's turns; and, if any, settings of the loop's constructor.
        options: ``model_type``, of the model's configuration, by which veRL knows how to build the tokens of answers;
            ``ending``, with which the model ends each of its turns; ``processor``; ``dataset``, veRL's data set class,
            which reads images; ``data``, of the run's configuration; ``columns`` of the data set's row; others are
            settings of ``rollout`` or ``rollout.multi_turn``.
    """
    run, model = scripted(cls, *args, **options)
    return asyncio.run(run()), model
