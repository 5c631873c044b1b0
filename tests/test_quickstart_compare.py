"""`compare.py` on runs that are complete: one picture, one table, and the figures of both."""

from __future__ import annotations

import json
import sys

import compare
import numpy as np
import pandas as pd
import pytest
from PIL import Image

STEPS = 12
CHECKS = 2


def write_run(folder, name, rates):
    (folder / name).mkdir(parents=True)
    entries = [{"step": 0, "data": {"val-core/flags_and_facts/heldout/acc/mean@1": 0.1}}]
    for step, rate in enumerate(rates, 1):
        data = {"critic/score/mean": rate}
        if step % CHECKS == 0:
            data["val-core/flags_and_facts/heldout/acc/mean@1"] = rate / 2
        entries.append({"step": step, "data": data})
    (folder / name / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))


@pytest.mark.parametrize("seeds", [[1], [1, 2]])
def test_complete_runs_are_plotted_and_not_run_again(tmp_path, monkeypatch, capsys, seeds):
    for seed in seeds:
        write_run(tmp_path, f"compare-gspo-{STEPS}-grpo-{seed}", [0.2] * STEPS)
        write_run(tmp_path, f"compare-gspo-{STEPS}-tapo-{seed}", [step / STEPS for step in range(1, STEPS + 1)])
    monkeypatch.setattr(compare, "train", lambda run: pytest.fail("must not train"))
    arguments = ["--loss", "gspo", "--steps", str(STEPS), "--seeds", *map(str, seeds), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["compare.py", *arguments])
    assert compare.main() == 0
    said = capsys.readouterr().out
    assert said.count("complete already") == 2 * len(seeds)
    assert "grpo: success in training 20.0%, 20.0% in the last quarter" in said
    assert "tapo: success in training 54.2%, 91.7% in the last quarter" in said
    assert "on held-out countries 10.0% before, 50.0% after" in said
    by_seed = [f"{{}} (seed {seed})" for seed in seeds]
    assert f"success in training, in points: {', '.join(by_seed).format(*['+34.2'] * 2)}\n" in said
    assert f"held-out countries, after, in points: {', '.join(by_seed).format(*['+40.0'] * 2)}\n" in said
    steps = pd.read_csv(tmp_path / f"compare-gspo-{STEPS}.csv")
    assert len(steps) == 2 * len(seeds) * (STEPS + 1)
    step = steps[(steps["advantage"] == "tapo") & (steps["seed"] == 1) & (steps["step"] == CHECKS)].iloc[0]
    assert (step["success"], step["held_out"]) == pytest.approx((CHECKS / STEPS, CHECKS / STEPS / 2), abs=1e-6)
    picture = tmp_path / f"compare-gspo-{STEPS}.png"
    with Image.open(picture) as image:
        assert len(np.unique(np.asarray(image.convert("L")))) > 5
