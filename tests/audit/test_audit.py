"""``verl-tapo audit``: reading rollouts, finding calls in text, judging them, and what is reported."""

from __future__ import annotations

import csv
import gzip
import importlib
import json
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pandas
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from rich.console import Console
from rollouts import GROUNDING_METRICS, LUXEMBOURG, grounded_group, silent_group

from verl_tapo import TapoConfig, transfer_credit
from verl_tapo.audit import ReadOptions, audit, terminal
from verl_tapo.audit.analysis import Sweep, analyse, figures, star
from verl_tapo.audit.batches import batch_from_dump
from verl_tapo.audit.collect import Sample
from verl_tapo.audit.model import Call, StepBatch, Trajectory
from verl_tapo.audit.sources import Problems, Row, find_sources, read_dump
from verl_tapo.audit.text import find_calls, split_turns
from verl_tapo.calls.formats import FORMATS
from verl_tapo.calls.parsing import NOT_EXECUTED_PREFIX
from verl_tapo.calls.writing import written
from verl_tapo.cli import main
from verl_tapo.rule import similarity
from verl_tapo.rule.config import Grounding
from verl_tapo.rule.steps import ToolStep
from verl_tapo.selftest.rollouts import data_proto
from verl_tapo.settings import TapoSettings
from verl_tapo.trainer import estimator
from verl_tapo.trainer.estimator import compute_tapo_advantage


def call_text(tool, **arguments):
    return f"<tool_call>\n{json.dumps({'name': tool, 'arguments': arguments}, ensure_ascii=False)}\n</tool_call>"


def answers(*texts):
    return "\nuser\n" + "\n".join(f"<tool_response>\n{text}\n</tool_response>" for text in texts) + "\nassistant\n"


def search_then(query, answer, thought="Let me look."):
    return thought + call_text("search", query=query) + answers(f"about {query}") + answer


def line(output, score, uid="p", session=0, step=1, **more):
    return {"input": "question", "output": output, "gts": ["x"], "score": score, "step": step} | {
        "uid": f"{uid}_{session}_0",
        **more,
    }


def write_dump(path, lines):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        for entry in lines:
            file.write((entry if isinstance(entry, str) else json.dumps(entry, ensure_ascii=False)) + "\n")
    return path


def two_of_four(step=1, uid="p"):
    """A group where two succeed with the same call, one fails with it, and one fails with another."""
    same, other = "capital of Oman", "currency of Chile"
    outputs = [(same, "right", 1.0), (same, "right", 1.0), (same, "wrong", 0.0), (other, "wrong", 0.0)]
    return [
        line(search_then(query, answer), score, uid, number, step)
        for number, (query, answer, score) in enumerate(outputs)
    ]


def record_header(step=1, **settings):
    return {"kind": "tapo_step_records", "version": 1, "step": step, "settings": settings}


def record_call(query, **changes):
    return {
        "tool": "search", "arguments": {"query": query}, "turn": [0, 40], "call": [12, 40], "turn_tokens": 40,
        "call_tokens": 28, "ok": True, "status": "ok", "latency_s": 0.1, "fault": None, "role": "none", "gate": "",
        "similarity": 0.0, "support": 0.0, "alpha": 0.0, "reference_advantage": 0.0, "transfer": 0.0, "witness": None,
    } | changes  # fmt: skip


def record_row(number, query, success, **changes):
    return {
        "key": f"p_{number}_0", "uid": "p", "trajectory": number, "score": float(success), "success": success,
        "advantage": 0.9 if success else -0.9, "tokens": 60, "length": 80, "changed_tokens": 0, "recognisable": False,
        "calls": [record_call(query)],
    } | changes  # fmt: skip


def recorded_group():
    """Two that succeed with a call, one that fails with the same, one with another."""
    queries = ["capital of Oman", "capital of Oman", "capital of Oman", "currency of Chile"]
    return [record_row(number, query, number < 2) for number, query in enumerate(queries)]


def codes(result):
    return {warned["code"]: warned["level"] for warned in result["warnings"]}


