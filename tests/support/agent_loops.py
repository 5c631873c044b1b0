"""Agent loops driven by a scripted model: real loops and tools, no inference."""

import asyncio
import json

from omegaconf import OmegaConf
from verl.experimental.agent_loop.agent_loop import DictConfigWrap, ToolListWrap
from verl.tools.schemas import OpenAIFunctionToolSchema
from verl.workers.rollout.replica import TokenOutput

GROUND_TRUTH = ["found Paris"]
"""Of every scripted trajectory: what a search for Paris answers, and no call asks for."""


def schema(name, **parameters):
    properties = {key: {"type": kind} for key, kind in parameters.items()}
    return OpenAIFunctionToolSchema.model_validate(
        {
            "type": "function",
            "function": {
                "name": name,
                "description": name,
                "parameters": {"type": "object", "properties": properties, "required": list(parameters)},
            },
        }
    )


class ScriptedModel:
    """Answers with the script's turns, token by token as the tokenizer would have them."""

    def __init__(self, tokenizer, script, ending="<|im_end|>"):
        self.turns = [tokenizer.encode(turn + ending, add_special_tokens=False) for turn in script]
        self.prompts = []

    async def generate(self, *, prompt_ids, **kwargs):
        self.prompts.append(list(prompt_ids))
        ids = self.turns[len(self.prompts) - 1]
        extra = {"min_global_steps": 7, "max_global_steps": 7}
        return TokenOutput(token_ids=ids, log_probs=[-0.5] * len(ids), extra_fields=extra)


def call(tool, **arguments):
    return f"<tool_call>\n{json.dumps({'name': tool, 'arguments': arguments})}\n</tool_call>"


def scripted(cls, tokenizer, tools, script, settings=None, model_type="qwen2", ending="<|im_end|>", **limits):
    """An agent loop on a scripted model, as a coroutine function, and the model; see `run_scripted`."""
    rollout = {
        "prompt_length": 4000,
        "response_length": 4000,
        "full_determinism": False,
        "multi_turn": {
            "max_user_turns": None,
            "max_assistant_turns": None,
            "max_parallel_calls": 1,
            "max_tool_response_length": 3000,
            "tool_response_truncate_side": "right",
            "format": "hermes",
        },
    }
    for name, value in limits.items():
        (rollout if name in rollout else rollout["multi_turn"])[name] = value
    config = OmegaConf.create({"actor_rollout_ref": {"rollout": rollout}, "data": {}, "algorithm": {}})
    model = ScriptedModel(tokenizer, script, ending)

    async def run():
        loop = cls(
            trainer_config=DictConfigWrap(config),
            server_manager=model,
            tokenizer=tokenizer,
            processor=None,
            dataset_cls=None,
            data_config=DictConfigWrap(config.data),
            hf_model_type=model_type,
            tools=ToolListWrap(tools),
            **(settings or {}),
        )
        columns = {"raw_prompt": [{"role": "user", "content": "Where is Paris?"}]}
        return await loop.run({}, **columns, reward_model={"style": "rule", "ground_truth": GROUND_TRUTH})

    return run, model


def run_scripted(cls, tokenizer, tools, script, settings=None, **limits):
    """One trajectory of an agent loop: its output, and the model.

    Args:
        script: the assistant's turns.
        settings: of the loop's constructor.
        limits: of ``rollout`` or ``rollout.multi_turn``; or ``model_type``, of the model's configuration, by which veRL
            knows how to build the tokens of answers; or ``ending``, with which the model ends each of its turns.
    """
    run, model = scripted(cls, tokenizer, tools, script, settings, **limits)
    return asyncio.run(run()), model
