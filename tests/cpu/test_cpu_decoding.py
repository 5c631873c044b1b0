"""Continuous batching against the plain model, and how tokens are drawn."""

import random
from functools import cache

import pytest
import torch
from PIL import Image
from tiny_models import save_tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from verl.utils import hf_processor

from verl_tapo.cpu.decoding import Decoder, Request
from verl_tapo.cpu.inputs import model_inputs
from verl_tapo.cpu.sampling import Sampling, draw, request_seed

FAMILIES = ("qwen3", "qwen2_5_vl", "qwen3_vl")


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    @cache
    def load(family):
        folder = save_tiny_model(tmp_path_factory.mktemp("models") / family, family)
        auto = AutoModelForCausalLM if family == "qwen3" else AutoModelForImageTextToText
        return auto.from_pretrained(folder).eval(), None if family == "qwen3" else hf_processor(folder)

    return load


def prompt_of(processor, rng, sizes):
    """Random text with images in between; the last one is in a later turn."""
    tokenizer = tiny_tokenizer()
    images = [Image.new("RGB", size, (rng.randrange(256), 40, 200)) for size in sizes if processor]
    turns = []
    for number in range(max(1, len(images))):
        image = "<|vision_start|><|image_pad|><|vision_end|>" if images else ""
        words = "".join(rng.choice("abc def ghi ") for _ in range(rng.randrange(3, 25)))
        turns.append(f"<|im_start|>user\n{image}{words}{number}<|im_end|>\n<|im_start|>assistant\n")
    text = "yes<|im_end|>\n".join(turns)
    if not images:
        return tokenizer(text)["input_ids"], None
    return processor(text=[text], images=images)["input_ids"][0], images


PICTURES = ([(64, 48)], [], [(56, 56), (90, 60)], [(120, 40)], [], [(60, 60)], [(57, 99), (64, 64)])


def prompts_of(processor):
    rng = random.Random(0)
    return [prompt_of(processor, rng, sizes) for sizes in PICTURES]


def requests_of(processor, **sampling):
    settings = {"max_tokens": 12, "stop_token_ids": frozenset({tiny_tokenizer().eos_token_id}), **sampling}
    requests = []
    for number, (prompt, images) in enumerate(prompts_of(processor)):
        positions, vision = model_inputs(prompt, images, processor)
        requests.append(Request(list(prompt), Sampling(**settings), random.Random(number), positions, vision))
    return requests


def finish(decoder, requests, together=True):
    for number, request in enumerate(requests):
        decoder.submit(request)
        if not together:
            for _ in range(number % 3):
                decoder.step()
    while decoder.busy:
        decoder.step()
    return requests


