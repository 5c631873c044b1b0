"""Agent loops driven by a scripted model: real loops and tools, no inference."""

import asyncio
import json

from verl.tools.schemas import OpenAIFunctionToolSchema

from verl_tapo.rollout import scripted as package

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


def call(tool, **arguments):
    return f"<tool_call>\n{json.dumps({'name': tool, 'arguments': arguments})}\n</tool_call>"


def scripted(*args, **options):
    """`verl_tapo.rollout.scripted.scripted`, with an accepted answer in the row."""
    columns = {"reward_model": {"style": "rule", "ground_truth": GROUND_TRUTH}}
    return package.scripted(*args, columns=columns, **options)


def run_scripted(*args, **options):
    """`verl_tapo.rollout.scripted.run_scripted`, with an accepted answer in the row."""
    run, model = scripted(*args, **options)
    return asyncio.run(run()), model
