"""Credit transfer against veRL's own GRPO, on the same tensors."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Mapping
from typing import Any

from measuring import Fact, Part, Sweep, medians, sweep
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage
from workload import CONFIG, Batch, make_batch

from verl_tapo import transfer_credit

OURS, GRPO = "credit transfer", "veRL's GRPO"


def functions(batch: Batch) -> Mapping[str, Callable[[], Any]]:
    base, _ = compute_grpo_outcome_advantage(batch.rewards, batch.mask, batch.index)
    return {
        OURS: lambda: transfer_credit(base, batch.mask, batch.index, batch.success, batch.steps, CONFIG),
        GRPO: lambda: compute_grpo_outcome_advantage(batch.rewards, batch.mask, batch.index),
    }


def peak_memory(batch: Batch) -> float:
    """Returns the peak memory that the transfer allocates, in (B, L) tensors."""
    base, _ = compute_grpo_outcome_advantage(batch.rewards, batch.mask, batch.index)
    tracemalloc.start()
    transfer_credit(base, batch.mask, batch.index, batch.success, batch.steps, CONFIG)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / (base.numel() * base.element_size())


def measure(quick: bool) -> Part:
    rows, length, repeats = (64, 512, 3) if quick else (512, 4096, 7)

    def growing(grows: str, fixed: str, sizes: list[int], name: str) -> Sweep:
        usual = {"trajectories": rows, "length": length}
        return sweep(grows, fixed, sizes, lambda size: functions(make_batch(**{**usual, name: size})), repeats=repeats)

    sweeps = [
        growing(
            "trajectories",
            f"{length} tokens, groups of 8, 5 calls each",
            [32, 64] if quick else [128, 256, 512, 1024, 2048, 4096],
            "trajectories",
        ),
        growing(
            "tokens of a response",
            f"{rows} trajectories, groups of 8, 5 calls each",
            [512, 1024] if quick else [1024, 2048, 4096, 8192, 16384],
            "length",
        ),
        growing(
            "calls of a trajectory",
            f"{rows} x {length}, groups of 8",
            [1, 5] if quick else [1, 2, 5, 10, 20, 40],
            "calls",
        ),
        growing(
            "rollouts of a prompt",
            f"{rows} x {length}, 5 calls each",
            [4, 16] if quick else [4, 8, 16, 32, 64, 128],
            "group_size",
        ),
    ]
    whole = make_batch(rows) if quick else make_batch(1024, 8192)
    ours, grpo = medians(*functions(whole).values(), repeats=repeats if quick else 11)
    group = make_batch(64, length=16384, group_size=64, calls=30)
    (single,) = medians(functions(group)[OURS], repeats=3)
    size = " x ".join(map(str, whole.mask.shape))
    facts = [
        Fact(f"credit transfer, {size}, 5 calls each", f"{ours * 1e3:.0f} ms, {ours / grpo:.2f} x GRPO", "1.0 x"),
        Fact("its peak memory, in (B, L) tensors, the result included", f"{peak_memory(whole):.2f}", "about 1"),
        Fact("one prompt group of 64 rollouts x 30 calls", f"{single:.2f} s", "1 s"),
    ]
    text = (
        "`transfer_credit` from steps that were recorded, against veRL's `compute_grpo_outcome_advantage` on the same "
        "tensors. 46 % of the calls are distinct ([`workload.py`](workload.py))."
    )
    return Part("Credit transfer", text, sweeps, facts)