def forbidden(processor):
    return [processor.image_token_id, processor.video_token_id] if processor else []


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_says_what_the_model_says_alone(load, family):
    """Greedy: in batches of any size, with rows that come and go, as `generate` of transformers does."""
    model, processor = load(family)
    lengths = (12, 5, 9, 1, 12, 7, 3)
    expected = []
    for (prompt, images), length in zip(prompts_of(processor), lengths, strict=True):
        inputs = {"input_ids": torch.tensor([prompt]), "attention_mask": torch.ones(1, len(prompt), dtype=torch.int64)}
        if processor:
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == processor.image_token_id).int()
        if images:
            inputs |= processor.image_processor(images, return_tensors="pt")
        suppressed = forbidden(processor) or None
        with torch.no_grad():
            output = model.generate(
                **inputs, do_sample=False, max_new_tokens=length, suppress_tokens=suppressed, use_cache=True
            )
        expected.append(output[0, len(prompt) :].tolist())
    for rows, together in ((1, True), (3, False), (3, True), (16, True)):
        requests = requests_of(processor, temperature=0.0)
        for request, length in zip(requests, lengths, strict=True):
            object.__setattr__(request.sampling, "max_tokens", length)
        finish(Decoder(model, max_rows=rows, forbidden=forbidden(processor)), requests, together)
        assert [request.tokens for request in requests] == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_are_those_of_a_full_forward(load, family):
    """Of logits over temperature, nothing left out: what veRL's actor computes."""
    model, processor = load(family)
    requests = requests_of(processor, temperature=0.7, top_p=0.8, top_k=40)
    finish(Decoder(model, max_rows=4, forbidden=forbidden(processor)), requests)
    for request, (_, images) in zip(requests, prompts_of(processor), strict=True):
        tokens = torch.tensor([request.prompt + request.tokens])
        positions, vision = model_inputs(tokens[0].tolist(), images, processor)
        with torch.no_grad():
            logits = model(input_ids=tokens, position_ids=positions.unsqueeze(-2), **vision).logits[0] / 0.7
        start = len(request.prompt) - 1
        log_probs = logits[start:-1].log_softmax(-1).gather(1, torch.tensor(request.tokens)[:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(request.log_probs), log_probs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_drawn_does_not_depend_on_the_batch(load, family):
    model, processor = load(family)
    settings = {"temperature": 1.0, "top_p": 0.95}
    alone = finish(Decoder(model, max_rows=1, forbidden=forbidden(processor)), requests_of(processor, **settings))
    batch = finish(Decoder(model, max_rows=7, forbidden=forbidden(processor)), requests_of(processor, **settings))
    order = requests_of(processor, **settings)
    finish(Decoder(model, max_rows=3, forbidden=forbidden(processor)), order[::-1], together=False)
    assert [r.tokens for r in alone] == [r.tokens for r in batch] == [r.tokens for r in order]
    assert len({tuple(r.tokens) for r in alone}) == len(alone)


def test_a_request_ends_at_a_stop_token_and_at_its_limit(load):
    model, _ = load("qwen3")
    full = finish(Decoder(model), requests_of(None, temperature=0.0))
    stop = full[0].tokens[4]
    first = full[0].tokens.index(stop)
    stopped = finish(Decoder(model), requests_of(None, temperature=0.0, stop_token_ids=frozenset({stop})))
    assert stopped[0].tokens == full[0].tokens[: first + 1]
    assert all(len(request.tokens) == 12 or request.tokens[-1] == stop for request in stopped)
    later = finish(
        Decoder(model), requests_of(None, temperature=0.0, stop_token_ids=frozenset({stop}), min_tokens=first + 1)
    )
    assert stop not in later[0].tokens[: first + 1]
    assert all(request.stop_reason == "completed" for request in (*full, *stopped, *later))


def test_placeholders_of_images_are_never_drawn(load):
    model, processor = load("qwen2_5_vl")
    decoder = Decoder(model, forbidden=range(20, len(tiny_tokenizer())))
    requests = finish(decoder, requests_of(processor, temperature=1.0))
    assert all(token < 20 for request in requests for token in request.tokens)
    assert all(log_prob < 0 for request in requests for log_prob in request.log_probs)


def test_aborted_requests_keep_what_they_have_and_can_go_on(load):
    model, _ = load("qwen3")
    whole = finish(Decoder(model, max_rows=4), requests_of(None, temperature=0.0))
    decoder = Decoder(model, max_rows=4)
    requests = requests_of(None, temperature=0.0)
    for request in requests:
        decoder.submit(request)
    for _ in range(3):
        decoder.step()
    assert decoder.abort() == requests
    assert not decoder.busy
    assert {request.stop_reason for request in requests} == {"aborted"}
    assert [len(request.tokens) for request in requests] == [3, 3, 3, 3, 0, 0, 0]
    for request, expected in zip(requests, whole, strict=True):
        prompt = request.prompt + request.tokens
        settings = Sampling(12 - len(request.tokens), temperature=0.0)
        rest = Request(prompt, settings, random.Random(0), torch.arange(len(prompt)))
        finish(decoder, [rest])
        assert request.tokens + rest.tokens == expected.tokens


def test_long_prompts_join_one_by_one(load):
    model, _ = load("qwen3")
    decoder = Decoder(model, max_prefill_tokens=1)
    requests = requests_of(None, temperature=0.0)
    for request in requests:
        decoder.submit(request)
    decoder.step()
    assert [len(request.tokens) for request in requests] == [1, 0, 0, 0, 0, 0, 0]


def drawn(logits, count=4000, seen=(), **sampling):
    rng = random.Random(0)
    rows = torch.tensor(logits).expand(count, -1)
    noise = [rng.random() for _ in range(count)]
    tokens = draw(rows, [Sampling(1, **sampling)] * count, [list(seen)] * count, noise)
    return torch.bincount(tokens, minlength=len(logits)) / count


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ({}, [0.1, 0.2, 0.3, 0.4]),
        ({"temperature": 0.5}, [0.01 / 0.3, 0.04 / 0.3, 0.09 / 0.3, 0.16 / 0.3]),
        ({"temperature": 0.0}, [0, 0, 0, 1]),
        ({"top_k": 2}, [0, 0, 3 / 7, 4 / 7]),
        ({"top_k": 9}, [0.1, 0.2, 0.3, 0.4]),
        ({"top_p": 0.65}, [0, 0, 3 / 7, 4 / 7]),
        ({"top_p": 0.75}, [0, 2 / 9, 3 / 9, 4 / 9]),
        ({"min_p": 0.6}, [0, 0, 3 / 7, 4 / 7]),
        ({"top_k": 3, "top_p": 0.5}, [0, 0, 3 / 7, 4 / 7]),
    ],
)
def test_tokens_are_drawn_as_often_as_they_should(sampling, expected):
    logits = [float(torch.log(torch.tensor(p))) for p in (0.1, 0.2, 0.3, 0.4)]
    torch.testing.assert_close(drawn(logits, **sampling), torch.tensor(expected).float(), atol=0.03, rtol=0)


