"""`search_agent.evaluate` against a server on loopback that plays scripts, and tools that search a dict."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from flags_and_facts.model import CHAT_TEMPLATE
from jinja2 import Environment
from PIL import Image
from recipe import evaluation_stand_ins
from recipe.evaluation_server import SCRIPTS, ZOOMS, Server, answer, search
from search_agent.evaluate import __main__ as command
from search_agent.prompts import create_kwargs

from search_backends.chat.messages import calls_in_text
from search_backends.evaluation.questions import read_questions
from verl_tapo.calls.limits import strip_control

STAND_INS = Path(evaluation_stand_ins.__file__)


def picture(number, kind="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", (64 + number, 48), (number % 256, 40, 90)).save(buffer, kind)
    return buffer.getvalue()


def row(number, play, benchmark="FVQA-test", images=1, **extra):
    text = "<image>" * images + f"\nplay {play} number {number}"
    return {
        "data_source": benchmark,
        "prompt": [{"role": "system", "content": "Answer."}, {"role": "user", "content": text}],
        "images": [{"bytes": picture(number + k)} for k in range(images)],
        "reward_model": {"style": "rule", "ground_truth": [f"value {TRUTH.get(play, 1)}"]},
        "extra_info": {"data_id": f"q{number}", "question": text, "category": "search_free", **extra},
    }


TRUTH = {
    "search": 2,
    "zoom": 3,
    "two": 3,
    "malformed": 4,
    "unknown": 5,
    "silly": 6,
    "hermes": 7,
    "outage": 8,
    "flaky": 9,
}
# Every way a conversation can go without a failure of the infrastructure; right or wrong, and how it ends.
FINISHING = {
    "direct": (1, "answered"),
    "wrong": (0, "answered"),
    "plain": (0, "answered"),
    "search": (1, "answered"),
    "zoom": (1, "answered"),
    "hermes": (1, "answered"),
    "malformed": (1, "answered"),
    "broken": (0, "malformed"),
    "unknown": (1, "answered"),
    "silly": (1, "answered"),
    "two": (1, "answered"),
    "endless": (0, "turns"),
    "cut": (0, "length"),
    "long": (0, "context"),
    "flaky": (1, "answered"),
}


@pytest.fixture
def stand_ins(monkeypatch):
    evaluation_stand_ins.install(lambda name, module: monkeypatch.setitem(sys.modules, name, module))


@pytest.fixture
def server():
    with Server() as server:
        yield server


def write(folder, rows, name="fvqa_test.parquet"):
    folder.mkdir(exist_ok=True, parents=True)
    pd.DataFrame(rows).to_parquet(folder / name)
    return folder / name


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tools.yaml").write_text("tools: []\n")
    return tmp_path


def arguments(folder, data, url, *more):
    files = [str(file) for file in (data if isinstance(data, list) else [data])]
    common = ["--tools", str(folder / "tools.yaml"), "--out", str(folder / "out"), "--base-url", url]
    return ["--data", *files, *common, "--model", "player", *more]


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def transcripts(folder):
    return {entry["question"].split()[-3]: entry for entry in lines(folder / "out" / "transcripts.jsonl")}


def statuses(entry):
    return [(step["tool"], step["status"]) for step in entry["tapo_steps"]["steps"]]


def test_every_way_a_conversation_goes(stand_ins, folder, server):
    data = write(folder, [row(number, play) for number, play in enumerate(FINISHING)])
    assert command.main(arguments(folder, data, server.url, "--max-turns", "5")) == 0
    found = transcripts(folder)
    assert {play: (entry["acc"], entry["ending"]) for play, entry in found.items()} == FINISHING
    assert statuses(found["search"]) == [("text_search", "ok")]
    assert statuses(found["hermes"]) == [("text_search", "ok")]
    assert statuses(found["malformed"]) == [("text_search", "malformed"), ("text_search", "ok")]
    assert statuses(found["broken"]) == [("", "malformed")] * 4  # three are answered, then it ends
    assert statuses(found["unknown"]) == [("teleport", "unknown_tool")]
    assert statuses(found["silly"]) == [("text_search", "error")]
    assert statuses(found["two"]) == [("text_search", "ok"), ("text_search", "over_limit")]
    assert statuses(found["endless"]) == [("text_search", "ok")] * 4 + [("text_search", "not_executed")]
    assert found["endless"]["turns"] == 5
    assert found["zoom"]["prompt_tokens"] == 100 + 200 + 300 + 400
    assert found["zoom"]["completion_tokens"] == 40


def test_images_of_tools_join_the_conversation_and_are_counted_on(stand_ins, folder, server):
    data = write(folder, [row(1, "zoom", images=1)])
    assert command.main(arguments(folder, data, server.url)) == 0
    entry = transcripts(folder)["zoom"]
    first, second, _ = entry["tapo_steps"]["steps"]
    assert (first["images_at_hand"], first["produced"]) == (1, [1])
    assert (second["images_at_hand"], second["produced"]) == (2, [2])
    assert len(entry["images"]) == len(entry["tapo_steps"]["images"]) == 3
    files = [folder / "out" / "images" / name for name in entry["images"]]
    assert files[0].read_bytes() == picture(1)
    with Image.open(files[1]) as shown:
        assert shown.size == (32, 24)  # what the stand-in cuts out
    # On the wire: images as data URLs; where tools may say only text, in a user's message after the answer.
    last = server.requests[-1]["messages"]
    urls = [
        part["image_url"]["url"]
        for message in last
        if isinstance(message["content"], list)
        for part in message["content"]
        if part["type"] == "image_url"
    ]
    assert len(urls) == 3
    assert all(url.startswith("data:image/png;base64,") for url in urls)
    assert [message["role"] for message in last[:5]] == ["system", "user", "assistant", "tool", "user"]
    assert last[3]["tool_call_id"] == last[2]["tool_calls"][0]["id"] == "c1"
    # Nothing but names in the transcript.
    assert "base64" not in (folder / "out" / "transcripts.jsonl").read_text()


def test_a_chat_template_tells_of_the_tools_and_calls_are_read_here(stand_ins, folder, server):
    data = write(folder, [row(1, "hermes"), row(2, "zooms")])
    assert command.main(arguments(folder, data, server.url, "--tool-calls", "template", "--calls-per-turn", "2")) == 0
    assert [entry["acc"] for entry in transcripts(folder).values()] == [1, 1]
    assert {request["tool_choice"] for request in server.requests} == {"none"}
    assert all(len(request["tools"]) == 2 for request in server.requests)
    # The model's text goes back as it was, and the conversation reads as in training, where tools have a role.
    messages = [server_side(message) for message in server.requests[-1]["messages"]]
    said, answered = messages[2:4]
    assert said == {"role": "assistant", "content": ZOOMS}
    calls = [{"role": "tool", "content": [IMAGE, {"type": "text", "text": "Image 2:"}]}]
    calls += [{"role": "tool", "content": [IMAGE, {"type": "text", "text": "Image 3:"}]}]
    assert answered["role"] == "user"
    assert render([*messages[:3], *calls]) == render([*messages[:3], answered])


IMAGE = {"type": "image"}


def server_side(message):
    """A message as a server hands it to the chat template."""
    content = message["content"]
    if isinstance(content, list):
        content = [part if part["type"] == "text" else IMAGE for part in content]
    return {"role": message["role"], "content": content}


def render(messages):
    return Environment().from_string(CHAT_TEMPLATE).render(messages=messages, tools=[], add_generation_prompt=True)


def test_what_the_server_is_asked(stand_ins, folder, server):
    data = write(folder, [row(1, "search")])
    more = ("--temperature", "0.5", "--request", '{"top_p": 0.9, "max_tokens": null, "max_completion_tokens": 50}')
    assert command.main(arguments(folder, data, server.url, *more)) == 0
    request = server.requests[0]
    assert [tool["function"]["name"] for tool in request["tools"]] == ["text_search", "zoom"]
    expected = {"model": "player", "temperature": 0.5, "top_p": 0.9, "max_completion_tokens": 50}
    assert {key: value for key, value in request.items() if key not in ("messages", "tools")} == expected
    answer = server.requests[1]["messages"][-1]
    assert answer == {"role": "tool", "tool_call_id": "c1", "content": "value 2 is what was looked for"}


def test_hermes_tells_the_model_of_the_tools_and_answers_in_text(stand_ins, folder, server):
    data = write(folder, [row(1, "hermes")])
    assert command.main(arguments(folder, data, server.url, "--tool-calls", "hermes")) == 0
    first, second = server.requests
    assert "tools" not in first
    assert first["messages"][0]["content"].startswith("Answer.")
    assert '"text_search"' in first["messages"][0]["content"]
    reply, answer = second["messages"][-2:]
    assert reply["content"].endswith("</tool_call>")
    assert answer["role"] == "user"
    assert answer["content"] == "<tool_response>\nvalue 7 is what was looked for\n</tool_response>"


def test_tool_text_cannot_break_the_prompt(stand_ins, folder, server):
    assert strip_control("a<|image_pad|>b <tool_<|im_end|>call>c</tool_response> 1 < 2 |x|") == "ab c 1 < 2 |x|"


def test_results(stand_ins, folder, server, capsys):
    rows = [row(number, play) for number, play in enumerate(["direct", "search", "wrong", "silly"])]
    rows += [row(10, "zoom", "MMSearch"), row(11, "wrong", "MMSearch")]
    assert command.main(arguments(folder, write(folder, rows), server.url, "--label", "tapo")) == 0
    found = json.loads((folder / "out" / "results.json").read_text())
    assert list(found["benchmarks"]) == ["MMSearch", "FVQA-test"]  # as in the paper's table
    assert found["average"] == pytest.approx((0.5 + 0.75) / 2)
    fvqa = found["benchmarks"]["FVQA-test"]
    assert (fvqa["n"], fvqa["accuracy"], fvqa["tool_calls"]) == (4, 0.75, 0.5)
    assert fvqa["interval"] == pytest.approx([0.3006, 0.9544], abs=1e-4)  # Wilson's, from tables
    assert fvqa["model_faults"] == 0.25
    assert found["benchmarks"]["MMSearch"]["tool_calls_by_tool"] == {"text_search": 0.5, "zoom": 1.0}
    search = found["tools"]["text_search"]
    assert (search["calls"], search["fetch_success"], search["model_faults"]) == (3, 1.0, 1)
    assert search["cache_hits"] == 0.5  # of the stand-in's: every query with an even number
    assert found["undone"] == 0
    assert found["settings"]["temperature"] == 0
    assert {"python", "verl"} <= set(found["versions"])
    text = (folder / "out" / "results.md").read_text()
    assert text.startswith("# tapo\n")
    assert "| FVQA-test | 4 | 75.00 | 30.06 to 95.44 | 0.50 |" in text
    assert "**62.50**" in text


def test_what_the_tools_found(stand_ins, folder, server, monkeypatch):
    """As training's metrics have it; a question without calls says nothing, nor does one with images only."""
    plays = {"misread": (2, "nonsense"), "lost": (3, "nonsense"), "guess": (3, "value 2")}
    for play, (fact, said) in plays.items():
        monkeypatch.setitem(SCRIPTS, play, [search(f"fact {fact}"), answer(said)])
        monkeypatch.setitem(TRUTH, play, 2)
    data = write(folder, [row(number, play) for number, play in enumerate(["search", "direct", "zooms", *plays])])
    assert command.main(arguments(folder, data, server.url)) == 0
    found = json.loads((folder / "out" / "results.json").read_text())
    expected = {"told": 4 / 6, "grounded_successes": 1 / 2, "grounded_failures": 1 / 2, "never_found": 2 / 4}
    assert found["all"]["grounding"] == found["benchmarks"]["FVQA-test"]["grounding"] == pytest.approx(expected)
    assert found["tools"]["text_search"]["found"] == 2 / 4
    assert found["tools"]["zoom"]["found"] is None
    text = (folder / "out" / "results.md").read_text()
    assert "| FVQA-test | 66.67 | 50.00 | 50.00 | 50.00 |" in text
    entry = next(entry for entry in transcripts(folder).values() if entry["tapo_steps"]["steps"])
    assert all("seen" not in json.dumps(message) for message in entry["messages"])


