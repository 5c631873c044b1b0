"""GRPO and TAPO on the same data, from the same weights, with the same seeds; both learning curves in one picture.

    python examples/quickstart/compare.py --steps 40 --seeds 1
    python examples/quickstart/compare.py --loss gspo --steps 40 --seeds 1 2 3

Runs that are complete are not run again.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from run import Failure, Run, parser, read_metrics, stop_with_me, summary, train, validation

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ADVANTAGES = {"grpo": "tab:gray", "tapo": "tab:blue"}
SMOOTH = 5  # steps that one point of a training curve averages


def curves(runs: list[Run]) -> tuple[np.ndarray, np.ndarray, list[list[tuple[int, float]]]]:
    """Of runs of the same length: steps (S,), success in training (runs, S), and each run's validations."""
    metrics = [read_metrics(run.metrics_file) for run in runs]
    training = [[entry["critic/score/mean"] for entry in run if "critic/score/mean" in entry] for run in metrics]
    checks = [[(entry["step"], rate) for entry in run if (rate := validation(entry)) is not None] for run in metrics]
    return np.arange(1, len(training[0]) + 1), np.array(training), checks


def plot(runs: dict[str, list[Run]], file: Path) -> None:
    """Success over training steps; the mean over seeds, thin lines each seed's."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for advantage, of in runs.items():
        steps, training, checks = curves(of)
        smooth = pd.DataFrame(training.T).rolling(SMOOTH, min_periods=1).mean().to_numpy()
        colour = ADVANTAGES[advantage]
        left.plot(steps, smooth, color=colour, alpha=0.3, linewidth=1)
        left.plot(steps, smooth.mean(axis=1), color=colour, label=advantage, linewidth=2)
        rates = np.array([[rate for _, rate in line] for line in checks])
        where = [step for step, _ in checks[0]]
        right.plot(where, rates.T, color=colour, alpha=0.3, linewidth=1)
        right.plot(where, rates.mean(axis=0), color=colour, label=advantage, linewidth=2, marker="o")
    left.set(
        title=f"training questions (mean of the last {SMOOTH} steps)", xlabel="step", ylabel="success rate", ylim=(0, 1)
    )
    right.set(title="held-out countries", xlabel="step")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def main() -> int:
    stop_with_me()
    arguments = parser(__doc__ or "")
    arguments.set_defaults(steps=40)
    arguments.add_argument("--seeds", type=int, nargs="+", default=[1], help="one pair of runs for each")
    args = arguments.parse_args()
    runs: dict[str, list[Run]] = {advantage: [] for advantage in ADVANTAGES}
    every = max(1, args.steps // 6)
    overrides = [f"trainer.test_freq={every}", f"trainer.save_freq={args.steps}", *args.overrides]
    for seed in args.seeds:
        for advantage in ADVANTAGES:
            name = f"compare-{args.loss}-{args.steps}-{advantage}-{seed}"
            run = Run(name, advantage, args.loss, args.steps, seed, args.out.resolve(), overrides)
            runs[advantage].append(run)
            done = read_metrics(run.metrics_file)
            if done and done[-1]["step"] == args.steps:
                print(f"{name}: complete already")
                continue
            try:
                print(summary(run, train(run)))
            except Failure as failure:
                print(f"\n{failure}", file=sys.stderr)
                return 1
    picture = args.out / f"compare-{args.loss}-{args.steps}.png"
    plot(runs, picture)
    print()
    for advantage, of in runs.items():
        _, training, checks = curves(of)
        late = training[:, -max(1, args.steps // 4) :].mean()
        first, last = (np.mean([line[end][1] for line in checks]) for end in (0, -1))
        print(f"{advantage}: success in training {late:.1%} (last quarter of the steps)")
        print(f"      on held-out countries {first:.1%} before, {last:.1%} after")
    print(picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
