"""TAPO on a recorded batch: six rollouts of one prompt, the rule's findings, and its changes. It needs no veRL."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from verl_tapo import TapoConfig, transfer_credit
from verl_tapo.records import recorded_steps


def main() -> None:
    """Prints every tool-use step with its credit, then the advantages before and after."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=Path, default=Path(__file__).with_name("batch.json"))
    parser.add_argument("--beta", type=float, default=0.8)
    parser.add_argument("--theta", type=float, default=0.8)
    parser.add_argument("--alpha-min", type=float, default=0.2)
    arguments = parser.parse_args()

    recorded = json.loads(arguments.batch.read_text())
    rollouts = recorded["rollouts"]
    cfg = TapoConfig(beta=arguments.beta, theta=arguments.theta, alpha_min=arguments.alpha_min, tools=recorded["tools"])
    success = [rollout["acc"] >= 0.5 for rollout in rollouts]
    mask = torch.zeros(len(rollouts), max(rollout["response_length"] for rollout in rollouts), dtype=torch.int64)
    steps = []
    for row, rollout in enumerate(rollouts):
        for start, end in rollout["policy_spans"]:
            mask[row, start:end] = 1
        steps += recorded_steps(rollout["tapo_steps"], row, rollout["response_length"], ["image"], 0)
    rewards = torch.tensor([rollout["acc"] for rollout in rollouts])
    grpo = (rewards - rewards.mean()) / (rewards.std() + 1e-6)  # what veRL's grpo gives, too
    base = grpo[:, None] * mask

    advantages, report = transfer_credit(base, mask, [rollout["uid"] for rollout in rollouts], success, steps, cfg)

    print(f"Prompt: {recorded['prompt']}\n")
    print(
        f"{'row':>3} {'outcome':8} {'tool':13} {'role':8} {'gate':12} {'sim':>5} {'sup':>5} {'A':>6} {'new A':>6}",
        " call",
    )
    for step, credit in zip(steps, report.steps, strict=True):
        token = step.turn[0]
        before, after = base[step.row, token].item(), advantages[step.row, token].item()
        print(
            f"{step.row:>3} {'success' if success[step.row] else 'failure':8} {step.tool:13} {credit.role:8} "
            f"{credit.gate or '-':12} {credit.similarity:5.2f} {credit.support:5.2f} {before:6.2f} {after:6.2f}  "
            f"{json.dumps(rollout_arguments(rollouts, step.row, step.call))}"
        )
    print("\nMetrics, as veRL's logger would get them:")
    for name, value in report.metrics().items():
        print(f"  {name} = {value:.3f}")


def rollout_arguments(rollouts: list[dict], row: int, call: tuple[int, int]) -> dict:
    """Returns the arguments as the model wrote them; the rule sees identities instead of image
    indices."""
    for step in rollouts[row]["tapo_steps"]["steps"]:
        if tuple(step["call"]) == call:
            return step["arguments"]
    raise KeyError(call)


if __name__ == "__main__":
    main()