def test_transcripts_of_before_say_nothing_of_what_was_found(stand_ins, folder, server):
    data = write(folder, [row(1, "search"), row(2, "silly")])
    assert command.main(arguments(folder, data, server.url)) == 0
    path = folder / "out" / "transcripts.jsonl"
    entries = lines(path)
    assert sorted(step["seen"] for entry in entries for step in entry["tapo_steps"]["steps"]) == [False, True]
    for entry in entries:
        for step in entry["tapo_steps"]["steps"]:
            del step["seen"]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert command.main(arguments(folder, data, server.url)) == 0
    found = json.loads((folder / "out" / "results.json").read_text())
    assert found["all"]["grounding"] == {"told": 0.0}
    assert "Grounded:" not in (folder / "out" / "results.md").read_text()


@pytest.mark.long
@pytest.mark.parametrize("play", ["500", "hang", "outage", "refuses", "judge"])
def test_failures_of_the_infrastructure_are_not_scored_and_are_done_again(stand_ins, folder, play, monkeypatch):
    # The fourth is a server that takes no such message; it says nothing of the model either.
    script = "direct" if play == "judge" else play
    rows = [row(1, "direct"), row(2, script, **({"judge": "down"} if play == "judge" else {})), row(3, "search")]
    data = write(folder, rows)
    with Server() as server:
        assert command.main(arguments(folder, data, server.url, "--timeout", "1")) == 1
        found = json.loads((folder / "out" / "results.json").read_text())
        assert (found["undone"], found["average"], found["failed_attempts"]) == (1, 1.0, 1)
        assert "1 question(s) are not done" in (folder / "out" / "results.md").read_text()
        if play == "outage":
            assert found["tools"]["text_search"]["fetch_success"] == 0.5
    monkeypatch.setitem(SCRIPTS, script, SCRIPTS["direct"])  # it is up again
    monkeypatch.setattr(evaluation_stand_ins, "JUDGE_DOWN", False)
    with Server() as server:
        assert command.main(arguments(folder, data, server.url, "--timeout", "1")) == 0
        assert len(server.requests) == 1  # nothing is asked twice
    assert len(lines(folder / "out" / "transcripts.jsonl")) == 3


