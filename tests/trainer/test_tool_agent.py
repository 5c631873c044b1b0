"""The recording agent loop: the real loop, the real stock loop beside it, real tools, a scripted model."""

import asyncio
import json
import logging
import signal
import threading
import time

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from verl_tapo.answers.evidence import evidence_of
from verl_tapo.calls.call import MALFORMED
from verl_tapo.calls.parsing import parse_steps
from verl_tapo.records import recorded_steps

pytest.importorskip("verl.experimental.agent_loop")

from agent_loops import GROUND_TRUTH, call, run_scripted, schema, scripted
from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics
from verl.experimental.agent_loop.tool_agent_loop import ToolAgentLoop
from verl.tools.base_tool import BaseTool
from verl.tools.function_tool import FunctionTool
from verl.tools.schemas import ToolResponse

from verl_tapo.rollout import execution
from verl_tapo.rollout import scripted as package
from verl_tapo.rollout.tool_agent import TapoToolAgentLoop, strip_control_tokens
from verl_tapo.trainer.verl_parser import cached_parser

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
        if query == "exit":
            raise SystemExit(3)
        if query == "interrupt":
            raise KeyboardInterrupt
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
        if query in ODD:
            return ToolResponse(text="found"), *ODD[query]
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
        if query == "long Paris":
            return ToolResponse(text=f"{'word ' * 40}found Paris in the end{' word' * 40}"), None, {}
        if query == "long":
            return ToolResponse(text="word " * 400), None, {}
        return ToolResponse(text=f"found {query}"), 0.5, {"hits": 1}


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


class Unwilling:
    def __str__(self):
        raise RuntimeError("no text")

    def item(self):
        raise RuntimeError("no number")


# Reward and metrics, as a tool may return them.
ODD = {
    "huge": (10**400, {"n": 10**400, "m": 1}),
    "beyond text": (10**5000, {"n": 10**5000, "m": 1}),
    "nan": (float("nan"), {"n": float("nan"), "m": 1}),
    "infinite": (float("-inf"), {"n": float("inf"), "m": 1}),
    "complex": (1j, {"n": np.float32("nan"), "m": 1}),
    "deep": ([], {"n": nested(100), "m": 1}),
    "deeper": ("0.5", {"n": nested(900), "m": 1}),
    "deepest": ({}, {"n": nested(100_000), "m": 1}),
    "foreign": (Unwilling(), {"n": Unwilling(), "m": 1}),
    "no mapping": (b"1", [("m", 1)]),
    "none": (None, None),
    "numbers of NumPy and torch": (torch.tensor(0.5), {"m": np.int64(1)}),
}


def add(a: int, b: int) -> str:
    errors = {1: SystemExit(3), 2: KeyboardInterrupt(), 3: StopIteration(), 4: OwnError("of no known kind")}
    if b == 0 and a in errors:
        raise errors[a]
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
    recorded = recorded_steps(output.extra_fields["tapo_steps"], 0, len(output.response_ids), (), None)
    assert parsed_steps(tokenizer, output) == recorded


def parsed_steps(tokenizer, output):
    """The steps in the output's tokens."""
    return parse_steps(
        cached_parser("hermes", tokenizer),
        torch.tensor(output.response_ids),
        torch.tensor(output.response_mask),
        [0, len(output.response_ids)],
        [0],
        evidence=lambda row: evidence_of(GROUND_TRUTH),
    ).steps


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
    assert (search["seen"], addition["seen"]) == (True, False)
    for step, text in ((search, call("search", query="Paris")), (addition, call("add", a=1, b=2))):
        start, end = step["call"]
        assert qwen_like_tokenizer.decode(ours.response_ids[start:end]) == text
        assert (step["ok"], step["status"]) == (True, "ok")
        assert 0 <= step["latency_s"] < 5
        assert all(ours.response_mask[step["turn"][0] : step["turn"][1]])
    assert search["metrics"] == {"hits": 1}
    assert addition["arguments"] == {"a": 1, "b": 2}
    assert_parses_alike(qwen_like_tokenizer, ours)


