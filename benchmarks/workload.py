"""A batch of the size the issue names: trajectories of about 8192 tokens, groups of 8, 5 tool calls each."""

from __future__ import annotations

import numpy as np
import torch

from verl_tapo import TapoConfig, ToolStep

CONFIG = TapoConfig(
    tools={
        "text_search": {"query": "text"},
        "image_search": {"image": "exact"},
        "zoom": {"image": "exact", "bbox": "iou"},
    }
)
_WORDS = ("capital", "currency", "river", "museum", "tower", "bridge", "author", "species", "flag", "border")


def make_batch(
    trajectories: int, length: int = 8192, group_size: int = 8, calls: int = 5, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, np.ndarray, np.ndarray, list[ToolStep]]:
    """Token-level rewards (B, L), response mask (B, L), uids (B,), success (B,) and steps; rows of a group apart."""
    rng = np.random.default_rng(seed)
    mask = torch.zeros(trajectories, length, dtype=torch.int64)
    rewards = torch.zeros(trajectories, length)
    groups = trajectories // group_size
    index = np.array([f"uid-{row % groups}" for row in range(trajectories)], dtype=object)
    success = rng.random(trajectories) < 0.4
    rewards[:, -1] = torch.from_numpy(success.astype(np.float32))
    steps = []
    share = length // (calls + 1)
    for row in range(trajectories):
        position = 0
        for _ in range(calls):
            turn = position, position + int(rng.integers(share // 8, share // 3))
            call = max(turn[0], turn[1] - 48), turn[1]
            mask[row, turn[0] : turn[1]] = 1
            tool = ("text_search", "text_search", "image_search", "zoom")[rng.integers(4)]
            arguments: dict[str, object]
            if tool == "text_search":
                words = [_WORDS[(row % groups + int(i)) % len(_WORDS)] for i in rng.integers(0, 4, 3)]
                arguments = {"query": f"what is the {' '.join(words)} of place {row % groups}"}
            elif tool == "image_search":
                arguments = {"image": "image-0"}
            else:
                x, y = (int(v) * 20 for v in rng.integers(0, 10, 2))
                arguments = {"image": "image-0", "bbox": [x, y, x + 200, y + 150]}
            steps.append(ToolStep(row, tool, arguments, turn, call, True))
            position += share
        mask[row, position : position + share // 4] = 1
    return rewards, mask, index, success, steps
