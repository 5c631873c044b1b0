"""Tool calls and tool-use steps out of tokens, against veRL's own parsers and on rollouts written by hand."""

import asyncio
import copy
import gc
import json
import logging
import time
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from verl_tapo.calls.call import MALFORMED
from verl_tapo.calls.formats import FORMATS, MAX_CALL_CHARS, NATIVE_FORMATS, read_text
from verl_tapo.calls.parsing import NOT_EXECUTED_PREFIX, STOCK_ERRORS, ToolCallParser, answer_is_error, parse_steps
from verl_tapo.calls.writing import written
from verl_tapo.rule.steps import step_columns
from verl_tapo.rule.values import MAX_DEPTH, canonical

SETTINGS = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
TOKENIZERS = ["qwen_like_tokenizer", "spelled_tokenizer", "metaspace_tokenizer"]
QUERIES = ["capital of France", "Größe < 3 & > 2", "北京 😀", 'say "hi"\n', "null", "17", "[1, 2]", "<b>", ""]


FRAGMENTS = {
    "hermes": [
        "<tool_call>",
        "</tool_call>",
        '{"name": "a", ',
        '"arguments": {}}',
        '"arguments": [1]}',
        "[[[",
        '"\\ud800"',
    ],
    "qwen3_coder": [
        *("<tool_call>", "</tool_call>", "<function=", "<function=f>", "</function>", "<parameter=", "<parameter=p>"),
        *("</parameter>", "\n", ">", "null", "Null\n", "{}"),
    ],
    "glm": [
        "<tool_call>",
        "</tool_call>",
        "<arg_key>",
        "</arg_key>",
        "<arg_value>",
        "</arg_value>",
        "[1",
        "\x1c",
        "\u2003",
    ],
    "seed": [
        *("<seed:tool_call>", "</seed:tool_call>", "<function=", "<function=f>", "</function>", "<parameter=p>"),
        *("</parameter>", "\n", ">", "3.5"),
    ],
    "minimax": [
        *("<minimax:tool_call>", "</minimax:tool_call>", '<invoke name="', '<invoke name="i">', "</invoke>", '">'),
        *('<parameter name="p">', "</parameter>", "true", "<invoke>"),
    ],
    "deepseek_v4": [
        *("<｜DSML｜tool_calls>", "</｜DSML｜tool_calls>", '<｜DSML｜invoke name="', '<｜DSML｜invoke name="f">', '">'),
        *("</｜DSML｜invoke>", '<｜DSML｜parameter name="', '<｜DSML｜parameter name="p" string="true">', "\n", "[1]"),
        *('<｜DSML｜parameter name="p" string="false">', '" string="true">', "</｜DSML｜parameter>", "<|endoftext|>"),
        *("<|im_end|>", '<｜DSML｜parameter name="p" string="maybe">'),
    ],
    "gemma4": [
        *("<|tool_call>", "<tool_call|>", "}<tool_call|>", "call:", "call:f{", "{", "}", '<|"|>', "k:", ":", ",", "É"),
        *("k:true", "k:Null", "k:-1.5e3", "k:[1,2]", "नाम:", "<|endoftext|>", "k:1_0", "k:nan"),
    ],
    "gpt-oss": [
        *("<|start|>assistant", "<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>", "<|constrain|>json"),
        *("<|channel|>analysis<|message|>", "<|channel|>commentary to=functions.f <|constrain|>json<|message|>"),
        *(
            " to=functions.",
            " ",
            "f ",
            "{}",
            '{"a": [1]}',
            "<|endoftext|>",
            "<|start|>assistant<|channel|>analysis<|mes",
        ),
        *("<|start|>assistant<|channel|>commentary", "sage|>"),
    ],
    "kimi": [
        *("<|tool_calls_section_begin|>", "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"),
        *("functions.zoom:3", "zoom:0", "functionszoom1", "2", "zoom", "{}", "[]", '{"a": 1}', '{"query": 1}'),
    ],
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.sampled_from(QUERIES),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=2),
    max_leaves=5,
)


@st.composite
def turns(draw, fmt):
    call = st.builds(
        written,
        st.just(fmt),
        st.sampled_from(["zoom", "text_search"]),
        st.dictionaries(st.sampled_from(["query", "image"]), JSON, max_size=2),
    )
    part = call | st.sampled_from(FRAGMENTS[fmt]) | st.sampled_from(QUERIES) | st.text(max_size=5)
    parts = draw(st.lists(part, max_size=8))
    return draw(st.sampled_from(["", " ", "\n"])).join(parts)


@pytest.fixture(scope="session")
def verl_calls():
    """``(format, tokenizer, ids, tools) -> [(name, arguments)]`` by veRL's own parser."""
    tool_parser = pytest.importorskip("verl.experimental.agent_loop.tool_parser")
    tool_parser.logger.setLevel(logging.CRITICAL)
    loop = asyncio.new_event_loop()

    def run(fmt, tokenizer, ids, tools=None):
        parser = tool_parser.ToolParser.get_tool_parser(fmt, tokenizer)
        _, calls = loop.run_until_complete(parser.extract_tool_calls(ids, tools))
        return [(call.name, call.arguments) for call in calls]

    yield run
    loop.close()