class TestText:
    def test_turns_and_answers(self):
        text = "think" + call_text("zoom", image=1) + answers("one") + call_text("search", query="é") + answers("two")
        text += "The end."
        turns = split_turns(text, "hermes")
        assert [text[slice(*span)] for span in turns.assistant] == [
            "think" + call_text("zoom", image=1),
            call_text("search", query="é"),
            "The end.",
        ]
        assert [[text[slice(*span)].strip() for span in of] for of in turns.answers] == [["one"], ["two"]]
        calls = find_calls(text, "hermes").calls
        assert [(c.tool, c.arguments, c.status, c.result, c.turn) for c in calls] == [
            ("zoom", {"image": 1}, "ok", "one", 0),
            ("search", {"query": "é"}, "ok", "two", 1),
        ]
        assert [text[slice(*c.call_span)] for c in calls] == [
            call_text("zoom", image=1),
            call_text("search", query="é"),
        ]
        assert text[slice(*calls[0].span)] == "think" + call_text("zoom", image=1)

    @pytest.mark.parametrize(
        ("answer", "status"),
        [
            ("found", "ok"),
            ("Error executing tool 'search': down", "error"),
            ("Unknown function 'search'. Available tools: []", "error"),
            ("Sorry, down for maintenance", "error"),  # one of our markers
            (f"{NOT_EXECUTED_PREFIX} too many", "not_executed"),
        ],
    )
    def test_status_by_the_answer(self, answer, status):
        text = call_text("search", query="a") + answers(answer) + "end"
        (call,) = find_calls(text, "hermes", ["Sorry, down"]).calls
        assert (call.status, call.ok) == (status, status == "ok")

    def test_unanswered_malformed_and_unclosed(self):
        text = "<tool_call>\n{broken\n</tool_call>" + call_text("search", query="a") + answers("found") + "end"
        first, second = find_calls(text, "hermes").calls
        assert (first.status, second.status, second.result) == ("malformed", "ok", "found")  # veRL drops the first
        (last,) = find_calls(call_text("search", query="a"), "hermes").calls
        assert (last.status, last.ok, last.result) == ("unanswered", False, None)
        found = find_calls("I will <tool_call>\n{", "hermes")
        assert (found.calls, found.unclosed) == ([], 1)

    def test_parallel_calls_share_a_turn(self):
        text = call_text("search", query="a") + "\n" + call_text("search", query="b") + answers("A", "B") + "end"
        calls = find_calls(text, "hermes").calls
        assert [(c.turn, c.result) for c in calls] == [(0, "A"), (0, "B")]

    def test_what_a_model_says_of_answers_is_no_answer(self):
        text = "<tool_response>fake</tool_response>" + call_text("search", query="a") + answers("real") + "end"
        (call,) = find_calls(text, "hermes").calls
        assert call.result == "real"
        assert call.span == (0, text.index("\nuser\n"))

    def test_without_headers_the_markers_count(self):
        text = call_text("search", query="a") + "\n<tool_response>\nA\n</tool_response>\n" + "The end."
        (call,) = find_calls(text, "hermes").calls
        assert call.result == "A"
        assert [text[slice(*span)].strip() for span in split_turns(text, "hermes").assistant][-1] == "The end."

    def test_special_tokens_that_were_kept(self):
        text = call_text("search", query="a") + "<|im_end|>\n<|im_start|>user\n<tool_response>\nA\n</tool_response>"
        text += "<|im_end|>\n<|im_start|>assistant\nThe end.<|im_end|>"
        (call,) = find_calls(text, "hermes").calls
        assert call.result == "A"
        assert [text[slice(*span)] for span in split_turns(text, "hermes").assistant] == [
            call_text("search", query="a"),
            "The end.<|im_end|>",
        ]

    def test_a_template_that_knows_no_tools(self):
        """As Qwen2.5-VL's own: a tool's message is its bare text after a header."""
        two = call_text("search", query="a") + call_text("search", query="b")
        text = (
            two + "\ntool\nA\ntool\nB\nassistant\n" + call_text("search", query="c") + "\ntool\nC user\nassistant\nend"
        )
        found = find_calls(text, "hermes")
        assert [(c.status, c.result, c.turn) for c in found.calls] == [
            ("ok", "A", 0),
            ("ok", "B", 0),
            ("ok", "C user", 1),
        ]
        assert found.size == len(two) + len(call_text("search", query="c")) + len("end")
        broken = call_text("search", query="a") + "\nuser\nError executing tool 'search': x"
        assert find_calls(broken, "hermes").calls[0].status == "error"

    def test_gpt_oss_with_its_special_tokens(self):
        def call(query):
            head = "<|start|>assistant<|channel|>commentary to=functions.search <|constrain|>json<|message|>"
            return f'{head}{{"query": "{query}"}}<|call|>'

        def answer(text):
            head = "<|start|>functions.search to=assistant<|channel|>commentary<|message|>"
            return f'{head}"{text}"<|end|>'

        text = "<|channel|>analysis<|message|>I think.<|end|>" + call("a") + call("b") + "<|return|>"
        text += answer("A <|start|>functions.search quoted") + answer("Error executing tool 'search': down")
        text += call("c") + answer("") + "<|start|>assistant<|channel|>final<|message|>The end.<|return|>"
        found = find_calls(text, "gpt-oss")
        assert [(of.arguments["query"], of.status, of.result, of.turn) for of in found.calls] == [
            ("a", "ok", "A <|start|>functions.search quoted", 0),
            ("b", "error", "Error executing tool 'search': down", 0),
            ("c", "ok", "", 1),
        ]
        assert not found.unclear

    @pytest.mark.parametrize("tool_format", ["deepseek_v4", "gemma4", "minimax", "kimi", "gpt-oss"])
    def test_the_template_decides_how_answers_are_written(self, tool_format):
        a, b = (written(tool_format, "search", {"query": query}) for query in "ab")
        text = a + "\n" + b + answers("A", "Error executing tool 'search': down") + a + answers("A") + "The end."
        found = find_calls(text, tool_format)
        assert [(of.status, of.result, of.turn) for of in found.calls] == [
            ("ok", "A", 0),
            ("error", "Error executing tool 'search': down", 0),
            ("ok", "A", 1),
        ]

    def test_marks_of_answers_that_an_answer_quotes(self):
        two = call_text("search", query="a") + call_text("search", query="b")
        page = "Of tools: <tool_response> and <tool_result> begin answers, <|tool_response> too."
        failed = "Error executing tool 'search': down"
        calls = find_calls(two + answers(page, failed) + "The end.", "hermes").calls
        assert [(of.status, of.result) for of in calls] == [("ok", page), ("error", failed)]
        # Where answers have no marks of their own, those that a page quotes are none either.
        text = two + f"tool\n\n{page}tool\n\nBassistant\n\nThe end."
        assert [of.result for of in find_calls(text, "hermes").calls] == [page, "B"]

    @pytest.mark.parametrize(
        ("tool", "assistant"),
        [("tool\n\n", "assistant\n\n"), ("\ntool\n", "\nassistant\n"), ("\ntool\n", "\nmodel\n")],
    )
    def test_empty_answers_behind_headers(self, tool, assistant):
        a, b = (call_text("search", query=query) for query in "ab")
        text = f"{a}{tool}{assistant}{a}{b}{tool}A{tool}{assistant}"
        text += f"<tool_call>{{</tool_call>{a}{b}{tool}{tool}B{assistant}end"
        found = find_calls(text, "hermes")
        assert [(of.status, of.result, of.turn) for of in found.calls] == [
            ("ok", "", 0),
            ("ok", "A", 1),
            ("ok", "", 1),
            ("malformed", None, 2),  # veRL does not answer it
            ("ok", "", 2),
            ("ok", "B", 2),
        ]
        assert not found.unclear

    def test_another_format(self):
        text = "<tool_call>\n<function=search>\n<parameter=query>\nOman\n</parameter>\n</function>\n</tool_call>"
        (call,) = find_calls(text + answers("A") + "end", "qwen3_coder").calls
        assert (call.tool, call.arguments, call.status) == ("search", {"query": "Oman"}, "ok")

    @pytest.mark.parametrize("header", ["{}\n\n", "<|eot_id|><|start_header_id|>{}<|end_header_id|>\n\n"])
    @pytest.mark.parametrize("tool", ["tool", "ipython"])
    def test_headers_right_behind_the_text(self, tool, header):
        """As Llama's template leaves them: no line of their own, an empty line behind."""
        tool, assistant = header.format(tool), header.format("assistant")
        a, b, c = (call_text("search", query=query) for query in "abc")
        answer = "A research assistant\n\nworks as a teaching-assistant\n\nwith a tool\n\nin Paris."
        text = f"Hm.{a}{tool}{answer}{assistant}{b}{c}{tool}B{tool}C{assistant}The end."
        found = find_calls(text, "hermes")
        assert [(of.arguments["query"], of.status, of.result, of.turn) for of in found.calls] == [
            ("a", "ok", answer, 0),
            ("b", "ok", "B", 1),
            ("c", "ok", "C", 1),
        ]
        assert found.size == len(f"Hm.{a}{b}{c}The end.")
        assert not found.unclear
        assert find_calls(f"{a}{tool}Paris{assistant}", "hermes").calls[0].result == "Paris"

    @pytest.mark.parametrize(
        ("user", "assistant"),
        [
            ("\nuser\n", "\nmodel\n"),
            ("\nuser\n", "\nAI:\n"),
            ("<|im_end|>\n<|im_start|>user\n", "<|im_end|>\n<|im_start|>ai\n"),
            ("<end_of_turn>\n<start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n"),
        ],
    )
    def test_assistants_of_other_names(self, user, assistant):
        a, b, c = (call_text("search", query=query) for query in "abc")
        A, B, C = (f"{user}<tool_response>\n{answer}\n</tool_response>" for answer in "ABC")
        found = find_calls(a + A + assistant + b + c + B + C + assistant + "The end.", "hermes")
        assert [(of.result, of.turn) for of in found.calls] == [("A", 0), ("B", 1), ("C", 1)]
        assert not found.unclear

    @pytest.mark.parametrize(
        ("text", "unclear"),
        [
            ("{a}It is Paris<answer>Paris</answer>", True),
            ("{a}It is Paris<think>hm</think>{b}", True),
            ("{a}\ntool\nIt is Paris|AI|{b}", True),  # an observation that nothing known ends
            ("{a}\nuser\n<tool_response>\nIt is Paris|AI|{b}", True),
            ("{a}", False),
            ("{a}\n{b}\n<|im_end|>\n", False),
            ("<answer>Paris</answer>", False),
            ("{a}\nuser\n<tool_response>\nIt is Paris\n</tool_response>\nassistant\n<answer>Paris</answer>", False),
            ("{a}\nuser\n<tool_response>\nIt is Par", False),
            ("{a}\nuser\n<tool_response>\nIt is Paris\n</tool_response>\nassist", False),
        ],
    )
    def test_turns_that_cannot_be_told_apart(self, text, unclear):
        a, b = call_text("search", query="a"), call_text("search", query="b")
        found = find_calls(text.replace("{a}", a).replace("{b}", b), "hermes")
        assert found.unclear == unclear

    PIECES = (
        *(" ", "\n", "\r\n \t", "\u3000", "<", "<a>", "{", "[", '"', "\\", "assistant", "assistant ", "assistant\n"),
        *("\nassistant", "assistant\n\n", "\nuser\n", "\ntool\n", "tool\n\n", "user\n<tool_response>"),
        *("<|im_end|>", "<|im_end|>\n", "<|eot_id|> ", "<|end_header_id|>\n", "<seed:eos>", "<seed:bos>tool"),
        *("<tool_response>", "</tool_response>", "</tool_response>\n", "</tool_response> assistant "),
        *("</tool_response>\nAI\nuser\n<tool_response>", "<response>", "</response>", "## Return of"),
        *("<function=a>", "</function>", "<parameter=a>", "</parameter>", '<parameter name="a">', "<invoke"),
        *('<invoke name="a">', "<arg_key>", "</arg_key>", "<arg_value>", "<|observation|>"),
    )

    @pytest.mark.long
    @pytest.mark.parametrize("tool_format", FORMATS)
    def test_time_grows_with_the_text_whatever_repeats(self, tool_format):
        fmt = FORMATS[tool_format]
        opening, closing = fmt.opening.decode(), fmt.closing.decode()
        own = [opening, closing, f"{closing}\nuser\n", f"{opening}x{closing}\nuser\n", fmt.inner.decode() or " "]
        answer = f"{opening}x{closing}\nuser\n{fmt.responses[0].decode()}"

        def seconds(text):
            start = time.process_time()
            find_calls(text, tool_format)
            return time.process_time() - start

        for piece in (*self.PIECES, *own):
            for head in (fmt.section.decode() + opening, answer):
                few, many = (head + piece * (length // len(piece)) for length in (4_000, 64_000))
                # 16 times the text; were time quadratic, 256 times as long.
                assert min(seconds(many) for _ in range(3)) < 80 * min(seconds(few) for _ in range(3)) + 0.02, piece

    @given(st.text(max_size=300))
    @settings(max_examples=300, deadline=None)
    def test_no_text_makes_it_raise(self, text):
        for piece in (
            "<tool_call>",
            "</tool_call>",
            "\nuser\n<tool_response>",
            "</tool_response>\nassistant\n",
            '{"a":',
        ):
            text = text.replace("0", piece, 1)
        for tool_format in ("hermes", "glm", "kimi", "minimax", "seed", "qwen3_coder"):
            found = find_calls(text, tool_format)
            spans = [span for call in found.calls for span in (call.span, call.call_span)]
            assert all(0 <= start <= end <= len(text) for start, end in spans)
            assert found.size <= len(text)


class TestReading:
    def test_a_folder_as_veRL_leaves_it(self, tmp_path):
        (tmp_path / "rollouts").mkdir()
        for step in (1, 2, 10):
            write_dump(tmp_path / "rollouts" / f"{step}.jsonl", two_of_four(step))
        (tmp_path / "validation").mkdir()
        write_dump(tmp_path / "validation" / "1.jsonl", two_of_four())
        write_dump(tmp_path / "metrics.jsonl", [{"step": 1, "data": {}}])
        found = find_sources([tmp_path])
        assert [source.step for source in found.sources] == [1, 2, 10]
        assert {path.name for path in found.left_out} == {"validation", "metrics.jsonl"}
        assert [s["step"] for s in audit(tmp_path).result["steps"]] == [1, 2, 10]
        assert audit(tmp_path / "validation").result["totals"]["trajectories"] == 4  # named on purpose

    def test_what_cannot_be_read_is_told_with_file_and_line(self, tmp_path):
        good = two_of_four()
        bad = [
            '{"input": "cut',
            "[1, 2]",
            json.dumps({"prompt": "p", "response": "r", "reward": 1}),
            json.dumps(line("text", None, session=9)),
            json.dumps(line("text", float("nan"), session=10)),
            "[" * 100_000,
            "",
        ]
        path = write_dump(tmp_path / "1.jsonl", [*good, *bad])
        path.write_text(path.read_text() + json.dumps(line("text", 1.0, session=11))[:-20])  # the run was killed here
        result = audit(path).result
        assert result["totals"]["trajectories"] == 4
        assert result["skipped"] == 7
        assert [(p["line"], p["reason"]) for p in result["problems"]] == [
            (5, "not JSON"),
            (6, "not a JSON object but list"),
            (7, "no text in 'output'; fields: prompt, response, reward"),
            (8, "no score"),
            (9, "the score is 'nan', not a finite number"),
            (10, "nested too deeply"),
            (12, "not JSON: the line is cut short"),
        ]
        assert {p["file"] for p in result["problems"]} == {str(path)}
        assert [w["code"] for w in result["warnings"]] == ["skipped_lines"]

    def test_many_alike_are_counted(self, tmp_path):
        path = write_dump(tmp_path / "1.jsonl", [*two_of_four(), *["nonsense"] * 500])
        result = audit(path).result
        assert result["skipped"] == 500
        assert len(result["problems"]) == 21
        assert result["problems"][-1] == {"file": str(path), "line": None, "reason": "480 more lines: not JSON"}

    def test_gz_and_one_that_breaks_off(self, tmp_path):
        path = write_dump(tmp_path / "1.jsonl.gz", two_of_four() * 200)
        whole = audit(path).result["totals"]
        path.write_bytes(path.read_bytes()[:-200])
        result = audit(path).result
        assert 0 < result["totals"]["trajectories"] <= whole["trajectories"]
        assert "the file breaks off" in result["problems"][-1]["reason"]

    def test_other_names_of_fields(self, tmp_path):
        renamed = [
            {"question": e["input"], "response": e["output"], "reward": e["score"], "id": e["uid"]}
            for e in two_of_four()
        ]
        path = write_dump(tmp_path / "7.jsonl", renamed)
        with pytest.raises(ValueError, match="neither a rollout dump"):
            audit(path)
        fields = {"input": "question", "output": "response", "score": "reward", "uid": "id"}
        result = audit(path, options=ReadOptions(fields=fields)).result
        assert (result["steps"][0]["step"], result["totals"]["corrected_steps"]) == (7, 1)
        assert result["groups"][0]["prompt"] == "question"

    def test_without_uid_the_prompt_and_the_truth_make_the_group(self, tmp_path):
        lines = [*two_of_four(), *two_of_four(uid="q")]
        for entry in lines:
            entry["gts"] = entry.pop("uid")[0]
        result = audit(write_dump(tmp_path / "1.jsonl", lines)).result
        assert (result["totals"]["prompts"], result["totals"]["corrected_steps"]) == (2, 2)

    def test_several_steps_in_one_file_and_one_twice(self, tmp_path):
        path = write_dump(tmp_path / "all.jsonl", [*two_of_four(1), *two_of_four(2), *two_of_four(3)])
        result = audit(path).result
        assert [(s["step"], s["trajectories"]) for s in result["steps"]] == [(1, 4), (2, 4), (3, 4)]
        again = audit(path, write_dump(tmp_path / "3.jsonl", two_of_four(3))).result
        assert "repeated_steps" in [w["code"] for w in again["warnings"]]

    def test_outputs_of_a_session_are_one_trajectory(self):
        first = line(call_text("search", query="Oman") + answers("A") + "and so", 0.0)
        last = {**line("then" + call_text("zoom", image=1) + answers("B") + "end", 1.0), "uid": "p_0_1"}
        batch = batch_from_dump(1, [Row(1, last), Row(2, first)], TapoSettings(), ReadOptions())
        (trajectory,) = batch.trajectories
        assert (trajectory.name, trajectory.group, trajectory.score, trajectory.success) == ("p_0", "p", 1.0, True)
        assert [(c.tool, c.turn) for c in trajectory.calls] == [("search", 0), ("zoom", 1)]
        assert [trajectory.text[slice(*c.call_span)] for c in trajectory.calls] == [
            call_text("search", query="Oman"),
            call_text("zoom", image=1),
        ]

    def test_rows_that_fill_up_a_batch_are_no_rollouts(self, tmp_path):
        padding = [{**line("", 0.0), "uid": f"pad{'0f' * 16}_{number}_0"} for number in range(4)]
        result = audit(write_dump(tmp_path / "1.jsonl", [*two_of_four(), *padding])).result
        assert (result["totals"]["trajectories"], result["totals"]["prompts"], result["warnings"]) == (4, 1, [])

    def test_success_is_the_key_or_else_the_score(self, tmp_path):
        lines = two_of_four()
        for entry in lines:
            entry["acc"] = 1.0 - entry["score"]
        path = write_dump(tmp_path / "1.jsonl", lines)
        assert audit(path).result["totals"]["successes"] == 2
        assert audit(path).result["totals"]["failing_trajectories"] == 0  # those with acc 0 have the higher score
        by_score = audit(path, settings={"success_key": "score"}).result["totals"]
        assert (by_score["failing_trajectories"], by_score["corrected_steps"]) == (2, 1)

    def test_however_a_file_is_compressed_encoded_or_named(self, tmp_path):
        text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in two_of_four())
        text = text.replace("Oman", "Öman 🐪")
        files = {
            "bom.jsonl": text.encode("utf-8-sig"),
            "utf16.jsonl": text.encode("utf-16"),
            "utf16_be.jsonl": "\ufeff".encode("utf-16-be") + text.encode("utf-16-be"),
            "utf16_bare.jsonl": text.encode("utf-16-le"),
            "utf32.jsonl": text.encode("utf-32"),
            "windows.jsonl": text.replace("\n", "\r\n").encode("utf-8-sig"),
            "packed.jsonl": gzip.compress(text.encode()),
            "plain.jsonl.gz": text.encode(),
            "bom.jsonl.gz": gzip.compress(text.encode("utf-8-sig")),
            "utf16.jsonl.gz": gzip.compress(text.encode("utf-16")),
            "two_parts.jsonl.gz": gzip.compress(text[:900].encode()) + gzip.compress(text[900:].encode()),
            "x.ndjson": text.encode(),
            "x.ndjson.gz": gzip.compress(text.encode()),
            "X.JSONL": text.encode(),
        }
        expected = None
        for name, data in files.items():
            folder = tmp_path / name.replace(".", "_")
            folder.mkdir()
            (folder / name).write_bytes(data)
            result = audit(folder).result
            assert codes(result) == {}, name
            groups = [{**group, "trajectories": group["trajectories"]} for group in result["groups"]]
            expected = expected or groups
            assert groups == expected, name

    def test_records_are_read_alike(self, tmp_path):
        text = "".join(json.dumps(value) + "\r\n" for value in [record_header(), *recorded_group()])
        for name, data in {
            "bom.jsonl": text.encode("utf-8-sig"),
            "packed.jsonl": gzip.compress(text.encode()),
            "1.jsonl.gz": text.encode("utf-16"),
        }.items():
            (tmp_path / name).write_bytes(data)
            result = audit(tmp_path / name).result
            assert (result["settings"]["recorded_steps"], result["totals"]["corrected_steps"]) == (1, 1)
            assert (result["skipped"], result["problems"]) == (0, [])

    @pytest.mark.parametrize(
        ("data", "reason"),
        [
            (b"BZh91AY&SY", "compressed with bzip2"),
            (b"\x28\xb5\x2f\xfd\x00", "compressed with zstd"),
            (b"PK\x03\x04", "compressed with zip"),
            (b"", "the file is empty"),
            (b"\n \n", "the file is empty"),
            (b"hello\n", "line 1 is no JSON: 'hello'"),
            (b"[{\n", "line 1 is no JSON"),
            (b"[1]\n", "line 1 is no JSON object but list"),
            (b'{"step": 1, "data": {}}\n', "no 'output' in line 1; fields: data, step"),
            (b"\x00\x01\x02\x03" * 1000, "line 1 is no JSON"),
        ],
    )
    def test_why_a_file_holds_no_rollouts(self, tmp_path, data, reason):
        path = tmp_path / "more.jsonl"
        path.write_bytes(data)
        with pytest.raises(ValueError, match=re.escape(reason)):
            audit(path)
        with pytest.raises(ValueError, match=re.escape(f"more.jsonl ({reason}")):
            audit(tmp_path)
        write_dump(tmp_path / "1.jsonl", two_of_four())
        result = audit(tmp_path).result
        assert result["left_out"][0].startswith(f"{path} ({reason}")
        assert codes(result) == {}
        path.rename(tmp_path / "2.jsonl")  # named as a dump of veRL's: a step that was lost
        result = audit(tmp_path).result
        if reason.startswith("no 'output'"):
            assert (result["left_out"][0], codes(result)) == (f"{tmp_path}/2.jsonl ({reason})", {})
        else:
            assert result["problems"][0]["reason"].startswith(reason)
            assert codes(result) == {"unread_files": "error"}

    def test_what_breaks_off_is_an_error(self, tmp_path, capsys):
        write_dump(tmp_path / "1.jsonl", two_of_four(1))
        cut = write_dump(tmp_path / "2.jsonl.gz", [e for k in range(40) for e in two_of_four(2, f"g{k}")])
        cut.write_bytes(cut.read_bytes()[:-100])
        result = audit(tmp_path).result
        assert codes(result) == {"unread_files": "error"}
        assert 4 < result["totals"]["trajectories"] < 164
        assert [(p["file"], p["line"]) for p in result["problems"]] == [(str(cut), None)]
        assert run_main(capsys, tmp_path)[0] == 1
        cut.write_bytes(cut.read_bytes()[:12])
        result = audit(tmp_path).result
        assert codes(result) == {"unread_files": "error"}
        assert "cannot be read" in result["problems"][0]["reason"]

    def test_more_lines_lost_than_read_is_an_error(self, tmp_path):
        path = write_dump(tmp_path / "1.jsonl", [*two_of_four(), *["torn"] * 4])
        assert codes(audit(path).result) == {"skipped_lines": "warning"}
        path = write_dump(tmp_path / "1.jsonl", [*two_of_four(), *["torn"] * 5])
        assert codes(audit(path).result) == {"skipped_lines": "error"}

    def test_what_is_no_utf8_is_said(self, tmp_path):
        text = json.dumps(two_of_four()[0] | {"input": "Grüße"}, ensure_ascii=False).encode("latin-1")
        path = tmp_path / "1.jsonl"
        path.write_bytes(text + b"\n" + "".join(json.dumps(e) + "\n" for e in two_of_four()[1:]).encode())
        result = audit(path).result
        assert codes(result) == {"read_otherwise": "info"}
        assert "1.jsonl:1: not UTF-8" in result["warnings"][0]["text"]
        assert result["groups"][0]["prompt"] == "Gr\ufffd\ufffde"

    def test_lines_beyond_all_measure_are_left_out(self, tmp_path, monkeypatch):
        monkeypatch.setattr("verl_tapo.text_files.MAX_LINE", 2000)
        long = json.dumps(line("x" * 9000, 1.0, session=9))
        path = write_dump(tmp_path / "1.jsonl", [*two_of_four()[:2], long, *two_of_four()[2:], long])
        result = audit(path).result
        assert result["totals"]["trajectories"] == 4
        assert [p["line"] for p in result["problems"]] == [3, 6]
        assert all("longer than" in p["reason"] for p in result["problems"])

    def test_the_read_is_reported_to_the_last_byte(self, tmp_path):
        path = write_dump(tmp_path / "1.jsonl", two_of_four() * 100)
        told = []
        list(read_dump(path, {}, Problems(), told.append))
        assert sum(told) == path.stat().st_size

    @pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "rloo"])
    def test_advantages_are_veRLs(self, estimator):
        core_algos = pytest.importorskip("verl.trainer.ppo.core_algos")
        import numpy as np

        scores = [0.1, 0.1, 0.1, 0.9, 0.3, 1.0, 0.7]
        groups = ["p", "p", "p", "q", "q", "q", "single"]
        rows = [Row(k, line("text", score, uid, k)) for k, (score, uid) in enumerate(zip(scores, groups, strict=True))]
        batch = batch_from_dump(1, rows, TapoSettings(), ReadOptions(estimator))
        rewards, mask = torch.tensor(scores)[:, None], torch.ones(7, 1)
        if estimator == "rloo":
            expected, _ = core_algos.compute_rloo_outcome_advantage(rewards, mask, np.array(groups))
        else:
            expected, _ = core_algos.compute_grpo_outcome_advantage(
                rewards, mask, np.array(groups), norm_adv_by_std_in_grpo=estimator == "grpo"
            )
        assert [t.advantage for t in batch.trajectories] == expected[:, 0].tolist()


