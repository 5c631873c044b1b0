"""The audit from Python, for notebooks: figures as pandas frames, plots on matplotlib axes.

python examples/audit/explore.py            # writes explore.png beside this file
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # leave this out in a notebook

import matplotlib.pyplot as plt

from verl_tapo.audit import audit

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Prints three tables and draws four plots."""
    found = audit(HERE / "data")
    print(found.steps[["success_rate", "failing_steps", "misassigned_steps", "corrected_steps", "lift"]].round(2))

    # Which calls are punished although successful siblings made them too?
    calls = found.calls
    corrected = calls[calls["gate"] == "corrected"]
    print("\nThe calls most often corrected:")
    print(corrected.groupby(["tool", "arguments"]).size().sort_values(ascending=False).head(5).to_string())

    # And which are nearly matched? Worth reading before theta is changed.
    near = calls[(calls["gate"] == "below_theta") & (calls["similarity"] > 0.7)]
    print("\nJust below theta:")
    print(near.sort_values("similarity", ascending=False)[["arguments", "similarity"]].head(5).to_string(index=False))

    axes = plt.subplots(2, 2, figsize=(11, 7.5))[1].ravel()
    found.plot_steps(axes[0])
    found.plot_similarity(axes[1])
    found.plot_tools(axes[2])
    found.plot_sweep("theta", axes[3])
    plt.tight_layout()
    plt.savefig(HERE / "explore.png", dpi=110)


if __name__ == "__main__":
    main()