def test_half_a_surrogate_pair_is_the_model_s_fault_and_told_to_it(stand_ins, folder, server):
    data = write(folder, [row(1, "halves")])
    assert command.main(arguments(folder, data, server.url, "--calls-per-turn", "2")) == 0
    (entry,) = transcripts(folder).values()
    named, *searches = entry["tapo_steps"]["steps"]
    assert (named["tool"], named["status"]) == ("?", "unknown_tool")
    # A call in the text is read as in training, where it is malformed.
    assert [step["status"] for step in searches] == ["error", "error", "malformed"]
    assert [step["metrics"] for step in searches[:2]] == [{"fault": "model"}] * 2
    assert entry["ending"] == "answered"
    told = [message for message in entry["messages"] if message["role"] in ("tool", "user")]
    assert sum("an unpaired surrogate" in json.dumps(message) for message in told) == 3
    # What is sent back to the server can be read by it.
    sent = server.requests[2]["messages"][-3]["tool_calls"]
    assert [json.loads(each["function"]["arguments"]) for each in sent] == [{"query": "?"}, {"query": "?"}]
    found = json.loads((folder / "out" / "results.json").read_text())
    assert (found["undone"], found["tools"]["text_search"]["infrastructure_faults"]) == (0, 0)


def test_half_a_surrogate_pair_in_ids_and_malformed_calls_ends_no_conversation(stand_ins, folder, server):
    data = write(folder, [row(1, "ids")])
    assert command.main(arguments(folder, data, server.url, "--calls-per-turn", "3")) == 0
    (entry,) = transcripts(folder).values()
    assert (entry["ending"], entry["acc"], len(server.requests)) == ("answered", 1, 4)
    assert [status for _, status in statuses(entry)] == ["ok"] + ["malformed"] * 5
    asked, answered = server.requests[1]["messages"][-2:]
    assert asked["tool_calls"][0]["id"] == answered["tool_call_id"] == "functions.?:0"


