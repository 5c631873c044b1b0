"""`compare.py` on runs that are complete: one picture, one table, and the figures of both."""

from __future__ import annotations

import json
import sys

import compare
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from run import Failure, read_metrics

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
    mean = "; mean {}, standard error 0.0" if len(seeds) > 1 else ""
    for name, points in (("success in training", "+34.2"), ("held-out countries, after", "+40.0")):
        differences = f"{', '.join(by_seed).format(*[points] * 2)}{mean.format(points)}\n"
        assert f"tapo minus grpo, {name}, in points: {differences}" in said
    steps = pd.read_csv(tmp_path / f"compare-gspo-{STEPS}.csv")
    assert len(steps) == 2 * len(seeds) * (STEPS + 1)
    step = steps[(steps["advantage"] == "tapo") & (steps["seed"] == 1) & (steps["step"] == CHECKS)].iloc[0]
    assert (step["success"], step["held_out"]) == pytest.approx((CHECKS / STEPS, CHECKS / STEPS / 2), abs=1e-6)
    assert_is_a_picture(tmp_path / f"compare-gspo-{STEPS}.png")


def assert_is_a_picture(picture):
    with Image.open(picture) as image:
        assert len(np.unique(np.asarray(image.convert("L")))) > 5


def test_variants_are_runs_of_their_own(tmp_path, monkeypatch, capsys):
    trained = []

    def train(run):
        trained.append(run)
        write_run(tmp_path, run.name, [{"grpo": 0.2, "tapo": 0.4}[run.advantage] + 0.2 * ("theta" in run.name)] * STEPS)
        return read_metrics(run.metrics_file)

    monkeypatch.setattr(compare, "train", train)
    for _ in range(2):
        arguments = ["--steps", str(STEPS), "--out", str(tmp_path), "--variants", "theta=1.0"]
        monkeypatch.setattr(sys, "argv", ["compare.py", *arguments])
        assert compare.main() == 0
    assert [run.name for run in trained] == [
        f"compare-vanilla-{STEPS}-{arm}-1" for arm in ("grpo", "tapo", "tapo-theta-1.0")
    ]
    assert [run.setting("algorithm.tapo.theta") for run in trained] == [None, None, "1.0"]
    said = capsys.readouterr().out
    assert "tapo minus grpo, success in training, in points: +20.0 (seed 1)" in said
    assert "tapo/theta=1.0 minus grpo, success in training, in points: +40.0 (seed 1)" in said
    steps = pd.read_csv(tmp_path / f"compare-vanilla-{STEPS}-theta-1.0.csv")
    assert [*dict.fromkeys(steps["advantage"])] == ["grpo", "tapo", "tapo/theta=1.0"]
    assert_is_a_picture(tmp_path / f"compare-vanilla-{STEPS}-theta-1.0.png")


def test_a_variant_of_several_settings_is_one_run(tmp_path, monkeypatch):
    trained = []

    def train(run):
        trained.append(run)
        write_run(tmp_path, run.name, [0.5] * STEPS)
        return read_metrics(run.metrics_file)

    monkeypatch.setattr(compare, "train", train)
    variant = "grounding.witnesses=true,grounding.luck=true"
    arguments = ["--steps", str(STEPS), "--out", str(tmp_path), "--variants", variant]
    monkeypatch.setattr(sys, "argv", ["compare.py", *arguments])
    assert compare.main() == 0
    assert len(trained) == 3
    run = trained[-1]
    assert run.advantage == "tapo"
    assert [run.setting(f"algorithm.tapo.grounding.{name}") for name in ("witnesses", "own", "luck")] == [
        "true",
        None,
        "true",
    ]
    # The name is a value on Hydra's command line, where a comma would make a sweep of it.
    assert "," not in run.name
    assert "=" not in run.name


@pytest.mark.parametrize("entry", ["theta", "theta=", "a.=1", "a=1,", "theta=[1, 2]", "theta=../x", "a=1,b"])
def test_what_is_no_setting_is_refused(entry, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compare.py", "--variants", entry])
    with pytest.raises(SystemExit):
        compare.main()
    assert "expected an entry of algorithm.tapo, like theta=1.0" in capsys.readouterr().err


def test_a_study_that_is_broken_off_leaves_its_results(tmp_path, monkeypatch, capsys):
    def train(run):
        if run.advantage == "tapo":
            raise Failure("no more")
        write_run(tmp_path, run.name, [0.5] * STEPS)
        return read_metrics(run.metrics_file)

    monkeypatch.setattr(compare, "train", train)
    monkeypatch.setattr(sys, "argv", ["compare.py", "--steps", str(STEPS), "--out", str(tmp_path)])
    assert compare.main() == 1
    assert "no more" in capsys.readouterr().err
    steps = pd.read_csv(tmp_path / f"compare-vanilla-{STEPS}.csv")
    assert set(steps["advantage"]) == {"grpo"}
    assert steps["step"].max() == STEPS