def text_of(tokenizer, model):
    return tokenizer.decode(model.prompts[-1])


@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_answers_are_cut_as_the_stock_loop_cuts_them_and_grounded_before(qwen_like_tokenizer, side):
    """What the model sees is the same; what was cut away was held all the same, which tokens alone cannot tell."""
    script = [call("search", query="long Paris"), call("search", query="Paris"), "done"]
    limits = {"max_tool_response_length": 30, "tool_response_truncate_side": side}
    stock, _ = run_loop(ToolAgentLoop, qwen_like_tokenizer, script, **limits)
    ours, model = run_loop(TapoToolAgentLoop, qwen_like_tokenizer, script, **limits)
    assert ours.response_ids == stock.response_ids
    assert "(truncated)" in text_of(qwen_like_tokenizer, model)
    assert "found Paris in the end" not in text_of(qwen_like_tokenizer, model)
    assert [step["seen"] for step in record_of(ours)] == [True, True]
    assert [step.seen for step in parsed_steps(qwen_like_tokenizer, ours)] == [None, True]


@pytest.mark.parametrize(
    ("turn", "seen"),
    [
        (call("search", query="Paris"), True),
        (call("search", query="Rome"), False),
        (call("search", query="found Paris"), None),  # it may be an echo
        (call("search", query="raise"), False),
        (call("nothing", query="Paris"), False),
        ("<tool_call>\n{]\n</tool_call>", False),
    ],
)
def test_what_was_found_and_no_ground_truth_in_the_prompt(qwen_like_tokenizer, turn, seen):
    output, model = run_loop(TapoToolAgentLoop, qwen_like_tokenizer, [turn, "done"])
    assert [step["seen"] for step in record_of(output)] == [seen]
    assert_parses_alike(qwen_like_tokenizer, output)
    if seen is False:
        assert "found Paris" not in text_of(qwen_like_tokenizer, model)


@pytest.mark.parametrize(
    ("truth", "selection", "expected"),
    [
        ("Paris", None, True),
        ("Paris", ["search"], True),
        ("yes", None, False),
        ("Paris", ["a tool that there is not"], False),
    ],
)
def test_whether_a_rollout_that_calls_nothing_could_have_found_the_answer(
    qwen_like_tokenizer, truth, selection, expected
):
    """VeRL takes a row's tools from its ``tool_selection``."""
    columns = {"reward_model": {"ground_truth": truth}, "extra_info": {"tool_selection": selection}}
    output, _ = package.run_scripted(TapoToolAgentLoop, qwen_like_tokenizer, tools(), ["Paris"], columns=columns)
    record = output.extra_fields["tapo_steps"]
    assert (record["steps"], record["recognisable"]) == ([], expected)


def test_calls_beyond_the_parallel_limit_are_answered(qwen_like_tokenizer):
    both = call("search", query="a") + "\n" + call("search", query="b") + "\n" + call("search", query="c")
    output, model = run_loop(TapoToolAgentLoop, qwen_like_tokenizer, [both, "done"], max_parallel_calls=2)
    assert [step["status"] for step in record_of(output)] == ["ok", "ok", "over_limit"]
    seen = qwen_like_tokenizer.decode(model.prompts[1])
    told = "[tool call not executed] Limit of calls per turn reached (2)"
    assert seen.index("found a") < seen.index("found b") < seen.index(told)
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
    assert seen.index("Limit of search calls reached (1)") < seen.index("Limit of tool calls reached (2)")
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


@pytest.mark.parametrize(
    ("settings", "statuses"), [({}, ["ok", "over_limit"]), ({"max_calls": {"search": 2}}, ["ok", "ok"])]
)
def test_a_tool_may_bring_its_limit_and_the_run_s_own_counts(qwen_like_tokenizer, monkeypatch, settings, statuses):
    monkeypatch.setattr(Search, "max_calls", 1, raising=False)
    script = [call("search", query="a"), call("search", query="b"), "x"]
    output, model = run_loop(TapoToolAgentLoop, qwen_like_tokenizer, script, settings=settings)
    assert [step["status"] for step in record_of(output)] == statuses
    refused = "Limit of search calls reached (1)" in qwen_like_tokenizer.decode(model.prompts[-1])
    assert refused == ("over_limit" in statuses)


