"""VeRL's own trainer, end to end: `python -m verl.trainer.main_ppo` on Flags & Facts, as the quickstart runs it.

Every run here is a real one (Ray, FSDP2, TransferQueue, agent loop, tools, checkpoints), of two small steps.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import prepare
import pytest
import torch
import yaml
from cpu_runs import assert_observed_alone, killed_at_the_end, wait_for_checkpoint
from hydra.core.override_parser.overrides_parser import OverridesParser
from run import HERE, Failure, Run, check, describe, read_metrics, summary, train, validation

from verl_tapo.audit import audit

pytestmark = pytest.mark.timeout(1800)

STEPS = 2
SMALL = [
    "data.train_batch_size=4",
    "actor_rollout_ref.rollout.n=4",
    "actor_rollout_ref.rollout.full_determinism=true",
    "trainer.val_before_train=false",
    "trainer.test_freq=-1",
    "trainer.save_freq=1",
]


@pytest.fixture(scope="session")  # the long tests, which come last, need it too
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    prepare.prepare(folder / "data", {"train": 32, "val": 8, "heldout": 8})
    return folder


@pytest.fixture(scope="session")
def finished(out):
    """Runs it once, however many tests ask: name, advantage, loss and overrides -> the run and its metrics."""

    @cache
    def finish(name, advantage="tapo", loss="vanilla", *overrides):
        run = Run(name, advantage, loss, STEPS, seed=1, out=out, overrides=[*SMALL, *overrides])
        metrics = train(run)
        print(summary(run, metrics))
        return run, metrics

    return finish


@pytest.fixture(scope="session")
def tapo(finished, out):
    return finished("tapo", "tapo", "vanilla", f"algorithm.tapo.record_dir={out / 'tapo' / 'records'}")


def weights(run, step=STEPS, ranks=1):
    folder = run.folder / "checkpoints" / f"global_step_{step}" / "actor"
    return [
        {name: getattr(value, "_local_tensor", value) for name, value in state.items()}
        for rank in range(ranks)
        for state in [torch.load(folder / f"model_world_size_{ranks}_rank_{rank}.pt", weights_only=False)]
    ]


def same(first, second):
    return all(torch.equal(a[name], b[name]) for a, b in zip(first, second, strict=True) for name in a)


def rollouts(run, step):
    """Sorted: veRL dumps them by the prompts' random uids."""
    lines = (run.folder / "rollouts" / f"{step}.jsonl").read_text().splitlines()
    return sorted((row["input"], row["output"], row["score"]) for row in map(json.loads, lines))


def assert_healthy(metrics, steps=STEPS):
    logged = [entry for entry in metrics if "critic/score/mean" in entry]
    assert len(logged) == steps
    for entry in logged:
        assert entry["training/rollout_probs_diff_max"] < 1e-4
        assert all(math.isfinite(value) for value in entry.values() if isinstance(value, float)), entry


def test_tapo_corrects(tapo):
    """Of the short tests the one that runs veRL's trainer, with those below that read what it left."""
    run, metrics = tapo
    assert_healthy(metrics)
    assert sum(entry["tapo/corrected_steps"] for entry in metrics) > 0
    assert not same(weights(run, 1), weights(run, 2))


@pytest.mark.long
def test_beta_0_ends_in_the_weights_of_grpo(finished):
    grpo, grpo_metrics = finished("grpo", "grpo")
    zero, zero_metrics = finished("beta-0", "tapo", "vanilla", "algorithm.tapo.beta=0")
    assert_healthy(grpo_metrics)
    assert_healthy(zero_metrics)
    for step in range(1, STEPS + 1):
        assert rollouts(grpo, step) == rollouts(zero, step)
    assert same(weights(grpo), weights(zero))
    assert not same(weights(grpo, 1), weights(grpo, 2))
    assert_observed_alone(grpo_metrics)


@pytest.mark.long
def test_tapo_ends_elsewhere_than_grpo(finished, tapo):
    run, _ = tapo
    grpo, _ = finished("grpo", "grpo")
    assert rollouts(run, 1) == rollouts(grpo, 1)
    assert not same(weights(run), weights(grpo))