def test_repetition_is_penalised_up_and_down():
    assert drawn([1.0, 2.0, 1.9, -1.0], seen=[1], repetition_penalty=2.0, temperature=0.0)[2] == 1
    assert drawn([-1.0, -1.1], seen=[0], repetition_penalty=2.0, temperature=0.0)[1] == 1


def test_noise_at_the_edges_draws_possible_tokens():
    rows = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]] * 2)
    assert draw(rows, [Sampling(1)] * 2, [[], []], [0.0, 1 - 2**-53]).tolist() == [1, 2]


def test_parameters_of_verl_are_understood_or_refused():
    verls = {"temperature": 0.7, "top_p": 0.9, "top_k": -1, "repetition_penalty": 1.0, "logprobs": True, "seed": 3}
    sampling = Sampling.from_verl(verls | {"stop_token_ids": [5], "min_tokens": None}, 9, frozenset({2}))
    assert (sampling.max_tokens, sampling.temperature, sampling.stop_token_ids) == (9, 0.7, frozenset({2, 5}))
    assert Sampling.from_verl({"ignore_eos": True}, 9, frozenset({2})).stop_token_ids == frozenset()
    with pytest.raises(ValueError, match="does not know the sampling parameters \\['stop'\\]"):
        Sampling.from_verl({"stop": ["\n"]}, 9, frozenset())
    for name, value in (("temperature", -1), ("top_p", 0), ("top_k", -2), ("min_p", 2), ("repetition_penalty", 0)):
        with pytest.raises(ValueError, match=f"sampling parameter {name} must be"):
            Sampling.from_verl({name: value}, 9, frozenset())


def test_seeds_tell_requests_apart_and_never_change():
    seeds = {request_seed(42, step, [1, 2, 3], sibling) for step in range(10) for sibling in range(10)}
    assert len(seeds) == 100
    assert request_seed(1, [2, 3]) != request_seed(1, 2, [3])
    assert request_seed(42, 0, [1, 2, 3], b"") == 17530884965498643102