@pytest.mark.parametrize("limit", [-1, "3", True])
def test_a_tool_s_own_limit_is_checked(qwen_like_tokenizer, monkeypatch, limit):
    monkeypatch.setattr(Search, "max_calls", limit, raising=False)
    with pytest.raises(ValueError, match=r"tapo_tool_agent: max_calls\.search must be a whole number"):
        run_loop(TapoToolAgentLoop, qwen_like_tokenizer, ["x"])


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
    assert "[tool call not executed] Malformed call: " in qwen_like_tokenizer.decode(model.prompts[1])
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
    assert seen.index("Malformed call") < seen.index("found a")


@pytest.mark.parametrize(
    ("query", "status", "seen"),
    [
        ("raise", "error", "Error executing tool 'search': the index is down"),
        ("hang", "timeout", "Error executing tool 'search': no answer within 0.2 s"),
        ("wrong type", "error", "Error executing tool 'search':"),
        ("video", "error", "video results are not supported"),
        ("image", "error", "it returned an image, but the model takes no images"),
        ("release", "error", "Error executing tool 'search': the instance is stuck"),
        ("cancel", "error", "Error executing tool 'search': the tool was cancelled"),
        ("own error", "error", "Error executing tool 'search': of no known kind"),
        ("no text", "error", "Error executing tool 'search': no text"),
        ("surrogate", "error", "Error executing tool 'search': half a ? pair"),
        ("long error", "error", "Error executing tool 'search': word word"),
        ("int text", "error", "Error executing tool 'search':"),
        ("deaf", "timeout", "Error executing tool 'search': no answer within 0.2 s"),
        ("exit", "error", "Error executing tool 'search': SystemExit: 3"),
        ("interrupt", "error", "Error executing tool 'search': KeyboardInterrupt"),
    ],
)
def test_a_failing_tool_is_an_answer_not_a_crash(qwen_like_tokenizer, query, status, seen):
    script = [call("search", query=query), "done"]
    output, model = run_loop(TapoToolAgentLoop, qwen_like_tokenizer, script, settings={"tool_timeout_s": 0.2})
    (step,) = record_of(output)
    assert (step["status"], step["ok"]) == (status, False)
    assert step["latency_s"] < 1
    assert step["abandoned"] == (query == "deaf")
    assert seen in qwen_like_tokenizer.decode(model.prompts[1])
    assert_parses_alike(qwen_like_tokenizer, output)


@pytest.mark.parametrize(
    ("a", "seen"), [(1, "SystemExit: 3"), (2, "KeyboardInterrupt"), (3, "Stop"), (4, "of no known")]
)
def test_whatever_a_plain_function_raises_is_an_answer(qwen_like_tokenizer, a, seen):
    output, model = run_loop(TapoToolAgentLoop, qwen_like_tokenizer, [call("add", a=a, b=0), "done"])
    assert [step["status"] for step in record_of(output)] == ["error"]
    assert f"Error executing tool 'add': {seen}" in qwen_like_tokenizer.decode(model.prompts[1])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_process_is_no_tool_s_failure(qwen_like_tokenizer, monkeypatch, number):
    """Python raises its exception in the midst of the tool; a plain event loop, since `asyncio.run` handles SIGINT."""

    class Interrupted(Search):
        async def execute(self, instance_id, parameters, **kwargs):
            signal.raise_signal(number)
            return ToolResponse(text="found"), None, {}

    def stop(*_):
        raise SystemExit(143)

    expected = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: SystemExit}[number]
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: stop}
    before = {n: signal.signal(n, handler) for n, handler in handlers.items()}
    tool = Interrupted({}, schema("search", query="string"))
    run, model = scripted(TapoToolAgentLoop, qwen_like_tokenizer, [tool], [call("search", query="a"), "done"])
    loop = asyncio.new_event_loop()
    try:
        with pytest.raises(expected):
            loop.run_until_complete(run())
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        assert {n: signal.getsignal(n) for n in handlers} == handlers
    finally:
        loop.close()
        for n, handler in before.items():
            signal.signal(n, handler)
    assert len(model.prompts) == 1