@pytest.mark.parametrize("source", ["rollouts", "records"])
def test_an_audit_says_what_training_logged(tapo, source):
    """From records exactly; from texts but for the share of tokens, which a text counts in characters."""
    run, metrics = tapo
    found = audit(run.folder / source).result
    assert found["settings"]["recorded_steps"] == (STEPS if source == "records" else 0)
    assert [figures["step"] for figures in found["steps"]] == [1, 2]
    for figures, logged in zip(found["steps"], metrics, strict=True):
        assert figures["calls"] / figures["trajectories"] == pytest.approx(logged["tapo/steps_per_trajectory"])
        assert figures["failed_calls"] / figures["calls"] == pytest.approx(logged["tapo/failed_calls"])
        for name in ("misassigned_steps", "corrected_steps"):
            assert figures[name] / max(figures["failing_steps"], 1) == pytest.approx(logged[f"tapo/{name}"])
        for name in ("similarity", "support", "alpha", "transfer", "lift", "success_rate"):
            assert figures[name] == pytest.approx(logged.get(f"tapo/{name}"), abs=1e-6), name
        near = 1e-12 if source == "records" else 0.05
        assert figures["token_share"] == pytest.approx(logged["tapo/token_share"], abs=near)


def test_an_audit_joins_records_and_texts(tapo):
    run, _ = tapo
    found = audit(run.folder).result
    assert found["settings"]["recorded_steps"] == STEPS
    texts = audit(run.folder / "rollouts").result
    assert found["totals"]["trajectories"] == texts["totals"]["trajectories"] == 2 * 16
    calls = [
        (trajectory["text"], call)
        for group in found["groups"]
        for trajectory in group["trajectories"]
        for call in trajectory["calls"]
    ]
    assert len(calls) == found["totals"]["calls"]
    for text, call in calls:
        start, end = call["call_span"]
        assert text[start:end].startswith("<tool_call>")
        assert call["status"] != "ok" or call["result"]


@pytest.mark.long
def test_parsed_and_recorded_steps_train_alike(finished, tapo):
    run, metrics = tapo
    parsed, parsed_metrics = finished("parsed", "tapo", "vanilla", "algorithm.tapo.step_source=parsed")
    assert_healthy(parsed_metrics)
    assert rollouts(run, STEPS) == rollouts(parsed, STEPS)
    for one, other in zip(metrics, parsed_metrics, strict=True):
        assert one["tapo/corrected_steps"] == other["tapo/corrected_steps"]
        assert one["tapo/transfer"] == other["tapo/transfer"]
    assert same(weights(run), weights(parsed))


@pytest.mark.long
def test_killed_and_resumed_it_ends_where_it_would_have(out, tapo):
    """Weights, optimizer, data position and rollouts come back, or the last step would end in other weights."""
    whole, _ = tapo
    run = Run("killed", "tapo", "vanilla", STEPS, seed=1, out=out, overrides=SMALL)
    run.folder.mkdir()
    with run.log_file.open("w") as log:
        killed = subprocess.Popen(
            run.command(), env=run.environment(), cwd=HERE, stdout=log, stderr=log, start_new_session=True
        )
    with killed_at_the_end(killed):
        code = wait_for_checkpoint(killed, run.folder / "checkpoints", 1, 900)
        assert code == 0, run.log_file.read_text()[-3000:]
    assert not (run.folder / "checkpoints" / "global_step_2").exists()
    with (run.folder / "resumed.log").open("w") as log:
        subprocess.run(run.command(), env=run.environment(), cwd=HERE, stdout=log, stderr=log, check=True)
    metrics = read_metrics(run.metrics_file)
    assert [entry["step"] for entry in metrics] == [2]
    assert_healthy(metrics, steps=1)
    assert same(weights(run, 1), weights(whole, 1))
    assert rollouts(run, 2) == rollouts(whole, 2)
    assert same(weights(run, 2), weights(whole, 2))


@pytest.mark.long
def test_two_ranks_gspo_and_only_groups_that_differ(finished):
    """VeRL's `filter_groups`, as DAPO has it, replaces prompts whose rollouts are all right or all wrong."""
    filtered = ["algorithm.filter_groups.enable=true", "algorithm.filter_groups.metric=acc"]
    run, metrics = finished("two-ranks", "tapo", "gspo", "trainer.n_gpus_per_node=2", *filtered)
    assert_healthy(metrics)
    for step in range(1, STEPS + 1):
        earned = {}
        for line in (run.folder / "rollouts" / f"{step}.jsonl").read_text().splitlines():
            rollout = json.loads(line)
            earned.setdefault(rollout["uid"].split("_")[0], []).append(rollout["score"])
        assert [sorted(set(scores)) for scores in earned.values()] == [[0, 1]] * 4
    assert len(weights(run, ranks=2)) == 2
    assert not same(weights(run, 1, ranks=2), weights(run, 2, ranks=2))


