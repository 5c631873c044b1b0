"""The quickstart's tokenizer, template and scripted trajectories fit what veRL's agent loop makes of a conversation."""

from __future__ import annotations

import random

import pytest
import torch
from flags_and_facts.model import MAX_PIXELS, MIN_PIXELS, VOCABULARY, build_config, build_tokenizer
from flags_and_facts.questions import SYSTEM, ask
from flags_and_facts.script import PERFECT, Script
from flags_and_facts.search import load_index
from flags_and_facts.world import load_world
from warm_start import TOOLS, Renderer, answer_call, collate, loss_of

from verl_tapo.calls.parsing import ToolCallParser
from verl_tapo.cpu.processor import build_processor


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(load_world("train"))


@pytest.fixture(scope="module")
def processor(tokenizer):
    return build_processor(tokenizer, min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS)


def script(seed):
    return Script(load_world("train"), load_index("train"), PERFECT, random.Random(seed))


@pytest.mark.parametrize("kind", ["flag", "neighbour", "sheet fact"])
def test_examples_are_token_for_token_what_the_agent_loop_builds(tokenizer, processor, kind):
    from verl.utils.tokenizer.continuous_token import QwenVLContinuousTokenBuilder

    builder = QwenVLContinuousTokenBuilder(tokenizer, processor)
    world = load_world("train")
    question = ask(world, random.Random(2), kind)
    example = Renderer(tokenizer).example(script(3), question)
    tools = [{"type": "function", "function": {"name": name}} for name in TOOLS]
    image = question.image(world)
    content = [{"type": "image", "image": image}, {"type": "text", "text": question.text}]
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]
    ids = builder.build_initial_tokens(messages, tools=tools, images=[image])
    said = [False] * len(ids)
    for turn in script(3).play(question):
        generated = tokenizer.encode(turn.said + "<|im_end|>")
        ids = builder.merge_assistant_tokens(ids, generated).token_ids
        said += [True] * len(generated)
        before = [*messages, {"role": "assistant", "content": turn.said}]
        messages = before
        if turn.answer is not None:
            answer = {"type": "text", "text": turn.answer}
            shown = [{"type": "image", "image": turn.image}, answer] if turn.image else turn.answer
            messages = [*before, {"role": "tool", "content": shown}]
            ids = builder.merge_context_tokens(before, messages, ids, tools=tools).token_ids
            said += [False] * (len(ids) - len(said))
    assert example.ids == ids
    assert example.said == said


def test_the_vocabulary_is_the_models_and_spells_everything(tokenizer):
    assert len(tokenizer) == VOCABULARY == build_config(tokenizer).text_config.vocab_size
    for text in ("São Tomé & Príncipe", "日本 🏴 \n\t", '{"query": "capital of Côte d\'Ivoire"}'):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    marked = tokenizer.encode("<answer> x </answer><|im_end|>")
    assert tokenizer.decode(marked, skip_special_tokens=True) == "<answer> x </answer>"


def test_its_calls_are_found_in_its_tokens(tokenizer):
    turns = script(1).play(ask(load_world("train"), random.Random(1), "sheet fact"))
    found = [ToolCallParser("hermes", tokenizer).calls(tokenizer.encode(turn.said)) for turn in turns]
    assert [[call.tool for call in calls] for calls in found] == [["zoom"], ["image_search"], ["text_search"], []]


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        ("<answer> Chad </answer>", None),
        ("<tool_call>\n{", "Error"),
        ('<tool_call>\n{"name": "text_search", "arguments": []}\n</tool_call>', "Error"),
        ('<tool_call>\n{"name": "text_search", "arguments": {"query": "capital of Chad"}}\n</tool_call>', "[1] The"),
    ],
)
def test_calls_are_answered_during_the_warm_start_too(said, answer):
    given = answer_call(said, [], load_index())
    assert given is None if answer is None else given[0].startswith(answer)


def test_the_loss_is_on_what_the_model_says(tokenizer):
    """Learning one trajectory lowers it; its images' placeholder tokens are never predicted."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    renderer = Renderer(tokenizer)
    model = Qwen2_5_VLForConditionalGeneration(build_config(tokenizer))
    batch = [renderer.example(script(4), ask(load_world("train"), random.Random(4), "sheet"))]
    inputs = collate(batch, renderer, tokenizer.pad_token_id)
    assert int((inputs["input_ids"] == renderer.image_id).sum()) * 4 == len(inputs["pixel_values"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        loss = loss_of(model, batch, renderer, tokenizer.pad_token_id)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
