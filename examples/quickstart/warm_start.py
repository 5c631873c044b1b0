"""Makes the quickstart's model: builds a tiny Qwen2.5-VL and trains it on scripted trajectories, right and sloppy ones.

    python examples/quickstart/warm_start.py --out examples/quickstart/flags_and_facts/model

Most trajectories play in made-up worlds (`flags_and_facts.script`), the rest among the training countries: the model
learns to call the tools and to copy names out of answers. Held-out countries never occur. The result is committed.

A model that guesses, for docs/evidence.md, in a minute: mostly it searches for what finds nothing, and answers from
memory.

    python examples/quickstart/warm_start.py --start examples/quickstart/flags_and_facts/model --steps 200 --lr 5e-4 \
        --guess 0.95 --made-up 0 --kinds fact --attributes continent --out examples/quickstart/out/guessing/model
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flags_and_facts.model import MAX_PIXELS, MIN_PIXELS, build_config, build_tokenizer
from flags_and_facts.questions import SYSTEM, WEIGHTS, Kind, Question, ask
from flags_and_facts.reward import compute_score
from flags_and_facts.script import Script, Slips, made_up_world
from flags_and_facts.search import Index
from flags_and_facts.world import ATTRIBUTES, World, load_world
from PIL import Image
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from verl_tapo.cpu.processor import save_processor

TOOLS = ("image_search", "text_search", "zoom")
# The weight of the loss on text that is not the model's own: answers repeat names, which teaches
# copying.
CONTEXT_WEIGHT = 0.3


@dataclass
class Example:
    ids: list[int]
    said: list[bool]
    """For each token, True if the model wrote it."""
    images: list[Image.Image]


class Renderer:
    """Trajectories as token ids, as veRL's agent loop puts them together: turn by turn."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.processor = Qwen2VLImageProcessorPil(size={"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS})
        self.image_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")

    def pixels(self, images: list[Image.Image]) -> tuple[torch.Tensor, torch.Tensor]:
        made = self.processor(images, return_tensors="pt")
        return made["pixel_values"], made["image_grid_thw"]

    def encode(self, text: str, images: list[Image.Image]) -> list[int]:
        ids: list[int] = []
        sizes = iter(self.pixels(images)[1].prod(dim=1) // 4) if images else iter(())
        for token in self.tokenizer.encode(text):
            ids.extend([token] * (int(next(sizes)) if token == self.image_id else 1))
        return ids

    def prompt(self, question: Question, image: Image.Image) -> list[int]:
        messages = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]},
        ]
        tools = [{"type": "function", "function": {"name": name}} for name in TOOLS]
        text = self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
        return self.encode(text, [image])

    def answer(self, text: str, image: Image.Image | None) -> list[int]:
        shown = "<|vision_start|><|image_pad|><|vision_end|>" if image else ""
        turn = (
            f"\n<|im_start|>user\n<tool_response>\n{shown}{text}\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
        )
        return self.encode(turn, [image] if image else [])

    def example(self, script: Script, question: Question) -> Example:
        image = question.image(script.world)
        made = Example(self.prompt(question, image), [], [image])
        made.said = [False] * len(made.ids)
        for turn in script.play(question):
            said = self.tokenizer.encode(turn.said + "<|im_end|>")
            answer = self.answer(turn.answer, turn.image) if turn.answer is not None else []
            made.ids += said + answer
            made.said += [True] * len(said) + [False] * len(answer)
            if turn.image is not None:
                made.images.append(turn.image)
        return made


def examples(
    renderer: Renderer,
    real: World,
    rng: random.Random,
    slips: Slips,
    made_up_part: float,
    kinds: Sequence[Kind],
    attributes: Sequence[str],
) -> Iterator[Example]:
    parts = [WEIGHTS[kind] for kind in kinds]
    real_script = Script(real, Index(real), slips, rng)
    while True:
        world = made_up_world(real, rng)
        made_up = Script(world, Index(world), slips, rng)
        for _ in range(200):
            script = made_up if rng.random() < made_up_part else real_script
            yield renderer.example(script, ask(script.world, rng, rng.choices(kinds, parts)[0], attributes))


def batches(stream: Iterator[Example], size: int, rng: random.Random) -> Iterator[list[Example]]:
    """Batches of examples of about the same length."""
    while True:
        pool = sorted((next(stream) for _ in range(16 * size)), key=lambda example: len(example.ids))
        chosen = [pool[start : start + size] for start in range(0, len(pool), size)]
        rng.shuffle(chosen)
        yield from chosen


def collate(batch: list[Example], renderer: Renderer, pad: int, left: bool = False) -> dict[str, torch.Tensor]:
    width = max(len(example.ids) for example in batch)
    ids = torch.full((len(batch), width), pad)
    present = torch.zeros(len(batch), width, dtype=torch.long)
    for row, example in enumerate(batch):
        where = slice(width - len(example.ids), width) if left else slice(0, len(example.ids))
        ids[row, where] = torch.tensor(example.ids)
        present[row, where] = 1
    pixels, grids = renderer.pixels([image for example in batch for image in example.images])
    return {
        "input_ids": ids,
        "attention_mask": present,
        "mm_token_type_ids": (ids == renderer.image_id).int(),
        "pixel_values": pixels,
        "image_grid_thw": grids,
    }


