"""Real tokenizers and chat templates, and every format: what veRL's own loop wrote and did is what is found in its
tokens.
"""

import json
import logging
from itertools import chain
from typing import NamedTuple

import numpy as np
import pytest
from real_tokenizers import FAMILIES, load

from verl_tapo.audit.text import find_calls
from verl_tapo.calls.call import MALFORMED
from verl_tapo.calls.formats import NATIVE_FORMATS
from verl_tapo.calls.parsing import ToolCallParser, parse_steps
from verl_tapo.calls.writing import written
from verl_tapo.rule.steps import step_columns

pytest.importorskip("verl.experimental.agent_loop")

from agent_loops import run_scripted, schema
from verl.experimental.agent_loop import tool_parser
from verl.experimental.agent_loop.tool_agent_loop import ToolAgentLoop
from verl.tools.base_tool import BaseTool
from verl.tools.schemas import ToolResponse

SCHEMAS = {"search": {"query": "string"}, "zoom": {"image": "integer", "label": "string"}}
TOOLS = {name: list(parameters) for name, parameters in SCHEMAS.items()}
QUOTE = "Paris. The log says: Error executing tool 'search': it was down, but only once."
ANSWERS = {
    "Paris": "Paris is the capital.",
    "Lyon": "",
    "quote": QUOTE,
    "page": "A page about tools: <tool_response> and <tool_result> begin answers, <|tool_response> too.",
    "北京": "北京是中国的首都 😀",
    "القاهرة": "القاهرة عاصمة مصر\n\n",
    "long": "A sentence of a long page. " * 40,
}


class Tool(BaseTool):
    """Notes what it is called with; answers that it knows nothing of what it does not know."""

    def __init__(self, name, executed):
        super().__init__({}, schema(name, **SCHEMAS[name]))
        self.executed = executed

    async def execute(self, instance_id, parameters, **kwargs):
        self.executed.append((self.name, parameters))
        if parameters.get("query") == "down":
            raise RuntimeError("it is down")
        return ToolResponse(text=ANSWERS.get(parameters.get("query"), "I see nothing.")), 0.0, {}


def search(query):
    return "search", {"query": query}


def zoom(image, label):
    return "zoom", {"image": image, "label": label}


# Turns of calls. A text is written as it is: a call that cannot be read.
CONVERSATIONS = {
    "one": [[search("Paris")], [search("down")], [zoom(3, "a b")]],
    "parallel": [
        [search("Paris"), search("Lyon")],
        [search("Paris"), search("down")],
        [search("down"), search("Paris")],
    ],
    "quotes": [[search("quote")], [search("quote"), search("Paris")], [search("page"), search("down")]],
    "scripts": [[search("北京"), search("القاهرة"), search("😀 👩‍👩‍👧 é")], [zoom(1, "שלום עולם"), search("นม ক্ষ")]],
    "lengths": [[search("long"), search("x" * 300)], [search("Paris")] * 3, [search(" two  spaces ")]],
    "unknown": [[("fetch", {"url": "Paris"}), search("Paris")]],
    "one broken": [["broken", search("Paris"), search("down")], [search("Lyon")]],
    "none": [],
}
BROKEN = {
    "hermes": "<tool_call>{broken</tool_call>",
    "qwen3_coder": "<tool_call>nothing</tool_call>",
    "glm": "",  # whatever stands there is a name
    "seed": "<seed:tool_call><function=f></seed:tool_call>",
    "minimax": "<minimax:tool_call><invoke name=f></invoke></minimax:tool_call>",
    "kimi": "",  # what stands before the next argument is a name
    "deepseek_v4": "<｜DSML｜tool_calls>nothing</｜DSML｜tool_calls>",
    "gemma4": "<|tool_call>search(Paris)<tool_call|>",
    "gpt-oss": "<|start|>assistant<|channel|>commentary to=functions.f<|message|>{}<|call|>",
}


class Row(NamedTuple):
    """A rollout of veRL's own loop, and what happened in it."""

    ids: list[int]
    mask: list[int]
    calls: list[tuple[str, dict, bool, str]]
    """Tool, arguments, whether it was answered without an error, and how it was written."""


def thought(fmt):
    if fmt == "gpt-oss":
        return "<|channel|>analysis<|message|>I think of to=functions.f <|constrain|>json<|message|>{}<|end|>"
    return "<think>\nThe map is Größe < 3, 北京.\n</think>\n\n"


