"""One run of the laboratory: warm start, then steps of sampling, advantages and veRL's policy loss."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from policy import Policy, Rollouts, sample
from rules import RULES, all_steps, grpo_advantages, identical_calls
from safetensors.torch import load_file, save_file
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.workers.config import ActorConfig, PolicyLossConfig
from world import World, demonstrate, draw_prompts, world_of

PROMPTS = 32
"""A step's prompts; each has the world's ``group`` rollouts."""
MINI_BATCHES = 2
HELD_OUT, HELD_OUT_EACH, HELD_OUT_EVERY = 64, 4, 5
STARTS = 2
"""Warm starts of a world; seeds take them in turn."""
DEMONSTRATIONS, WARM_STEPS, WARM_RATE = 128, 300, 6e-3
WATCHED = ("misassigned_steps", "corrected_steps", "token_share", "support", "lift", "lucky_steps")
"""The figures of `CreditReport.metrics`. For rules without a report they say what TAPO would have done."""


def actor_config(loss: str) -> ActorConfig:
    """Returns the configuration of a policy loss: veRL's defaults, except GSPO's clip.

    GSPO's clip is veRL's recommendation (3e-4, 4e-4) times 50. So small a model moves further in a
    step, and the recommendation would clip much of every batch [ours].

    Raises:
        ValueError: for an unknown loss.
    """
    if loss not in ("vanilla", "gspo", "sapo"):
        raise ValueError(f"loss must be 'vanilla', 'gspo' or 'sapo', got {loss!r}")
    low, high = (0.015, 0.02) if loss == "gspo" else (0.2, 0.2)
    return ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_mini_batch_size=1,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio_low=low,
        clip_ratio_high=high,
        loss_agg_mode="token-mean" if loss == "vanilla" else "seq-mean-token-mean",
        policy_loss=PolicyLossConfig(loss_mode=loss),
    )


@dataclass(frozen=True)
class Run:
    """Everything that decides a run's results."""

    world: str
    """A world's name, with dials changed: see `world.world_of`."""
    loss: str
    rule: str
    learning_rate: float
    seed: int
    steps: int = 40

    def __post_init__(self) -> None:
        world_of(self.world)
        actor_config(self.loss)
        if self.rule not in RULES:
            raise ValueError(f"unknown rule {self.rule!r}; known: {', '.join(RULES)}")


@contextmanager
def _one_thread() -> Iterator[None]:
    """Small tensors gain nothing from more, runs go side by side, and results do not depend on the machine's cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def warm_start(world: World, start: int, folder: Path) -> Policy:
    """A policy that imitates the world's demonstrations, trained once and kept in ``folder`` at half precision."""
    # What happens to answers, how many rollouts a prompt has and what is grounded make no difference to demonstrations.
    other = ("flaky", "strict", "group", "chance", "reworded")
    shown = {dial: value for dial, value in asdict(world).items() if dial not in other}
    file = folder / (
        ",".join(f"{name}={value:g}" for name, value in {**shown, "start": start}.items()) + ".safetensors"
    )
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with _one_thread():
            trained = {name: value.half() for name, value in _imitate(world, start).state_dict().items()}
        handle, temporary = tempfile.mkstemp(dir=folder)
        os.close(handle)
        save_file(trained, temporary)
        os.replace(temporary, file)
    policy = Policy()
    policy.load_state_dict({name: value.float() for name, value in load_file(file).items()})
    return policy


def _imitate(world: World, seed: int) -> Policy:
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 1])
    policy = Policy()
    optimizer = torch.optim.Adam(policy.parameters())
    start = world.prompt_length
    for step in range(WARM_STEPS):
        optimizer.param_groups[0]["lr"] = WARM_RATE * min((step + 1) / 30, 1 - step / WARM_STEPS)
        tokens = torch.zeros(DEMONSTRATIONS, start + world.response_length, dtype=torch.int64)
        mask = torch.zeros(DEMONSTRATIONS, world.response_length)
        for row, prompt in enumerate(draw_prompts(world, DEMONSTRATIONS, rng)):
            response, own = demonstrate(world, prompt, rng)
            tokens[row, : start + len(response)] = torch.tensor([*prompt.tokens(world), *response])
            mask[row, : len(own)] = torch.tensor(own, dtype=mask.dtype)
        loss = -(policy.log_probs(tokens, start) * mask).sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
    return policy


