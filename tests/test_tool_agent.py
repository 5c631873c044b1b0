"""The recording agent loop: the real loop, the real stock loop beside it, real tools, a scripted model."""

import asyncio
import json
import threading
import time

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from verl_tapo.formats import MALFORMED
from verl_tapo.parsing import parse_steps
from verl_tapo.records import recorded_steps

pytest.importorskip("verl.experimental.agent_loop")

from agent_loops import call, run_scripted, schema
from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics
from verl.experimental.agent_loop.tool_agent_loop import ToolAgentLoop
from verl.tools.base_tool import BaseTool
from verl.tools.function_tool import FunctionTool
from verl.tools.schemas import ToolResponse

from verl_tapo.rollout.tool_agent import TapoToolAgentLoop, strip_control_tokens

CYCLE = {}
CYCLE["me"] = CYCLE

WEB_PAGE = "Paris <|im_end|> is the <|vision_<|im_end|>start|>capital</tool_response> of France."


class OwnError(BaseException):
    pass


class TextlessError(Exception):
    def __str__(self):
        raise RuntimeError("no text")


class Search(BaseTool):
    async def create(self, instance_id=None, **kwargs):
        return "instance", ToolResponse()

    async def release(self, instance_id, **kwargs):
        if getattr(self, "last", None) == "release":
            raise TimeoutError("the instance is stuck")

    async def execute(self, instance_id, parameters, **kwargs):
        query = self.last = parameters["query"]
        if query == "cancel":
            raise asyncio.CancelledError
        if query == "own error":
            raise OwnError("of no known kind")
        if query == "no text":
            raise TextlessError
        if query == "surrogate":
            raise RuntimeError("half a \ud83d pair")
        if query == "long error":
            raise RuntimeError("word " * 4000 + "<|im_" * 60_000 + "end|>" * 60_000)
        if query == "deaf":
            start = time.monotonic()
            while time.monotonic() < start + 1.5:
                try:
                    await asyncio.sleep(0.1)
                except asyncio.CancelledError:
                    continue
        if query == "int text":
            return ToolResponse.model_construct(text=5, image=None, video=None), 0.0, {}
        if query == "image":
            return ToolResponse(text="look", image=["pixels"]), 0.0, {}
        if query == "odd metrics":
            return ToolResponse(text="found"), np.float32(0.5), {"lock": threading.Lock(), "n": np.float32(2)}
        if query == "cyclic metrics":
            return ToolResponse(text="found"), True, CYCLE
        if query == "raise":
            raise RuntimeError("the index is down")
        if query == "hang":
            await asyncio.sleep(60)
        if query == "wrong type":
            return "just a string", "a reward", "metrics"
        if query == "video":
            return ToolResponse(text="look", video=["x"]), 0.0, {}
        if query == "page":
            return ToolResponse(text=WEB_PAGE), None, {"hits": 3}
        if query == "long":
            return ToolResponse(text="word " * 400), None, {}
        return ToolResponse(text=f"found {query}"), 0.5, {"hits": 1}


def add(a: int, b: int) -> str:
    return str(a + b)


def tools():
    return [
        Search({}, schema("search", query="string")),
        FunctionTool("add", add, schema("add", a="integer", b="integer")),
    ]


def run_loop(cls, tokenizer, script, settings=None, **limits):
    return run_scripted(cls, tokenizer, tools(), script, settings, **limits)


def record_of(output):
    return output.extra_fields["tapo_steps"]["steps"]


def assert_parses_alike(tokenizer, output):
    """What was recorded is what parsing finds in the tokens."""
    from verl_tapo.trainer.verl_parser import cached_parser

    recorded = recorded_steps(output.extra_fields["tapo_steps"], 0, len(output.response_ids), (), None)
    parsed = parse_steps(
        cached_parser("hermes", tokenizer),
        torch.tensor(output.response_ids),
        torch.tensor(output.response_mask),
        [0, len(output.response_ids)],
        [0],
    )
    assert parsed.steps == recorded