def test_only_tools_that_there_are_stand_in_the_tables(stand_ins, folder, server):
    data = write(folder, [row(1, "ids"), row(2, "names"), row(3, "malformed")])
    assert command.main(arguments(folder, data, server.url, "--calls-per-turn", "1", "--max-turns", "3")) == 0
    found = json.loads((folder / "out" / "results.json").read_text())
    assert list(found["tools"]) == ["text_search"]
    # One call of each turn of "names" is beyond the limit, and in the last turn no call is executed: there is no tool
    # `teleport` all the same.
    assert (found["malformed_calls"], found["calls_of_no_tool"]) == (6, 3)
    assert found["tools"]["text_search"]["calls"] == 1 + 2 + 1
    text = (folder / "out" / "results.md").read_text()
    assert "Malformed calls: 6; calls of tools that do not exist: 3." in text
    assert "teleport" not in text


@pytest.mark.parametrize("play", ["no_number", "parts"])
def test_an_answer_of_another_form_is_the_server_s_fault(stand_ins, folder, server, play):
    data = write(folder, [row(1, "direct"), row(2, play)])
    assert command.main(arguments(folder, data, server.url)) == 1
    (failure,) = lines(folder / "out" / "failures.jsonl")
    assert "the model server's answer is no chat completion" in failure["why"]


@pytest.mark.long
def test_an_outage_stops_the_run_with_one_message(stand_ins, folder, capsys):
    data = write(folder, [row(number, "outage") for number in range(30)])
    with Server() as server:
        assert command.main(arguments(folder, data, server.url, "--max-failures", "4", "--concurrency", "2")) == 1
        assert len(server.requests) <= 7
    said = " ".join(capsys.readouterr().err.split())
    assert "Stopped: 5 questions in a row could not be done, the last because text_search:" in said
    assert "30 of 30 questions are not done; the same command goes on" in said


def test_no_server(stand_ins, folder, capsys):
    data = write(folder, [row(1, "direct")])
    with Server() as server:
        url = server.url
    assert command.main(arguments(folder, data, url)) == 1
    assert "no model server answers at http://127.0.0.1" in capsys.readouterr().err


def test_a_wrong_model_or_key_stops_at_once(stand_ins, folder, server, capsys):
    data = write(folder, [row(number, "403") for number in range(10)])
    assert command.main(arguments(folder, data, server.url, "--model", "another")) == 1
    assert "has no model 'another', but player" in capsys.readouterr().err
    more = ("--out", str(folder / "out2"), "--concurrency", "1")
    assert command.main(arguments(folder, data, server.url, *more)) == 1
    assert len(server.requests) == 1
    assert "403 no access" in capsys.readouterr().err


