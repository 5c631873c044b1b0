"""What TAPO costs, as ratios against veRL's own GRPO on the same tensors in the same run. `make benchmark`."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage
from workload import CONFIG, make_batch

from verl_tapo import ToolStep, transfer_credit
from verl_tapo.parsing import ToolCallParser, parse_steps

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

REPEATS = 11


def medians(*functions: Callable[[], Any], repeats: int = REPEATS) -> list[float]:
    """Median seconds of each, taken in turn so that the machine's moods strike all alike."""
    times: list[list[float]] = [[] for _ in functions]
    for function in functions:
        function()
    for _ in range(repeats):
        for function, taken in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def row(name: str, value: str, bound: str) -> None:
    print(f"| {name} | {value} | {bound} |", flush=True)


def tokens_of(steps: list[ToolStep], mask: torch.Tensor, tokenizer: Any) -> torch.Tensor:
    """Response tokens in which every step is a hermes call at the end of its turn, answered by an observation."""
    rng = np.random.default_rng(1)
    plain = np.array(tokenizer.encode("the answer is in this picture of a river and a tower", add_special_tokens=False))
    tokens = plain[rng.integers(0, len(plain), tuple(mask.shape))]
    answer, ending = tokenizer.convert_tokens_to_ids(["<tool_response>", "<|im_end|>"])
    for step in steps:
        text = json.dumps({"name": step.tool, "arguments": step.arguments})
        ids = tokenizer.encode(f"<tool_call>\n{text}\n</tool_call>", add_special_tokens=False)
        start, end = step.turn
        ids = ids[-(end - start - 1) :]
        tokens[step.row, end - 1 - len(ids) : end - 1] = ids
        tokens[step.row, end - 1] = ending
        tokens[step.row, end + 3] = answer
    return torch.from_numpy(tokens)


def main() -> None:
    """Prints a Markdown table."""
    import conftest

    threads = torch.get_num_threads()
    print(f"\n{os.cpu_count()} cores, {threads} threads, torch {torch.__version__}; medians of {REPEATS}\n")
    print("| measured | figure | bound |\n| --- | --- | --- |")
    rewards, mask, index, success, steps = make_batch(1024)
    base, _ = compute_grpo_outcome_advantage(rewards, mask, index)
    tokenizer = conftest._byte_level(conftest.TOOL_TOKENS)
    tokens = tokens_of(steps, mask, tokenizer)
    parser = ToolCallParser("hermes", tokenizer)
    flat, policy = tokens.reshape(-1).numpy(), mask.reshape(-1).numpy()
    offsets, rows = np.arange(0, flat.size + 1, mask.shape[1]), np.arange(len(mask))
    parsed = parse_steps(parser, flat, policy, offsets, rows)
    found = sum(a.arguments == b.arguments for a, b in zip(parsed.steps, steps, strict=True))
    assert found == len(steps), f"only {found} of {len(steps)} calls found again"
    grpo, credit, parsing = medians(
        lambda: compute_grpo_outcome_advantage(rewards, mask, index),
        lambda: transfer_credit(base, mask, index, success, steps, CONFIG),
        lambda: parse_steps(parser, flat, policy, offsets, rows),
    )
    row("veRL's GRPO, 1024 x 8192", f"{grpo * 1e3:.0f} ms", "")
    row("credit transfer, 5 calls each", f"{credit * 1e3:.0f} ms, {credit / grpo:.2f} x GRPO", "1.0 x")
    row("finding the steps in the tokens", f"{parsing * 1e3:.0f} ms, {parsing / grpo:.2f} x GRPO", "1.0 x")

    tracemalloc.start()
    transfer_credit(base, mask, index, success, steps, CONFIG)
    peak = tracemalloc.get_traced_memory()[1] / (base.numel() * base.element_size())
    tracemalloc.stop()
    row("peak memory, in (B, L) tensors, the result included", f"{peak:.2f}", "about 1")

    group = make_batch(64, length=16384, group_size=64, calls=30)
    group_base, _ = compute_grpo_outcome_advantage(group[0], group[1], group[2])
    (single,) = medians(lambda: transfer_credit(group_base, group[1], group[2], group[3], group[4], CONFIG), repeats=3)
    row("one prompt group of 64 rollouts x 30 calls", f"{single:.2f} s", "1 s")

    per_row = {}
    for trajectories in (1024, 4096, 16384):
        large = make_batch(trajectories, length=1024)
        large_base, _ = compute_grpo_outcome_advantage(large[0], large[1], large[2])
        (taken,) = medians(lambda b=large_base, x=large: transfer_credit(b, x[1], x[2], x[3], x[4], CONFIG), repeats=3)
        per_row[trajectories] = taken / trajectories * 1e6
    figures = ", ".join(f"{n}: {taken:.0f} us" for n, taken in per_row.items())
    row("time per trajectory (x 1024 tokens)", figures, "flat: linear")

    imports: dict[str, list[float]] = {"auto": [], "none": []}
    for _ in range(9):
        for policy_name, taken_list in imports.items():
            environment = {**os.environ, "VERL_USE_EXTERNAL_PLUGINS": policy_name}
            code = "import time; s = time.perf_counter(); import verl; print(time.perf_counter() - s)"
            done = subprocess.run(
                [sys.executable, "-W", "ignore", "-c", code],
                env=environment,
                capture_output=True,
                text=True,
                check=True,
            )
            taken_list.append(float(done.stdout.split()[-1]))
    whole = min(imports["none"])  # of seconds that swing by more than what is looked for, the least tell
    cost = min(imports["auto"]) - whole
    row("import verl with the plug-in", f"{cost * 1e3:+.0f} ms (of {whole:.1f} s)", "50 ms")


if __name__ == "__main__":
    main()