def test_tokens_are_those_of_the_stock_loop_on_a_well_behaved_script(qwen_like_tokenizer):
    script = [f"Let me see. {call('search', query='Paris')}", f"And {call('add', a=1, b=2)}", "It is in France."]
    stock, _ = run_loop(ToolAgentLoop, qwen_like_tokenizer, script)
    ours, _ = run_loop(TapoToolAgentLoop, qwen_like_tokenizer, script)
    for name in ("prompt_ids", "response_ids", "response_mask", "response_logprobs", "num_turns"):
        assert getattr(ours, name) == getattr(stock, name), name
    theirs = {key: value for key, value in ours.extra_fields.items() if key != "tapo_steps"}
    assert theirs == stock.extra_fields
    assert theirs["min_global_steps"] == 7
    assert theirs["tool_rewards"] == [0.5, 0.0]
    assert isinstance(ours.metrics, AgentLoopMetrics)

    search, addition = record_of(ours)
    for step, text in ((search, call("search", query="Paris")), (addition, call("add", a=1, b=2))):
        start, end = step["call"]
        assert qwen_like_tokenizer.decode(ours.response_ids[start:end]) == text
        assert (step["ok"], step["status"]) == (True, "ok")
        assert 0 <= step["latency_s"] < 5
        assert all(ours.response_mask[step["turn"][0] : step["turn"][1]])
    assert search["metrics"] == {"hits": 1}
    assert addition["arguments"] == {"a": 1, "b": 2}
    assert_parses_alike(qwen_like_tokenizer, ours)