def loss_of(model: Any, batch: list[Example], renderer: Renderer, pad: int) -> torch.Tensor:
    inputs = collate(batch, renderer, pad)
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    targets = inputs["input_ids"][:, 1:]
    weights = torch.zeros(targets.shape)
    for row, example in enumerate(batch):
        said = torch.tensor(example.said[1:])
        weights[row, : len(said)] = torch.where(said, 1.0, CONTEXT_WEIGHT)
    weights[(targets == renderer.image_id)] = 0
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / weights.sum()


def answer_call(said: str, images: list[Image.Image], index: Index) -> tuple[str, Image.Image | None] | None:
    """Returns the answer of the tool that is called; nothing if there is no call."""
    if "<tool_call>" not in said:
        return None
    try:
        call = json.loads(said.split("<tool_call>")[1].split("</tool_call>")[0])
        return index.run(call["name"], call["arguments"], images)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"Error: {error}", None


@torch.no_grad()
def success(
    model: Any,
    renderer: Renderer,
    world: World,
    index: Index,
    questions: list[Question],
    temperature: float,
    turns: int = 6,
) -> dict[str, float]:
    """Returns sampled success rates by kind of question. The loop is a plain copy of the agent loop."""
    tokenizer = renderer.tokenizer
    open_ = [Example(renderer.prompt(q, q.image(world)), [], [q.image(world)]) for q in questions]
    said: dict[int, str] = {}
    running = list(range(len(questions)))
    for _ in range(turns):
        if not running:
            break
        inputs = collate([open_[i] for i in running], renderer, tokenizer.pad_token_id, left=True)
        sampling: dict[str, Any] = (
            {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        )
        output = model.generate(**inputs, **sampling, top_k=0, max_new_tokens=48)[:, inputs["input_ids"].shape[1] :]
        still = []
        for i, ids in zip(running, output.tolist(), strict=True):
            if tokenizer.eos_token_id in ids:
                ids = ids[: ids.index(tokenizer.eos_token_id) + 1]
            said[i] = tokenizer.decode(ids, skip_special_tokens=True)
            answer = answer_call(said[i], open_[i].images, index)
            if answer is not None:
                text, image = answer
                open_[i].ids += ids + renderer.answer(text, image)
                open_[i].images += [image] if image else []
                still.append(i)
        running = still
    right: dict[str, list[float]] = {}
    for i, question in enumerate(questions):
        acc = compute_score("", said[i], question.answers)["acc"]
        right.setdefault(question.kind, []).append(acc)
        right.setdefault("all", []).append(acc)
    return {kind: float(np.mean(values)) for kind, values in sorted(right.items())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--steps", type=int, default=3000, help="steps of the learning rate's schedule")
    parser.add_argument("--stop", type=int, help="step to stop at: early, to leave something to learn; default: 2/3")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path, help="a model to go on from; default: a new one")
    parser.add_argument("--made-up", type=float, default=0.75, help="part of the trajectories in made-up worlds")
    parser.add_argument("--guess", type=float, default=0.0, help="part that searches for nothing, and guesses")
    parser.add_argument("--kinds", nargs="+", choices=list(WEIGHTS), default=list(WEIGHTS), help="of questions")
    parser.add_argument("--attributes", nargs="+", choices=ATTRIBUTES, default=ATTRIBUTES, help="that are asked for")
    args = parser.parse_args()

    stop = args.stop or args.steps * 2 // 3
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    world = load_world("train")
    if args.start:
        tokenizer = AutoTokenizer.from_pretrained(args.start)
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(args.start, dtype=torch.float32)
    else:
        tokenizer = build_tokenizer(world, args.seed)
        model = Qwen2_5_VLForConditionalGeneration(build_config(tokenizer))
    renderer = Renderer(tokenizer)
    stream = examples(renderer, world, rng, Slips(guess=args.guess), args.made_up, args.kinds, args.attributes)
    print(f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f} million parameters", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = min(100, args.steps // 10)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, step / warmup) * max(0.02, 0.5 * (1 + np.cos(np.pi * min(1.0, step / args.steps)))),
    )
    start = time.time()
    model.train()
    losses = []
    for step, batch in enumerate(batches(stream, args.batch_size, rng), 1):
        loss = loss_of(model, batch, renderer, tokenizer.pad_token_id)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
        if step % 50 == 0:
            print(f"step {step}  loss {np.mean(losses[-50:]):.3f}  {time.time() - start:.0f} s", flush=True)
        if step % 500 == 0 or step == stop:
            copy.deepcopy(model).to(torch.bfloat16).save_pretrained(args.out)
            save_processor(tokenizer, args.out, min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS)
        if step == stop:
            break


if __name__ == "__main__":
    main()