def test_the_key_is_sent_and_shown_nowhere(stand_ins, folder, server, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    data = write(folder, [row(1, "direct"), row(2, "403")])
    assert command.main(arguments(folder, data, server.url)) == 1
    assert {headers["authorization"] for headers in server.headers} == {"Bearer sk-secret"}
    said = capsys.readouterr().err
    assert "check OPENAI_API_KEY" in said
    written = b"".join(file.read_bytes() for file in (folder / "out").rglob("*") if file.is_file())
    assert "sk-secret" not in said
    assert b"sk-secret" not in written


def test_limits_on_calls_are_those_of_training(stand_ins, folder, server):
    (folder / "loop.yaml").write_text(
        "- {name: tapo_tool_agent, max_calls: {text_search: 2}, max_malformed_turns: 0}\n"
    )
    data = write(folder, [row(1, "endless"), row(2, "broken")])
    more = ("--agent-loop", str(folder / "loop.yaml"), "--max-turns", "4")
    assert command.main(arguments(folder, data, server.url, *more)) == 0
    found = transcripts(folder)
    expected = ["ok", "ok", "over_limit", "not_executed"]
    assert [status for _, status in statuses(found["endless"])] == expected
    assert "Limit of text_search calls reached (2)" in json.dumps(found["endless"]["messages"])
    assert (found["broken"]["turns"], found["broken"]["ending"]) == (1, "malformed")


def test_the_policy_says_what_the_tools_are_told(stand_ins, folder, server, monkeypatch, capsys):
    told = []
    call = evaluation_stand_ins.DictToolbox.call

    async def noting(self, name, arguments, images, create_kwargs=None):
        told.append(create_kwargs)
        return await call(self, name, arguments, images, create_kwargs)

    monkeypatch.setattr(evaluation_stand_ins.DictToolbox, "call", noting)
    data = write(folder, [row(1, "zoom", image_keys=["key"])])
    argv = arguments(folder, data, server.url)
    assert command.main([*argv, "--policy", "qwen2_5_vl_7b"]) == 0
    assert told[0] == {"image_keys": ["key"], "coordinates": "absolute"}  # of the zoom
    assert told[2] == {"image_keys": ["key"]}  # of the search
    assert command.main(argv) == 2
    assert "tool_settings:" in capsys.readouterr().err
    assert command.main([*argv, "--policy", "qwen9"]) == 2
    assert "--policy qwen9: " in capsys.readouterr().err
    (folder / "mine.yaml").write_text("data: 3")
    assert command.main([*argv, "--policy", str(folder / "mine.yaml")]) == 2
    assert "mine.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("setting", ["max_calls: 3", "max_calls: {zoom: -1}", "tool_timeout_s: soon"])
def test_limits_that_are_none(stand_ins, folder, setting, capsys):
    (folder / "loop.yaml").write_text(f"- {{name: tapo_tool_agent, {setting}}}\n")
    data = write(folder, [row(1, "direct")])
    argv = arguments(folder, data, "http://127.0.0.1:9/v1", "--agent-loop", str(folder / "loop.yaml"))
    assert command.main(argv) == 2
    assert setting.partition(":")[0] in capsys.readouterr().err


def test_answers_are_compared_as_in_training(folder):
    from search_agent.rewards.settings import read_settings

    args = command.parse(arguments(folder, folder / "x.parquet", "http://127.0.0.1:9/v1"))
    assert args.match.split(",") == list(read_settings({}).match) == ["exact", "substring"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--match", "exct"), "--match.0: Input should be 'exact', 'substring', 'f1' or 'judge'"),
        (("--match", "judge", "--judge", '{"model": "m", "url": "x"}'), "--judge.url"),
    ],
)
def test_settings_of_the_comparison_are_checked_first(stand_ins, folder, server, more, said, capsys):
    data = write(folder, [row(1, "direct")])
    assert command.main(arguments(folder, data, server.url, *more)) == 2
    assert said in capsys.readouterr().err
    assert server.requests == []


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--temperature", "1"), "temperature: 0.0 is now 1.0"),
        (("--max-turns", "3"), "limits:"),
        (("--request", '{"seed": 1}'), "request:"),
        (("--match", "substring"), "match:"),
        (("--match", "judge", "--judge", '{"model": "m", "base_url": "http://h/v1"}'), "judge:"),
    ],
)
def test_other_settings_do_not_go_on_in_a_folder(stand_ins, folder, server, capsys, more, said):
    data = write(folder, [row(1, "direct")])
    assert command.main(arguments(folder, data, server.url)) == 0
    assert command.main(arguments(folder, data, server.url, *more)) == 2
    assert said in capsys.readouterr().err
    assert len(server.requests) == 1


def test_other_tools_or_data_do_not_go_on_in_a_folder(stand_ins, folder, server, capsys):
    data = write(folder, [row(1, "direct")])
    assert command.main(arguments(folder, data, server.url)) == 0
    more = write(folder, [row(5, "search", "MMSearch")], "mmsearch.parquet")
    assert command.main(arguments(folder, [data, more], server.url)) == 0  # another benchmark is no change
    assert list(json.loads((folder / "out" / "results.json").read_text())["benchmarks"]) == ["MMSearch", "FVQA-test"]
    write(folder, [row(2, "direct")])
    assert command.main(arguments(folder, data, server.url)) == 2
    assert "the content of fvqa_test.parquet" in capsys.readouterr().err
    write(folder, [row(1, "direct")])
    (folder / "tools.yaml").write_text("tools: []  # other\n")
    assert command.main(arguments(folder, data, server.url)) == 2
    assert "Changed: tools:" in capsys.readouterr().err