def encode(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def comparable(name, arguments):
    return name, json.dumps(arguments, sort_keys=True)


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("fmt", NATIVE_FORMATS)
def test_agrees_with_verl(fmt, tokenizer, request, verl_calls):
    tokenizer = request.getfixturevalue(tokenizer)
    from agent_loops import schema

    # Kimi's name a tool as they like; veRL finds the one that is meant.
    tools = {"zoom": {"image": "integer"}, "text_search": {"query": "string"}} if fmt == "kimi" else {}
    parser = ToolCallParser(fmt, tokenizer, tools=tools)
    schemas = [schema(name, **parameters) for name, parameters in tools.items()]

    @settings(SETTINGS, max_examples=100)
    @given(turns(fmt))
    def check(text):
        ids = encode(tokenizer, text)
        try:
            theirs = verl_calls(fmt, tokenizer, ids, schemas)
        except Exception:  # theirs may give up on the whole turn; ours does not
            assert fmt == "kimi"
            parser.calls(ids)
            return
        # Its loop reads the arguments; what is none of JSON, or no object, is answered with an error.
        theirs = [(name, plain_json(raw)) for name, raw in theirs]
        if fmt == "qwen3_coder":  # theirs has no schema here, and so keeps values as text
            theirs = [(name, {k: plain_json(v) for k, v in values.items()}) for name, values in theirs]
        if fmt == "kimi":  # what names no tool is not executed
            theirs = [(name if name in tools else "", values) for name, values in theirs]
        found = parser.calls(ids)
        ours = [
            comparable(call.tool if call.tool in tools or fmt != "kimi" else "", call.arguments)
            for call in found
            if call.error is None
        ]
        assert ours == [comparable(*call) for call in theirs if isinstance(call[1], dict)]
        for call in found:
            assert 0 <= call.span[0] < call.span[1] <= len(ids)
            assert (call.tool == MALFORMED) == (call.error is not None)
            assert not (call.error and call.arguments)

    check()


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_a_call_in_a_closed_thought_is_none(tokenizer, request, verl_calls):
    """Also where nothing follows the thought; gpt-oss is the one format whose parser in veRL knows thoughts."""
    tokenizer = request.getfixturevalue(tokenizer)
    parser, call = ToolCallParser("gpt-oss", tokenizer), written("gpt-oss", "zoom", {"image": 1})
    thought = f"<|channel|>analysis<|message|>I could {call}, or not.<|end|>"
    for text, expected in (
        (thought, 0),
        (f"{thought}<|start|>assistant<|channel|>final<|message|>No.<|return|>", 0),
        (thought.removesuffix("<|end|>"), 1),  # a thought that does not end
        (thought + call, 1),
        (call + thought, 1),
    ):
        ids = encode(tokenizer, text)
        assert len(parser.calls(ids)) == len(verl_calls("gpt-oss", tokenizer, ids)) == expected


def plain_json(value):
    try:
        return value if value is None else json.loads(value)
    except (ValueError, RecursionError):
        return value


class OddTokenizer:
    """A tokenizer whose vocabulary does not tell what its tokens decode to."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def __len__(self):
        return len(self._tokenizer)

    def get_vocab(self):
        vocabulary, added = self._tokenizer.get_vocab(), self._tokenizer.get_added_vocab()
        return {token if token in added else f"token {number}": number for token, number in vocabulary.items()}


@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("fmt", NATIVE_FORMATS)
def test_spans_are_exact(fmt, name, odd, request):
    tokenizer = request.getfixturevalue(name)
    parser = ToolCallParser(fmt, OddTokenizer(tokenizer) if odd else tokenizer)
    texts = [written(fmt, "zoom", {"query": query, "image": 1}) for query in QUERIES]
    if fmt == "kimi":
        texts = [
            text.removeprefix("<|tool_calls_section_begin|>").removesuffix("<|tool_calls_section_end|>")
            for text in texts
        ]
        texts[0] = "<|tool_calls_section_begin|>" + texts[0]
    ids = encode(tokenizer, "Größe <tool> 😀: a < b" + "\n".join(texts) + "\n<|im_end|>\n")
    calls = parser.calls(ids)
    assert [call.tool for call in calls] == ["zoom"] * len(texts)
    # The XML-like formats do not tell texts from other values.
    queries = QUERIES if fmt == "qwen3_coder" else [query.strip() for query in QUERIES]
    plain = ("qwen3_coder", "glm", "seed", "minimax")
    expected = [plain_json(query) for query in queries] if fmt in plain else QUERIES
    if fmt == "gemma4":  # veRL takes the quotation marks of a text with a line break for a part of it
        expected = [f'<|"|>{query}<|"|>' if "\n" in query else query for query in QUERIES]
    assert [call.arguments["query"] for call in calls] == expected
    for (start, end), text in zip((call.span for call in calls), texts, strict=True):
        text = text.removeprefix("<|tool_calls_section_begin|>")
        assert text in tokenizer.decode(ids[start:end])
        assert text not in tokenizer.decode(ids[start + 1 : end])
        assert text not in tokenizer.decode(ids[start : end - 1])


@pytest.mark.parametrize(
    ("fmt", "text", "why"),
    [
        ("hermes", "<tool_call>{broken</tool_call>", "not valid JSON"),
        ("hermes", "<tool_call>[]</tool_call>", "not a JSON object"),
        ("hermes", '<tool_call>{"name": 3, "arguments": {}}</tool_call>', "'name'"),
        ("hermes", '<tool_call>{"name": "zoom"}</tool_call>', "no 'arguments'"),
        ("hermes", '<tool_call>{"name": "zoom", "arguments": "{}"}</tool_call>', "arguments are not a JSON object"),
        ("hermes", '<tool_call>{"name": "a", "arguments": {"q": "\\ud800"}}</tool_call>', "surrogate"),
        ("hermes", '<tool_call>{"name": "a", "arguments": {"q": %s}}</tool_call>' % ("9" * 5000), "not valid JSON"),
        ("hermes", "<tool_call>" + "[" * 60000 + "</tool_call>", "nested|not valid JSON"),
        ("hermes", "<tool_call>" + " " * MAX_CALL_CHARS + "x</tool_call>", "longer than"),
        ("qwen3_coder", "<tool_call>hello</tool_call>", "<function="),
        ("seed", "<seed:tool_call><function=f></seed:tool_call>", "<function="),
        ("minimax", "<minimax:tool_call><invoke name=f></invoke></minimax:tool_call>", "<invoke"),
        ("kimi", "<|tool_calls_section_begin|><|tool_call_begin|>f<|tool_call_end|>", "argument_begin"),
        ("deepseek_v4", "<｜DSML｜tool_calls>hello</｜DSML｜tool_calls>", "invoke"),
        ("gemma4", "<|tool_call>zoom(1)<tool_call|>", "call:NAME"),
        ("gpt-oss", "<|channel|>commentary to=functions.zoom<|message|>{}<|call|>", "constrain"),
        (
            "gpt-oss",
            "<|start|>assistant<|channel|>commentary to=functions. <|constrain|>json<|message|>{}<|call|>",
            "NAME",
        ),
        ("gpt-oss", written("gpt-oss", "zoom", {}).replace("{}", "{oops"), "arguments are not valid JSON"),
        ("gpt-oss", written("gpt-oss", "zoom", {}).replace("{}", "[]"), "arguments are not a JSON object"),
        (
            "glm",
            "<tool_call>f<arg_key>q</arg_key><arg_value>" + "x" * MAX_CALL_CHARS + "</arg_value></tool_call>",
            "longer",
        ),
    ],
)
def test_malformed_calls_are_returned_with_a_reason(fmt, text, why, qwen_like_tokenizer):
    ids = encode(qwen_like_tokenizer, "So: " + text)
    (call,) = ToolCallParser(fmt, qwen_like_tokenizer).calls(ids)
    assert (call.tool, call.arguments) == (MALFORMED, {})
    assert any(part in call.error for part in why.split("|"))
    assert len(call.error) < 300
    assert call.span[1] == len(ids)


KIMI_IDS = ["functions.search:0", "search:0", "functionssearch0", "functions.search", "functionssearch:12", "search"]


@pytest.mark.parametrize("name", [*KIMI_IDS, "0", "functions.my-search_tool:1", "functions.zoom_search:1", "other:3"])
def test_kimi_calls_the_tool_that_verl_executes(name, qwen_like_tokenizer, verl_calls):
    from agent_loops import schema

    schemas = [schema("search", query="string"), schema("zoom", image="integer"), schema("ping")]
    tools = {"search": ["query"], "zoom": ["image"], "ping": []}
    for arguments in ({"query": "Paris"}, {"image": 1}, {"query": "Paris", "image": 1}, {}):
        text = written("kimi", "search", arguments).replace("functions.search:0", name)
        ids = encode(qwen_like_tokenizer, text)
        ((theirs, _),) = verl_calls("kimi", qwen_like_tokenizer, ids, schemas)
        (ours,) = ToolCallParser("kimi", qwen_like_tokenizer, tools=tools).calls(ids)
        assert ours.arguments == arguments
        if theirs in tools:
            assert ours.tool == theirs
        else:
            assert ours.tool not in tools or ours.tool in name


@pytest.mark.parametrize(
    ("name", "tool"),
    [
        *((name, "search") for name in KIMI_IDS),
        *[("0", "0"), ("functions.search2:0", "search2"), ("search2", "search2"), ("functions.a:1:2", "a:1")],
        *[("functions_search:0", "functions_search"), ("functions.search2", "search2"), ("functions", "functions")],
        *[("functions.:0", "functions.:0"), ("9" * 60_000, "9" * 60_000), ("功能.поиск:7", "功能.поиск")],
    ],
)
def test_kimi_names_without_knowing_the_tools(name, tool, qwen_like_tokenizer):
    text = written("kimi", "search", {"query": "Paris"}).replace("functions.search:0", name)
    (call,) = ToolCallParser("kimi", qwen_like_tokenizer).calls(encode(qwen_like_tokenizer, text))
    assert (call.tool, call.arguments) == (tool, {"query": "Paris"})


ODD_VALUES = [
    *(
        "9" * 5000,
        "-" + "9" * 4000,
        "NaN",
        "Infinity",
        "-Infinity",
        "1e999",
        "-1e-999",
        "1" * 400 + ".5",
        "0x10",
        "1_000",
    ),
    *(
        '"\\ud800"',
        '"\\udc00\\ud800"',
        '"\\ud83d\\ude00"',
        '"\\u0000"',
        '"\x00"',
        "\ufeff1",
        "\ufeff",
        "True",
        "nULL",
        "٣",
    ),
    *(
        "[" * 100_000,
        "[" * 500 + "]" * 500,
        '{"a":' * 3000,
        "[" * 63 + "]" * 63,
        "[" * 64 + "]" * 64,
        "{}",
        "[]",
        "}",
        "]",
    ),
    *(
        '{"a": 1, "a": 2}',
        "1 2",
        "[1,]",
        "'a'",
        "  3  ",
        "3\n",
        "\x1c4\x1c",
        "\u2003x\u2003",
        "a,b:c",
        "<b>",
        ">",
        '"',
        '">',
    ),
]


@pytest.mark.long
@pytest.mark.parametrize("fmt", NATIVE_FORMATS)
def test_odd_values_are_those_that_verl_reads(fmt, qwen_like_tokenizer, verl_calls):
    tokenizer = qwen_like_tokenizer
    parser = ToolCallParser(fmt, tokenizer)
    call = written(fmt, "zoom", {"query": 12321})
    texts = [call.replace("12321", value) for value in ODD_VALUES]
    texts += [call.replace("12321", f'<|"|>{value}<|"|>') for value in ODD_VALUES if fmt == "gemma4"]
    texts += [call.replace('string="false"', 'string="true"').replace("12321", value) for value in ODD_VALUES]
    # Whole arguments, names and keys.
    texts += [call.replace('{"query": 12321}', value) for value in ODD_VALUES]
    texts += [call.replace("zoom", value) for value in ODD_VALUES if "{" not in value]
    texts += [call.replace("query", value) for value in ODD_VALUES if "{" not in value]
    for text in texts:
        ids = encode(tokenizer, text)
        found = parser.calls(ids)
        ours = [comparable(each.tool, each.arguments) for each in found if each.error is None]
        try:
            theirs = [(name, plain_json(raw)) for name, raw in verl_calls(fmt, tokenizer, ids)]
        except Exception:  # Kimi's parser passes on what its own type refuses
            assert fmt == "kimi"
            assert not ours
            continue
        if fmt == "kimi":
            theirs = [(name.removeprefix("functions.").removesuffix(":0"), values) for name, values in theirs]
        if fmt == "qwen3_coder":
            theirs = [(name, {key: plain_json(v) for key, v in values.items()}) for name, values in theirs]
        few = len(text) < MAX_CALL_CHARS
        theirs = [call for call in theirs if few and isinstance(call[1], dict) and usable(*call)]
        assert ours == [comparable(*each) for each in theirs], text[:200]
        steps = steps_of(parser, tokenizer, [[(1, text), (0, answer("fine"))]]).steps
        assert [step.ok for step in steps] == [each.error is None for each in found]


def usable(name, arguments):
    """Whether a call can be compared and written down: not nested too deeply, and without halves of surrogate pairs."""
    level, levels = [arguments], 0
    while level := [item for each in level for item in (each.values() if isinstance(each, dict) else each)]:
        level = [item for item in level if isinstance(item, dict | list)]
        levels += 1
    written = (name + json.dumps(arguments, ensure_ascii=False)) if levels < MAX_DEPTH else ""
    return levels < MAX_DEPTH and written == written.encode("utf-8", "replace").decode()


@pytest.mark.parametrize("fmt", ["hermes", "glm", "minimax"])
def test_depth_limit_is_what_canonical_takes(fmt, qwen_like_tokenizer):
    parser = ToolCallParser(fmt, qwen_like_tokenizer)
    for depth in (MAX_DEPTH - 1, MAX_DEPTH):
        value = json.loads("[" * depth + "]" * depth)
        (call,) = parser.calls(encode(qwen_like_tokenizer, written(fmt, "zoom", {"a": value})))
        assert (call.error is None) == (depth < MAX_DEPTH)
        canonical(call.arguments)


def test_unclosed_calls(qwen_like_tokenizer):
    text = "<tool_call>\n<function=zoom>\n<parameter=image>\n2\n"
    ids = encode(qwen_like_tokenizer, "Look: " + text)
    (call,) = ToolCallParser("qwen3_coder", qwen_like_tokenizer).calls(ids)
    assert (call.tool, call.arguments, call.span[1]) == ("zoom", {"image": 2}, len(ids))
    hermes = ToolCallParser("hermes", qwen_like_tokenizer)
    assert hermes.calls(ids) == []
    assert steps_of(hermes, qwen_like_tokenizer, [[(1, "Look: " + text)], [(1, "done")]]).unclosed == 1


# --- Steps ----------------------------------------------------------------------------------------------------------


def batch(tokenizer, rows, pad_to=None):
    """Flat ids, mask and offsets of rows, each a list of (mask, text or ids)."""
    ids, mask, offsets = [], [], [0]
    for row in rows:
        for policy, part in row:
            part = encode(tokenizer, part) if isinstance(part, str) else part
            ids += part
            mask += [policy] * len(part)
        if pad_to:
            missing = offsets[-1] + pad_to - len(ids)
            ids += [tokenizer.pad_token_id] * missing
            mask += [0] * missing
        offsets.append(len(ids))
    return np.array(ids, np.int64), np.array(mask, np.int64), np.array(offsets)


def steps_of(parser, tokenizer, rows, pad_to=None, **options):
    ids, mask, offsets = batch(tokenizer, rows, pad_to)
    parsed = parse_steps(parser, ids, mask, offsets, np.arange(len(rows)), **options)
    if rows:
        step_columns(parsed.steps, len(rows), max(np.diff(offsets)))  # spans are what the rule accepts
    return parsed


def call(query="q", tool="text_search"):
    return written("hermes", tool, {"query": query})


def answer(*texts):
    blocks = "\n".join(f"<tool_response>\n{text}\n</tool_response>" for text in texts)
    return f"\n<|im_start|>user\n{blocks}<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(params=["qwen_like_tokenizer", "spelled_tokenizer"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def parser(tokenizer):
    return ToolCallParser("hermes", tokenizer)


def oks(parsed):
    return [step.ok for step in parsed.steps]


def test_turns_and_calls(parser, tokenizer):
    rows = [
        [
            (1, "First. " + call("a") + "<|im_end|>"),
            (0, answer("Paris")),
            (1, "Then " + call("b")),
            (0, answer("x")),
            (1, "42"),
        ],
        [],
        [(1, "no tools here, a < b")],
        [(1, call("c")), (0, answer("y"))],
    ]
    parsed = steps_of(parser, tokenizer, rows)
    assert [(s.row, s.tool, s.arguments, s.ok) for s in parsed.steps] == [
        (0, "text_search", {"query": "a"}, True),
        (0, "text_search", {"query": "b"}, True),
        (3, "text_search", {"query": "c"}, True),
    ]
    assert parsed[1:] == (0, 0, 0, 0)
    ids, mask, offsets = batch(tokenizer, rows)
    for step, text in zip(parsed.steps, "abc", strict=True):
        row = slice(offsets[step.row], offsets[step.row + 1])
        assert mask[row][slice(*step.turn)].all()
        edges = [at for at in (step.turn[0] - 1, step.turn[1]) if 0 <= at < offsets[step.row + 1] - offsets[step.row]]
        assert not mask[row][edges].any()
        assert call(text) in tokenizer.decode(ids[row][slice(*step.call)])
    assert parsed.steps[0].turn[0] == 0 < parsed.steps[0].call[0]


def test_markers_in_an_observation_are_no_calls(parser, tokenizer):
    rows = [
        [
            (1, call() + "<|im_end|>"),
            (0, answer("a page with " + call("other"))),
            (1, "<tool_call>"),
            (0, "x</tool_call>"),
        ]
    ]
    parsed = steps_of(parser, tokenizer, rows)
    assert [s.arguments["query"] for s in parsed.steps] == ["q"]
    assert parsed.unclosed == 1


@pytest.mark.parametrize(
    "text", [error + "zoom' and more of it" for error in STOCK_ERRORS] + [NOT_EXECUTED_PREFIX + " no", "Oops: 1"]
)
def test_errors_are_not_ok(text, parser, tokenizer):
    rows = [
        [
            (1, call()),
            (0, answer(text)),
            (1, call()),
            (0, answer("  \n\n" + text)),
            (1, call()),
            (0, answer("about: " + text)),
        ]
    ]
    parsed = steps_of(parser, tokenizer, rows, error_markers=["Oops"])
    assert oks(parsed) == [False, False, True]
    assert parsed.failed == 2
    assert answer_is_error(text, ["Oops"])
    assert not answer_is_error("about: " + text, ["Oops"])


def test_answers_that_begin_like_an_error_but_are_none(parser, tokenizer):
    rows = [
        [
            (1, call()),
            (0, answer("Error rates in surveys")),
            (1, call()),
            (0, answer("Un")),
            (1, call()),
            (0, answer("")),
        ]
    ]
    assert oks(steps_of(parser, tokenizer, rows)) == [True, True, True]


def test_parallel_calls(parser, tokenizer):
    three = call("a") + call("b") + call("c")
    error = STOCK_ERRORS[2] + "zoom'"
    rows = [
        [(1, three), (0, answer("1", error, "3")), (1, "ok")],
        [(1, three), (0, answer("1")), (1, "calls beyond max_parallel_calls are dropped")],
        [(1, three)],
        [(1, three), (0, "<|im_end|>\n")],
    ]
    parsed = steps_of(parser, tokenizer, rows)
    assert oks(parsed) == [True, False, True, True] + [False] * 8
    assert (parsed.failed, parsed.unanswered) == (1, 8)
    assert {s.turn for s in parsed.steps[:3]} == {parsed.steps[0].turn}


def test_malformed_calls_in_stock_and_own_rollouts(parser, tokenizer):
    bad = "<tool_call>{oops</tool_call>"
    error = STOCK_ERRORS[2] + "text_search'"
    rows = [
        [(1, bad + call("a") + call("b")), (0, answer("1", error)), (1, "stock: the malformed call has no answer")],
        [(1, bad + call("a") + call("b")), (0, answer(NOT_EXECUTED_PREFIX, "1", error)), (1, "own: it has one")],
        [(1, bad)],
    ]
    parsed = steps_of(parser, tokenizer, rows)
    assert [s.tool for s in parsed.steps] == [MALFORMED, "text_search", "text_search"] * 2 + [MALFORMED]
    assert oks(parsed) == [False, True, False] * 2 + [False]
    assert parsed[1:] == (3, 0, 0, 2)
    assert all(s.call[0] >= s.turn[0] for s in parsed.steps)


def test_calls_that_only_stock_loops_accept_keep_their_answers(parser, tokenizer):
    # veRL's parser takes arguments that are no object; its loop answers with an error.
    odd = '<tool_call>{"name": "zoom", "arguments": [1]}</tool_call>'
    rows = [[(1, "<tool_call>{</tool_call>" + odd + call()), (0, answer(STOCK_ERRORS[2] + "zoom'", "fine")), (1, "ok")]]
    assert oks(steps_of(parser, tokenizer, rows)) == [False, False, True]


def test_padding_is_no_answer_and_changes_nothing(parser, tokenizer):
    rows = [
        [(1, call("a")), (0, answer("1")), (1, "done")],
        [(1, call("b"))],
        [(1, "x" + call("c")), (0, answer("cut off").split("off")[0])],
        [],
    ]
    jagged = steps_of(parser, tokenizer, rows)
    assert oks(jagged) == [True, False, True]
    assert steps_of(parser, tokenizer, rows, pad_to=128) == jagged
    ids, mask, offsets = (torch.from_numpy(array) for array in batch(tokenizer, rows, 128))
    assert parse_steps(parser, ids, mask.bool(), offsets, list(range(4))) == jagged
    part = parse_steps(parser, ids, mask, offsets[1:3], [7])
    assert part.steps == [jagged.steps[1]._replace(row=7)]


def test_templates_without_a_known_answer_marker(spelled_tokenizer):
    parser = ToolCallParser("hermes", spelled_tokenizer)
    rows = [
        [(1, call("a") + call("b")), (0, "<|im_end|>tool: 12 results"), (1, "ok")],
        [(1, call()), (0, "<|im_end|>tool: " + STOCK_ERRORS[0] + "x'")],
        [(1, call()), (0, "<|im_end|>\n<|endoftext|>")],
    ]
    assert oks(steps_of(parser, spelled_tokenizer, rows)) == [True, False, False, False]


@pytest.mark.parametrize(
    ("fmt", "observation"),
    [
        ("glm", "<|observation|>\n<tool_response>\n{}\n</tool_response>"),
        ("glm", "<|observation|>\n{}"),
        ("qwen3_coder", "<|im_start|>user\n<tool_response>\n{}\n</tool_response>"),
        ("seed", "<seed:bos>tool\n{}<seed:eos>"),
        ("minimax", "]~b]tool\n<response>{}</response>"),
        ("kimi", "<|im_system|>zoom<|im_middle|>## Return of functions.zoom:0\n{}<|im_end|>"),
    ],
)
def test_answers_of_other_templates(fmt, observation, tokenizer):
    parser = ToolCallParser(fmt, tokenizer)
    turn = written(fmt, "zoom", {"query": "a"})
    rows = [[(1, turn), (0, observation.format(text)), (1, "ok")] for text in ("fine", STOCK_ERRORS[2] + "zoom': why")]
    assert oks(steps_of(parser, tokenizer, rows)) == [True, False]


# Chat templates that veRL's loop is used with, as far as answers go; {} stands for each of several.
TEMPLATES = {
    "llama": ("<|im_end|>", "<|im_start|>ipython<|endoftext|>\n\n{}<|im_end|>", ""),
    "chatml": ("<|im_end|>\n", "<|im_start|>tool\n{}<|im_end|>\n", ""),
    "deepseek": ("<|im_end|>", "<|endoftext|><|vision_pad|>{}<|vision_end|>", "<|endoftext|>"),
    "mistral": ("</s>", '[TOOL_RESULTS]{{"content": "{}", "call_id": "1"}}[/TOOL_RESULTS]', ""),
    "plain": ("\n", "\nResult: {}\n", "\n"),
    "qwen": ("<|im_end|>\n", "\n<tool_response>\n{}\n</tool_response>", "<|im_end|>\n"),
}


def with_template(tokenizer, template):
    """The tokenizer, with a chat template that writes answers so."""
    ending, each, last = template
    before, _, after = each.replace("{{", "{").replace("}}", "}").partition("{}")
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (
        "{%- for message in messages %}{%- if message.role == 'tool' %}"
        f"{{{{- {json.dumps(before)} + message.content + {json.dumps(after)} }}}}"
        f"{{%- if loop.last %}}{{{{- {json.dumps(last)} }}}}{{%- endif %}}"
        f"{{%- else %}}{{{{- message.role + ': ' + message.content + {json.dumps(ending)} }}}}"
        "{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- 'assistant: ' }}{%- endif %}"
    )
    return tokenizer


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_chat_template_tells_how_answers_begin(name, tokenizer):
    tokenizer = with_template(tokenizer, TEMPLATES[name])
    parser = ToolCallParser("hermes", tokenizer)
    _, each, last = TEMPLATES[name]

    def answers(*texts):
        return "".join(each.format(text) for text in texts) + last + "assistant: "

    error = STOCK_ERRORS[2] + "zoom'"
    quote = f"A log says: {error}: down."
    if name != "plain":  # whose answers end with nothing
        quote += f" Results begin with {each.split('{}')[0].strip()} there."
    rows = [
        [(1, call("a") + call("b")), (0, answers("Paris", "Lyon")), (1, "ok")],
        [(1, call("a") + call("b")), (0, answers("Paris", error)), (1, "ok")],
        [(1, call("a") + call("b")), (0, answers(error, "")), (1, call()), (0, answers(quote)), (1, "ok")],
        [(1, call("a") + call("b") + call("c")), (0, answers(quote, error, "Rome")), (1, "ok")],
        [(1, call("a") + call("b")), (0, answers("only one is answered"))],
    ]
    expected = [[True, True], [True, False], [False, True, True], [True, False, True], [True, False]]
    assert oks(steps_of(parser, tokenizer, rows)) == [*chain(*expected)]
    assert oks(steps_of(parser, tokenizer, rows, pad_to=600)) == [*chain(*expected)]


def test_image_provenance(qwen_like_tokenizer):
    tokenizer = qwen_like_tokenizer
    parser = ToolCallParser("hermes", tokenizer)
    picture = "<|vision_start|><|image_pad|><|image_pad|><|vision_end|>"

    def zoom(image, *box):
        return written("hermes", "zoom", {"image": image, "bbox": box})

    def row(box, then=1):
        return [
            (1, zoom(0, *box)),
            (0, answer(picture + "cropped")),
            (1, zoom(then, 5, 5, 9, 9)),
            (0, answer(picture)),
            (1, ""),
        ]

    asked = []

    def prompt_images(number):
        asked.append(number)
        return ["the prompt's image"]

    search = [(1, call()), (0, answer("no images")), (1, "ok")]
    rows = [row((0, 0, 9, 9)), row((0, 0, 9, 9)), row((1, 1, 5, 5)), search, row((0, 0, 9, 9), 0), row((0, 0, 9, 9), 7)]
    # Two answers with an image each, and one image in an observation that answers nothing.
    both = zoom(0, 1, 1, 5, 5) + zoom(0, 0, 0, 9, 9)
    two = [
        (1, both),
        (0, answer(picture, picture + picture)),
        (1, "hm"),
        (0, picture),
        (1, zoom(2, 5, 5, 9, 9) + zoom(4, 1)),
        (0, answer("", "")),
    ]
    parsed = steps_of(
        parser, tokenizer, [*rows, two], image_parameters=["image"], image_index_base=0, prompt_images=prompt_images
    )
    images = {n: [s.arguments.get("image") for s in parsed.steps if s.row == n] for n in range(len(rows) + 1)}
    assert images[0][0] == "the prompt's image"
    assert images[0] == images[1]
    assert images[2][0] == images[0][0]
    assert images[2][1] != images[0][1], "two crops are two images, whatever their index"
    assert images[4] == ["the prompt's image"] * 2
    assert images[5][1].startswith("no image 7 among ")
    assert images[6][2] == images[0][1]
    assert images[6][3].startswith("unknown ")
    assert set(asked) == {0, 1, 2, 4, 5, 6}
    assert len(asked) == 6
    assert parser.count_images(encode(tokenizer, picture + "x" + picture)) == 2
    assert parser.count_images([]) == 0
    # Equal calls from an unknown start: indices as the model wrote them.
    assert steps_of(parser, tokenizer, [rows[0]]).steps[0].arguments["image"] == 0


def test_placeholders_repeated_for_patches_count_once(qwen_like_tokenizer):
    parser = ToolCallParser("hermes", qwen_like_tokenizer, image_markers=["<|image_pad|>", "<absent>"])
    assert parser.count_images(encode(qwen_like_tokenizer, "<|image_pad|>" * 9 + "a" + "<|image_pad|>" * 3)) == 2


# --- Formats by fallback, bad input, garbage ------------------------------------------------------------------------


def test_fallback_for_other_formats(qwen_like_tokenizer):
    with pytest.raises(ValueError, match=r"'gemma9'.*hermes, qwen3_coder"):
        ToolCallParser("gemma9", qwen_like_tokenizer)

    def fallback(ids):
        text = qwen_like_tokenizer.decode(ids)
        if "crash" in text:
            raise RuntimeError("boom")
        return [("zoom", '{"a": 1}'), ("zoom", "{broken")] if "CALL" in text else []

    parser = ToolCallParser("gemma9", qwen_like_tokenizer, fallback)
    rows = [
        [(1, "CALL"), (0, answer("1", STOCK_ERRORS[1] + "zoom'")), (1, "no"), (0, "x"), (1, "crash")],
        [],
        [(0, "CALL"), (1, "CALL")],
    ]
    parsed = steps_of(parser, qwen_like_tokenizer, rows)
    assert [(s.row, s.tool, s.ok) for s in parsed.steps] == [
        (0, "zoom", True),
        (0, MALFORMED, False),
        (0, MALFORMED, False),
        (2, "zoom", False),
        (2, MALFORMED, False),
    ]
    assert all(s.call == s.turn for s in parsed.steps)
    assert parser.calls([]) == []


@pytest.mark.parametrize(
    ("arrays", "name"),
    [
        (([1, 2], [1], [0, 1], [0]), "response_mask"),
        (([1, 2], [1, 1], [0, 3], [0]), "offsets"),
        (([1, 2], [1, 1], [1, 0], [0]), "offsets"),
        (([1, 2], [1, 1], [0, 2], [0, 1]), "rows"),
        (([[1, 2]], [1, 1], [0, 2], [0]), "responses"),
        (([1.5, 2], [1, 1], [0, 2], [0]), "responses"),
    ],
)
def test_arrays_that_disagree(arrays, name, qwen_like_tokenizer):
    with pytest.raises(ValueError, match=name):
        parse_steps(ToolCallParser("hermes", qwen_like_tokenizer), *arrays)


@pytest.mark.parametrize("fmt", NATIVE_FORMATS)
@settings(SETTINGS, max_examples=60)
@given(data=st.data())
def test_garbage_never_raises(fmt, qwen_like_tokenizer, data):
    tokenizer = qwen_like_tokenizer
    markers = [t for part in FRAGMENTS[fmt] for t in encode(tokenizer, part)]
    token = st.integers(0, len(tokenizer)) | st.sampled_from([*markers, -1, -(2**62), 2**62]) | st.sampled_from(markers)
    ids = data.draw(st.lists(token, max_size=60))
    mask = data.draw(st.lists(st.sampled_from([1, 1, 1, 0]), min_size=len(ids), max_size=len(ids)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=3)))
    parser = ToolCallParser(fmt, tokenizer)
    parser.calls(ids)
    parsed = parse_steps(parser, ids, mask, [0, *cuts, len(ids)], range(len(cuts) + 1), image_parameters=["p", "image"])
    step_columns(parsed.steps, len(cuts) + 1, len(ids))
    assert parsed.malformed + parsed.unanswered + parsed.failed + sum(oks(parsed)) == len(parsed.steps)
    for step in parsed.steps:
        canonical(step.arguments)


@pytest.mark.long
@pytest.mark.parametrize("fmt", NATIVE_FORMATS)
@pytest.mark.timeout(60)
def test_endless_calls_take_linear_time(fmt, qwen_like_tokenizer):
    parser = ToolCallParser(fmt, qwen_like_tokenizer)
    whole = written(fmt, "zoom", {"query": "x" * 10_000_000})
    opening, closing = whole.split("zoom")[0], whole[-30:]
    long = encode(qwen_like_tokenizer, opening) + encode(qwen_like_tokenizer, " ab") * 2_000_000
    for ids in (long, long + encode(qwen_like_tokenizer, closing)):
        assert all(call.tool == MALFORMED or not call.arguments for call in parser.calls(ids))
    for fragment in FRAGMENTS[fmt]:
        parser.calls(encode(qwen_like_tokenizer, opening + fragment * 4000 + closing))
        parser.calls(encode(qwen_like_tokenizer, (opening + fragment + closing) * 500))


def cpu_time(function, size):
    """Seconds of this process's own, without those in which it looks for garbage among all that it holds."""
    gc.disable()
    try:
        start = time.process_time()
        function(size)
        return time.process_time() - start
    finally:
        gc.enable()


def grows_linearly(function, few, many):
    """Whether eight times as much takes less than sixteen times as long, in one of a few tries: others disturb."""
    assert many == 8 * few
    return any(cpu_time(function, many) < 16 * max(cpu_time(function, few), 1e-3) for _ in range(6))


@pytest.mark.long
@pytest.mark.parametrize("fmt", NATIVE_FORMATS)
def test_reading_a_turn_takes_linear_time(fmt):
    opening, closing = FORMATS[fmt].opening.decode(), FORMATS[fmt].closing.decode()
    section, inner = FORMATS[fmt].section.decode(), FORMATS[fmt].inner.decode()
    whole = written(fmt, "zoom", {"query": "x"})
    units = [opening + closing, closing + opening, f"{whole}{closing}\nuser\n", opening + "{", inner + opening, " \n"]
    for unit in [*units, *FRAGMENTS[fmt]]:
        for before, after in ((section, ""), (whole.split("zoom")[0], closing)):

            def read(times, unit=unit, before=before, after=after):
                read_text(FORMATS[fmt], (before + unit * times + after).encode())

            assert grows_linearly(read, 2000, 16_000), (unit, before, after)


@pytest.mark.parametrize("fmt", NATIVE_FORMATS)
def test_finding_steps_takes_linear_time(fmt, qwen_like_tokenizer):
    tokenizer = qwen_like_tokenizer
    parser = ToolCallParser(fmt, tokenizer)
    acting = [encode(tokenizer, text) for text in (written(fmt, "zoom", {"image": 1}), "</tool_call>", "\n" * 50)]
    picture = "<|vision_start|><|image_pad|><|vision_end|>"
    seen = [encode(tokenizer, text) for text in (answer("fine"), answer(picture), "\n" * 50)]

    def find(parts):
        def steps(times):
            turns = [(policy, tokens * times) for policy, tokens in parts]
            return steps_of(parser, tokenizer, [turns], image_parameters=["image"])

        return steps

    def in_turn(acting, seen, times):
        return steps_of(parser, tokenizer, [[(1, acting), (0, seen)] * times], image_parameters=["image"])

    for own, theirs in zip(acting, seen, strict=True):
        assert grows_linearly(lambda times, own=own, theirs=theirs: in_turn(own, theirs, times), 60, 480)
        assert grows_linearly(find([(1, own + theirs)]), 60, 480)
        assert grows_linearly(find([(1, own), (0, theirs)]), 60, 480)
