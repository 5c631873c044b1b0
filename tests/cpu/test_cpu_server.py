"""The rollout server as veRL calls it, without Ray."""

import asyncio

import pytest
import torch
from PIL import Image
from tiny_models import save_tiny_model
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from verl.utils import hf_processor
from verl.workers.config import HFModelConfig, RolloutConfig

from verl_tapo.cpu.server import TransformersServer

SAMPLED = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "repetition_penalty": 1.0, "logprobs": True}
GREEDY = {**SAMPLED, "temperature": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), "qwen2_5_vl")


def server_of(folder, **settings):
    """A server with the folder's weights."""
    settings = {"dtype": "float32", "prompt_length": 64, "response_length": 24, "load_format": "auto"} | settings
    config = RolloutConfig(name="transformers", tensor_model_parallel_size=1, **settings)
    model = HFModelConfig(path=str(folder), override_config={"attn_implementation": "sdpa"})
    return TransformersServer(config, model, replica_rank=0)


@pytest.fixture(scope="module")
def prompt(folder):
    processor = hf_processor(folder)
    text = (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is this?<|im_end|>\n<|im_start|>assistant\n"
    )
    images = [Image.new("RGB", (64, 48), "red")]
    return {"prompt_ids": processor(text=[text], images=images)["input_ids"][0], "image_data": images}


def ask(server, prompt, params, count=1, seeds=None):
    async def asked():
        calls = [{**params, **({"seed": seeds[number]} if seeds else {})} for number in range(count)]
        return await asyncio.gather(*[server.generate(**prompt, sampling_params=c, request_id="r") for c in calls])

    return asyncio.run(asked())


def tokens(outputs):
    return [output.token_ids for output in outputs]


def test_rollouts_of_a_prompt_come_back_in_every_run(folder, prompt):
    first = ask(server_of(folder), prompt, SAMPLED, 6, seeds=range(6))
    second = ask(server_of(folder, max_num_seqs=2), prompt, SAMPLED, 6, seeds=range(5, -1, -1))
    assert tokens(first) == tokens(second)[::-1]
    assert len(set(map(tuple, tokens(first)))) == 6
    assert tokens(ask(server_of(folder, seed=7), prompt, SAMPLED, 6, seeds=range(6))) != tokens(first)


def test_without_a_number_the_set_of_rollouts_comes_back(folder, prompt):
    server = server_of(folder)
    first = tokens(ask(server, prompt, SAMPLED, 6))
    assert len(set(map(tuple, first))) == 6
    assert sorted(tokens(ask(server_of(folder), prompt, SAMPLED, 6))) == sorted(first)
    assert not set(map(tuple, tokens(ask(server, prompt, SAMPLED, 6)))) & set(map(tuple, first))


def test_every_step_draws_anew(folder, prompt):
    server = server_of(folder)
    outputs = []
    for step in (1, 2):
        asyncio.run(server.set_global_steps(step))
        outputs += ask(server, prompt, SAMPLED, seeds=[0])
    assert outputs[0].token_ids != outputs[1].token_ids
    assert [output.extra_fields["global_steps"] for output in outputs] == [1, 2]


def test_another_image_is_another_prompt(folder, prompt):
    server = server_of(folder)
    blue = {**prompt, "image_data": [Image.new("RGB", (64, 48), "blue")]}
    (red_output,), (blue_output,) = ask(server, prompt, GREEDY), ask(server, blue, GREEDY)
    assert red_output.log_probs != blue_output.log_probs


def test_lengths_are_counted_as_verl_does(folder, prompt):
    length = len(prompt["prompt_ids"])
    limits = {"ignore_eos": True}

    def generated(params=(), **settings):
        return len(ask(server_of(folder, **settings), prompt, GREEDY | limits | dict(params))[0].token_ids)

    assert generated() == 24
    assert generated(prompt_length=length - 10) == 14  # what a long prompt takes, the response lacks
    assert generated({"max_tokens": 3}) == generated({"max_new_tokens": 3}) == 3
    assert generated({"max_tokens": 99}, max_model_len=length + 5) == 5
    with pytest.raises(ValueError, match="no room to answer"):
        generated(max_model_len=length)


def test_log_probs_only_where_they_are_asked_for(folder, prompt):
    (output,) = ask(server_of(folder), prompt, {**GREEDY, "logprobs": False})
    assert output.log_probs is None
    assert output.stop_reason == "completed"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"video_data": [object()]}, "neither videos nor audio"),
        ({"sampling_params": {"best_of": 2}}, "best_of"),
        ({"image_data": []}, "image tokens"),
    ],
)
def test_what_it_cannot_do_it_refuses(folder, prompt, change, message):
    server = server_of(folder)
    with pytest.raises(ValueError, match=message):
        asyncio.run(server.generate(**{**prompt, "sampling_params": GREEDY, "request_id": "r", **change}))
    assert ask(server, prompt, GREEDY)  # and goes on