def test_limit_is_of_each_benchmark_and_may_grow(stand_ins, folder, server):
    rows = [row(number, "direct") for number in range(4)] + [row(9, "direct", "LiveVQA")]
    data = write(folder, rows)
    assert command.main(arguments(folder, data, server.url, "--limit", "2")) == 0
    assert len(server.requests) == 3
    assert command.main(arguments(folder, data, server.url)) == 0
    assert len(server.requests) == 5


def stable(results):
    """Without what differs from run to run: times."""
    if isinstance(results, dict):
        return {key: stable(value) for key, value in results.items() if key not in ("seconds", "latency_s", "time")}
    return [stable(value) for value in results] if isinstance(results, list) else results


def wait_for(condition):
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("number", "of_sigint"),
    [
        (signal.SIGKILL, signal.default_int_handler),
        (signal.SIGTERM, signal.default_int_handler),
        (signal.SIGTERM, signal.SIG_IGN),  # what a script starts with &
    ],
)
@pytest.mark.long
def test_killed_in_the_middle_every_question_is_done_once(stand_ins, folder, number, of_sigint):
    plays = [play for play in FINISHING if play not in ("flaky", "hang")]
    data = write(folder, [row(number, plays[number % len(plays)]) for number in range(30)])
    with Server(delay_s=0.1) as server:
        options = ("--concurrency", "4", "--max-turns", "4")
        argv = arguments(folder, data, server.url, *options)
        process = subprocess.Popen(
            [sys.executable, str(STAND_INS), *argv],
            env={**os.environ, "PYTHONPATH": str(Path(command.__file__).parents[2])},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=lambda: signal.signal(signal.SIGINT, of_sigint),
        )
        done = folder / "out" / "transcripts.jsonl"
        wait_for(lambda: done.exists() and done.read_bytes().count(b"\n") >= 8)
        process.send_signal(number)
        assert process.wait(30) == (-9 if number == signal.SIGKILL else 1)
        assert 8 <= done.read_bytes().count(b"\n") < 30
        before = done.read_bytes()
        before = before[: before.rfind(b"\n") + 1]
        with done.open("ab") as file:  # as a process leaves it that dies while it writes
            file.write(b'{"id": "FVQA-test/q29/')
        assert command.main(argv) == 0
        assert done.read_bytes().startswith(before)
        again = arguments(folder, data, server.url, *options, "--out", str(folder / "whole"))
        assert command.main(again) == 0
    entries = lines(done)
    assert len(entries) == len({entry["id"] for entry in entries}) == 30
    one, other = (json.loads((folder / name / "results.json").read_text()) for name in ("out", "whole"))
    assert stable(one) == stable(other)
    whole = {entry["id"]: stable(entry) for entry in lines(folder / "whole" / "transcripts.jsonl")}
    assert {entry["id"]: stable(entry) for entry in entries} == whole


def test_a_cancellation_that_is_lost_ends_it_all_the_same(folder):
    """As `asyncio.wait_for` loses one now and then: the question under way is done, no other is begun."""
    from search_backends.evaluation.loop import run
    from search_backends.evaluation.store import Store

    class Deaf:
        begun = 0

        async def do(self, question):
            self.begun += 1
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(30)
            return {"id": question.id}, {}

    async def main():
        running = asyncio.ensure_future(run(questions, task, store, concurrency=2, max_failures=0))
        while task.begun < 2:
            await asyncio.sleep(0.01)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    questions = read_questions([write(folder, [row(number, "direct") for number in range(9)])])
    task, store = Deaf(), Store(folder / "out", {"data": {}})
    asyncio.run(main())
    store.close()
    assert (task.begun, len(store.done)) == (2, 2)