def train(run: Run, warm_starts: Path) -> pd.DataFrame:
    """A run's figures, one row a step; the row of a step tells of rollouts before its update.

    The same seed gives the same prompts and the same random numbers, whatever the loss and the rule.
    """
    with _one_thread():
        frame = pd.DataFrame(_steps(run, warm_starts)).astype(np.float32)
    return frame.assign(**asdict(run), dials=world_of(run.world).dials, step=range(run.steps + 1))


def _steps(run: Run, warm_starts: Path) -> Iterator[dict[str, float]]:
    world = world_of(run.world)
    policy = warm_start(world, run.seed % STARTS, warm_starts)
    optimizer = torch.optim.Adam(policy.parameters(), lr=run.learning_rate)
    generator = torch.Generator().manual_seed(run.seed)
    rng = np.random.default_rng([run.seed, 2])
    for step in range(run.steps + 1):
        rollouts = sample(policy, world, draw_prompts(world, PROMPTS, rng), world.group, generator)
        index = np.repeat(np.arange(PROMPTS), world.group)
        figures = _outcomes(rollouts) | {
            "entropy": float(rollouts.entropy.sum() / rollouts.mask.sum()),
            "calls": len(all_steps(rollouts)) / len(index),
        }
        base = grpo_advantages(rollouts.success, rollouts, index)
        advantages, report = RULES[run.rule](base, rollouts, index)
        watched = (report or RULES["tapo"](base, rollouts, index)[1]).metrics()
        figures |= {name: watched.get(f"tapo/{name}", math.nan) for name in WATCHED}
        figures |= _pushes(advantages, rollouts, index)
        if step % HELD_OUT_EVERY == 0:
            figures |= {f"held_out_{name}": value for name, value in _held_out(policy, world, run.seed).items()}
        if step < run.steps:
            figures |= _update(policy, optimizer, rollouts, advantages, run.loss, generator)
        yield figures


def _outcomes(rollouts: Rollouts) -> dict[str, float]:
    return {
        "success": float(rollouts.success.float().mean()),
        "proficiency": float(np.mean([episode.proficient for episode in rollouts.episodes])),
    }


def _held_out(policy: Policy, world: World, seed: int) -> dict[str, float]:
    """Evaluates on prompts that all runs of a world share and no run trains on."""
    prompts = draw_prompts(world, HELD_OUT, np.random.default_rng(0))
    return _outcomes(sample(policy, world, prompts, HELD_OUT_EACH, torch.Generator().manual_seed(seed)))


def _pushes(advantages: torch.Tensor, rollouts: Rollouts, index: np.ndarray) -> dict[str, float]:
    """Returns where the advantages push calls. ``agreement`` is the share of the advantages of
    equal calls in a prompt group that remains after adding them up, 1 if all push the same way.
    Gradients of equal tokens after an equal context add up in the same way."""
    values = advantages.numpy()
    places = [np.array(calls).T for calls in identical_calls(rollouts, index)]
    net = sum(abs(values[rows, ends].sum()) for rows, ends in places)
    gross = sum(np.abs(values[rows, ends]).sum() for rows, ends in places)
    right = np.array([right for episode in rollouts.episodes for right in episode.right], dtype=bool)
    pushes = np.array([values[step.row, step.call[1] - 1] for step in all_steps(rollouts)])
    return {
        "agreement": float(net / gross) if gross else math.nan,
        "push_right": float(pushes[right].mean()) if right.any() else math.nan,
        "push_right_sd": float(pushes[right].std()) if right.any() else math.nan,
        "push_wrong": float(pushes[~right].mean()) if (~right).any() else math.nan,
    }


def _update(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    rollouts: Rollouts,
    advantages: torch.Tensor,
    loss: str,
    generator: torch.Generator,
) -> dict[str, float]:
    config, loss_function = actor_config(loss), get_policy_loss_fn(loss)
    clipped, norms = [], []
    for rows in torch.randperm(len(advantages), generator=generator).chunk(MINI_BATCHES):
        log_probs = policy.log_probs(rollouts.tokens[rows], rollouts.prompt_length)
        value, metrics = loss_function(
            rollouts.log_probs[rows],
            log_probs,
            advantages[rows],
            rollouts.mask[rows],
            loss_agg_mode=config.loss_agg_mode,
            config=config,
        )
        optimizer.zero_grad()
        value.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)))
        optimizer.step()
        clipped.append(metrics["actor/pg_clipfrac"])
    return {"clipped": float(np.mean(clipped)), "gradient_norm": float(np.mean(norms))}
