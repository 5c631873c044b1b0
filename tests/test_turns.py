"""Reading plain turns in bulk gives what reading turn by turn gives."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rollouts import FakeRollout, fake_batch

from verl_tapo.parsing import ToolCallParser, parse_steps

PIECES = [
    ("Look. ", 1),
    ("a < b and <b>bold</b>", 1),
    ('<tool_call>\n{"name": "search", "arguments": {"query": "a", "image": 0}}\n</tool_call>', 1),
    ('<tool_call>{"name": "zoom", "arguments": {"image": 1}}</tool_call>', 1),
    ("<tool_call>{bad}</tool_call>", 1),
    ("<tool_call>", 1),
    ("</tool_call>", 1),
    ("<|im_end|>", 1),
    ("<tool_response>\nfine, and quite long enough\n</tool_response>", 0),
    ("<tool_response>\nError executing tool 'search': down\n</tool_response>", 0),
    ("<tool_response>ok</tool_response>", 0),
    ("<tool_response>\x1c Error executing tool 'search': down</tool_response>", 0),
    ("<|vision_start|><|image_pad|><|vision_end|>", 0),
    ("<html> <t <tool", 0),
    ('<tool_call>{"name": "search", "arguments": {}}</tool_call>', 0),
    ("\n", 0),
    ([-7, 2**40], 1),  # token ids of no vocabulary
    ([2**40], 0),
]


def parse(parser, rows, bulk, monkeypatch):
    ids = np.array([token for rollout in rows for token in rollout.ids], dtype=np.int64)
    mask = np.array([bit for rollout in rows for bit in rollout.mask], dtype=np.int64)
    offsets = np.cumsum([0, *(len(rollout.ids) for rollout in rows)])
    with monkeypatch.context() as patch:
        if not bulk:
            patch.setattr(ToolCallParser, "bulk", False)
        return parse_steps(
            parser,
            ids,
            mask,
            offsets,
            [3 * number for number in range(len(rows))],
            image_parameters=["image"],
            image_index_base=0,
            prompt_images=lambda row: [f"prompt {row}"],
        )


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_bulk_is_turn_by_turn(qwen_like_tokenizer, monkeypatch, data):
    parser = ToolCallParser("hermes", qwen_like_tokenizer)
    assert parser.bulk
    rows = []
    for _ in range(data.draw(st.integers(1, 4))):
        rollout = FakeRollout(qwen_like_tokenizer)
        for text, policy in data.draw(st.lists(st.sampled_from(PIECES), max_size=9)):
            policy *= data.draw(st.sampled_from([1, 7]))  # all but 0 are the policy's
            if isinstance(text, str):
                rollout._add(text, policy)
            else:
                rollout.ids += text
                rollout.mask += [policy] * len(text)
        rows.append(rollout)
    assert parse(parser, rows, True, monkeypatch) == parse(parser, rows, False, monkeypatch)


def test_plain_rows_are_in_fact_read_in_bulk(qwen_like_tokenizer, monkeypatch):
    rows = [rollout for rollout, _, _ in fake_batch(qwen_like_tokenizer)]
    parser = ToolCallParser("hermes", qwen_like_tokenizer)
    seen = []
    original = ToolCallParser.turn_calls
    monkeypatch.setattr(ToolCallParser, "turn_calls", lambda *a: seen.append(a) or original(*a))
    steps = parse(parser, rows, True, monkeypatch).steps
    assert len(seen) == 2  # the two rows with parallel calls
    assert len(steps) == sum(len(rollout.record.steps) for rollout in rows)


@pytest.mark.parametrize("tool_format", ["qwen3_coder", "kimi", "minimax"])
def test_formats_with_more_to_them_are_read_turn_by_turn(qwen_like_tokenizer, tool_format):
    assert not ToolCallParser(tool_format, qwen_like_tokenizer).bulk