class TestFiles:
    """Which files are read: each once, and nothing but plain ones."""

    def test_links_that_lead_back(self, tmp_path):
        folder = tmp_path / "rollouts"
        folder.mkdir()
        write_dump(folder / "1.jsonl", two_of_four())
        for name in ("latest", "newest", "0"):
            (folder / name).symlink_to(".")
        (folder / "up").symlink_to(tmp_path)
        (folder / "0.jsonl").symlink_to("1.jsonl")
        (folder / "2.jsonl").hardlink_to(folder / "1.jsonl")
        result = audit(tmp_path, folder, folder / "latest", folder / "1.jsonl", folder / "latest" / "1.jsonl").result
        assert (result["totals"]["trajectories"], codes(result)) == (4, {})
        assert result["sources"] == [str(folder / "1.jsonl")]

    def test_what_is_no_plain_file_is_named_and_never_opened(self, tmp_path):
        write_dump(tmp_path / "1.jsonl", two_of_four())
        os.mkfifo(tmp_path / "2.jsonl")
        (tmp_path / "3.jsonl").symlink_to("/dev/zero")
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(tmp_path / "4.jsonl"))
        result = audit(tmp_path).result
        assert (result["totals"]["trajectories"], codes(result)) == (4, {})
        assert result["left_out"] == [
            f"{tmp_path}/2.jsonl (a named pipe, not a plain file)",
            f"{tmp_path}/4.jsonl (a socket, not a plain file)",
            f"{tmp_path}/3.jsonl (a device, not a plain file)",
        ]
        result = audit(tmp_path / "1.jsonl", tmp_path / "2.jsonl").result  # named on purpose
        assert (result["totals"]["trajectories"], codes(result)) == (4, {"unread_files": "error"})
        assert result["problems"][0]["reason"] == "a named pipe, not a plain file"
        for path, what in ((tmp_path / "2.jsonl", "a named pipe"), ("/dev/zero", "a device")):
            with pytest.raises(ValueError, match=f"no rollouts in .*{what}"):
                audit(path)

    def test_what_cannot_be_entered_or_is_gone(self, tmp_path, monkeypatch):
        for name in ("open", "closed"):
            (tmp_path / name).mkdir()
            write_dump(tmp_path / name / "1.jsonl", two_of_four())
        (tmp_path / "2.jsonl").symlink_to("gone")
        (tmp_path / "round").symlink_to("round")
        scandir = os.scandir

        def refuse(path):
            if str(path).endswith("closed"):  # whoever runs the tests may enter any folder
                raise PermissionError(13, "Permission denied", str(path))
            return scandir(path)

        monkeypatch.setattr(os, "scandir", refuse)
        result = audit(tmp_path).result
        assert (result["totals"]["trajectories"], codes(result)) == (4, {"unread_files": "error"})
        assert {(Path(p["file"]).name, p["reason"]) for p in result["problems"]} == {
            ("closed", "cannot be read: Permission denied"),
            ("2.jsonl", "cannot be read: No such file or directory"),
            ("round", "cannot be read: Too many levels of symbolic links"),
        }

    def test_a_file_without_end(self, tmp_path):
        """Of zeros, and larger than any disk."""
        write_dump(tmp_path / "1.jsonl", two_of_four())
        for name in ("2.jsonl", "more.jsonl"):
            with (tmp_path / name).open("wb") as file:
                file.truncate(1 << 40)
        result = audit(tmp_path).result
        assert (result["totals"]["trajectories"], codes(result)) == (4, {"unread_files": "error"})
        assert result["problems"][0]["reason"] == "line 1 is longer than 64 MiB"
        assert result["left_out"] == [f"{tmp_path}/more.jsonl (line 1 is longer than 64 MiB)"]

    def test_deep_folders(self, tmp_path):
        deep = tmp_path.joinpath(*["d"] * 800)
        deep.mkdir(parents=True)
        write_dump(deep / "1.jsonl", two_of_four())
        assert audit(tmp_path).result["totals"]["trajectories"] == 4

    def test_a_copy_of_a_dump_counts_once(self, tmp_path):
        whole = write_dump(tmp_path / "1.jsonl", two_of_four(1) + two_of_four(1, "q"))
        write_dump(tmp_path / "1.jsonl.gz", two_of_four(1) + two_of_four(1, "q"))
        result = audit(tmp_path).result
        assert codes(result) == {"copied_lines": "warning", "repeated_steps": "warning"}
        assert result["totals"] == audit(whole).result["totals"]

    def test_a_dump_in_parts(self, tmp_path):
        """Groups are whole, whichever files their lines are in."""
        lines = [e for step in (1, 2) for uid in "pq" for e in two_of_four(step, uid)]
        write_dump(tmp_path / "whole.jsonl", lines)
        (tmp_path / "parts").mkdir()
        write_dump(tmp_path / "parts" / "rank_0.jsonl", lines[::2])
        write_dump(tmp_path / "parts" / "rank_1.jsonl.gz", lines[1::2])
        whole, parts = audit(tmp_path / "whole.jsonl").result, audit(tmp_path / "parts").result
        assert codes(parts) == {"repeated_steps": "warning"}
        assert parts["steps"] == whole["steps"]


class TestStepsAndKeys:
    @pytest.mark.parametrize("name", ["all.jsonl", "all.jsonl.gz"])
    def test_steps_in_any_order(self, tmp_path, name):
        lines = [e for step in (1, 2, 3) for uid in "pq" for e in two_of_four(step, uid)]
        in_order = audit(write_dump(tmp_path / "sorted.jsonl", lines)).result
        random.Random(1).shuffle(lines)
        result = audit(write_dump(tmp_path / name, ["torn", *lines])).result
        assert [step["step"] for step in result["steps"]] == [1, 2, 3]
        for step, expected in zip(result["steps"], in_order["steps"], strict=True):
            assert step == pytest.approx(expected)
        assert codes(result) == {"skipped_lines": "warning"}

    @pytest.mark.parametrize(
        ("name", "step"),
        [
            *(("7.jsonl", 7), ("0012.jsonl", 12), ("step_3.jsonl.gz", 3), ("run2_step-10.jsonl", 10)),
            *(("Step4.jsonl", 4), ("rollouts-5.jsonl", 5), ("step_6/rollouts.jsonl", 6), ("rollouts.jsonl", 0)),
            (f"{'9' * 400}.jsonl"[-200:], 0),
        ],
    )
    def test_the_step_in_a_name(self, tmp_path, name, step):
        lines = [{k: v for k, v in entry.items() if k != "step"} for entry in two_of_four()]
        (tmp_path / name).parent.mkdir(exist_ok=True)
        path = write_dump(tmp_path / name, lines)
        result = audit(path).result
        assert [of["step"] for of in result["steps"]] == [step]
        assert codes(result) == ({} if step else {"read_otherwise": "info"})

    @pytest.mark.parametrize("given", ["4", 4.0, " 4 "])
    def test_steps_of_other_types(self, tmp_path, given):
        path = write_dump(tmp_path / "9.jsonl", [entry | {"step": given} for entry in two_of_four()])
        result = audit(path).result
        assert ([of["step"] for of in result["steps"]], codes(result)) == ([4], {})

    @pytest.mark.parametrize(
        "given", ["four", 4.5, True, [4], {}, 10**400, float("inf"), "", -(10**16)], ids="{!s:.9}".format
    )
    def test_steps_that_are_none(self, tmp_path, given):
        path = write_dump(tmp_path / "9.jsonl", [entry | {"step": given} for entry in two_of_four()])
        result = audit(path).result
        assert ([of["step"] for of in result["steps"]], codes(result)) == ([9], {"read_otherwise": "info"})

    def test_a_uid_that_all_rollouts_of_a_prompt_share(self, tmp_path):
        lines = []
        for number, prompt in enumerate(("first", "second", "third")):
            for entry in two_of_four():
                lines.append(entry | {"uid": f"nq_{number}_0", "input": prompt})
        result = audit(write_dump(tmp_path / "1.jsonl", lines)).result
        totals = result["totals"]
        assert (totals["trajectories"], totals["prompts"], totals["corrected_steps"]) == (12, 3, 3)
        assert codes(result) == {"foreign_uids": "warning"}

    def test_uids_that_name_data_set_question_and_rollout(self, tmp_path):
        lines = []
        for number in (11, 12, 13):
            for rollout, entry in enumerate(two_of_four()):
                lines.append(entry | {"uid": f"nq_{number}_{rollout}", "gts": [f"truth {number}"]})
        result = audit(write_dump(tmp_path / "1.jsonl", lines)).result
        totals = result["totals"]
        assert (totals["trajectories"], totals["prompts"], totals["corrected_steps"]) == (12, 3, 3)
        assert codes(result) == {"foreign_uids": "warning"}

    @pytest.mark.parametrize("uid", ["question 7", 7])
    def test_uids_without_veRLs_numbers_are_prompts(self, tmp_path, uid):
        result = audit(write_dump(tmp_path / "1.jsonl", [entry | {"uid": uid} for entry in two_of_four()])).result
        # Two of the four say the same, so that they are no copies.
        assert (result["totals"]["trajectories"], result["totals"]["prompts"]) == (4, 1)

    def test_a_dump_appended_to_itself_counts_once(self, tmp_path):
        lines = [e for uid in "pq" for e in two_of_four(1, uid)]
        once = audit(write_dump(tmp_path / "1.jsonl", lines)).result
        twice = audit(write_dump(tmp_path / "1.jsonl", lines + lines)).result
        assert twice["totals"] == once["totals"]
        assert codes(twice) == {"copied_lines": "warning"}
        assert "1.jsonl:9" in twice["warnings"][0]["text"]

    def test_two_runs_in_one_dump(self, tmp_path):
        """The same keys, other rollouts: each line is one."""
        other = [entry | {"output": search_then("river of Peru", "x")} for entry in two_of_four()]
        result = audit(write_dump(tmp_path / "1.jsonl", two_of_four() + other)).result
        assert (result["totals"]["trajectories"], result["totals"]["prompts"]) == (8, 1)
        assert codes(result) == {"foreign_uids": "warning"}

    def test_texts_of_records_come_from_any_dump(self, tmp_path):
        (tmp_path / "records").mkdir()
        for step in (1, 2, 3):
            write_dump(tmp_path / "records" / f"{step:06d}.jsonl.gz", [record_header(step), *recorded_group()])
        lines = [e for step in (1, 2, 3) for e in two_of_four(step)]
        random.Random(2).shuffle(lines)
        write_dump(tmp_path / "all.jsonl.gz", lines)
        result = audit(tmp_path).result
        assert result["settings"]["recorded_steps"] == 3
        assert result["totals"]["trajectories"] == 12
        assert all(t["text"] and t["calls"][0]["result"] for g in result["groups"] for t in g["trajectories"])


