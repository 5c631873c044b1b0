"""Batches of rows in pieces, against a plain reading of each row's text."""

import json
from itertools import groupby

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from verl_tapo.calls.call import MALFORMED
from verl_tapo.calls.parsing import ToolCallParser, answer_is_error, parse_steps
from verl_tapo.selftest.rollouts import FakeRollout, fake_batch

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
    ("<tool_response>a page that quotes <tool_response>, and Error executing tool 'it'</tool_response>", 0),
    ("<tool_response>\x1c Error executing tool 'search': down</tool_response>", 0),
    ("<|vision_start|><|image_pad|><|vision_end|>", 0),
    ("<html> <t <tool", 0),
    ('<tool_call>{"name": "search", "arguments": {}}</tool_call>', 0),
    ("\n", 0),
    ([-7, 2**40], 1),  # token ids of no vocabulary
    ([2**40], 0),
]


def parse(parser, rows, **options):
    ids = np.array([token for rollout in rows for token in rollout.ids], dtype=np.int64)
    mask = np.array([bit for rollout in rows for bit in rollout.mask], dtype=np.int64)
    offsets = np.cumsum([0, *(len(rollout.ids) for rollout in rows)])
    return parse_steps(parser, ids, mask, offsets, [3 * number for number in range(len(rows))], **options)


def read_plainly(tokenizer, rollout):
    """The calls of a row, each as tool, arguments, turn, span and whether it was answered well."""
    names = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
    opening, closing, answer, answered = tokenizer.convert_tokens_to_ids(names)
    runs, at = [], 0
    for policy, bits in groupby(bool(bit) for bit in rollout.mask):
        end = at + len(list(bits))
        runs.append((policy, at, end))
        at = end
    found = []
    for number, (policy, start, end) in enumerate(runs):
        if not policy:
            continue
        calls, at = [], None
        for place in range(start, end):
            if rollout.ids[place] == opening and at is None:
                at = place
            elif rollout.ids[place] == closing and at is not None:
                calls.append((at, place + 1))
                at = None
        texts, closed = [], True
        for place in range(*runs[number + 1][1:]) if number + 1 < len(runs) else ():
            token = rollout.ids[place]
            closed = closed or token == answered
            if token == answer and closed:
                texts.append([])
                closed = False
            elif texts:
                texts[-1].append(token)
        texts = [text_of(tokenizer, tokens) for tokens in texts]
        read = [json_or_none(text_of(tokenizer, rollout.ids[first + 1 : last - 1])) for first, last in calls]
        # All calls are answered, or those that veRL reads.
        takes = [len(texts) == len(calls) or call is not None for call in read]
        for call, take, span in zip(read, takes, calls, strict=True):
            text = texts.pop(0) if take and texts else None
            ok = call is not None and text is not None and not answer_is_error(text)
            tool, arguments = (call["name"], call["arguments"]) if call else (MALFORMED, {})
            found.append((tool, arguments, (start, end), span, ok, None))
    return found


def text_of(tokenizer, ids):
    return tokenizer.decode([number for number in ids if 0 <= number < len(tokenizer)])


def json_or_none(text):
    try:
        return json.loads(text)
    except ValueError:
        return None


@st.composite
def batches(draw, tokenizer):
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        rollout = FakeRollout(tokenizer)
        for text, policy in draw(st.lists(st.sampled_from(PIECES), max_size=9)):
            policy *= draw(st.sampled_from([1, 7]))  # all but 0 are the policy's
            if isinstance(text, str):
                rollout._add(text, policy)
            else:
                rollout.ids += text
                rollout.mask += [policy] * len(text)
        rows.append(rollout)
    return rows


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_rows_are_read_as_they_are_plainly(qwen_like_tokenizer, data):
    parser = ToolCallParser("hermes", qwen_like_tokenizer)
    rows = data.draw(batches(qwen_like_tokenizer))
    parsed = parse(parser, rows)
    expected = [(3 * n, *call) for n, row in enumerate(rows) for call in read_plainly(qwen_like_tokenizer, row)]
    assert [tuple(step) for step in parsed.steps] == expected
    assert parsed.malformed == sum(tool == MALFORMED for _, tool, *_ in expected)
    assert parsed.malformed + parsed.unanswered + parsed.failed + sum(ok for *_, ok, _ in expected) == len(expected)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_row_is_read_alike_in_any_batch(qwen_like_tokenizer, data):
    parser = ToolCallParser("hermes", qwen_like_tokenizer)
    rows = data.draw(batches(qwen_like_tokenizer))
    images = dict(image_parameters=["image"], image_index_base=0, prompt_images=lambda row: ["the prompt's"])
    together = parse(parser, rows, **images)
    alone = [parse(parser, [row], **images) for row in rows]
    unnumbered = [
        step._replace(row=3 * number, arguments=renumbered(step.arguments, number))
        for number, parsed in enumerate(alone)
        for step in parsed.steps
    ]
    assert together.steps == unnumbered
    assert together[1:] == tuple(map(sum, zip(*(parsed[1:] for parsed in alone), strict=True)))


def renumbered(arguments, row):
    """Images that nobody is known to have made are named by their row, which is 0 for all that are read alone."""
    image = arguments.get("image", "")
    named = (
        f"unknown {3 * row} {image.split()[-1]}" if isinstance(image, str) and image.startswith("unknown") else image
    )
    return {**arguments, "image": named} if "image" in arguments else arguments


def test_all_steps_of_stock_rollouts_are_found(qwen_like_tokenizer):
    rows = [rollout for rollout, _, _ in fake_batch(qwen_like_tokenizer)]
    steps = parse(ToolCallParser("hermes", qwen_like_tokenizer), rows).steps
    noted = [(3 * n, step.tool, step.turn, step.call) for n, row in enumerate(rows) for step in row.record.steps]
    assert [(step.row, step.tool, step.turn, step.call) for step in steps] == noted
    statuses = [step.status for row in rows for step in row.record.steps]
    assert [step.ok for step in steps] == [status == "ok" for status in statuses]