@pytest.mark.long
def test_tools_that_fail_neither_stop_nor_poison_a_run(finished, tmp_path):
    """The text search raises and the zoom hangs from some call on; with the SAPO loss, and validation."""
    config = yaml.safe_load((HERE / "tools.yaml").read_text())
    for tool in config["tools"]:
        how = {"text_search": "raise", "zoom": "hang"}.get(tool["tool_schema"]["function"]["name"])
        if how is not None:
            tool["class_name"] = "flaky_tools.FlakyTool"
            tool["config"]["how"] = how
    tools = tmp_path / "tools.yaml"
    tools.write_text(yaml.safe_dump(config))
    loop = tmp_path / "agent_loop.yaml"
    settings = {"name": "tapo_tool_agent", "_target_": "verl_tapo.rollout.tool_agent.TapoToolAgentLoop"}
    loop.write_text(yaml.safe_dump([{**settings, "tool_timeout_s": 2.0}]))
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[1] / "support")  # Run.environment keeps it
    try:
        run, metrics = finished(
            "flaky",
            "tapo",
            "sapo",
            f"actor_rollout_ref.rollout.multi_turn.tool_config_path={tools}",
            f"actor_rollout_ref.rollout.agent.agent_loop_config_path={loop}",
            f"trainer.test_freq={STEPS}",
        )
    finally:
        del os.environ["PYTHONPATH"]
    assert_healthy(metrics)
    answers = "".join(output for step in (1, 2) for _, output, _ in rollouts(run, step))
    assert "the index is gone" in answers
    assert sum(entry["tapo/failed_calls"] for entry in metrics) > 0
    assert validation(metrics[-1]) is not None
    # No call of a tool that is down is ever anybody's witness.
    assert metrics[-1].get("tapo/tool/text_search/corrected_steps", 0) == 0


def test_the_summary_can_be_read(tapo):
    run, metrics = tapo
    text = summary(run, metrics)
    assert "failing steps with corrected credit" in text
    assert all(Path(line.strip()).exists() for line in text.splitlines()[-5:] if "validation" not in line)
    assert "success in training" in describe(metrics[-1])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("actor_rollout_ref.model.path=/no/such/model", "no model at /no/such/model"),
        ("data.train_files=/no/such.parquet", "there is no file /no/such.parquet"),
    ],
)
def test_mistakes_are_told_at_once(out, override, message):
    with pytest.raises(Failure, match=message):
        check(Run("mistake", out=out, overrides=[override]))


@pytest.mark.parametrize(
    "name", ["a=b", "a,b", "(a) [b]", "#a ~b", "it's", 'say "a"', "Größe 北京", "\\", "a\\'b\\", "$a {b}", "null"]
)
def test_hydra_gets_paths_as_they_are(tmp_path, name):
    run = Run("odd", out=tmp_path / name)
    command = run.command()
    parse = OverridesParser.create().parse_override
    told = {each.key_or_group: each.value() for each in map(parse, command[command.index("quickstart") + 1 :])}
    assert told["data.train_files"] == str(tmp_path / name / "data" / "train.parquet")
    assert told["trainer.default_local_dir"] == str(tmp_path / name / "odd" / "checkpoints")


def test_a_path_with_an_interpolation_is_refused(tmp_path):
    with pytest.raises(Failure, match=r"a path with \$\{ in it"):
        check(Run("odd", out=tmp_path / "${a}"))
    assert not list(tmp_path.iterdir())


def test_a_plug_in_that_is_not_installed_is_told_at_once(out, monkeypatch):
    monkeypatch.setattr("run.entry_points", lambda group: type("None_", (), {"names": set()})())
    with pytest.raises(Failure, match="verl-tapo is not installed"):
        check(Run("mistake", out=out))


@pytest.mark.long
def test_a_wrong_setting_ends_the_run_with_its_message(out):
    run = Run("wrong", "tapo", "vanilla", STEPS, out=out, overrides=[*SMALL, "algorithm.tapo.theta=3"])
    with pytest.raises(Failure, match="theta"):
        train(run)


TAKEN = """
import json, os, pathlib, sys
tries = pathlib.Path(sys.argv[1])
tries.write_text(tries.read_text() + "." if tries.exists() else ".")
if len(tries.read_text()) <= int(sys.argv[2]):
    sys.exit("RuntimeError: EADDRINUSE, Address already in use")
pathlib.Path(os.environ["VERL_FILE_LOGGER_PATH"]).write_text(json.dumps({"step": 1, "data": {}}) + "\\n")
"""


@pytest.mark.parametrize(("times", "tries"), [(1, 2), (2, 2)])
def test_a_port_that_was_taken_is_tried_once_more(out, tmp_path, monkeypatch, capsys, times, tries):
    """In the trainer's place, a process that finds its port taken."""
    file = tmp_path / "tries"
    monkeypatch.setattr(Run, "command", lambda self: [sys.executable, "-c", TAKEN, str(file), str(times)])
    run = Run("port", out=out)
    if times == 1:
        assert train(run) == [{"step": 1}]
    else:
        with pytest.raises(Failure, match="Address already in use"):
            train(run)
    assert len(file.read_text()) == tries
    assert "a port was taken" in capsys.readouterr().out