def test_prompts_that_do_not_fit_their_images_are_refused(load):
    _, processor = load("qwen2_5_vl")
    prompt, images = prompt_of(processor, random.Random(0), [(64, 48)])
    with pytest.raises(ValueError, match="has 3 image tokens, its 1 images have 4"):
        model_inputs(
            [t for i, t in enumerate(prompt) if i != prompt.index(processor.image_token_id)], images, processor
        )
    with pytest.raises(ValueError, match="the model takes none"):
        model_inputs(prompt, images, None)


class Counting:
    """A model, and the tokens that it was given."""

    def __init__(self, model):
        self._model, self.tokens = model, 0

    def eval(self):
        return self

    def __call__(self, input_ids, **inputs):
        self.tokens += input_ids.numel()
        return self._model(input_ids=input_ids, **inputs)


def conversation(model, max_rows, turns=3, siblings=4):
    """Rollouts of two prompts that begin alike, each turn's prompt being the last one with an answer behind it."""
    beginning = random.Random(1).choices(range(10, 400), k=60)
    model = Counting(model)
    decoder = Decoder(model, max_rows=max_rows)
    ended = frozenset({tiny_tokenizer().eos_token_id})
    prompts = [[*beginning, 20 + number // siblings] for number in range(2 * siblings)]
    said = []
    for turn in range(turns):
        requests = [
            Request(
                prompt,
                Sampling(max_tokens=6 + number, stop_token_ids=ended),
                random.Random(10 * turn + number),
                torch.arange(len(prompt)),
            )
            for number, prompt in enumerate(prompts)
        ]
        said += finish(decoder, requests, together=turn != 1)
        prompts = [[*request.prompt, *request.tokens, 30, 31, 32] for request in requests]
    return said, model.tokens, decoder


def test_what_prompts_have_in_common_is_computed_once(load):
    model, _ = load("qwen3")
    alone, all_tokens, _ = conversation(model, max_rows=1)
    shared, tokens, _ = conversation(model, max_rows=16)
    assert [request.tokens for request in shared] == [request.tokens for request in alone]
    for one, other in zip(shared, alone, strict=True):
        assert one.log_probs == pytest.approx(other.log_probs, abs=1e-4)
    assert all_tokens == sum(len(request.prompt) + len(request.tokens) - 1 for request in alone)
    assert tokens < all_tokens / 3


def test_what_is_kept_has_a_limit_and_is_forgotten(load):
    model, _ = load("qwen3")
    _, _, decoder = conversation(model, max_rows=16)
    prefixes = decoder._prefixes
    prompt = random.Random(2).choices(range(10, 400), k=40)
    finish(decoder, [Request(prompt, Sampling(max_tokens=1), random.Random(0), torch.arange(40))])
    assert prefixes.longest([*prompt, 5]) == (40, prefixes.longest(prompt)[1])
    prefixes.max_tokens = 50
    other = prompt[::-1]
    finish(decoder, [Request(other, Sampling(max_tokens=1), random.Random(0), torch.arange(40))])
    assert prefixes.longest(other)[0] == 40
    assert prefixes.longest(prompt)[0] == 0
    decoder.forget()
    assert prefixes.longest(other) == (0, [])


def test_a_row_that_began_with_old_weights_is_not_kept(load):
    model, _ = load("qwen3")
    decoder = Decoder(model)
    prompt = random.Random(3).choices(range(10, 400), k=30)
    request = Request(prompt, Sampling(max_tokens=40), random.Random(0), torch.arange(30))
    decoder.submit(request)
    for _ in range(3):
        decoder.step()
    decoder.forget()
    while decoder.busy:
        decoder.step()
    assert len(request.tokens) == 40
    assert decoder._prefixes.longest([*prompt, *request.tokens]) == (0, [])