class TestStrangers:
    """A file never chooses code, a model or the network, whatever it holds."""

    @pytest.mark.parametrize(
        "kernel", ["embedding", {"kernel": "embedding", "model": "./model"}, "their_own", {"kernel": ["x"]}, {}, 7]
    )
    def test_a_record_chooses_no_kernel_that_loads_anything(self, tmp_path, monkeypatch, kernel):
        def loads(*_):
            raise AssertionError("a model was asked for")

        monkeypatch.setattr("verl_tapo.rule.similarity._sentence_transformer", loads)
        monkeypatch.setitem(similarity._REGISTRY, "their_own", loads)
        header = record_header(tools={"search": {"query": kernel, "page": "exact"}})
        path = write_dump(tmp_path / "000001.jsonl", [header, *recorded_group()])
        result = audit(path).result
        assert codes(result) == {"kernels_not_used": "error"}
        assert "for query of search" in result["warnings"][0]["text"]
        assert result["settings"]["tools"] == {"search": {"query": "text", "page": "exact"}}
        assert result["totals"]["corrected_steps"] == 1

    def test_the_caller_may_choose_it(self, tmp_path, monkeypatch):
        asked = []

        class Model:
            def encode(self, texts, **_):
                return [[1.0, 0.0] if "oman" in text else [0.0, 1.0] for text in texts]

        monkeypatch.setattr(similarity, "_sentence_transformer", lambda *given: asked.append(given) or Model())
        header = record_header(tools={"search": {"query": {"kernel": "embedding", "model": "./model"}}})
        path = write_dump(tmp_path / "000001.jsonl", [header, *recorded_group()])
        mine = {"search": {"query": {"kernel": "embedding", "model": "mine"}}}
        assert codes(audit(path, settings={"tools": mine}).result) == {}
        assert set(asked) == {("mine", None)}

    def test_harmless_kernels_are_as_recorded(self, tmp_path):
        tools = {"search": {"query": {"kernel": "text"}, "page": {"kernel": "number", "scale": 2}}, "zoom": None}
        path = write_dump(tmp_path / "000001.jsonl", [record_header(tools=tools), *recorded_group()])
        result = audit(path).result
        assert result["settings"]["tools"] == tools
        assert "kernels_not_used" not in codes(result)


DEEP: list = []
for _ in range(300):
    DEEP = [DEEP]
ODD = [
    *(None, True, False, 0, 1, -1, 2**63, -(2**64), 10**400, 1e308, -1e308, 3.5e38, float("nan"), float("inf"), 1.5),
    *("", "x", "1", "nan", "\ud800", "\x1b[2J", "\x00", "9" * 5000, [], [None], [1, 2], [10**400, 1e308], DEEP),
    *({}, {"": 1}, {"\ud800": "\udfff"}, {"a": float("nan")}, {"kernel": "embedding"}),
]
MISSING = object()


def with_value(value, path, odd):
    """A deep copy with another value at a path."""
    copy = json.loads(json.dumps(value))
    at = copy
    for name in path[:-1]:
        at = at[name]
    if odd is MISSING:
        del at[path[-1]]
    else:
        at[path[-1]] = odd
    return copy


class TestOddValues:
    """No value of any field ends an audit: its line is read, or named with its reason, and the rest is audited."""

    def check(self, path):
        found = audit(path)
        assert json.loads(found.to_json())["version"] == 1
        assert len(found.calls) == found.result["totals"]["calls"]
        return found.result

    @pytest.mark.parametrize("name", ["input", "output", "gts", "score", "step", "uid", "acc", "more"])
    def test_in_dumps(self, tmp_path, name):
        odd = [line("no call", 0.0, "odd", number) | {name: value} for number, value in enumerate(ODD)]
        lines = [*two_of_four(), *map(json.dumps, odd), *two_of_four(uid="q")]
        result = self.check(write_dump(tmp_path / "1.jsonl", lines))
        assert result["totals"]["trajectories"] + result["skipped"] == len(lines)
        assert result["totals"]["corrected_steps"] >= 2
        if name == "score":
            reasons = {p["reason"] for p in result["problems"]}
            assert "the score is '1e+308', beyond veRL's arithmetic" in reasons
            assert "the score is 'inf', not a finite number" in reasons
            assert "the score is a list, not a finite number" in reasons

    def test_in_the_arguments_of_calls(self, tmp_path):
        lines = []
        for number, value in enumerate(ODD):
            for session, name in enumerate(("query", "bbox", "image", "other")):
                text = call_text("search", **{name: json.loads(json.dumps(value))}) + answers("A") + "end"
                lines += [json.dumps(line(text, float(k), f"{name}{number}", 2 * session + k)) for k in (0, 1)]
        result = self.check(write_dump(tmp_path / "1.jsonl", [*lines, *two_of_four()]))
        assert result["totals"]["trajectories"] == len(lines) + 4
        assert result["totals"]["corrected_steps"] > 4 * len(ODD) / 2

    PATHS = (
        *(("key",), ("uid",), ("trajectory",), ("score",), ("success",), ("advantage",), ("tokens",), ("length",)),
        *(("changed_tokens",), ("recognisable",), ("calls",), ("calls", 0), ("more",)),
        *(("calls", 0, name) for name in ("tool", "arguments", "turn", "call", "turn_tokens", "call_tokens", "ok")),
        *(("calls", 0, name) for name in ("status", "gate", "witness", "latency_s", "more")),
        *(("calls", 0, "arguments", name) for name in ("query", "bbox", "image")),
    )

    @pytest.mark.parametrize("path", PATHS, ids=lambda path: ".".join(map(str, path)))
    def test_in_records(self, tmp_path, path):
        row = record_row(9, "capital of Oman", False)
        known = path[-1] not in ("more", "bbox", "image")
        odd = [with_value(row | {"trajectory": 100 + number, "key": f"p_{number}_0"}, path, value)
               for number, value in enumerate([*ODD, MISSING] if known else ODD)]  # fmt: skip
        good = [row | {"trajectory": 1000 + row["trajectory"]} for row in recorded_group()]
        rows = [record_header(), *good, *odd]
        result = self.check(write_dump(tmp_path / "000001.jsonl", list(map(json.dumps, rows))))
        assert result["totals"]["corrected_steps"] >= 1
        assert result["totals"]["trajectories"] + result["skipped"] == len(rows) - 1
        for problem in result["problems"]:
            assert problem["line"]
            assert problem["reason"].startswith((path[0], "not a row of step records", "not JSON", "20 more"))

    @pytest.mark.parametrize(
        ("path", "odd", "reason"),
        [
            (("calls",), None, "calls is None, not a list"),
            (("calls", 0), 7, "calls[0] is int, not a mapping"),
            (("calls", 0, "turn"), None, "calls[0].turn is None, not a span"),
            (("calls", 0, "ok"), MISSING, "calls[0].ok is missing, not true or false"),
            (("advantage",), "x", "advantage is 'x', not a number that can be reckoned with"),
            (("advantage",), float("nan"), "advantage is nan, not a number that can be reckoned with"),
            (("trajectory",), [0], "trajectory is a list, not a whole number"),
            (("uid",), None, "uid is None, not a text"),
            (("success",), "yes", "success is 'yes', not true or false"),
            (("score",), 10**400, f"score is {str(10**400)[:40]}, not a number that can be reckoned with or null"),
        ],
    )
    def test_line_and_field_are_named(self, tmp_path, path, odd, reason):
        rows = [record_header(), with_value(record_row(8, "x", False), path, odd), *recorded_group()]
        result = self.check(write_dump(tmp_path / "000001.jsonl", list(map(json.dumps, rows))))
        assert [(p["line"], p["reason"]) for p in result["problems"]] == [(2, reason)]
        assert result["totals"]["trajectories"] == 4

    SETTINGS = (
        *("beta", "theta", "alpha_min", "token_scope", "scope", "use_support", "clip", "tools", "success_key"),
        *("success_threshold", "error_markers", "image_parameters", "image_index_base", "record_dir", "unheard_of"),
    )

    def test_in_headers(self, tmp_path):
        header = record_header(tools={"search": {"query": "text"}})
        paths = [*((name,) for name in header), *(("settings", name) for name in self.SETTINGS)]
        paths += [("settings", "tools", "search"), ("settings", "tools", "search", "query")]
        odd = [with_value(header, path, value) for path in paths for value in ODD]
        for number, value in enumerate(odd):
            rows = [with_value(row, ("uid",), f"u{number}") for row in recorded_group()]
            write_dump(tmp_path / f"{number:06d}.jsonl", list(map(json.dumps, [value, *rows])))
        write_dump(tmp_path / "999999.jsonl", [record_header(999999), *recorded_group()])
        result = self.check(tmp_path)
        assert result["steps"][-1]["step"] == 999999
        read = result["totals"]["trajectories"] // 4
        unread = next(w["text"] for w in result["warnings"] if w["code"] == "unread_files")
        assert f"{len(odd) + 1 - read - len(result['left_out'])} files" in unread
        reasons = {p["reason"].split(": ", 1)[-1] for p in result["problems"]}
        assert "the header's step is missing, not a whole number" not in reasons
        assert "the header's settings is None, not a mapping" in reasons

    @pytest.mark.parametrize("name", ["step", "settings"])
    def test_headers_that_lack_something(self, tmp_path, name):
        write_dump(tmp_path / "000001.jsonl", [with_value(record_header(), (name,), MISSING), *recorded_group()])
        write_dump(tmp_path / "000002.jsonl", [record_header(2), *recorded_group()])
        result = self.check(tmp_path)
        assert result["totals"]["trajectories"] == 4
        assert f"the header's {name} is missing" in result["problems"][0]["reason"]

    def test_parquet_files_of_something_else(self, tmp_path):
        pandas.DataFrame({"a": [1]}).to_parquet(tmp_path / "1.parquet")
        (tmp_path / "2.parquet").write_bytes(b"PAR1 and no more")
        table = pyarrow.table({"uid": ["u"], "calls": [[{"arguments": "{"}]]})
        header = json.dumps(record_header())
        pyarrow.parquet.write_table(
            table.replace_schema_metadata({"tapo_step_records": header}), tmp_path / "3.parquet"
        )
        write_dump(tmp_path / "4.jsonl", two_of_four(4))
        result = self.check(tmp_path)
        assert result["totals"]["trajectories"] == 4
        assert result["left_out"] == [f"{tmp_path}/1.parquet (a Parquet file of something else)"]
        places = [(Path(problem["file"]).name, problem["line"]) for problem in result["problems"]]
        assert places == [("2.parquet", None), ("3.parquet", 1)]


