"""Finding the calls in tokens, against decoding every turn and veRL's own parser."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from conftest import TOOL_TOKENS, _byte_level
from measuring import Fact, Part, medians, sweep
from verl.experimental.agent_loop.tool_parser import ToolParser
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage
from workload import Batch, make_batch

from verl_tapo.calls.parsing import ToolCallParser, parse_steps

OURS, DECODING = "parse_steps", "decoding each turn, veRL's parser"


def tokens_of(batch: Batch, tokenizer: Any) -> torch.Tensor:
    """Response tokens in which every step is a hermes call at the end of its turn, answered by an observation."""
    rng = np.random.default_rng(1)
    plain = np.array(tokenizer.encode("the answer is in this picture of a river and a tower", add_special_tokens=False))
    tokens = plain[rng.integers(0, len(plain), tuple(batch.mask.shape))]
    answer, ending = tokenizer.convert_tokens_to_ids(["<tool_response>", "<|im_end|>"])
    for step in batch.steps:
        text = json.dumps({"name": step.tool, "arguments": step.arguments})
        ids = tokenizer.encode(f"<tool_call>\n{text}\n</tool_call>", add_special_tokens=False)
        start, end = step.turn
        ids = ids[-(end - start - 1) :]
        tokens[step.row, end - 1 - len(ids) : end - 1] = ids
        tokens[step.row, end - 1] = ending
        tokens[step.row, end + 3] = answer
    return torch.from_numpy(tokens)


def by_decoding(parser: ToolParser, tokens: np.ndarray, mask: np.ndarray) -> int:
    """The obvious alternative to our parser. It finds calls, but neither their tokens nor their
    answers."""

    async def run() -> int:
        found = 0
        for row, of_policy in zip(tokens, mask, strict=True):
            edges = np.flatnonzero(np.diff(of_policy, prepend=0, append=0)).reshape(-1, 2)
            for start, end in edges:
                _, calls = await parser.extract_tool_calls(row[start:end].tolist())
                found += len(calls)
        return found

    return asyncio.run(run())


def functions(batch: Batch, tokenizer: Any) -> Mapping[str, Callable[[], Any]]:
    tokens = tokens_of(batch, tokenizer).numpy()
    mask = batch.mask.numpy()
    parser = ToolCallParser("hermes", tokenizer)
    offsets, rows = np.arange(0, tokens.size + 1, tokens.shape[1]), np.arange(len(tokens))
    stock = ToolParser.get_tool_parser("hermes", tokenizer)
    measured = {
        OURS: lambda: parse_steps(parser, tokens.reshape(-1), mask.reshape(-1), offsets, rows),
        DECODING: lambda: by_decoding(stock, tokens, mask),
    }
    found = [(step.row, step.tool, step.arguments) for step in measured[OURS]().steps]
    assert found == [(step.row, step.tool, step.arguments) for step in batch.steps], "a turn is too short for its call"
    assert measured[DECODING]() == len(batch.steps)
    return measured


def measure(quick: bool) -> Part:
    tokenizer = _byte_level(TOOL_TOKENS)
    rows, length, repeats = (8, 8192, 1) if quick else (128, 8192, 3)
    sweeps = [
        sweep(
            "trajectories",
            f"{length} tokens, 5 calls each",
            [8, 16] if quick else [64, 128, 256, 512],
            lambda size: functions(make_batch(size, length), tokenizer),
            repeats,
        ),
        sweep(
            "calls of a trajectory",
            f"{rows} trajectories of {2 * length} tokens",
            [1, 2] if quick else [1, 2, 5, 10],
            lambda size: functions(make_batch(rows, 2 * length, calls=size), tokenizer),
            repeats,
        ),
    ]
    whole = make_batch(rows, length) if quick else make_batch(1024, 8192)
    ours = functions(whole, tokenizer)[OURS]
    parsing, grpo = medians(
        ours,
        lambda: compute_grpo_outcome_advantage(whole.rewards, whole.mask, whole.index),
        repeats=repeats if quick else 11,
    )
    size = " x ".join(map(str, whole.mask.shape))
    facts = [
        Fact(f"finding the steps in {size} tokens", f"{parsing * 1e3:.0f} ms, {parsing / grpo:.2f} x GRPO", "1.0 x")
    ]
    text = (
        "`parse_steps` on stock rollouts, against decoding every turn with the tokenizer and giving it to veRL's own "
        "`HermesToolParser`, which finds the calls but neither their tokens nor whether they were answered. Rollouts "
        "recorded by `tapo_tool_agent` do not pay it."
    )
    return Part("Parsing", text, sweeps, facts)
