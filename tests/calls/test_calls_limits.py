"""What training and evaluation count and say alike."""

from pathlib import Path

import pytest

from verl_tapo.calls.limits import (
    ANY_CONTROL,
    CallCount,
    CallLimits,
    control_pattern,
    failed,
    invalid_json,
    refused,
    strip_control,
    unknown_tool,
    unreadable,
    with_own_limits,
)
from verl_tapo.calls.parsing import NOT_EXECUTED_PREFIX, answer_is_error

MODEL = Path(__file__).resolve().parents[2] / "examples" / "quickstart" / "flags_and_facts" / "model"


def test_calls_are_counted_by_tool_and_together():
    made = CallCount(CallLimits(max_calls={"search": 2, "all": 3}, max_parallel_calls=2))
    assert made.count_or_refuse("search", 0) is None
    assert (
        made.count_or_refuse("search", 2) == "Limit of calls per turn reached (2). Make this call in the next turn."
    )  # and is not counted
    assert made.count_or_refuse("search", 1) is None
    assert (
        made.count_or_refuse("search", 0) == "Limit of search calls reached (2). Continue without further search calls."
    )
    assert made.count_or_refuse("zoom", 0) is None
    assert made.count_or_refuse("zoom", 0) == "Limit of tool calls reached (3). Continue without further tool calls."


def test_turns_of_nothing_but_malformed_calls_end_a_trajectory():
    made = CallCount(CallLimits(max_malformed_turns=1))
    turns = [["bad"], ["bad", None], [], ["bad", "bad"]]
    assert [made.ends(turn) for turn in turns] == [False, False, False, True]


class Limited:
    max_calls = 3


def test_what_a_run_says_counts_before_what_a_tool_brings():
    tools = {"search": Limited(), "zoom": object()}
    assert with_own_limits(None, tools) == {"search": 3}
    assert with_own_limits({"search": 9, "all": 4}, tools) == {"search": 9, "all": 4}
    with pytest.raises(ValueError, match="max_calls names 'serach'; known: all, search, zoom"):
        with_own_limits({"serach": 1}, tools)
    with pytest.raises(ValueError, match="max_calls must map tools to numbers, got 3"):
        with_own_limits(3, tools)


def test_without_a_tokenizer_its_control_tokens_are_taken_out_too():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    control = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
    control -= {"<answer>", "</answer>"}  # of the quickstart's model only
    text = "a " + " ".join(sorted(control)) + " <tool_<|im_end|>call> \ud83d 1 < 2 |x|"
    for pattern in (control_pattern(control), ANY_CONTROL):
        assert " ".join(strip_control(text, pattern).split()) == "a ? 1 < 2 |x|"


def test_what_is_said_of_a_call_without_an_answer_reads_as_an_error():
    said = [failed("zoom", "no"), unknown_tool("zom", ["zoom"]), invalid_json("zoom", "no"), refused("no")]
    for text in (*said, unreadable("no")):
        assert answer_is_error(text, ())
    assert refused("no").startswith(NOT_EXECUTED_PREFIX)