LOGGED = {
    "told": ("told_trajectories", "trajectories"),
    "grounded_successes": ("grounded_successes", "told_successes"),
    "grounded_failures": ("grounded_failures", "told_failures"),
    "never_found": ("never_found_trajectories", "told_trajectories"),
}
"""How the metrics ``tapo/grounding/`` follow from an audit's figures."""


def grounding_of(result):
    """An audit's figures as training logs them."""
    totals = result["totals"]
    shares = {f"tapo/grounding/{name}": totals[part] / totals[whole] for name, (part, whole) in LOGGED.items()}
    for tool, of in result["tools"].items():
        if of["told_answers"]:
            shares[f"tapo/grounding/tool/{tool}/found"] = of["found_answers"] / of["told_answers"]
    return shares


class TestGrounding:
    """Whether the tools' answers held an accepted answer."""

    def judged(self, tmp_path, *calls, gts="Luxembourg", **more):
        """What is told of a rollout's calls, each with its answer."""
        text = "".join(call_text(tool, **arguments) + answers(answer) for tool, arguments, answer in calls) + "end"
        path = write_dump(tmp_path / "1.jsonl", [json.dumps(line(text, 1.0) | {"gts": gts, **more})])
        return audit(path).calls["seen"].tolist()

    def logged(self, record_dir, rows, tokenizer, luck):
        """What a training step with these rows logs; its record is written."""
        data, metrics = data_proto(rows, tokenizer, reward_model=[LUXEMBOURG] * len(rows)), {}
        compute_tapo_advantage(
            data.batch["token_level_rewards"],
            data.batch["response_mask"],
            data.non_tensor_batch["uid"],
            OmegaConf.create({"tapo": {"record_dir": str(record_dir), "grounding": {"luck": luck}}}),
            non_tensor_batch=data.non_tensor_batch,
            batch=data.batch,
            adv_context={"metrics": metrics},
        )
        estimator._RecorderCache.recorder.flush()
        return metrics

    @pytest.mark.parametrize("luck", [False, True])
    @pytest.mark.parametrize("trainer", ["ray_trainer.RayPPOTrainer", "v1.trainer_base.PPOTrainer"])
    def test_what_training_logs(self, tmp_path, qwen_like_tokenizer, trainer, luck):
        """Of one batch: the metrics, the step's record, and the dump that veRL writes."""
        pytest.importorskip("verl.trainer.ppo.ray_trainer")
        rows = grounded_group(qwen_like_tokenizer)
        metrics = self.logged(tmp_path / "records", rows, qwen_like_tokenizer, luck)
        logged = {name: metrics[name] for name in GROUNDING_METRICS}
        assert logged == pytest.approx(GROUNDING_METRICS)
        module, _, name = trainer.rpartition(".")
        write_generations = getattr(importlib.import_module(f"verl.trainer.ppo.{module}"), name)._write_generations
        texts = [qwen_like_tokenizer.decode(rollout.ids, skip_special_tokens=True) for rollout, _, _ in rows]
        count = len(rows)
        write_generations(
            ["question"] * count, texts, [LUXEMBOURG["ground_truth"]] * count, [float(ok) for _, ok, _ in rows],
            {"uid": [f"u0_{row}_0" for row in range(count)]}, str(tmp_path / "dump"), 1,
        )  # fmt: skip
        for folder in ("records", "dump"):
            result = audit(tmp_path / folder, settings={"grounding": {"luck": luck}}).result
            assert grounding_of(result) == pytest.approx(logged)
            totals = result["totals"]
            assert totals["withheld_trajectories"] / 6 == luck / 3
            for name in ("misassigned_steps", "corrected_steps"):
                assert totals[name] / totals["failing_steps"] == pytest.approx(metrics[f"tapo/{name}"])
            assert totals["reference_advantage"] == pytest.approx(metrics["tapo/reference_advantage"])

    def test_rollouts_that_call_nothing(self, tmp_path, qwen_like_tokenizer):
        """A record says whether a tool could have told; of a dump the ground truth does."""
        rows = silent_group(qwen_like_tokenizer)
        metrics = self.logged(tmp_path / "records", rows, qwen_like_tokenizer, True)
        texts = [line("<answer>x</answer>", float(ok)) | {"gts": ["Luxembourg"]} for _, ok, _ in rows]
        (tmp_path / "dump").mkdir()
        write_dump(tmp_path / "dump" / "1.jsonl", [json.dumps(text) for text in texts])
        assert metrics["tapo/grounding/withheld_trajectories"] == 1 / 2
        for folder in ("records", "dump"):
            totals = audit(tmp_path / folder, settings={"grounding": {"luck": True}}).result["totals"]
            assert totals["withheld_trajectories"] == 2

    def test_of_one_rollout(self, tmp_path):
        page, other = "Luxembourg is a country.", "nothing of it"
        calls = [
            ("search", {"query": "a"}, page),
            ("search", {"query": "a"}, other),
            ("search", {"query": "is it LUXEMBOURG"}, page),
            ("search", {"query": "b"}, f"{other} (truncated)"),
            ("search", {"query": "b"}, f"{page} (truncated)"),
            ("search", {"query": "c"}, f"Error executing tool 'search': {page}"),
            ("search", {"query": "d"}, ""),
            ("zoom", {"image": 1}, "Zoomed in."),
            ("zoom", {"image": 1}, page),
            ("look", {"x": 1}, "<image>"),
            ("image_search", {"image": 1}, "A page of many words. " * 20),
        ]
        sights = [True, False, None, None, True, False, None, None, True, None, False]
        assert self.judged(tmp_path, *calls) == sights

    @pytest.mark.parametrize(
        "fields",
        [
            {"ground_truth": "Luxembourg"},
            {"reward_model": {"style": "rule", "ground_truth": ["Luxembourg"]}},
            {"gts": '["Luxembourg"]'},
            {"gts": {"target": ["Luxembourg"]}},
        ],
    )
    def test_where_people_keep_the_ground_truth(self, tmp_path, fields):
        call = ("search", {"query": "a"}, "Luxembourg")
        assert self.judged(tmp_path, call, **{"gts": None, **fields}) == [True]
        assert self.judged(tmp_path, call, **{**fields, "gts": "Belgium"}) == [False]

    @pytest.mark.parametrize(
        "gts",
        [
            None,
            "yes",
            1999,
            [],
            "['A' 'B']",
            "[" * 5000,
            "Luxembourg" * 20_000,
            DEEP,
            ["['a', " + "1, " * 40_000 + "'yes, in 1999']"],
        ],
    )
    def test_what_cannot_be_told(self, tmp_path, gts):
        assert self.judged(tmp_path, ("search", {"query": "a"}, "yes, in 1999"), gts=gts) == [None]

    @pytest.mark.parametrize("value", ["True", 1, [], {}])
    def test_records_that_say_something_else(self, tmp_path, value):
        rows = [record_row(0, "x", False, calls=[record_call("x", seen=value)]), *recorded_group()]
        result = audit(write_dump(tmp_path / "000001.jsonl", [record_header(), *rows])).result
        said = "calls[0].seen is " + (f"a {type(value).__name__}" if isinstance(value, list | dict) else repr(value))
        assert [p["reason"] for p in result["problems"]] == [f"{said}, not true or false or null"]
        assert result["totals"]["told_trajectories"] == 0  # nor do the first files say anything


class TestImages:
    """``image: 2`` is the same image only where it was made in the same way."""

    def rollout(self, *boxes, session, score, first=1, second=2):
        text = "".join(call_text("zoom", image=first, bbox=box) + answers("<image>") for box in boxes)
        return line(text + call_text("image_search", image=second) + answers("A flag") + "end", score, session=session)

    def compared(self, *lines):
        rows = [Row(number, entry) for number, entry in enumerate(lines)]
        batch = batch_from_dump(1, rows, TapoSettings(), ReadOptions())
        return [[dict(call.compared) for call in trajectory.calls] for trajectory in batch.trajectories]

    def test_images_that_tools_made(self):
        left, right, left_again = self.compared(
            self.rollout([0, 0, 9, 9], session=0, score=1.0),
            self.rollout([5, 5, 9, 9], session=1, score=0.0),
            self.rollout([0, 0, 9, 9], session=2, score=0.0),
        )
        assert left[1] == left_again[1] != right[1]
        assert left[0]["image"] == right[0]["image"] == 1  # the prompt's

    @pytest.mark.parametrize(("one", "two"), [(1.0, 2.0), ("1", "2"), ([1], [2.0]), ("image 1", " 2 ")])
    def test_an_index_is_read_however_it_is_written(self, one, two):
        left, right, left_again = self.compared(
            self.rollout([0, 0, 9, 9], session=0, score=1.0),
            self.rollout([5, 5, 9, 9], session=1, score=0.0, first=one, second=two),
            self.rollout([0, 0, 9, 9], session=2, score=0.0, first=one, second=two),
        )
        assert left == left_again
        assert left[0]["image"] == right[0]["image"]
        assert left[1] != right[1]

    def test_lists_of_images(self):
        left, right = self.compared(
            self.rollout([0, 0, 9, 9], session=0, score=1.0, second=[1, 2]),
            self.rollout([5, 5, 9, 9], session=1, score=0.0, second=[1, 2]),
        )
        assert left[1]["image"][0] == right[1]["image"][0] == 1
        assert left[1]["image"][1] != right[1]["image"][1]

    def test_an_image_of_the_prompt_stays_one_later(self):
        first, second = self.compared(
            self.rollout([0, 0, 9, 9], session=0, score=1.0),
            self.rollout([5, 5, 9, 9], [0, 0, 9, 9], session=1, score=0.0),
        )
        assert first[0] == second[1]


def random_batch(seed, rows=12):
    r, sights = random.Random(seed), random.Random(seed + 10_000)
    trajectories = []
    for number in range(rows):
        success = r.random() < 0.5
        calls = []
        turn = 0
        for _ in range(r.randrange(4)):
            turn += r.random() < 0.7
            arguments = {"query": r.choice(["red car", "red cars", "blue car", "tall tree"])}
            sizes = (r.randrange(5, 50), r.randrange(1, 5))
            calls.append(Call(r.choice(["search", "look"]), arguments, arguments, turn, r.random() < 0.9, "ok", *sizes))
            calls[-1].seen = sights.choice([True, False, False, False, None])
        for call in calls:
            call.turn_size = max(other.turn_size for other in calls if other.turn == call.turn)
        advantage = r.choice([0.5, 1.0]) if success else r.choice([-0.4, -1.2])
        group = f"g{number % 3}"
        trajectories.append(Trajectory(f"t{number}", group, float(success), success, advantage, 200, calls))
    return StepBatch(1, trajectories)


SWITCHES = [Grounding(), Grounding(witnesses=True, own=True, luck=True)]


class TestAnalysis:
    @pytest.mark.parametrize("clip", [True, False])
    @pytest.mark.parametrize("grounding", SWITCHES)
    @pytest.mark.parametrize("scope", ["step", "call"])
    @pytest.mark.parametrize("seed", range(20))
    def test_the_same_as_on_tokens(self, seed, scope, grounding, clip):
        """Against the rule on real tokens, with parallel calls in shared turns."""
        batch = random_batch(seed)
        cfg = TapoConfig(token_scope=scope, alpha_min=0.1, grounding=grounding, clip=clip)
        steps, mask = [], torch.zeros(len(batch.trajectories), 200, dtype=torch.int64)
        mask[:, :] = 1
        for row, trajectory in enumerate(batch.trajectories):
            at = {}
            for call in trajectory.calls:
                begin, used = at.get(call.turn, (50 * call.turn, 0))
                at[call.turn] = (begin, used + call.call_size)
                turn = (begin, begin + call.turn_size)
                first = begin + used
                inside = first + call.call_size <= turn[1]
                first = first if inside else turn[1] - call.call_size
                steps.append(
                    ToolStep(
                        row,
                        call.tool,
                        call.arguments,
                        turn,
                        (max(first, turn[0]), first + call.call_size),
                        call.ok,
                        call.seen,
                    )
                )
        base = torch.tensor([t.advantage for t in batch.trajectories], dtype=torch.float64)[:, None].repeat(1, 200)
        groups, success = [t.group for t in batch.trajectories], [t.success for t in batch.trajectories]
        advantages, report = transfer_credit(base, mask, groups, success, steps, cfg)
        analysis = analyse(batch, cfg)
        assert [j.credit for j in analysis.calls] == report.steps
        for judged, step in zip(analysis.calls, steps, strict=True):
            if scope == "step":
                assert judged.after == advantages[step.row, step.turn[0]].item()
        values = figures(analysis.counts())
        metrics = report.metrics()
        assert values["failing_steps"] == sum(s.role == "failing" for s in report.steps)
        for name in ("misassigned", "corrected"):
            share = values[f"{name}_steps"] / max(values["failing_steps"], 1)
            assert share == pytest.approx(metrics[f"tapo/{name}_steps"])
        lucky = metrics.get("tapo/lucky_steps", 0.0) * values["misassigned_steps"]
        assert values["lucky_steps"] == pytest.approx(lucky)
        inexact = metrics.get("tapo/inexact_steps", 0.0) * values["misassigned_steps"]
        assert values["inexact_steps"] == pytest.approx(inexact)
        for name in ("similarity", "support", "alpha", "transfer", "lift", "reference_advantage"):
            assert (values[name] is None) == (f"tapo/{name}" not in metrics)
            assert values[name] == pytest.approx(metrics.get(f"tapo/{name}"))
        if scope == "step":
            assert values["token_share"] == pytest.approx(metrics["tapo/token_share"])
            removed = (advantages - base)[base < 0].sum().item() / -base[base < 0].sum().item()
            assert values["penalty_removed"] == pytest.approx(removed)

    @pytest.mark.parametrize("grounding", SWITCHES)
    @pytest.mark.parametrize("scope", ["step", "call"])
    def test_a_sweep_says_what_an_audit_of_each_setting_says(self, scope, grounding):
        cfg = TapoConfig(token_scope=scope, grounding=grounding)
        sweep = Sweep(cfg, star(cfg, [0.2, 1.5], [0.5, 0.95], [0.0, 0.6]))
        batches = [random_batch(seed) for seed in range(5)]
        for batch in batches:
            sweep.add(batch)
        assert len(sweep.rows()) == 7
        for row in sweep.rows():
            own = TapoConfig(
                beta=row["beta"],
                theta=row["theta"],
                alpha_min=row["alpha_min"],
                token_scope=scope,
                grounding=grounding,
            )
            analyses = [analyse(batch, own) for batch in batches]
            corrected = [j for a in analyses for j in a.calls if j.credit.gate == "corrected"]
            assert row["corrected_steps"] == len(corrected) > 0
            assert row["mean_lifted_advantage"] == pytest.approx(sum(j.after for j in corrected) / len(corrected))
            changed = sum(a.counts()["changed_size"] for a in analyses)
            assert row["token_share"] == pytest.approx(changed / (5 * 12 * 200))

    def test_nothing_to_judge(self):
        silent = StepBatch(1, [Trajectory("t", "g", 0.0, False, 0.0, 5, [])])
        assert figures(analyse(silent, TapoConfig()).counts())["token_share"] == 0
        assert figures(analyse(StepBatch(1, []), TapoConfig()).counts())["token_share"] is None

    def test_a_sample_is_even_and_bounded(self):
        sample = Sample(100)
        for number in range(12345):
            sample.add(number)
        assert 50 <= len(sample.items) <= 100
        gaps = {b - a for a, b in zip(sample.items[:-1], sample.items[1:], strict=True)}
        assert len(gaps) == 1