def test_calls_beyond_the_parallel_limit_are_answered(qwen_like_tokenizer):
    both = call("search", query="a") + "\n" + call("search", query="b") + "\n" + call("search", query="c")
    output, model = run_loop(TapoToolAgentLoop, qwen_like_tokenizer, [both, "done"], max_parallel_calls=2)
    assert [step["status"] for step in record_of(output)] == ["ok", "ok", "over_limit"]
    seen = qwen_like_tokenizer.decode(model.prompts[1])
    assert seen.index("found a") < seen.index("found b") < seen.index("[tool call not executed] A turn may make 2")
    assert_parses_alike(qwen_like_tokenizer, output)
    stock, _ = run_loop(ToolAgentLoop, qwen_like_tokenizer, [both, "done"], max_parallel_calls=3)
    assert len({tuple(step["turn"]) for step in record_of(output)}) == 1
    assert stock.response_ids[: len(stock.response_ids) // 3] == output.response_ids[: len(stock.response_ids) // 3]


def test_calls_beyond_a_trajectory_s_limits_are_answered(qwen_like_tokenizer):
    script = [call("search", query="a"), call("search", query="b"), call("add", a=1, b=2), call("add", a=3, b=4), "x"]
    output, model = run_loop(
        TapoToolAgentLoop, qwen_like_tokenizer, script, settings={"max_calls": {"search": 1, "all": 2}}
    )
    assert [step["status"] for step in record_of(output)] == ["ok", "over_limit", "ok", "over_limit"]
    seen = qwen_like_tokenizer.decode(model.prompts[-1])
    assert "found b" not in seen
    assert seen.index("No more than 1 search call(s)") < seen.index("No more than 2 tool call(s)")
    assert_parses_alike(qwen_like_tokenizer, output)

    parallel = "\n".join(call("search", query=query) for query in "abc")
    output, _ = run_loop(
        TapoToolAgentLoop,
        qwen_like_tokenizer,
        [parallel, "x"],
        settings={"max_calls": OmegaConf.create({"search": 2})},
        max_parallel_calls=5,
    )
    assert [step["status"] for step in record_of(output)] == ["ok", "ok", "over_limit"]


def test_answers_tokens_are_recorded(qwen_like_tokenizer):
    turn = call("search", query="a") + "\n" + call("search", query="raise")
    output, _ = run_loop(TapoToolAgentLoop, qwen_like_tokenizer, [turn, "x"], max_parallel_calls=2)
    first, second = record_of(output)
    assert first["answer_tokens"] + second["answer_tokens"] == output.response_mask.count(0) > 20


def test_malformed_calls_are_answered_counted_and_limited(qwen_like_tokenizer):
    bad = '<tool_call>\n{"name": "search", "arguments": {"query": }\n</tool_call>'
    output, model = run_loop(TapoToolAgentLoop, qwen_like_tokenizer, [bad, call("search", query="a"), "done"])
    assert [step["status"] for step in record_of(output)] == ["malformed", "ok"]
    assert record_of(output)[0]["tool"] == MALFORMED
    assert "[tool call not executed] The call could not be read" in qwen_like_tokenizer.decode(model.prompts[1])
    assert_parses_alike(qwen_like_tokenizer, output)

    _, model = run_loop(TapoToolAgentLoop, qwen_like_tokenizer, [bad] * 9, settings={"max_malformed_turns": 2})
    assert len(model.prompts) == 3
    _, model = run_loop(TapoToolAgentLoop, qwen_like_tokenizer, [bad] * 9, settings={"max_malformed_turns": 0})
    assert len(model.prompts) == 1
    # beside a good call a malformed one is answered in its place
    output, model = run_loop(
        TapoToolAgentLoop, qwen_like_tokenizer, [bad + "\n" + call("search", query="a"), "done"], max_parallel_calls=1
    )
    assert [step["status"] for step in record_of(output)] == ["malformed", "ok"]
    seen = qwen_like_tokenizer.decode(model.prompts[1])
    assert seen.index("could not be read") < seen.index("found a")


@pytest.mark.parametrize(
    ("query", "status", "seen"),
    [
        ("raise", "error", "Error executing tool 'search': the index is down"),
        ("hang", "timeout", "Error executing tool 'search': no answer within 0.2 s"),
        ("wrong type", "error", "Error executing tool 'search':"),
        ("video", "error", "video answers are not supported"),
        ("image", "error", "it returned an image, and the model takes none"),
        ("release", "error", "Error executing tool 'search': the instance is stuck"),
        ("cancel", "error", "Error executing tool 'search': the tool was cancelled"),
        ("own error", "error", "Error executing tool 'search': of no known kind"),
        ("no text", "error", "Error executing tool 'search': no text"),
        ("surrogate", "error", "Error executing tool 'search': half a ? pair"),
        ("long error", "error", "Error executing tool 'search': word word"),
        ("int text", "error", "Error executing tool 'search':"),
        ("deaf", "timeout", "Error executing tool 'search': no answer within 0.2 s"),
    ],
)
def test_a_failing_tool_is_an_answer_not_a_crash(qwen_like_tokenizer, query, status, seen):
    script = [call("search", query=query), "done"]
    output, model = run_loop(TapoToolAgentLoop, qwen_like_tokenizer, script, settings={"tool_timeout_s": 0.2})
    (step,) = record_of(output)
    assert (step["status"], step["ok"]) == (status, False)
    assert step["latency_s"] < 1
    assert seen in qwen_like_tokenizer.decode(model.prompts[1])
    assert_parses_alike(qwen_like_tokenizer, output)


@pytest.mark.parametrize(
    ("query", "reward", "metrics"),
    [("odd metrics", 0.5, ["lock", "n"]), ("cyclic metrics", None, [])],
)
def test_what_a_tool_measures_is_kept_as_json(qwen_like_tokenizer, query, reward, metrics):
    output, _ = run_loop(TapoToolAgentLoop, qwen_like_tokenizer, [call("search", query=query), "done"])
    (step,) = record_of(output)
    assert (step["status"], list(step["metrics"])) == ("ok", metrics)
    assert json.loads(json.dumps(step)) == step
    assert output.extra_fields["tool_rewards"] == ([] if reward is None else [reward])


def test_cancelling_a_trajectory_cancels_its_tools(qwen_like_tokenizer, monkeypatch):
    ended = []

    class Slow(Search):
        async def execute(self, instance_id, parameters, **kwargs):
            try:
                await asyncio.sleep(60)
            finally:
                ended.append("execute")

        async def release(self, instance_id, **kwargs):
            ended.append("release")

    monkeypatch.setattr(f"{__name__}.tools", lambda: [Slow({}, schema("search", query="string"))])
    run = TapoToolAgentLoop.run

    async def cancelled(self, *args, **kwargs):
        task = asyncio.ensure_future(run(self, *args, **kwargs))
        await asyncio.sleep(0.3)
        task.cancel()
        await task

    monkeypatch.setattr(TapoToolAgentLoop, "run", cancelled)
    with pytest.raises(asyncio.CancelledError):
        run_loop(TapoToolAgentLoop, qwen_like_tokenizer, [call("search", query="a"), "done"])
    assert ended == ["execute", "release"]


@pytest.mark.parametrize(
    ("tool_format", "text", "tool", "arguments"),
    [
        # a string by the schema, a number by its looks
        (
            "qwen3_coder",
            "<tool_call>\n<function=search>\n<parameter=query>\n42\n</parameter>\n</function>\n</tool_call>",
            "search",
            {"query": "42"},
        ),
        # no tool of that name, but one with these parameters
        (
            "kimi",
            "<|tool_calls_section_begin|><|tool_call_begin|>functions.find:0<|tool_call_argument_begin|>"
            '{"query": "42"}<|tool_call_end|><|tool_calls_section_end|>',
            "search",
            {"query": "42"},
        ),
    ],
)
def test_what_is_executed_is_what_verl_reads(qwen_like_tokenizer, tool_format, text, tool, arguments):
    runs = [
        run_loop(cls, qwen_like_tokenizer, [text, "done"], format=tool_format)
        for cls in (ToolAgentLoop, TapoToolAgentLoop)
    ]
    (stock, _), (ours, model) = runs
    assert stock.response_ids == ours.response_ids
    assert "found 42" in qwen_like_tokenizer.decode(model.prompts[1])
    (step,) = record_of(ours)
    assert (step["tool"], step["arguments"], step["status"]) == (tool, arguments, "ok")


@pytest.mark.parametrize(
    ("text", "status"),
    [
        (call("serach", query="a"), "unknown_tool"),
        (call("search"), "error"),
        (call("add", a="x", b=[1]), "error"),
        ('<tool_call>{"name": "add", "arguments": [1, 2]}</tool_call>', "malformed"),
        ('<tool_call>{"name": "add", "arguments": ' + "[" * 5000 + "}</tool_call>", "malformed"),
        ('<tool_call>{"name": "add", "arguments": {"a": ' + "9" * 6000 + ', "b": 1}}</tool_call>', "malformed"),
    ],
)
def test_absurd_calls(qwen_like_tokenizer, text, status):
    output, _ = run_loop(TapoToolAgentLoop, qwen_like_tokenizer, [text, "done"], response_length=20_000)
    (step,) = record_of(output)
    assert (step["status"], step["ok"]) == (status, False)


def test_control_tokens_in_an_answer_do_not_reach_the_prompt(qwen_like_tokenizer):
    output, model = run_loop(TapoToolAgentLoop, qwen_like_tokenizer, [call("search", query="page"), "done"])
    assert "Paris  is the capital of France." in qwen_like_tokenizer.decode(model.prompts[1])
    assert_parses_alike(qwen_like_tokenizer, output)
    assert strip_control_tokens("a <|im_<|im_end|>end|> b", qwen_like_tokenizer) == "a  b"


def test_a_call_that_is_never_run_is_not_executed(qwen_like_tokenizer):
    script = [call("search", query="a"), call("search", query="b"), "never"]
    output, model = run_loop(TapoToolAgentLoop, qwen_like_tokenizer, script, max_assistant_turns=2)
    assert len(model.prompts) == 2
    assert [step["status"] for step in record_of(output)] == ["ok", "not_executed"]
    assert_parses_alike(qwen_like_tokenizer, output)


def test_an_answer_that_does_not_fit_was_never_seen(qwen_like_tokenizer):
    output, model = run_loop(
        TapoToolAgentLoop, qwen_like_tokenizer, [call("search", query="long"), "never"], response_length=120
    )
    assert len(model.prompts) == 1
    assert [step["status"] for step in record_of(output)] == ["not_executed"]
    assert_parses_alike(qwen_like_tokenizer, output)


def test_a_call_cut_at_the_response_length(qwen_like_tokenizer):
    output, _ = run_loop(TapoToolAgentLoop, qwen_like_tokenizer, [call("search", query="a")], response_length=10)
    assert len(output.response_ids) == 10
    steps = recorded_steps(output.extra_fields["tapo_steps"], 0, 10, (), None)
    assert all(0 <= s.turn[0] <= s.call[0] <= s.call[1] <= s.turn[1] <= 10 and not s.ok for s in steps)


@pytest.fixture
def cropping(monkeypatch):
    """Loops with a tool that returns images, and a processor that refuses small ones. Veering off the real path in one
    thing: no VL processor can be built offline, so the merge of image answers into the prompt is that of their text.
    """
    from PIL import Image

    looks = {"red": ((8, 8), (255, 0, 0)), "blue": ((8, 8), (0, 0, 255)), "thin": ((1, 8), (0, 0, 255))}

    class Crop(BaseTool):
        async def execute(self, instance_id, parameters, **kwargs):
            size, colour = looks[parameters["part"]]
            return ToolResponse(text="a crop", image=[Image.new("RGB", size, colour)]), 0.5, {}

    search = Search({}, schema("search", query="string", image="integer"))
    monkeypatch.setattr(f"{__name__}.tools", lambda: [Crop({}, schema("crop", part="string")), search])
    monkeypatch.setattr(TapoToolAgentLoop, "_assert_mm_supported", lambda self, has: None)
    stock_merge = ToolAgentLoop.ct_merge_context_msg

    async def merge(self, previous, updated, *args, **kwargs):
        def plain(message):
            if not isinstance(message.get("content"), list):
                return message
            if any(part["image"].width < 2 for part in message["content"] if part["type"] == "image"):
                raise ValueError("width must be larger")
            return {**message, "content": "a crop"}

        return await stock_merge(self, list(map(plain, previous)), list(map(plain, updated)), *args, **kwargs)

    monkeypatch.setattr(TapoToolAgentLoop, "ct_merge_context_msg", merge)
    original_init = TapoToolAgentLoop.__init__

    def init(self, *args, **kwargs):
        original_init(self, *args, **kwargs)
        self.processor = type("P", (), {"image_processor": True})()

    async def no_images(self, messages):
        return {}

    monkeypatch.setattr(TapoToolAgentLoop, "__init__", init)
    monkeypatch.setattr(TapoToolAgentLoop, "process_multi_modal_info", no_images)


@pytest.mark.usefixtures("cropping")
def test_images_keep_the_identity_of_their_content(qwen_like_tokenizer):
    resolved = {}
    for first in ("red", "blue"):
        script = [call("crop", part=first), call("search", query="what is it", image=0), "done"]
        output, _ = run_loop(TapoToolAgentLoop, qwen_like_tokenizer, script)
        record = output.extra_fields["tapo_steps"]
        assert record["steps"][0]["produced"] == [0]
        assert [step["images_at_hand"] for step in record["steps"]] == [0, 1]
        steps = recorded_steps(record, 0, len(output.response_ids), ["image"], 0)
        resolved[first] = steps[1].arguments["image"]
        assert resolved[first] == record["images"][0]
    assert resolved["red"] != resolved["blue"]


@pytest.mark.usefixtures("cropping")
def test_an_image_that_the_processor_refuses_is_an_error(qwen_like_tokenizer):
    script = [call("crop", part="thin") + "\n" + call("search", query="a"), call("crop", part="red"), "done"]
    output, model = run_loop(TapoToolAgentLoop, qwen_like_tokenizer, script, max_parallel_calls=2)
    record = output.extra_fields["tapo_steps"]
    assert [step["status"] for step in record["steps"]] == ["error", "ok", "ok"]
    assert [step["produced"] for step in record["steps"]] == [[], [], [0]]
    assert len(record["images"]) == len(output.multi_modal_data["images"]) == 1
    assert output.extra_fields["tool_rewards"] == [0.5, 0.5]
    seen = qwen_like_tokenizer.decode(model.prompts[1])
    assert seen.count("width must be larger") == seen.count("found a") == 1
    assert_parses_alike(qwen_like_tokenizer, output)


@pytest.mark.parametrize(
    "settings",
    [
        {"tool_timeout_s": 0},
        {"tool_timeout_s": True},
        {"tool_timeout_s": None},
        {"tool_timeout_s": float("nan")},
        {"max_malformed_turns": -1},
        {"max_malformed_turns": 0.5},
        {"max_malformed_turns": "3"},
        {"max_calls": 3},
        {"max_calls": {"search": -1}},
        {"max_calls": {"serach": 3}},
    ],
)
def test_bad_settings(qwen_like_tokenizer, settings):
    with pytest.raises(ValueError, match=f"tapo_tool_agent: {next(iter(settings))}"):
        run_loop(TapoToolAgentLoop, qwen_like_tokenizer, ["x"], settings=settings)


def test_registered_and_the_shipped_yaml_makes_it(qwen_like_tokenizer):
    from importlib.resources import files

    from hydra.utils import instantiate
    from verl.experimental.agent_loop.agent_loop import _agent_loop_registry

    assert "tapo_tool_agent" in _agent_loop_registry
    (entry,) = OmegaConf.create((files("verl_tapo") / "conf" / "agent_loop.yaml").read_text())
    assert entry["_target_"] == _agent_loop_registry["tapo_tool_agent"]["_target_"]

    def made(tokenizer, **kwargs):
        loop = instantiate(config={**entry, "tool_timeout_s": 5}, tokenizer=tokenizer, **kwargs)
        assert (type(loop), loop.tool_timeout_s, loop.max_malformed_turns) == (TapoToolAgentLoop, 5.0, 3)
        return loop

    output, _ = run_loop(made, qwen_like_tokenizer, [call("search", query="a"), "done"])
    assert record_of(output)[0]["ok"]
    assert (entry["tool_timeout_s"], entry["max_malformed_turns"]) == (60.0, 3)