def test_an_error_in_the_model_reaches_every_request(folder, prompt):
    server = server_of(folder)
    forward = server._decoder.model.forward
    server._decoder.model.forward = lambda **_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        ask(server, prompt, GREEDY, 3)
    server._decoder.model.forward = forward
    assert ask(server, prompt, GREEDY)[0].token_ids


def test_abort_hands_back_what_there_is_and_resume_goes_on(folder, prompt):
    """As an asynchronous trainer does between steps; veRL's client asks again with the tokens so far."""
    whole = ask(server_of(folder), prompt, GREEDY | {"ignore_eos": True})[0].token_ids

    async def interrupted():
        server = server_of(folder)
        params = GREEDY | {"ignore_eos": True, "max_tokens": 24}
        running = asyncio.create_task(server.generate(**prompt, sampling_params=params, request_id="r"))
        while not server._decoder._rows or len(server._decoder._rows[0].tokens) < 2:
            await asyncio.sleep(0)
        await server.abort_all_requests()
        part = await running
        assert part.stop_reason == "aborted"
        assert 2 <= len(part.token_ids) == len(part.log_probs) < 24
        rest = {**prompt, "prompt_ids": [*prompt["prompt_ids"], *part.token_ids]}
        params["max_tokens"] = 24 - len(part.token_ids)
        waiting = asyncio.create_task(server.generate(**rest, sampling_params=params, request_id="r"))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        await server.resume_generation()
        return part.token_ids + (await waiting).token_ids

    assert asyncio.run(interrupted()) == whole


def test_a_server_that_leaves_rejects(folder, prompt):
    async def rejected():
        server = server_of(folder)
        await server.abort_all_requests(reject_request=True)
        return await server.generate(**prompt, sampling_params=GREEDY, request_id="r")

    output = asyncio.run(rejected())
    assert (output.token_ids, output.stop_reason) == ([], "aborted")


def test_weights_arrive_whole_or_not_at_all(folder, prompt, tmp_path):
    other = AutoModelForImageTextToText.from_pretrained(save_tiny_model(tmp_path, "qwen2_5_vl", seed=1))
    expected = ask(server_of(tmp_path), prompt, GREEDY)[0].token_ids
    server = server_of(folder, load_format="dummy")
    with pytest.raises(RuntimeError, match="no weights have arrived"):
        ask(server, prompt, GREEDY)

    async def update(weights):
        await server.begin_update()
        names = sorted(weights)
        for part in (names[::2], names[1::2]):
            await server.update_weights({name: weights[name] for name in part})
        await server.end_update(global_steps=5)

    weights = dict(other.state_dict())
    asyncio.run(update(weights))
    (output,) = ask(server, prompt, GREEDY)
    assert output.token_ids == expected
    assert output.extra_fields["global_steps"] == 5
    del weights["lm_head.weight"]
    with pytest.raises(RuntimeError, match=r"1 weights did not arrive from the actor: lm_head\.weight"):
        asyncio.run(update(weights))
    with pytest.raises(KeyError):
        asyncio.run(update({"no.such.weight": torch.zeros(1)}))


def test_nothing_computed_with_old_weights_outlives_them(tmp_path):
    """Keys and values of prompts are kept, and a prompt of before comes again after an update."""
    old, new = (save_tiny_model(tmp_path / str(seed), "qwen3", seed=seed) for seed in (1, 2))
    prompt = {"prompt_ids": [*range(20, 60)]}
    server = server_of(old)
    before = ask(server, prompt, SAMPLED, 2, seeds=range(2))
    weights = dict(AutoModelForCausalLM.from_pretrained(new).state_dict())

    async def update():
        await server.begin_update()
        names = sorted(weights)
        await server.update_weights({name: weights[name] for name in names[::2]})
        await server.generate(**prompt, sampling_params=SAMPLED, request_id="r")  # between two parts
        await server.update_weights({name: weights[name] for name in names[1::2]})
        await server.end_update(global_steps=None)

    asyncio.run(update())
    after = ask(server, prompt, SAMPLED, 2, seeds=range(2))
    expected = ask(server_of(new), prompt, SAMPLED, 2, seeds=range(2))
    assert tokens(after) == tokens(expected) != tokens(before)
    for one, other in zip(after, expected, strict=True):
        assert one.log_probs == pytest.approx(other.log_probs, abs=1e-5)