class TestFigures:
    """By hand: two right and two wrong rollouts; a = ±0.866; of the wrong ones, one made the call of the right ones."""

    def test_of_one_group(self, tmp_path):
        result = audit(write_dump(tmp_path / "1.jsonl", two_of_four())).result
        totals = result["totals"]
        expected = {
            "prompts": 1,
            "trajectories": 4,
            "successes": 2,
            "failing_trajectories": 2,
            "misassigned_trajectories": 1,
            "correctable_trajectories": 1,
            "calls": 4,
            "witness_steps": 2,
            "failing_steps": 2,
            "misassigned_steps": 1,
            "corrected_steps": 1,
            "below_theta_steps": 1,
            "lucky_steps": 0,
            "only_success_steps": 0,
            "inexact_steps": 0,
            "success_rate": 0.5,
            "similarity": 1.0,
            "support": 1.0,
        }
        assert {name: totals[name] for name in expected} == expected
        assert totals["lift"] == pytest.approx(2 / 3 - 1 / 2)
        turn = len("Let me look." + call_text("search", query="capital of Oman"))
        other = len("Let me look." + call_text("search", query="currency of Chile"))
        whole = 3 * turn + other + 4 * 5
        assert totals["token_share"] == pytest.approx(turn / whole)
        # the corrected turn's advantage rises to -0.866 + 0.8 * 0.866
        assert totals["penalty_removed"] == pytest.approx(0.8 * turn / (turn + other + 10), abs=1e-6)
        (group,) = result["groups"]
        third, fourth = group["trajectories"][2]["calls"][0], group["trajectories"][3]["calls"][0]
        assert (third["gate"], third["witness"]) == ("corrected", {"trajectory": 0, "call": 0})
        assert third["before"] == pytest.approx(-0.866, abs=1e-3)
        assert third["after"] == pytest.approx(-0.866 * 0.2, abs=1e-3)
        assert (fourth["gate"], fourth["after"]) == ("below_theta", fourth["before"])
        assert 0 < fourth["similarity"] < 0.8
        assert fourth["alpha"] is None
        assert result["totals"] == {k: v for k, v in result["steps"][0].items() if k != "step"}

    def test_lift_by_tool(self, tmp_path):
        """All four search for Oman, the two that succeed and one that fails look at the same page too."""
        look = call_text("visit", url="oman.om") + answers("A page")
        lines = [
            line(call_text("search", query="Oman") + answers("A") + look * (k < 3) + "end", float(k < 2), session=k)
            for k in range(4)
        ]
        result = audit(write_dump(tmp_path / "1.jsonl", lines)).result
        tools = result["tools"]
        assert {tool: of["reference_groups"] for tool, of in tools.items()} == {"search": 1, "visit": 1}
        assert tools["search"]["lift"] == 0
        assert tools["visit"]["lift"] == pytest.approx(2 / 3 - 1 / 2)
        assert result["totals"]["lift"] == pytest.approx((2 / 3 - 1 / 2) / 2)

    @pytest.mark.parametrize(("scope", "steps"), [("group", 3), ("batch", 0)])
    def test_where_one_success_tells_nothing_of_luck(self, tmp_path, scope, steps):
        """Of 5 misassigned calls 3 are in a group with one success. Over the batch the others' successes count."""
        lines = [line(search_then("a guess", "x"), float(k == 0), "one", k) for k in range(4)]
        lines += [line(search_then("another", "x"), float(k < 2), "two", k) for k in range(4)]
        result = audit(write_dump(tmp_path / "1.jsonl", lines), settings={"scope": scope}).result
        totals = result["totals"]
        assert result["tools"]["search"]["only_success_steps"] == steps
        assert (totals["misassigned_steps"], totals["only_success_steps"], totals["lucky_steps"]) == (5, steps, 0)

    def test_json_can_hold_it(self, tmp_path):
        odd = search_then("\ud800", "wrong")
        found = audit(write_dump(tmp_path / "1.jsonl", [*two_of_four(), json.dumps(line(odd, 0.0, session=7))]))
        assert json.loads(found.to_json())["totals"] == found.result["totals"]


class TestWarnings:
    def codes(self, tmp_path, lines, **options):
        result = audit(write_dump(tmp_path / "1.jsonl", lines), **options).result
        return {warned["code"]: warned["level"] for warned in result["warnings"]}

    @pytest.mark.parametrize(
        ("values", "threshold"), [((0.5, 1.5), "=1,"), ((0.0, 0.1), "=0.05,"), ((0.6, 1.0), "=0.8,")]
    )
    def test_scores_on_one_side_of_the_threshold(self, tmp_path, values, threshold):
        lines = [entry | {"score": values[int(entry["score"])]} for k in range(5) for entry in two_of_four(uid=f"g{k}")]
        path = write_dump(tmp_path / "1.jsonl", lines)
        result = audit(path).result
        assert codes(result) == {"one_sided_threshold": "error"}
        (warned,) = result["warnings"]
        assert f"run from {values[0]:g} to {values[1]:g}" in warned["text"]
        assert f"--set success_threshold{threshold}" in warned["advice"]
        fit = audit(path, settings={"success_threshold": sum(values) / 2}).result
        assert (fit["totals"]["corrected_steps"], codes(fit)) == (5, {})

    def test_all_fail_by_their_own_field(self, tmp_path):
        lines = [entry | {"acc": 0.0} for k in range(5) for entry in two_of_four(uid=f"g{k}")]
        result = audit(write_dump(tmp_path / "1.jsonl", lines)).result
        assert codes(result)["one_sided_groups"] == "warning"
        assert "though scores differ in 100 %" in next(w["text"] for w in result["warnings"] if "sided" in w["code"])

    @pytest.mark.parametrize(
        ("yes", "no"),
        [("1.0", "0.0"), ("True", "False"), (" true", "FALSE"), (True, False), (1, 0), ("1", "0.2"), (10**400, "-inf")],
    )
    def test_success_as_text(self, tmp_path, yes, no):
        lines = [
            entry | {"score": 0.6 + entry["score"] / 4, "acc": yes if entry["score"] else no} for entry in two_of_four()
        ]
        result = audit(write_dump(tmp_path / "1.jsonl", lines)).result
        assert (result["totals"]["successes"], result["totals"]["corrected_steps"], codes(result)) == (2, 1, {})

    @pytest.mark.parametrize("acc", ["yes", "", [1.0], {"a": 1}, "nan", float("nan")])
    def test_success_that_cannot_be_read(self, tmp_path, acc):
        lines = [entry | {"acc": acc} for entry in two_of_four()]
        result = audit(write_dump(tmp_path / "1.jsonl", lines)).result
        assert codes(result) == {"unread_success": "error"}
        assert "acc of 4 rollouts" in result["warnings"][0]["text"]
        assert "1.jsonl:1" in result["warnings"][0]["text"]
        assert result["totals"]["successes"] == 2  # by the score

    def test_scores_as_text(self, tmp_path):
        lines = [entry | {"score": str(entry["score"])} for entry in two_of_four()]
        assert audit(write_dump(tmp_path / "1.jsonl", lines)).result["totals"]["corrected_steps"] == 1

    def test_a_sound_run_has_none(self, tmp_path):
        lines = [e for group in range(10) for e in two_of_four(uid=f"g{group}")]
        assert self.codes(tmp_path, lines) == {}

    def test_no_calls(self, tmp_path):
        assert self.codes(tmp_path, [line("hm", 1.0), line("hm", 0.0, session=1)]) == {"no_calls": "error"}

    def test_calls_whose_special_tokens_a_dump_left_out(self, tmp_path):
        said = 'assistantcommentary to=functions.search json{"query": "a"}functions.search to=assistantcommentary"A"'
        write_dump(tmp_path / "1.jsonl", [line(said, float(right), session=right) for right in (0, 1)])
        (warned,) = audit(tmp_path, options=ReadOptions(tool_format="gpt-oss")).result["warnings"]
        assert (warned["code"], warned["level"]) == ("no_calls", "error")
        assert "special tokens" in warned["advice"]
        assert "record_dir" in warned["advice"]

    @pytest.mark.parametrize(("share", "level"), [(4, "error"), (1, "warning"), (0, None)])
    def test_turns_that_cannot_be_told_apart(self, tmp_path, share, level):
        """Nothing is left of the template's headers."""
        lines = [e for group in range(4) for e in two_of_four(uid=f"g{group}")]
        for entry in lines:
            if int(entry["uid"][1]) < share:
                for header in ("\nuser\n<tool_response>\n", "\n</tool_response>\nassistant\n"):
                    entry["output"] = entry["output"].replace(header, "")
        assert self.codes(tmp_path, lines) == ({"turns_unclear": level} if level else {})

    def test_one_rollout_a_prompt(self, tmp_path):
        lines = [line(search_then("Oman", "end"), 1.0, uid=f"p{k}") for k in range(5)]
        assert self.codes(tmp_path, lines)["single_rollouts"] == "error"

    def test_one_sided_groups(self, tmp_path):
        lines = [line(search_then("Oman", "end"), 0.0, uid=f"p{k // 4}", session=k % 4) for k in range(20)]
        assert self.codes(tmp_path, lines)["one_sided_groups"] == "warning"

    def test_lucky_witnesses(self, tmp_path):
        lines = []
        for group in range(10):
            uid = f"g{group}"
            # One guess out of three holds; the right call is rare, and the guess is popular.
            lines += [line(search_then("a guess", "x"), float(k == 0), uid, k) for k in range(6)]
            lines += [line(search_then("what helps", "x"), 1.0, uid, k) for k in (6, 7)]
        assert self.codes(tmp_path, lines) == {"lucky_witnesses": "warning"}
        (warned,) = audit(tmp_path / "1.jsonl").result["warnings"]
        assert warned["text"].startswith("100 % of the matched failing calls have lucky witnesses")
        assert "(mean lift: −21 points)" in warned["text"]

    @pytest.mark.parametrize(("wrong", "codes"), [("Cambohia", {"inexact_matches": "info"}), ("Cambodia", {})])
    def test_calls_that_are_only_similar(self, tmp_path, wrong, codes):
        lines = []
        for group in range(40):
            queries = ["Cambodia", "Cambodia", wrong, "Cambodia"][: 4 if group % 2 else 3]
            for k, name in enumerate(queries):
                lines.append(line(search_then(f"capital of {name}", "x"), float(k < 2), f"g{group}", k))
        assert self.codes(tmp_path, lines) == codes

    @pytest.mark.parametrize(
        ("right", "wrong", "codes"),
        [
            ("Luxembourg it is", "Luxembourg it is", {"unread_answers": "info"}),
            ("nothing", "nothing", {"ungrounded_successes": "info", "never_found": "info"}),
            ("Luxembourg it is", "nothing", {}),
        ],
    )
    def test_what_the_tools_found(self, tmp_path, right, wrong, codes):
        lines = []
        for group in range(10):
            for k in range(4):
                query = "currency of Chile" if k == 3 else "capital of Oman"
                text = call_text("search", query=query) + answers(right if k < 2 else wrong) + "end"
                lines.append(line(text, float(k < 2), f"g{group}", k, gts="Luxembourg"))
        assert self.codes(tmp_path, lines) == codes
        found = audit(tmp_path / "1.jsonl")
        said = " ".join(warned["text"] for warned in found.result["warnings"])
        assert ("100 % of the failures had found the answer and did not give it" in said) == ("unread_answers" in codes)
        assert ("In 100 % of the rollouts no tool's answer held" in said) == ("never_found" in codes)
        assert ("100 % of the successes are ungrounded" in said) == ("never_found" in codes)

    def test_a_call_that_all_siblings_make_is_not_lucky(self, tmp_path):
        lines = [
            line(search_then("first step", "x"), float(k < 4), f"g{group}", k) for group in range(10) for k in range(8)
        ]
        assert self.codes(tmp_path, lines) == {}

    def test_tools(self, tmp_path):
        lines = []
        for group in range(10):
            for k in range(4):
                broken = call_text("visit", url="a") + answers("Error executing tool 'visit': down")
                code = call_text("python", code="1") + answers("1")
                dead = call_text("lookup", word=f"{group} {k}") + answers("?") if k >= 2 else ""
                text = broken + code + dead + call_text("search", query="a") + answers("A") + "end"
                lines.append(line(text, float(k < 2), f"g{group}", k))
        found = self.codes(tmp_path, lines)
        assert found == {"failing_tool": "warning", "left_out_tool": "info", "dead_tool": "info"}

    def test_gates(self, tmp_path):
        lines = []
        for group in range(10):
            uid = f"g{group}"
            lines += [line(search_then(f"query number {group}{k}", "x"), 1.0, uid, k) for k in range(4)]
            lines += [line(search_then(f"query number {group}{k}", "x"), 0.0, uid, 4 + k) for k in range(4)]
        assert "below_alpha" in self.codes(tmp_path, lines, settings={"theta": 1.0, "alpha_min": 0.3})
        near = [
            {
                **entry,
                "output": entry["output"].replace("query number", "quest number")
                if entry["score"] == 0
                else entry["output"],
            }
            for entry in lines
        ]
        assert "near_theta" in self.codes(tmp_path, near, settings={"theta": 0.9})
        assert "nothing_matches" in self.codes(
            tmp_path, near, settings={"tools": {"search": {"query": "exact"}}, "theta": 1.0}
        )


