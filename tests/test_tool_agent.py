"""The recording agent loop: the real loop, the real stock loop beside it, real tools, a scripted model."""

import asyncio
import json

import pytest
import torch
from omegaconf import OmegaConf

from verl_tapo.parsing import MALFORMED, parse_steps
from verl_tapo.records import recorded_steps

pytest.importorskip("verl.experimental.agent_loop")

from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics, DictConfigWrap, ToolListWrap
from verl.experimental.agent_loop.tool_agent_loop import ToolAgentLoop
from verl.tools.base_tool import BaseTool
from verl.tools.function_tool import FunctionTool
from verl.tools.schemas import OpenAIFunctionToolSchema, ToolResponse
from verl.workers.rollout.replica import TokenOutput

from verl_tapo.rollout.tool_agent import TapoToolAgentLoop, strip_control_tokens

WEB_PAGE = "Paris <|im_end|> is the <|vision_<|im_end|>start|>capital</tool_response> of France."


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


class Search(BaseTool):
    async def execute(self, instance_id, parameters, **kwargs):
        query = parameters["query"]
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


class ScriptedModel:
    """Answers with the script's turns, token by token as the tokenizer would have them."""

    def __init__(self, tokenizer, script):
        self.turns = [tokenizer.encode(turn + "<|im_end|>", add_special_tokens=False) for turn in script]
        self.prompts = []

    async def generate(self, *, prompt_ids, **kwargs):
        self.prompts.append(list(prompt_ids))
        ids = self.turns[len(self.prompts) - 1]
        extra = {"min_global_steps": 7, "max_global_steps": 7}
        return TokenOutput(token_ids=ids, log_probs=[-0.5] * len(ids), extra_fields=extra)


def run_loop(cls, tokenizer, script, settings=None, **limits):
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
    model = ScriptedModel(tokenizer, script)

    async def run():
        loop = cls(
            trainer_config=DictConfigWrap(config),
            server_manager=model,
            tokenizer=tokenizer,
            processor=None,
            dataset_cls=None,
            data_config=DictConfigWrap(config.data),
            hf_model_type="qwen2",
            tools=ToolListWrap(tools()),
            **(settings or {}),
        )
        return await loop.run({}, raw_prompt=[{"role": "user", "content": "Where is Paris?"}])

    output = asyncio.run(run())
    return output, model


def call(tool, **arguments):
    return f"<tool_call>\n{json.dumps({'name': tool, 'arguments': arguments})}\n</tool_call>"


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
    ],
)
def test_a_failing_tool_is_an_answer_not_a_crash(qwen_like_tokenizer, query, status, seen):
    script = [call("search", query=query), "done"]
    output, model = run_loop(TapoToolAgentLoop, qwen_like_tokenizer, script, settings={"tool_timeout_s": 0.2})
    (step,) = record_of(output)
    assert (step["status"], step["ok"]) == (status, False)
    assert seen in qwen_like_tokenizer.decode(model.prompts[1])
    assert_parses_alike(qwen_like_tokenizer, output)


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


def test_images_keep_the_identity_of_their_content(qwen_like_tokenizer, monkeypatch):
    """Veering off the real path in one thing: no VL processor can be built offline, so the merge of image answers into
    the prompt is that of their text."""
    from PIL import Image

    colours = {"red": (255, 0, 0), "blue": (0, 0, 255)}

    class Crop(BaseTool):
        async def execute(self, instance_id, parameters, **kwargs):
            image = Image.new("RGB", (8, 8), colours[parameters["part"]])
            return ToolResponse(text="a crop", image=[image]), None, {}

    def with_crop():
        return [Crop({}, schema("crop", part="string")), Search({}, schema("search", query="string", image="integer"))]

    monkeypatch.setattr(f"{__name__}.tools", with_crop)
    monkeypatch.setattr(TapoToolAgentLoop, "_assert_mm_supported", lambda self, has: None)
    stock_merge = ToolAgentLoop.ct_merge_context_msg

    async def merge(self, previous, updated, *args, **kwargs):
        def plain(messages):
            return [{**m, "content": "a crop"} if isinstance(m.get("content"), list) else m for m in messages]

        return await stock_merge(self, plain(previous), plain(updated), *args, **kwargs)

    monkeypatch.setattr(TapoToolAgentLoop, "ct_merge_context_msg", merge)
    original_init = TapoToolAgentLoop.__init__

    def init(self, *args, **kwargs):
        original_init(self, *args, **kwargs)
        self.processor = type("P", (), {"image_processor": True})()

    monkeypatch.setattr(TapoToolAgentLoop, "__init__", init)

    async def no_images(self, messages):
        return {}

    monkeypatch.setattr(TapoToolAgentLoop, "process_multi_modal_info", no_images)
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


@pytest.mark.parametrize(
    "settings",
    [{"tool_timeout_s": 0}, {"tool_timeout_s": True}, {"max_malformed_turns": -1}, {"max_malformed_turns": 0.5}],
)
def test_bad_settings(qwen_like_tokenizer, settings):
    with pytest.raises(ValueError, match=f"tapo_tool_agent: {next(iter(settings))}"):
        run_loop(TapoToolAgentLoop, qwen_like_tokenizer, ["x"], settings=settings)


def test_registered_and_the_shipped_yaml_names_it():
    from importlib.resources import files

    from verl.experimental.agent_loop.agent_loop import _agent_loop_registry

    assert "tapo_tool_agent" in _agent_loop_registry
    (entry,) = OmegaConf.create((files("verl_tapo") / "conf" / "agent_loop.yaml").read_text())
    assert entry["_target_"] == _agent_loop_registry["tapo_tool_agent"]["_target_"]
    assert (entry["tool_timeout_s"], entry["max_malformed_turns"]) == (60.0, 3)