def roll_out(family, fmt, conversation):
    texts = [[BROKEN[fmt] if call == "broken" else written(fmt, *call) for call in turn] for turn in conversation]
    script = [thought(fmt) + "\n".join(turn) for turn in texts] + ["That is all."]
    executed = []
    output, _ = run_scripted(
        ToolAgentLoop,
        load(family),
        [Tool(name, executed) for name in SCHEMAS],
        script,
        model_type=FAMILIES[family].model_type,
        ending=FAMILIES[family].ending,
        format=fmt,
        max_parallel_calls=3,
        response_length=8000,
    )
    calls = []
    for call, text in zip(chain(*conversation), chain(*texts), strict=True):
        if call == "broken":
            calls += [(MALFORMED, {}, False, text)] if text else []
        elif call[0] in SCHEMAS:
            assert comparable(*executed[0]) == comparable(*call)
            calls.append((*executed.pop(0), call[1].get("query") != "down", text))
        else:
            calls.append((*call, False, text))
    assert not executed
    return Row(output.response_ids, output.response_mask, calls)


def parse(family, fmt, rows, **options):
    parser = ToolCallParser(fmt, load(family), tools=TOOLS)
    ids = np.array([token for row in rows for token in row.ids])
    mask = np.array([bit for row in rows for bit in row.mask])
    offsets = np.cumsum([0, *(len(row.ids) for row in rows)])
    parsed = parse_steps(parser, ids, mask, offsets, range(len(rows)), **options)
    step_columns(parsed.steps, len(rows), max(np.diff(offsets)))
    return parsed


def comparable(tool, arguments):
    """Some formats do not say which values are texts; veRL takes that from the tool's schema."""
    return tool, {name: _value(value) for name, value in arguments.items()}


def _value(value):
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value.strip()


@pytest.fixture(autouse=True)
def quiet():
    tool_parser.logger.setLevel(logging.CRITICAL)


@pytest.mark.parametrize("fmt", NATIVE_FORMATS)
@pytest.mark.parametrize(
    "family",
    [
        # Loading a tokenizer is most of the time.
        family if family in ("qwen3", "llama3") else pytest.param(family, marks=pytest.mark.long)
        for family in FAMILIES
    ],
)
def test_calls_are_those_that_verl_executes_and_answers(family, fmt):
    rows = [roll_out(family, fmt, conversation) for conversation in CONVERSATIONS.values()]
    steps = parse(family, fmt, rows).steps
    for number, (name, row) in enumerate(zip(CONVERSATIONS, rows, strict=True)):
        own = [step for step in steps if step.row == number]
        assert [comparable(step.tool, step.arguments) for step in own] == [comparable(*call[:2]) for call in row.calls]
        assert [step.ok for step in own] == [call[2] for call in row.calls], name
        for step, (*_, text) in zip(own, row.calls, strict=True):
            assert spells(family, row, step.call, text.removeprefix(SECTION[0]).removesuffix(SECTION[1]))
            assert all(row.mask[slice(*step.turn)])
            assert step.turn[0] == 0 or not row.mask[step.turn[0] - 1]
        dumps_say_the_same(family, fmt, row, own)
    cut_rows_hold_the_calls_before_the_cut(family, fmt, rows[1])


# Their templates separate answers from what the policy wrote by special tokens alone.
OPAQUE = ("gpt_oss", "gemma4")


def dumps_say_the_same(family, fmt, row, steps):
    """The audit finds in a rollout's text what training finds in its tokens, or says that it cannot."""
    for skip in (True, False):
        found = find_calls(load(family).decode(row.ids, skip_special_tokens=skip), fmt)
        if skip and steps and family in OPAQUE:
            assert found.unclear or not found.calls
            continue
        assert not found.unclear
        expected = [(step.tool, step.arguments, step.ok) for step in steps]
        assert [(call.tool, call.arguments, call.ok) for call in found.calls] == expected


SECTION = ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>")  # round Kimi's calls


def spells(family, row, span, text):
    """Whether the tokens of a span are those in which the text stands, and no others."""
    start, end = span
    decoded = load(family).decode(row.ids[start:end])
    inner = load(family).decode(row.ids[start + 1 : end]), load(family).decode(row.ids[start : end - 1])
    return text in decoded and not any(text in less for less in inner)


def cut_rows_hold_the_calls_before_the_cut(family, fmt, row):
    whole = parse(family, fmt, [row]).steps
    lengths = range(1, len(row.ids), 7)
    cut = [Row(row.ids[:length], row.mask[:length], []) for length in lengths]
    steps = parse(family, fmt, cut).steps
    for number, length in enumerate(lengths):
        own = [step for step in steps if step.row == number]
        before = [step for step in whole if step.call[1] <= length]
        assert [step[1:3] + step[4:5] for step in own[: len(before)]] == [step[1:3] + step[4:5] for step in before]
        # One more may be open, where the turn's end closes it.
        assert len(own) - len(before) <= (fmt == "qwen3_coder")
        for now, then in zip(own, before, strict=False):
            assert then.ok or not now.ok or length < then.turn[1] + 64  # an error may be cut before it reads as one