def run_main(capsys, *arguments):
    code = main(["audit", *map(str, arguments)])
    said = capsys.readouterr()
    return code, said.out, said.err


class TestCommand:
    def test_tables(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "120")
        write_dump(tmp_path / "1.jsonl", two_of_four())
        code, out, err = run_main(capsys, tmp_path)
        assert (code, err) == (0, "")
        assert "corrected" in out
        assert "50.0%" in out
        assert "search" in out

    @pytest.mark.parametrize("width", [45, 60, 80, 100, 140])
    def test_no_table_is_cut(self, tmp_path, capsys, monkeypatch, width):
        """As many columns as fit, whole; those left out are named."""
        monkeypatch.setenv("COLUMNS", str(width))
        long = "search_" + "x" * 50
        lines = [entry for step in range(1, 12) for entry in two_of_four(step)]
        lines += [
            {**entry, "output": entry["output"].replace('"search"', f'"{long}"')} for entry in two_of_four(1, "q")
        ]
        code, out, _ = run_main(capsys, write_dump(tmp_path / "1.jsonl", lines))
        assert code == 0
        tables = out.split("Left out")[0]
        assert "…" not in tables
        assert max(map(len, tables.splitlines())) <= width
        for title, names in (("By training step", ["step", "misassigned"]), ("By tool", ["tool", "misassigned"])):
            table = tables.split(title)[1].split("└")[0]
            header = table.splitlines()[2]
            assert all(name in header for name in names)
        said = " ".join(tables.split())  # a caption may be broken
        every = "calls failed failing misassigned corrected lucky similarity support tokens success lift".split()
        header = tables.split("By training step")[1].splitlines()[2]
        missing = [name for name in every if name not in header]
        assert bool(missing) == (width < 119)
        assert not missing or "in a wider terminal: support" in said
        caption = said.split("By training step")[1].split("By tool")[0]
        assert all(name in caption.split("in a wider terminal:")[1] for name in missing)
        row = next(line for line in tables.splitlines() if line.startswith("│ 11 "))
        assert "50.0%" in row

    def test_what_the_tables_say(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "140")
        found = audit(write_dump(tmp_path / "1.jsonl", two_of_four()))
        found.result["tools"]["search"]["lift"] = -0.042
        terminal.show(found.result, Console(width=140))
        out = capsys.readouterr().out
        overview, rest = out.split("By training step")
        by_step, by_tool = rest.split("By tool")
        assert [line.split("│")[2].strip() for line in overview.splitlines() if "mean lift" in line] == ["+16.7"]
        assert "+16.7" in by_step
        assert "-4.2" in by_tool.split("With other settings")[0]

    def test_the_tables_say_what_the_tools_found(self, tmp_path, capsys):
        """Where it can be told of any rollout."""
        page = [
            line(call_text("search", query="q") + answers(f"Of {answer}.") + "end", score, session=number, gts="Oslo")
            for number, (answer, score) in enumerate([("Oslo", 1.0), ("Rome", 1.0), ("Oslo", 0.0), ("Rome", 0.0)])
        ]
        page += [line("silent", 0.0, session=9, gts="Oslo")]
        found = audit(write_dump(tmp_path / "1.jsonl", page))
        terminal.show(found.result, Console(width=140))
        out = capsys.readouterr().out
        rows = {cells[1].strip(): cells[2].strip() for row in out.splitlines() if len(cells := row.split("│")) == 5}
        assert rows["grounding can be told"] == "80.0%"
        assert (
            rows["successes that are grounded"] == rows["failures that are grounded"] == rows["never found"] == "50.0%"
        )
        head, row = (re.split("[│┃]", out.split("By tool")[1].splitlines()[line]) for line in (2, 4))
        assert dict(zip(map(str.strip, head), map(str.strip, row), strict=True))["answer found"] == "50.0%"
        terminal.show(audit(write_dump(tmp_path / "1.jsonl", two_of_four())).result, Console(width=140))
        assert "grounded" not in capsys.readouterr().out

    @pytest.mark.long
    def test_in_a_pipe_and_in_any_encoding(self, tmp_path):
        lines = [{**e, "output": e["output"].replace('"search"', '"suche_für_東京"')} for e in two_of_four()]
        path = write_dump(tmp_path / "1.jsonl", lines)
        code = "import sys; from verl_tapo.cli import main; sys.exit(main(sys.argv[1:]))"
        environment = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
        for encoding in ("utf-8", "ascii"):
            done = subprocess.run(
                [sys.executable, "-c", code, "audit", path], capture_output=True, check=True,
                env={**environment, "PYTHONIOENCODING": encoding},
            )  # fmt: skip
            out = done.stdout.decode(encoding)
            assert "…" not in out
            assert "misassigned" in out.split("By tool")[1]

    def test_the_report_is_named_with_its_size(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "40")
        path = write_dump(tmp_path / "1.jsonl", two_of_four())
        report = tmp_path / ("a long name " * 5 + "[red].html")
        _, out, _ = run_main(capsys, path, "--html", report)
        assert out.splitlines()[-1] == f"Report: {report} ({-(-report.stat().st_size // 1000)} kB)"
        _, out, err = run_main(capsys, path, "--html", report, "--json", "-")
        assert json.loads(out)["version"] == 1
        assert err.startswith("Report: ")
        assert "Report" not in "".join(run_main(capsys, path, "--html", report, "--quiet")[1:])
        assert "Report" not in run_main(capsys, path, "--html", "/dev/null")[1]

    def test_names_of_files_are_harmless(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "200")
        evil = "\x1b[31m[bold]\u202e"
        write_dump(tmp_path / f"1{evil}.jsonl", [*two_of_four(), "torn"])
        write_dump(tmp_path / f"metrics{evil}.jsonl", [{"step": 1, "data": {}}])
        code, out, err = run_main(capsys, tmp_path)
        assert code == 0
        assert not {"\x1b", "\u202e"} & set(out + err)
        assert "Not read: 1 line " in out
        assert out.count("[bold]") == 2

    def test_a_terminal_obeys_no_rollout(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "200")
        evil = "\x1b[2J[bold red]boo[/]\u202e"
        lines = [line(call_text(evil, query="a") + answers("A") + "end", float(k < 2), session=k) for k in range(4)]
        code, out, _ = run_main(capsys, write_dump(tmp_path / "1.jsonl", lines))
        assert code == 0
        assert not {"\x1b", "\u202e"} & set(out)
        assert "[bold red]boo" in out

    def test_files(self, tmp_path, capsys):
        write_dump(tmp_path / "1.jsonl", two_of_four(1))
        write_dump(
            tmp_path / "2.jsonl",
            [*two_of_four(2), json.dumps(line(search_then("\ud800", "x"), 0.0, session=9, step=2))],
        )
        out = tmp_path / "out"
        out.mkdir()
        code, said, _ = run_main(
            capsys, tmp_path / "1.jsonl", tmp_path / "2.jsonl", "--quiet", "--html", out / "r.html", "--json",
            out / "r.json", "--csv", out / "csv", "--parquet", out / "parquet",
        )  # fmt: skip
        assert (code, said) == (0, "")
        assert "<title>" in (out / "r.html").read_text()
        assert json.loads((out / "r.json").read_text())["groups"] == []
        for name in ("steps", "tools", "sweeps", "warnings", "calls"):
            csv, parquet = (
                pandas.read_csv(out / "csv" / f"{name}.csv"),
                pandas.read_parquet(out / "parquet" / f"{name}.parquet"),
            )
            assert list(csv.columns) == list(parquet.columns)
            assert len(csv) == len(parquet)
        calls = pandas.read_parquet(out / "parquet" / "calls.parquet")
        assert len(calls) == 9
        assert (calls["gate"] == "corrected").sum() == 2
        assert calls["seen"].isna().all()  # the ground truth is too short to say anything
        write_dump(tmp_path / "1.jsonl", [entry | {"gts": "about capital"} for entry in two_of_four(1)])
        for kind, read in (("csv", pandas.read_csv), ("parquet", pandas.read_parquet)):
            run_main(capsys, tmp_path / "1.jsonl", "--quiet", f"--{kind}", out / kind)
            calls = read(out / kind / f"calls.{kind}")
            assert calls["seen"].tolist() == calls["grounded"].tolist() == [True, True, True, False]
            tools = read(out / kind / f"tools.{kind}")
            assert tools[["told_answers", "found_answers", "grounded_failures"]].to_numpy().tolist() == [[4, 3, 1]]
        run_main(capsys, tmp_path / "1.jsonl", "--quiet", "--csv", out / "csv")
        assert len(pandas.read_csv(out / "csv" / "calls.csv")) == 4  # a new audit, not an addition

    def test_a_spreadsheet_runs_no_cell(self, tmp_path, capsys):
        lines = []
        for k, tool in enumerate(["=1+1", "+1", "-1", "@SUM(A1)", "search"]):
            for session in range(4):
                text = call_text(tool, query="=a") + answers("A") + "end"
                lines.append(line(text, float(session < 2), f"=uid{k}", session))
        path = write_dump(tmp_path / "1.jsonl", lines)
        run_main(capsys, path, "--quiet", "--csv", tmp_path / "csv", "--parquet", tmp_path / "parquet")
        for name in ("calls", "tools", "warnings"):
            with (tmp_path / "csv" / f"{name}.csv").open(newline="") as file:
                cells = [cell for row in csv.reader(file) for cell in row]
            numbers = {cell for cell in cells if re.fullmatch(r"[+-]?[\d.]+(e-\d+)?", cell)}
            assert not [cell for cell in cells if cell[:1] in set("=+-@\t\r\n") and cell not in numbers]
        tools = pandas.read_csv(tmp_path / "csv" / "tools.csv")["tool"]
        assert sorted(tools) == ["'+1", "'-1", "'=1+1", "'@SUM(A1)", "search"]
        assert sorted(pandas.read_parquet(tmp_path / "parquet" / "tools.parquet")["tool"])[1] == "-1"

    def test_json_on_standard_output_alone(self, tmp_path):
        path = write_dump(tmp_path / "1.jsonl", two_of_four())
        command = [sys.executable, "-m", "verl_tapo.cli", "audit", path, "--json", "-", "--browse", "5"]
        code = "import sys; from verl_tapo.cli import main; sys.exit(main(sys.argv[1:]))"
        command[1:3] = ["-c", code]
        done = subprocess.run(command, capture_output=True, check=True)
        assert len(json.loads(done.stdout)["groups"]) == 1

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["{}/nowhere"], "there is no such file or folder"),
            (["{}/empty"], "no rollouts in"),
            (["{}/other.jsonl"], "neither a rollout dump"),
            (["{}/1.jsonl", "--theta", "1.5"], "algorithm.tapo.theta"),
            (["{}/1.jsonl", "--theta", "0.8", "7"], "theta"),
            (["{}/1.jsonl", "--set", "bta=1"], "did you mean 'beta'"),
            (["{}/1.jsonl", "--set", "beta"], "write KEY=VALUE"),
            (["{}/1.jsonl", "--field", "answer=x"], "write NAME=OWN"),
            (["{}/1.jsonl", "--browse", "-1"], "--browse must be at least 0"),
            (["{}/1.jsonl", "--html", "{}/no/such/r.html"], "No such file"),
            (["{}/broken.jsonl"], "not one rollout could be read"),
        ],
    )
    def test_what_cannot_be_done_is_said_in_one_line(self, tmp_path, capsys, arguments, message):
        write_dump(tmp_path / "1.jsonl", two_of_four())
        write_dump(tmp_path / "other.jsonl", [{"a": 1}])
        write_dump(tmp_path / "broken.jsonl", [{"output": "x"}])
        (tmp_path / "empty").mkdir()
        code, out, err = run_main(capsys, *(argument.format(tmp_path) for argument in arguments))
        assert (code, out) == (2, "")
        assert message in err
        assert len(err.strip().splitlines()) == 1

    OUTPUTS = ("--html", "r.html", "--json", "r.json", "--csv", "csv", "--parquet", "parquet")

    def test_an_interrupt_ends_it_without_a_traceback_and_leaves_what_was_there(self, tmp_path, capsys, monkeypatch):
        path = write_dump(tmp_path / "1.jsonl", two_of_four())
        monkeypatch.chdir(tmp_path)
        assert run_main(capsys, path, "--quiet", *self.OUTPUTS)[0] == 0
        before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
        assert len(before) == 13

        def interrupt(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr("verl_tapo.audit.collect.Collector.result", interrupt)
        code, out, err = run_main(capsys, path, "--quiet", *self.OUTPUTS)
        assert (code, out, err) == (130, "", "verl-tapo audit: interrupted\n")
        assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before

    def test_an_interrupt_from_the_keyboard(self, tmp_path):
        os.mkfifo(tmp_path / "go")
        write_dump(tmp_path / "1.jsonl", two_of_four())
        code = (
            "import sys, time; import verl_tapo.audit.run as run; from verl_tapo.cli import main\n"
            "def wait(*_): open(sys.argv[1], 'w').close(); time.sleep(600)\n"
            "run.analyse = wait; sys.exit(main(['audit', sys.argv[2], '--quiet']))"
        )
        command = [sys.executable, "-c", code, tmp_path / "go", tmp_path / "1.jsonl"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
            (tmp_path / "go").read_text()  # waits for it to be in the middle
            running.send_signal(signal.SIGINT)
            assert running.communicate() == ("", "verl-tapo audit: interrupted\n")
        assert running.returncode == 130

    @pytest.mark.parametrize("output", range(0, 8, 2))
    def test_a_full_disk_leaves_what_was_there(self, tmp_path, capsys, monkeypatch, output):
        path = write_dump(tmp_path / "1.jsonl", two_of_four())
        monkeypatch.chdir(tmp_path)
        option = self.OUTPUTS[output : output + 2]
        assert run_main(capsys, path, "--quiet", *option)[0] == 0
        before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        caught = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
            code, out, err = run_main(capsys, path, "--quiet", *option)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
            signal.signal(signal.SIGXFSZ, caught)
        assert (code, out) == (2, "")
        assert "File too large" in err
        after = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
        assert after == before

    @pytest.mark.long
    @pytest.mark.parametrize("option", ["--html", "--json"])
    def test_standard_output_by_its_name(self, tmp_path, option):
        path = write_dump(tmp_path / "1.jsonl", two_of_four())
        code = "import sys; from verl_tapo.cli import main; sys.exit(main(sys.argv[1:]))"
        command = [sys.executable, "-c", code, "audit", path, option, "/dev/stdout"]
        written = subprocess.run(command, capture_output=True, check=True).stdout
        assert written.endswith(b"</html>\n") if option == "--html" else json.loads(written)

    def test_a_reader_that_goes_away_changes_no_exit_code(self, tmp_path):
        path = write_dump(tmp_path / "1.jsonl", two_of_four())
        code = "import sys; from verl_tapo.cli import main; sys.exit(main(sys.argv[1:]))"
        read, write = os.pipe()
        os.close(read)
        with os.fdopen(write, "wb") as stdout:
            done = subprocess.run(
                [sys.executable, "-c", code, "audit", path], stdout=stdout, stderr=subprocess.PIPE, check=False
            )
        assert (done.returncode, done.stderr) == (0, b"")

    @pytest.mark.parametrize(
        ("option", "where", "message"),
        [
            ("--html", "no/such/r.html", "No such file or directory"),
            ("--json", "no/such/r.json", "No such file or directory"),
            ("--html", ".", "Is a directory"),
            ("--csv", "1.jsonl", "File exists"),
        ],
    )
    def test_what_cannot_be_written_is_found_before_anything_is_read(
        self, tmp_path, capsys, monkeypatch, option, where, message
    ):
        write_dump(tmp_path / "1.jsonl", two_of_four())
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("verl_tapo.audit.run.find_sources", lambda *_: pytest.fail("it reads"))
        code, out, err = run_main(capsys, "1.jsonl", option, where)
        assert (code, out) == (2, "")
        assert message in err

    def test_names_of_files_and_fields_command_no_terminal(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "300")
        evil = "\x1b]0;boo\x07[red]\u202e"
        for number, content in enumerate((two_of_four(), [{evil: 1}], [{"output": "x", evil: 1}, *two_of_four(2)])):
            write_dump(tmp_path / f"{number}{evil}.jsonl", content)
        os.mkfifo(tmp_path / f"{evil}.jsonl")
        for name in ("", f"1{evil}.jsonl", f"{evil}.jsonl", evil):
            _, out, err = run_main(capsys, tmp_path / name)
            assert not {"\x1b", "\x07", "\u202e"} & {*out, *err}
            assert out or len(err.splitlines()) == 1

    def test_time_grows_with_the_calls_of_a_turn(self):
        def seconds(calls):
            call = Call("search", {"query": "a"}, {"query": "a"}, 0, True, "ok", calls, 1)
            rollouts = [Trajectory(str(k), "g", k, bool(k), 2.0 * k - 1, calls, [call] * calls) for k in (0, 1)]
            batch = StepBatch(1, rollouts)
            start = time.process_time()
            assert analyse(batch, TapoConfig()).counts()["corrected_steps"] == calls
            return time.process_time() - start

        seconds(10)
        # 16 times the calls; were time quadratic, 256 times as long.
        assert min(seconds(8000) for _ in range(3)) < 80 * min(seconds(500) for _ in range(3)) + 0.02

    def test_exit_codes(self, tmp_path, capsys):
        silent = write_dump(tmp_path / "1.jsonl", [line("hm", 1.0), line("hm", 0.0, session=1)])
        torn = write_dump(tmp_path / "2.jsonl", [*two_of_four(), "torn"])
        assert run_main(capsys, silent)[0] == 1
        assert run_main(capsys, silent, "--fail-on", "never")[0] == 0
        assert run_main(capsys, torn)[0] == 0
        assert run_main(capsys, torn, "--fail-on", "warning")[0] == 1

    def test_settings_and_sweeps(self, tmp_path, capsys):
        path = write_dump(tmp_path / "1.jsonl", two_of_four())
        out = tmp_path / "r.json"
        run_main(capsys, path, "--quiet", "--json", out, "--theta", 0.2, 0.9, "--set", "token_scope=call")
        result = json.loads(out.read_text())
        assert (result["settings"]["theta"], result["settings"]["token_scope"]) == (0.2, "call")
        assert result["totals"]["corrected_steps"] == 2
        assert sorted({row["theta"] for row in result["sweeps"]}) == [0.2, 0.9]

    @pytest.mark.long
    def test_without_the_extra(self, tmp_path):
        code = "import sys; sys.modules['rich'] = None; from verl_tapo.cli import main; main(['audit', 'x'])"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert "pip install 'verl-tapo[audit]'" in done.stderr
        assert "Traceback" not in done.stderr


class TestFrames:
    @pytest.fixture
    def found(self, tmp_path):
        for step in (1, 2, 3):
            write_dump(tmp_path / f"{step}.jsonl", [e for g in range(step) for e in two_of_four(step, f"g{g}")])
        return audit(tmp_path)

    def test_frames(self, found):
        assert list(found.steps.index) == [1, 2, 3]
        assert found.steps["corrected_steps"].tolist() == [1, 2, 3]
        assert found.tools.loc["search", "calls"] == 24
        calls = found.calls
        assert len(calls) == 24
        corrected = calls[calls["gate"] == "corrected"]
        assert (corrected["after"] > corrected["before"]).all()
        assert found.sweeps["corrected_steps"].max() >= 6
        assert list(found.warnings.columns) == ["code", "level", "text", "advice"]

    def test_in_a_notebook_it_is_short(self, found, tmp_path):
        assert repr(found).startswith("<Audit of ")
        for part in ("3 training steps", "24 rollouts", "24 calls", "of 12 failing calls 6 misassigned, 6 corrected"):
            assert part in repr(found)
        assert "findings: none" in repr(found)
        assert len(repr(found)) < 300
        odd = audit(write_dump(tmp_path / "1.jsonl", [*two_of_four(), "torn"]), title="<script>boo</script>\x1b[2J")
        assert "\x1b" not in repr(odd) + odd._repr_html_()
        assert "skipped_lines" in repr(odd)
        html = odd._repr_html_()
        assert "<script>" not in html
        assert "could not be read" in html
        assert "success rate" in html
        assert len(html) < 5000

    def test_calls_may_be_left_out(self, tmp_path):
        found = audit(write_dump(tmp_path / "1.jsonl", two_of_four()), keep_calls=False)
        with pytest.raises(ValueError, match="keep_calls=True"):
            _ = found.calls

    def test_plots(self, found, tmp_path):
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        axes = plt.subplots(2, 3)[1].ravel()
        made = [found.plot_steps(axes[0]), found.plot_similarity(axes[1]), found.plot_support(axes[2])]
        made += [found.plot_tools(axes[3]), found.plot_sweep("theta", axes[4]), found.plot_sweep("beta", axes[5])]
        assert [ax.get_xlabel() for ax in made] == [
            "training step", "similarity to the best witness", "similarity", "calls", "theta", "beta",
        ]  # fmt: skip
        assert made[2].get_ylabel() == "support"  # as on the page
        assert made[2].collections[0].get_offsets().tolist() == [[1.0, 1.0]] * 6
        curve = made[2].lines[0].get_xydata()
        assert (curve[:, 0] * curve[:, 1]).tolist() == pytest.approx(
            [found.result["settings"]["alpha_min"]] * len(curve)
        )
        assert made[0].lines[1].get_ydata().tolist() == [0.5, 0.5, 0.5]
        assert sum(patch.get_height() for patch in made[1].patches) == 12
        plt.savefig(tmp_path / "plots.png")
        with pytest.raises(ValueError, match="name must be one of"):
            found.plot_sweep("gamma")

    def test_light(self):
        """What reads no frame needs no pandas."""
        code = (
            "import sys; import verl_tapo.audit; assert not {'pandas', 'matplotlib', 'rich', 'verl'} & set(sys.modules)"
        )
        subprocess.run([sys.executable, "-c", code], check=True)


class TestExample:
    """``examples/audit``: its data are of a real run, and its README says what it prints."""

    FOLDER = Path(__file__).parents[2] / "examples" / "audit"

    @pytest.mark.parametrize("source", ["data", "data/rollouts"])
    def test_what_the_run_logged(self, source):
        found = audit(self.FOLDER / source).result
        logged = [json.loads(entry) for entry in (self.FOLDER / "data" / "metrics.jsonl").read_text().splitlines()]
        assert [entry["step"] for entry in logged] == [of["step"] for of in found["steps"]]
        assert {warned["level"] for warned in found["warnings"]} <= {"info"}
        for of, entry in zip(found["steps"], logged, strict=True):
            metrics = entry["data"]
            for name in ("misassigned_steps", "corrected_steps"):
                assert of[name] / of["failing_steps"] == pytest.approx(metrics[f"tapo/{name}"], abs=1e-12)
            for name in ("similarity", "support", "alpha", "transfer", "lift", "success_rate"):
                assert of[name] == pytest.approx(metrics[f"tapo/{name}"], abs=1e-6)
            near = 1e-12 if source == "data" else 0.02
            assert of["token_share"] == pytest.approx(metrics["tapo/token_share"], abs=near)

    def test_its_readme_shows_what_is_printed(self, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "110")
        run_main(capsys, self.FOLDER / "data")
        code, out, _ = run_main(capsys, self.FOLDER / "data")
        overview = out.split("By training step")[0].rstrip()
        assert code == 0
        assert overview in (self.FOLDER / "README.md").read_text()

    @pytest.mark.long
    def test_explore(self, tmp_path):
        for name in ("explore.py", "data"):
            (tmp_path / name).symlink_to(self.FOLDER / name)
        copy = tmp_path / "mine.py"
        copy.write_text((self.FOLDER / "explore.py").read_text())
        done = subprocess.run([sys.executable, copy], capture_output=True, text=True, check=True)
        assert "The calls most often corrected" in done.stdout
        assert (tmp_path / "explore.png").stat().st_size > 10_000
