"""A model's chat template: the prompt that it makes of a run's tools, and how it writes calls."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from verl.utils.tokenizer.chat_template import apply_chat_template

from verl_tapo.calls.parsing import ToolCallParser
from verl_tapo.model_check.loading import Model
from verl_tapo.model_check.run import Report, Rows, Run, listed
from verl_tapo.trainer.verl_parser import verl_fallback

Wanted: TypeAlias = tuple[str, Mapping[str, Any]]
"""A call to find: the tool, and its arguments."""

THOUGHT = "A thought of the doctor's."
QUESTION = {"role": "user", "content": "A question of the doctor's."}


class Template:
    """A model's chat template, as veRL renders it for a run."""

    def __init__(self, model: Model, run: Run) -> None:
        self.model, self.run = model, run
        self._renderer = model.tokenizer if model.processor is None else model.processor
        self.source: Any = getattr(self._renderer, "chat_template", None)
        self._parsers: dict[str, ToolCallParser] = {}

    def _render(self, messages: Sequence[Mapping[str, Any]], prompt: bool, tools: bool = True) -> str:
        text = apply_chat_template(
            self._renderer,
            [dict(message) for message in messages],
            tokenize=False,
            add_generation_prompt=prompt,
            tools=self.run.tools if tools else None,
            **self.run.template_options,
        )
        return str(text)

    def prompt(self, tools: bool = True) -> str:
        """The text of a prompt, with the tools or without."""
        return self._render([QUESTION], True, tools)

    def tokens(self, text: str) -> list[int]:
        """The tokens of a text, none added."""
        ids: list[int] = self.model.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def parser(self, tool_format: str) -> ToolCallParser:
        """The reader of a tool format, kept: to make one takes a look at the whole vocabulary."""
        if tool_format not in self._parsers:
            tokenizer = self.model.tokenizer
            self._parsers[tool_format] = ToolCallParser(tool_format, tokenizer, verl_fallback(tool_format, tokenizer))
        return self._parsers[tool_format]

    def forms(self, calls: Sequence[Wanted]) -> list[str]:
        """The ways in which the template writes an assistant's turn with ``calls``; empty if it shows none."""
        found = []
        for as_text in (False, True):
            for content in ("", None):
                message = {"role": "assistant", "content": content, "tool_calls": _tool_calls(calls, as_text)}
                try:
                    text = self._turn(message)
                except Exception:  # some templates take arguments as a mapping only, some as text
                    continue
                text = text.rpartition("</think>")[2].strip().removesuffix(self.ending()).rstrip()
                if calls[0][0] in text and text not in found:
                    found.append(text)
        return found

    def _turn(self, message: Mapping[str, Any]) -> str:
        """What the template writes of an assistant's message behind the prompt."""
        before, after = self._render([QUESTION], True), self._render([QUESTION, message], False)
        # A prompt may end in what the model's turn begins with, such as an empty thought.
        same = next((n for n, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), len(before))
        return after[same:]

    def ending(self) -> str:
        """With which the model ends a turn: the token that the template writes behind its text."""
        try:
            after = self._turn({"role": "assistant", "content": THOUGHT}).partition(THOUGHT)[2].lstrip()
        except Exception:  # the template will be complained of elsewhere
            after = ""
        tokens = [*self.model.tokenizer.all_special_tokens, *self.model.tokenizer.get_added_vocab()]
        ends = [token for token in tokens if token and after.startswith(token)]
        return str(max(ends, key=len, default=self.model.tokenizer.eos_token or ""))

    def thought(self) -> str:
        """What the model writes before its calls; in a think block if it knows such."""
        if self.run.tool_format == "gpt-oss":
            return f"<|channel|>analysis<|message|>{THOUGHT}<|end|>"
        if "<think>" not in self.model.tokenizer.get_vocab() and "<think>" not in str(self.source):
            return f"{THOUGHT}\n"
        opening = "" if self.prompt().rstrip().endswith("<think>") else "<think>\n"
        return f"{opening}{THOUGHT}\n</think>\n\n"


def _tool_calls(calls: Sequence[Wanted], as_text: bool) -> list[dict[str, Any]]:
    return [
        {
            "id": f"call_{number}",
            "type": "function",
            "function": {
                "name": tool,
                "arguments": json.dumps(given, ensure_ascii=False) if as_text else dict(given),
            },
        }
        for number, (tool, given) in enumerate(calls)
    ]


def made_up_call(tool: Mapping[str, Any]) -> Wanted:
    """A call of a tool with a value for each parameter of its schema."""
    properties = (tool["function"].get("parameters") or {}).get("properties") or {}
    return tool["function"]["name"], {name: _value(name, schema or {}) for name, schema in properties.items()}


def _value(name: str, schema: Mapping[str, Any]) -> Any:
    if schema.get("enum"):
        return schema["enum"][0]
    kinds = schema.get("type") or "string"
    kind = kinds if isinstance(kinds, str) else kinds[0]
    values: dict[str, Any] = {"integer": 3, "number": 2.5, "boolean": True, "array": [1, 2], "object": {"of": name}}
    return values.get(kind, f"{name} of 北京 < Größe")


def prompt_rows(template: Template, prompt: str, report: Report) -> Rows:
    """Whether the prompt tells of the tools, and how long it is."""
    run, tokens = template.run, len(template.tokens(prompt))
    if tokens > run.prompt_length:
        report.warnings.append(
            f"a prompt has {tokens} tokens with the tools and a short question, and data.max_prompt_length is "
            f"{run.prompt_length}: veRL leaves the row out, or cuts its beginning off, where the tools are"
        )
    missing = [name for tool in run.tools for name, given in [made_up_call(tool)] if not _told([name, *given], prompt)]
    silent = prompt == template.prompt(tools=False)
    if silent:
        told = "none: the template is silent about tools"
        report.warnings.append(
            "the chat template is silent about tools: no prompt tells the model of them. Tell of them in the data's "
            "system prompts, or set actor_rollout_ref.model.custom_chat_template"
        )
    elif missing:
        told = f"not, or not with all of their parameters: {listed(missing)}"
        report.warnings.append(f"the chat template does not put all tools into the prompt: {told}")
    else:
        told = f"{listed(run.names)}, with their parameters"
    if run.made_up:
        told += " (made up: the configuration names no tools)"
    return [("tools in the prompt", told), ("a short prompt", f"{tokens} tokens{'' if silent else ', tools included'}")]


def _told(names: Sequence[str], prompt: str) -> bool:
    return all(name in prompt for name in names)