def test_workers_that_fail_together_tell_of_one_outage(folder):
    from search_backends.evaluation.loop import Outage, Undone, run
    from search_backends.evaluation.store import Store

    class Down:
        begun = 0

        async def do(self, question):
            self.begun += 1
            await together.wait()
            raise Undone("down")

    async def main():
        running = asyncio.ensure_future(run(questions, task, store, concurrency=8, max_failures=4))
        while task.begun < 8:
            await asyncio.sleep(0.01)
        together.set()
        with pytest.raises(Outage, match=r"^5 questions in a row"):
            await running

    questions = read_questions([write(folder, [row(number, "direct") for number in range(30)])])
    task, store, together = Down(), Store(folder / "out", {"data": {}}), asyncio.Event()
    asyncio.run(main())
    store.close()
    assert 8 <= task.begun <= 12  # the first four to fail may go on to another
    assert len(list(store.failures())) >= 5


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda out: (out / "settings.json").unlink(), "holds transcripts.jsonl and no settings.json"),
        (lambda out: (out / "settings.json").write_text(""), "settings.json cannot be read (Expecting value"),
        (lambda out: (out / "settings.json").write_text("[]"), "settings.json cannot be read (it is no JSON object"),
        (
            lambda out: (out / "settings.json").write_text('{"model": "x"}'),
            "settings.json cannot be read (it is no JSON",
        ),
        (lambda out: (out / "settings.json").write_bytes(b"\xff"), "settings.json cannot be read ('utf-8' codec"),
        (lambda out: (out / "transcripts.jsonl").write_text("{}\n"), "transcripts.jsonl, line 1, has no id"),
        (
            lambda out: (out / "transcripts.jsonl").write_text('{"id": "x", "data_source": "y", "acc": "1"}\n'),
            "line 1, has '1' as acc: the file was changed; remove that line",
        ),
        (lambda out: (out / "transcripts.jsonl").write_text("[" * 5000 + "\n"), "line 1, is no JSON object"),
        (lambda out: (out / "failures.jsonl").write_text('{"id": "x"}\n'), "failures.jsonl, line 1, has no steps"),
        (
            lambda out: (out / "failures.jsonl").write_text('{"id": "x", "steps": [{}]}\n'),
            "failures.jsonl, line 1, has calls without latency_s, metrics, status, tool",
        ),
    ],
    ids=range(10),
)
def test_a_folder_that_was_spoilt_is_told(stand_ins, folder, server, capsys, spoil, message):
    data = write(folder, [row(1, "direct")])
    assert command.main(arguments(folder, data, server.url)) == 0
    spoil(folder / "out")
    before = {file.name: file.read_bytes() for file in (folder / "out").glob("*.json*")}
    assert command.main(arguments(folder, data, server.url)) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert message in said
    assert str(folder / "out") in said
    assert {file.name: file.read_bytes() for file in (folder / "out").glob("*.json*")} == before


def test_only_failures_are_results_too(stand_ins, folder, capsys):
    data = write(folder, [row(1, "500")])
    with Server() as server:
        assert command.main(arguments(folder, data, server.url, "--timeout", "1")) == 1
        (folder / "out" / "settings.json").unlink()
        assert command.main(arguments(folder, data, server.url, "--timeout", "1")) == 2
    assert "holds failures.jsonl and no settings.json" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("tools", "said"),
    [
        ("tools: [{class_name: no.such.Tool, config: {type: native}}]", "No module named 'no'"),
        ("tools: [{class_name: no.such.Tool, config: {}}]", "Missing key type"),
        ("tools: [{config: {}}]", "class_name"),
        ("tools: {", "ParserError"),
    ],
)
def test_tools_that_cannot_be_made_are_told_before_a_server_is_started(
    stand_ins, folder, checkpoint, monkeypatch, capsys, tools, said
):
    from search_agent.evaluate import __main__

    def make(file):
        from verl.tools.tool_registry import initialize_tools_from_config

        return initialize_tools_from_config(str(file))

    monkeypatch.setattr(evaluation_stand_ins.DictToolbox, "from_yaml", make)
    monkeypatch.setattr(__main__, "serve", lambda *_, **__: pytest.fail("it was started"))
    (folder / "tools.yaml").write_text(tools)
    data = write(folder, [row(1, "direct")])
    assert command.main(serving(folder, data, checkpoint)) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert f"--tools {folder / 'tools.yaml'}: " in told
    assert said in told


def test_two_at_once_in_one_folder(stand_ins, folder, server, capsys):
    from search_backends.evaluation.store import Store

    data = write(folder, [row(1, "direct")])
    store = Store(folder / "out", {"data": {}})
    assert command.main(arguments(folder, data, server.url)) == 2
    assert "another evaluation is writing to" in capsys.readouterr().err
    store.close()


def test_a_row_that_is_there_twice_is_two_questions(folder):
    data = write(folder, [row(1, "direct"), row(1, "direct"), row(2, "direct")])
    first, second, third = (question.id for question in read_questions([data]))
    assert second == f"{first}#2"
    assert third not in (first, second)
    other = write(folder, [row(2, "direct")], "other.parquet")
    with pytest.raises(ValueError, match=r"is in .*other\.parquet and in .*fvqa_test\.parquet"):
        list(read_questions([data, other]))


def test_data_that_does_not_fit(folder):
    wrong = row(1, "direct", images=2)
    wrong["images"] = wrong["images"][:1]
    data = write(folder, [row(0, "direct"), wrong])
    with pytest.raises(ValueError, match="row 1: the prompt has 2 <image>, and there are 1 images"):
        list(read_questions([data]))
    broken = row(1, "direct")
    broken["images"] = [{"bytes": b"<html>not found</html>"}]
    with pytest.raises(ValueError, match="row 0: an image has no bytes, or none that are an image"):
        list(read_questions([write(folder, [broken], "broken.parquet")]))
    for column, value in {"prompt": None, "images": [None], "reward_model": None, "extra_info": "x"}.items():
        odd = write(folder, [{**row(1, "direct"), column: value}], f"{column}.parquet")
        with pytest.raises(ValueError, match=r"row 0 is not as search_agent\.data\.prepare writes it"):
            list(read_questions([odd]))
    truths = [{"ground_truth": []}, {"ground_truth": {"text": "Paris"}}]
    for truth in truths:
        odd = write(folder, [{**row(1, "direct"), "reward_model": truth}], "truth.parquet")
        with pytest.raises(ValueError, match="row 0: ground_truth"):
            list(read_questions([odd]))
    pd.DataFrame({"prompt": ["x"]}).to_parquet(folder / "bad.parquet")
    with pytest.raises(ValueError, match="has no column 'data_source'"):
        list(read_questions([folder / "bad.parquet"]))
    with pytest.raises(ValueError, match="is not a parquet file"):
        list(read_questions([folder / "tools.yaml"]))