@pytest.fixture
def told(monkeypatch, caplog):
    """What is said once in a process has not been said yet."""
    monkeypatch.setattr(execution, "_told", set())
    caplog.set_level(logging.WARNING)
    return caplog


def test_tools_that_block_their_threads_stop_no_rollout(qwen_like_tokenizer, told):
    """More of them than a default executor has threads; they would go on for half a minute."""
    go, begun, ended = threading.Event(), [], []

    def block(query: str) -> str:
        begun.append(query)
        go.wait(30)
        ended.append(query)
        return "too late"

    tools = [FunctionTool("block", block, schema("block", query="string"))]
    script = [call("block", query="a"), call("block", query="b"), "done"]

    async def all_of_them():
        runs = [
            scripted(TapoToolAgentLoop, qwen_like_tokenizer, tools, script, {"tool_timeout_s": 0.2})[0]
            for _ in range(12)
        ]
        return await asyncio.gather(*[run() for run in runs])

    outputs = asyncio.run(all_of_them())
    assert (len(begun), ended) == (24, [])
    go.set()
    for output in outputs:
        steps = record_of(output)
        assert [(step["status"], step["abandoned"]) for step in steps] == [("timeout", True)] * 2
        assert all(step["latency_s"] < 10 for step in steps)
    assert told.text.count("'block' did not stop at its timeout of 0.2 s and cannot be stopped") == 1


def test_a_tool_that_fills_the_default_executor_stops_no_rollout(qwen_like_tokenizer):
    """What veRL and the loop compute in threads, such as the merging of tokens, does not wait for it."""
    go, begun, ended = threading.Event(), [], []

    class Blocking(Search):
        async def execute(self, instance_id, parameters, **kwargs):
            await asyncio.to_thread(lambda: (begun.append(1), go.wait(30), ended.append(1)))

    tools = [Blocking({}, schema("search", query="string"))]
    script = [call("search", query="a"), "done"]

    async def all_of_them():
        runs = [
            scripted(TapoToolAgentLoop, qwen_like_tokenizer, tools, script, {"tool_timeout_s": 0.2})[0]
            for _ in range(40)
        ]
        outputs = await asyncio.gather(*[run() for run in runs])
        assert begun
        assert not ended
        go.set()
        return outputs

    statuses = [step["status"] for output in asyncio.run(all_of_them()) for step in record_of(output)]
    assert statuses == ["timeout"] * 40


def test_plain_functions_see_the_context_and_their_arguments(qwen_like_tokenizer):
    output, model = run_loop(TapoToolAgentLoop, qwen_like_tokenizer, [call("add", a=20, b=22), "done"])
    assert record_of(output)[0]["status"] == "ok"
    assert "42" in qwen_like_tokenizer.decode(model.prompts[1])


def test_a_tool_that_holds_the_event_loop_is_named_while_it_does(qwen_like_tokenizer, monkeypatch, told):
    monkeypatch.setattr(execution, "_STALL_S", 0.05)

    class Holding(Search):
        async def execute(self, instance_id, parameters, **kwargs):
            await asyncio.sleep(0)
            start = time.monotonic()
            while "held the event loop" not in told.text and time.monotonic() < start + 30:
                time.sleep(0.01)
            return ToolResponse(text="found"), None, {}

    tools = [Holding({}, schema("search", query="string"))]
    script = [call("search", query="a"), call("search", query="b"), "done"]
    output, _ = run_scripted(TapoToolAgentLoop, qwen_like_tokenizer, tools, script, {"tool_timeout_s": 0.1})
    assert all(step["latency_s"] < 30 for step in record_of(output))
    assert told.text.count("the tool 'search' has held the event loop for") == 1
    told.clear()
    execution._told.clear()
    run_loop(TapoToolAgentLoop, qwen_like_tokenizer, [call("search", query="hang"), "x"], {"tool_timeout_s": 0.3})
    assert "held the event loop" not in told.text  # one that only waits does not


