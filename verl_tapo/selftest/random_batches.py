"""Random batches and settings, the same ones for a seed, to hold the rule against `verl_tapo.rule.reference`."""

from __future__ import annotations

from typing import Any, TypeAlias, get_args

import numpy as np
import torch

from verl_tapo.rule.config import Grounding, Scope, TapoConfig
from verl_tapo.rule.steps import TokenScope, ToolStep

Batch: TypeAlias = tuple[torch.Tensor, torch.Tensor, list[str], list[bool], list[ToolStep]]
"""Base advantages (B, L), response mask (B, L), prompt groups (B,), success (B,) and steps."""

TOOLS: dict[str, dict[str, Any]] = {
    "text_search": {"query": "text"},
    "zoom": {"image": "exact", "bbox": "iou"},
    "lookup": {"page": {"kernel": "number", "scale": 4.0}, "session": "ignore"},
    "fetch": {},
}
QUERIES = ["capital of France", "Capital of france?", "capital of the France", "river in Peru", "Peru river", "", "!!!"]
BOXES: list[Any] = [
    *([0, 0, 10, 10], [10, 10, 0, 0], [0, 0, 10, 9], [5, 5, 15, 15], [3, 3, 3, 9], [3, 9, 3, 3], "box", [0, 0, 1]),
    *("[0, 0, 10, 10]", "0,0,10,9", ["0", "0", "10", "10"], {"x1": 0, "y1": 0, "x2": 10, "y2": 9}, [[5, 5], [15, 15]]),
    *(None, [10**400, 0, 1, 1], [0, 0, 10, float("nan")]),
]
PAGES: list[Any] = [0, 1, 2, 3, 4, 5, "3", " 4.0 ", "last", None, 10**400, float("inf")]


def random_arguments(rng: np.random.Generator, tool: str) -> dict[str, Any]:
    """Arguments of a call, odd ones among them."""
    if tool == "text_search":
        query = QUERIES[rng.integers(len(QUERIES))]
        return {"query": query if rng.random() < 0.9 else [*query.split(), 7][::-1] if rng.random() < 0.5 else None}
    if tool == "zoom":
        arguments = {
            "image": int(rng.integers(2)),
            "bbox": BOXES[rng.integers(4 if rng.random() < 0.5 else len(BOXES))],
        }
        if rng.random() < 0.1:
            arguments["label"] = "a dog"
        return arguments if rng.random() < 0.8 else {"bbox": arguments["bbox"]}
    if tool == "lookup":
        return {"page": PAGES[rng.integers(6 if rng.random() < 0.6 else len(PAGES))], "session": float(rng.random())}
    if tool == "fetch":
        return {} if rng.random() < 0.5 else {"url": f" a {rng.integers(2)} ", "n": float(rng.integers(2))}
    return {"code": "print(1)"}


def random_batch(seed: int, rows: int | None = None, length: int = 12, group_size: int = 4) -> Batch:
    """A batch of binary rewards, normalised within groups as GRPO does, its rows shuffled."""
    rng = np.random.default_rng(seed)
    rows = int(rng.integers(2, 10)) if rows is None else rows
    index = [f"u{i // group_size}" for i in range(rows)]
    rng.shuffle(index)
    success = rng.random(rows) < 0.45
    reward = success + (rng.random(rows) * 0.3 if rng.random() < 0.5 else 0.0)
    mask = torch.from_numpy((rng.random((rows, length)) < 0.75).astype(np.int64))
    advantage = np.zeros(rows)
    for uid in set(index):
        members = [i for i in range(rows) if index[i] == uid]
        advantage[members] = (reward[members] - reward[members].mean()) / (reward[members].std() + 1e-6)
    base = torch.from_numpy(advantage).float()[:, None] * mask
    if rng.random() < 0.3:  # an estimator with token-level advantages
        base = base + torch.from_numpy(rng.normal(0, 0.2, (rows, length))).float() * mask
    steps = []
    for row in range(rows):
        for _ in range(int(rng.integers(0, 4))):
            start = int(rng.integers(0, length))
            end = int(rng.integers(start, length + 1))
            call_start = int(rng.integers(start, end + 1))
            call = (call_start, int(rng.integers(call_start, end + 1)))
            for _ in range(int(rng.integers(1, 3))):
                tool = [*TOOLS, "python"][rng.choice(5, p=[0.35, 0.25, 0.2, 0.1, 0.1])]
                ok = bool(rng.random() < 0.9)
                steps.append(ToolStep(row, tool, random_arguments(rng, tool), (start, end), call, ok))
    # Drawn on their own, so that the batches of a seed stay what they are.
    sights = np.random.default_rng(seed + 20_000_000).choice(3, size=len(steps), p=[0.15, 0.6, 0.25])
    steps = [step._replace(seen=(None, False, True)[sight]) for step, sight in zip(steps, sights, strict=True)]
    return base, mask, index, success.tolist(), steps


def random_config(seed: int) -> TapoConfig:
    """Settings of the rule."""
    rng = np.random.default_rng(seed + 10_000_000)
    return TapoConfig(
        beta=float(rng.choice([0.3, 0.8, 1.0, 2.0])),
        theta=float(rng.choice([0.0, 0.3, 0.8, 0.95, 1.0])),
        alpha_min=float(rng.choice([0.0, 0.2, 0.6])),
        token_scope=get_args(TokenScope)[rng.choice(2)],
        scope=get_args(Scope)[rng.choice(2)],
        use_support=bool(rng.random() < 0.7),
        clip=bool(rng.random() < 0.7),
        tools=TOOLS if rng.random() < 0.8 else None,
        grounding=Grounding(*(bool(switch) for switch in rng.random(3) < 0.5 * (seed % 2))),
    )
