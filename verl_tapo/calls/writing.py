"""Well-formed calls of every format, as models write them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def written(fmt: str, tool: str, arguments: Mapping[str, Any]) -> str:
    """Returns a well-formed call as a model writes it; ``fmt`` is one of
    `verl_tapo.calls.formats.NATIVE_FORMATS`."""
    plain = {key: value if isinstance(value, str) else json.dumps(value) for key, value in arguments.items()}
    if fmt == "hermes":
        return f"<tool_call>\n{json.dumps({'name': tool, 'arguments': arguments}, ensure_ascii=False)}\n</tool_call>"
    if fmt == "glm":
        pairs = "".join(f"<arg_key>{k}</arg_key>\n<arg_value>{v}</arg_value>\n" for k, v in plain.items())
        return f"<tool_call>{tool}\n{pairs}</tool_call>"
    if fmt == "kimi":
        return (
            f"<|tool_calls_section_begin|><|tool_call_begin|>functions.{tool}:0<|tool_call_argument_begin|>"
            f"{json.dumps(arguments)}<|tool_call_end|><|tool_calls_section_end|>"
        )
    if fmt == "deepseek_v4":
        heads = {k: f'name="{k}" string="{str(isinstance(arguments[k], str)).lower()}"' for k in plain}
        pairs = "".join(f"<｜DSML｜parameter {heads[k]}>{v}</｜DSML｜parameter>\n" for k, v in plain.items())
        return f'<｜DSML｜tool_calls>\n<｜DSML｜invoke name="{tool}">\n{pairs}</｜DSML｜invoke>\n</｜DSML｜tool_calls>'
    if fmt == "gemma4":
        values = {k: f'<|"|>{v}<|"|>' if isinstance(arguments[k], str) else v for k, v in plain.items()}
        return f"<|tool_call>call:{tool}{{{','.join(f'{k}:{v}' for k, v in values.items())}}}<tool_call|>"
    if fmt == "gpt-oss":
        head = f"<|start|>assistant<|channel|>commentary to=functions.{tool} <|constrain|>json<|message|>"
        return f"{head}{json.dumps(arguments, ensure_ascii=False)}<|call|>"
    if fmt == "minimax":
        pairs = "".join(f'<parameter name="{k}">{v}</parameter>\n' for k, v in plain.items())
        return f'<minimax:tool_call>\n<invoke name="{tool}">\n{pairs}</invoke>\n</minimax:tool_call>'
    pairs = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in plain.items())
    prefix = "seed:" if fmt == "seed" else ""
    return f"<{prefix}tool_call>\n<function={tool}>\n{pairs}</function>\n</{prefix}tool_call>"
