"""Trains a real language model, SmolLM2-135M-Instruct, with veRL's own trainer.

    python examples/quickstart_lm/run_lm.py                                  # TAPO, 10 steps
    python examples/quickstart_lm/run_lm.py --advantage grpo --loss gspo --seed 2

Everything but the model and the questions is the quickstart's `run.py`.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "quickstart"))

import fetch_model
import told
from run import Failure, Run, main


@dataclass
class LanguageRun(Run):
    """A run of this example."""

    here = HERE
    configuration = "quickstart_lm"
    extra = "quickstart-lm"

    out: Path = HERE / "out"

    @property
    def model(self) -> Path:
        return fetch_model.folder()

    def prepare(self) -> None:
        told.prepare(self.out / "data")

    def environment(self) -> dict[str, str]:
        # Unlike the quickstart's, this model is large enough for all cores. Threads that wait leave theirs to others.
        threads = {"OMP_NUM_THREADS": str(os.cpu_count()), "OMP_WAIT_POLICY": "passive"}
        return {**threads, **super().environment()}

    def fetch(self) -> None:
        """Makes the model's folder if it is missing."""
        if self.setting("actor_rollout_ref.model.path") is None:
            try:
                fetch_model.fetch()
            except fetch_model.Unavailable as problem:
                raise Failure(str(problem)) from problem


if __name__ == "__main__":
    sys.exit(main(LanguageRun, __doc__ or ""))