def test_what_a_question_tells_a_tool(folder):
    kwargs = {"zoom": {"create_kwargs": {"coordinates": "absolute"}}}
    other = {"image_search": {"create_kwargs": {"key": "k"}}}
    data = write(folder, [row(1, "direct", tools_kwargs=kwargs), row(2, "direct", tools_kwargs=other)])
    first, second = (question.extra_info for question in read_questions([data]))
    assert create_kwargs(first, "zoom") == {"coordinates": "absolute"}
    assert create_kwargs(first, "image_search") == create_kwargs(second, "zoom") == {}
    assert create_kwargs(second, "image_search") == {"key": "k"}
    settings = {"zoom": {"coordinates": "thousandths"}, "image_search": {"more": 1}}
    keyed = {"image_keys": ["a"], **second}
    assert create_kwargs(keyed, "image_search", settings) == {"image_keys": ["a"], "more": 1, "key": "k"}
    assert create_kwargs(keyed, "zoom", settings) == {"image_keys": ["a"], "coordinates": "thousandths"}
    assert create_kwargs(first, "zoom", settings) == {"coordinates": "absolute"}  # the question's own


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('<tool_call>{"name": "a", "arguments": {"x": 1}}</tool_call>', [("a", {"x": 1}, True)]),
        # As in training: veRL's parser refuses these, and ends a rollout at a call that is cut off.
        ('<tool_call>{"name": "a", "arguments": "{\\"x\\": 1}"}</tool_call>', [("", {}, False)]),
        ('<tool_call>{"name": "a"}</tool_call> and <tool_call>[]</tool_call>', [("", {}, False)] * 2),
        ('<tool_call>{"name": "a", "argu', []),
        ('<tool_call>{"name": 3, "arguments": {}}</tool_call>', [("", {}, False)]),
        ("no call </tool_call>", []),
    ],
)
def test_calls_in_text(text, expected):
    assert [(call.tool, call.arguments, call.problem is None) for call in calls_in_text(text)] == expected


@pytest.fixture
def checkpoint(folder):
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    return folder / "model"


def serving(folder, data, checkpoint, *more):
    common = ["--data", str(data), "--tools", str(folder / "tools.yaml"), "--out", str(folder / "out")]
    return [*common, "--checkpoint", str(checkpoint), *more]


def install_vllm(folder, monkeypatch, *lines):
    file = folder / "bin" / "vllm"
    file.parent.mkdir()
    file.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    file.chmod(0o755)
    monkeypatch.setenv("PATH", str(file.parent), prepend=os.pathsep)


@pytest.mark.long
def test_a_checkpoint_is_served_and_the_server_stopped(stand_ins, folder, checkpoint, monkeypatch, capsys):
    program = STAND_INS.with_name("evaluation_server.py")
    install_vllm(
        folder,
        monkeypatch,
        f'echo "$@" > {folder}/said',
        f"echo $$ > {folder}/pid",
        f"{sys.executable} {program} $@ &",
        "wait",
    )
    data = write(folder, [row(1, "direct"), row(2, "zooms")])
    argv = serving(folder, data, checkpoint, "--label", "player", "--vllm-args", "--max-model-len 4096")
    assert command.main(argv) == 0
    said = (folder / "said").read_text()
    assert said.startswith(f"serve {checkpoint} --served-model-name player --host 127.0.0.1 --port ")
    assert said.endswith(" --max-model-len 4096\n")
    group = int((folder / "pid").read_text())
    wait_for(lambda: not alive(group))
    assert len(lines(folder / "out" / "transcripts.jsonl")) == 2
    (checkpoint / "model.safetensors").write_bytes(b"other weights")
    assert command.main(argv) == 2
    assert "Changed: model:" in capsys.readouterr().err


def alive(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_server_that_does_not_come_up(stand_ins, folder, checkpoint, monkeypatch, capsys):
    install_vllm(folder, monkeypatch, "echo loading; echo CUDA out of memory; exit 3")
    data = write(folder, [row(1, "direct")])
    assert command.main(serving(folder, data, checkpoint)) == 2
    said = capsys.readouterr().err
    assert "vLLM ended with exit code 3" in said
    assert "CUDA out of memory" in said


def test_without_vllm(stand_ins, folder, checkpoint, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    data = write(folder, [row(1, "direct")])
    assert command.main(serving(folder, data, checkpoint)) == 2
    assert "there is no command 'vllm'" in capsys.readouterr().err