@pytest.mark.parametrize("query", ODD)
def test_odd_rewards_and_metrics_are_named_and_left_out(qwen_like_tokenizer, told, query):
    script = [call("search", query=query), call("search", query=query), "done"]
    output, _ = run_loop(TapoToolAgentLoop, qwen_like_tokenizer, script)
    for step in record_of(output):
        assert step["status"] == "ok"
        assert step["metrics"] == ({} if query in ("no mapping", "none") else {"m": 1})
    fine = query == "numbers of NumPy and torch"
    assert output.extra_fields["tool_rewards"] == ([0.5, 0.5] if fine else [])
    named = query not in ("none", "numbers of NumPy and torch")
    assert told.text.count("'search' returned a reward that is no finite number") == named
    assert told.text.count("'search' returned metrics that cannot be recorded") == named


@pytest.mark.parametrize("how", ["attributes", "contents", "nothing"])
def test_what_a_tool_does_to_agent_data_does_not_bend_the_trajectory(qwen_like_tokenizer, how):
    seen = []

    class Meddling(Search):
        async def execute(self, instance_id, parameters, agent_data, **kwargs):
            seen.append((getattr(agent_data, "session", None), agent_data.extra_fields.get("mine")))
            if how != "nothing":
                agent_data.messages[0].clear()
                for value in vars(agent_data).values():
                    if isinstance(value, list | dict):
                        value.clear()
            if how == "attributes":
                vars(agent_data).clear()
            agent_data.session = f"session {len(seen)}"
            if how != "attributes":
                agent_data.extra_fields["mine"] = f"field {len(seen)}"
            return ToolResponse(text=f"found {parameters['query']}"), 0.5, {}

    tools = [Meddling({}, schema("search", query="string"))]
    both = call("search", query="b") + call("search", query="c")
    script = [call("search", query="a"), both, "done"]
    output, model = run_scripted(TapoToolAgentLoop, qwen_like_tokenizer, tools, script, max_parallel_calls=2)
    tools = [Search({}, schema("search", query="string"))]
    tame, tame_model = run_scripted(TapoToolAgentLoop, qwen_like_tokenizer, tools, script, max_parallel_calls=2)
    assert model.prompts == tame_model.prompts
    assert (output.response_ids, output.response_mask) == (tame.response_ids, tame.response_mask)
    assert [step["status"] for step in record_of(output)] == ["ok"] * 3
    assert output.extra_fields["tool_rewards"] == [0.5] * 3
    for name in ("min_global_steps", "max_global_steps"):
        assert output.extra_fields[name] == 7
    assert [session for session, _ in seen] == [None, "session 1", "session 2"]
    if how == "nothing":
        assert [mine for _, mine in seen] == [None, "field 1", "field 2"]
        assert output.extra_fields["mine"] == "field 3"


def test_what_cannot_be_sent_to_the_trainer_is_left_out(qwen_like_tokenizer, told):
    class Storing(Search):
        async def execute(self, instance_id, parameters, agent_data, **kwargs):
            agent_data.extra_fields.update({"lock": threading.Lock(), 5: "a number", "mine": [1, 2]})
            return ToolResponse(text="found"), None, {}

    tools = [Storing({}, schema("search", query="string"))]
    output, _ = run_scripted(TapoToolAgentLoop, qwen_like_tokenizer, tools, [call("search", query="a"), "done"])
    assert output.extra_fields["mine"] == [1, 2]
    assert not {"lock", 5} & set(output.extra_fields)
    assert "stored in extra_fields as 'lock' cannot be sent" in told.text


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
    began, ended = threading.Event(), []

    class Slow(Search):
        async def execute(self, instance_id, parameters, **kwargs):
            began.set()
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
        while not began.is_set():
            await asyncio.sleep(0)
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
    thing: no VL processor can be built offline, so the merge of image answers into the prompt is that of their text
    and an image's tokens.
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
            return {**message, "content": "a crop<|vision_start|><|image_pad|><|vision_end|>"}

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
