"""The workload: batches of rollouts with tool calls, and an index of passages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from search_backends.retrieval.load_test import write_corpus
from verl_tapo import TapoConfig, ToolStep

CONFIG = TapoConfig(
    tools={
        "text_search": {"query": "text"},
        "image_search": {"image": "exact"},
        "zoom": {"image": "exact", "bbox": "iou"},
    }
)
_WORDS = ("capital", "currency", "river", "museum", "tower", "bridge", "author", "species", "flag", "border")


class Batch(NamedTuple):
    """Rollouts; the rows of a group are apart."""

    rewards: torch.Tensor
    """(B, L), of tokens."""
    mask: torch.Tensor
    """(B, L), of the policy's tokens."""
    index: np.ndarray
    """(B,), the prompts' uids."""
    success: np.ndarray
    """(B,)"""
    steps: list[ToolStep]


def make_batch(trajectories: int, length: int = 8192, group_size: int = 8, calls: int = 5, seed: int = 0) -> Batch:
    """Returns a batch in which 40 % succeed and at most a third of the tokens are the policy's."""
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
    return Batch(rewards, mask, index, success, steps)


def build_index(folder: Path, passages: int) -> Path:
    """An index of made-up passages, built as the retrieval service has it."""
    folder.mkdir(exist_ok=True)
    corpus, index = folder / "passages.jsonl", folder / "index"
    write_corpus(corpus, passages)
    command = [sys.executable, "-m", "search_backends.retrieval.build", "--corpus", str(corpus), "--out", str(index)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return index
