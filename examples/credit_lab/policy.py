"""The policy: a transformer of about 20,000 parameters that samples token by token, with tools in between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from world import PAD, VOCABULARY_SIZE, Episode, Prompt, World

WIDTH, LAYERS, HEADS = 32, 2, 4
LONGEST = 48
"""Prompt and response together, in tokens."""


class Block(nn.Module):
    """Attention and feed-forward layer, pre-norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, cache: tuple[torch.Tensor, torch.Tensor] | None, past: int) -> torch.Tensor:
        """(B, T, WIDTH) to the same; ``cache``: keys and values (B, HEADS, LONGEST, WIDTH // HEADS), filled up to
        ``past`` and further here."""
        b, t, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        if cache is not None:
            cache[0][:, :, past : past + t], cache[1][:, :, past : past + t] = k, v
            k, v = cache[0][:, :, : past + t], cache[1][:, :, : past + t]
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=t > 1)
        x = x + self.out(attended.transpose(1, 2).reshape(b, t, WIDTH))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Policy(nn.Module):
    """Decoder over `world`'s vocabulary, input and output embeddings tied."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY_SIZE, WIDTH)
        self.positions = nn.Embedding(LONGEST, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        for embedding in (self.embedding, self.positions):
            nn.init.normal_(embedding.weight, std=0.1)

    def forward(
        self, tokens: torch.Tensor, caches: list[tuple[torch.Tensor, torch.Tensor]] | None = None, past: int = 0
    ) -> torch.Tensor:
        """Logits (B, T, V) of the tokens after each of ``tokens`` (B, T), which follow ``past`` cached ones."""
        x = self.embedding(tokens) + self.positions.weight[past : past + tokens.shape[1]]
        for number, block in enumerate(self.blocks):
            x = block(x, caches[number] if caches else None, past)
        return self.norm(x) @ self.embedding.weight.T

    def log_probs(self, tokens: torch.Tensor, prompt_length: int) -> torch.Tensor:
        """(B, L) log-probabilities of the response's tokens; ``tokens`` (B, prompt_length + L)."""
        logits = self(tokens[:, :-1])[:, prompt_length - 1 :]
        return -F.cross_entropy(logits.transpose(1, 2), tokens[:, prompt_length:], reduction="none")


@dataclass(frozen=True)
class Rollouts:
    """B rollouts of L response tokens; rollouts of one prompt are adjacent."""

    tokens: torch.Tensor
    """(B, prompt_length + L)"""
    prompt_length: int
    mask: torch.Tensor
    """(B, L) 1 on the policy's own tokens."""
    log_probs: torch.Tensor
    """(B, L) at sampling."""
    entropy: torch.Tensor
    """(B, L) of the distribution each token was drawn from."""
    episodes: list[Episode]
    success: torch.Tensor
    """(B,) bool"""


@torch.no_grad()
def sample(policy: Policy, world: World, prompts: Sequence[Prompt], each: int, generator: torch.Generator) -> Rollouts:
    """``each`` rollouts of every prompt, at temperature 1."""
    asked = [prompt for prompt in prompts for _ in range(each)]
    episodes = [Episode(world, prompt, row) for row, prompt in enumerate(asked)]
    start = torch.tensor([prompt.tokens(world) for prompt in asked])
    rows, length = len(asked), world.response_length
    caches = [
        tuple(torch.zeros(2, rows, HEADS, start.shape[1] + length, WIDTH // HEADS).unbind()) for _ in range(LAYERS)
    ]
    logits = policy(start, caches)[:, -1]
    tokens = torch.full((rows, length), PAD)
    mask, log_probs, entropy = torch.zeros(3, rows, length).unbind()
    waiting: list[list[int]] = [[] for _ in asked]  # a tool's answer, not yet in the context
    for position in range(length):
        distribution = logits.log_softmax(-1)
        drawn = torch.multinomial(distribution.exp(), 1, generator=generator)
        chosen = drawn[:, 0].tolist()
        own = [False] * rows
        for row, episode in enumerate(episodes):
            if waiting[row]:
                chosen[row] = waiting[row].pop(0)
            elif episode.done:
                chosen[row] = PAD
            else:
                own[row] = True
                waiting[row] = episode.token(chosen[row])
        tokens[:, position] = torch.tensor(chosen)
        mask[:, position] = torch.tensor(own)
        log_probs[:, position] = distribution.gather(1, drawn)[:, 0]
        entropy[:, position] = -(distribution.exp() * distribution).sum(-1)
        if all(episode.done for episode in episodes):
            break
        logits = policy(tokens[:, position : position + 1], caches, start.shape[1] + position)[:, -1]
    # Drawn for all rows, so that the generator's state does not depend on what the rollouts did.
    kept = torch.rand(rows, generator=generator) >= world.flaky
    success = kept & torch.tensor([episode.right_answer for episode in episodes])
    used = int(mask.any(0).nonzero().max()) + 1
    return Rollouts(
        torch.cat([start, tokens[:, :used]], 1),
        start.shape[1],
        mask[:, :used],
        log_probs[:, :used] * mask[:, :used],
        entropy[:, :used] * mask[:, :used],
        episodes,
        success,
    )
