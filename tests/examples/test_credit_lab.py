"""The credit laboratory: its world, its rules against the project's, whole runs, and a study that resumes."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples" / "credit_lab"))

import report
import study
import training
from policy import Policy, Rollouts, sample
from rules import RULES, TOOLS, all_steps, grpo_advantages, tapo
from training import PROMPTS, Run, train, warm_start
from world import (
    END,
    ENTITY,
    KNOW,
    REGION,
    THOUGHT,
    TOOL,
    WORLDS,
    Episode,
    World,
    demonstrate,
    draw_prompts,
    world_of,
)

from verl_tapo import TapoConfig, transfer_credit

INDEX = np.repeat(np.arange(PROMPTS), 8)


@pytest.fixture(scope="module")
def warm_starts(tmp_path_factory):
    """Warm starts that are hardly warm: enough to call tools and to succeed at times."""
    folder = tmp_path_factory.mktemp("warm_starts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "WARM_STEPS", 150)
        patch.setattr(training, "DEMONSTRATIONS", 64)
        warm_start(WORLDS["one_hop"], 0, folder)
    return folder


def demonstrated(world: World, prompts: int, seed: int) -> Rollouts:
    """A batch of the demonstrating agent's rollouts, with the world's own successes."""
    rng = np.random.default_rng(seed)
    asked = [prompt for prompt in draw_prompts(world, prompts, rng) for _ in range(world.group)]
    mask = torch.zeros(len(asked), world.response_length)
    episodes = []
    for row, prompt in enumerate(asked):
        tokens, own = demonstrate(world, prompt, rng)
        mask[row, : len(own)] = torch.tensor(own, dtype=mask.dtype)
        episode = Episode(world, prompt, row)
        for token, mine in zip(tokens, own, strict=True):
            if mine:
                episode.token(token)
        episodes.append(episode)
    success = torch.tensor([episode.right_answer for episode in episodes])
    return Rollouts(torch.zeros(0), world.prompt_length, mask, mask, mask, episodes, success)


@pytest.fixture(scope="module")
def batch():
    rollouts = demonstrated(WORLDS["one_hop"], PROMPTS, 0)
    return rollouts, grpo_advantages(rollouts.success, rollouts, INDEX)


# the world


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize("seed", range(3))
def test_an_agent_without_faults_always_succeeds(name, seed):
    world = replace(WORLDS[name], skip=0, wrong=0, wrong_answer=0, guess=0)
    rollouts = demonstrated(world, 20, seed)
    assert rollouts.success.all()
    assert all(episode.proficient and len(episode.steps) == world.calls for episode in rollouts.episodes)


@given(st.integers(0, 2**32), st.sampled_from(sorted(WORLDS)))
@settings(max_examples=50, deadline=None)
def test_spans_of_demonstrations_are_the_agents_own_tokens(seed, name):
    world = WORLDS[name]
    rng = np.random.default_rng(seed)
    prompt = draw_prompts(world, 1, rng)[0]
    tokens, own = demonstrate(world, prompt, rng)
    assert len(tokens) == len(own) <= world.response_length
    episode = Episode(world, prompt, 0)
    for token, mine in zip(tokens, own, strict=True):
        if mine:
            episode.token(token)
    assert episode.done
    assert sum(end - start for start, end in (turn.span for turn in episode.turns)) == sum(own)
    for step in episode.steps:
        assert all(own[slice(*step.turn)])
        assert tokens[step.turn[1] - 1] == END
        assert step.call[0] == step.turn[0] + 1  # the thought is the turn's, not the call's


def test_equal_wrong_calls_find_the_same_and_never_the_answer():
    world = WORLDS["one_hop"]
    for prompt in draw_prompts(world, 50, np.random.default_rng(0)):
        wrong = REGION + (prompt.region + 4) % 8
        found = []
        for row in range(2):
            episode = Episode(world, prompt, row)
            for token in (THOUGHT, TOOL, wrong):
                assert episode.token(token) == []
            found.append(episode.token(END))
            assert episode.right == [False]
        assert found[0] == found[1]
        assert ENTITY + prompt.chain[-1] not in found[0]


def test_a_turn_that_never_ends_and_calls_beyond_the_chain_end_the_rollout():
    world = WORLDS["one_hop"]
    prompt = draw_prompts(world, 1, np.random.default_rng(0))[0]
    endless, busy = Episode(world, prompt, 0), Episode(world, prompt, 1)
    tokens = 0
    while not endless.done:
        endless.token(THOUGHT)
        tokens += 1
    assert tokens <= world.response_length
    while not busy.done:
        for token in (THOUGHT, TOOL, REGION + prompt.region, END):
            busy.token(token)
    assert len(busy.steps) == world.calls
    assert not busy.proficient
    assert not busy.right_answer
    answering = Episode(world, prompt, 2)
    for token in (THOUGHT + KNOW, TOOL + KNOW, ENTITY + prompt.chain[-1], END):
        answering.token(token)
    assert answering.right_answer
    assert not answering.proficient  # a guess


def test_worlds_are_changed_by_their_dials_and_say_what_is_wrong():
    changed = world_of("one_hop,flaky=0.25,group=4,image=1")
    assert changed == replace(WORLDS["one_hop"], flaky=0.25, group=4)
    for spec, word in (("nowhere", "nowhere"), ("one_hop,flakey=1", "flakey"), ("one_hop,flaky=2", "flaky")):
        with pytest.raises(ValueError, match=word):
            world_of(spec)
    for wrong in ({"loss": "ppo"}, {"rule": "none"}, {"world": "nowhere"}):
        with pytest.raises(ValueError, match=next(iter(wrong.values()))):
            Run(**{"world": "one_hop", "loss": "vanilla", "rule": "grpo", "learning_rate": 1e-3, "seed": 0, **wrong})


# the rules


def test_the_batch_has_something_to_correct(batch):
    rollouts, base = batch
    advantages, credit = RULES["tapo"](base, rollouts, INDEX)
    assert 0 < credit.metrics()["tapo/corrected_steps"] < 1
    assert (advantages != base).any()


def test_beta_zero_is_grpo_exactly(batch):
    rollouts, base = batch
    assert torch.equal(RULES["tapo/beta=0.0"](base, rollouts, INDEX)[0], base)
    assert torch.equal(RULES["grpo"](base, rollouts, INDEX)[0], base)


@pytest.mark.parametrize("setting", [{}, {"theta": 0.6}, {"use_support": False}, {"token_scope": "call"}])
def test_tapo_is_the_projects_transfer(batch, setting):
    rollouts, base = batch
    expected, _ = transfer_credit(
        base, rollouts.mask, INDEX, rollouts.success, all_steps(rollouts), TapoConfig(tools=TOOLS, **setting)
    )
    assert torch.equal(tapo(**setting)(base, rollouts, INDEX)[0], expected)


def test_the_product_never_corrects_more_than_the_minimum(batch):
    rollouts, base = batch
    minimum, of_minimum = RULES["tapo"](base, rollouts, INDEX)
    product, of_product = RULES["tapo/product"](base, rollouts, INDEX)
    pairs = [(p, m) for p, m in zip(of_product.steps, of_minimum.steps, strict=True) if m.similarity]
    assert all(p.similarity <= m.similarity + 1e-9 for p, m in pairs)
    assert any(p.similarity < m.similarity - 1e-3 for p, m in pairs)
    assert not torch.equal(product, minimum)


def test_gates_bar_lucky_witnesses_and_nothing_else():
    rollouts = demonstrated(WORLDS["lucky"], PROMPTS, 1)
    base = grpo_advantages(rollouts.success, rollouts, INDEX)
    open_, credit = RULES["tapo"](base, rollouts, INDEX)
    lifts = credit.lifts()
    for gate, barred in (("lucky", lifts.lucky), ("lift", lifts.lucky | lifts.universal)):
        gated, _ = RULES[f"tapo/gate={gate}"](base, rollouts, INDEX)
        expected = open_.clone()
        for step, group in zip(all_steps(rollouts), lifts.of_step, strict=True):
            if group >= 0 and barred[group]:
                expected[step.row, slice(*step.turn)] = base[step.row, slice(*step.turn)]
        assert torch.equal(gated, expected)
        assert not torch.equal(gated, open_)


def test_clamping_leaves_no_negative_advantage_on_calls_and_all_others_alone(batch):
    rollouts, base = batch
    advantages = RULES["clamp"](base, rollouts, INDEX)[0]
    touched = torch.zeros_like(base, dtype=torch.bool)
    for step in all_steps(rollouts):
        touched[step.row, slice(*step.turn)] = True
    assert (advantages[touched] >= 0).all()
    assert (base[touched] < 0).any()
    assert torch.equal(advantages[~touched], base[~touched])


def test_cures_of_luck_are_told_apart():
    """The project's, of rewards before GRPO's advantages, and two of advantages: all, or those of calls alone."""
    rollouts = demonstrated(replace(WORLDS["memory"], skip=0.3), PROMPTS, 1)
    base = grpo_advantages(rollouts.success, rollouts, INDEX)
    right = np.asarray(rollouts.success, dtype=bool)
    grounded = right & np.array([any(step.seen for step in episode.steps) for episode in rollouts.episodes])
    lucky = np.flatnonzero(right & ~grounded & (base.sum(1).numpy() > 0))
    silent = [row for row in lucky if not rollouts.episodes[row].steps]
    kept = RULES["grounded/witnesses+own"](base, rollouts, INDEX)[0]
    cures = ("grounded/luck of advantages", "grounded/luck of steps", "grounded/luck alone")
    whole, calls, paid = (RULES[name](base, rollouts, INDEX)[0] for name in cures)
    assert len(lucky) > len(silent) > 0
    assert not whole[lucky].any()
    assert torch.equal(calls[silent], kept[silent])
    for row in lucky:
        of_steps = torch.zeros_like(calls[row], dtype=torch.bool)
        for step in rollouts.episodes[row].steps:
            of_steps[slice(*step.turn)] = True
        assert torch.equal(calls[row], kept[row].where(~of_steps, torch.zeros(())))
    others = np.setdiff1d(np.arange(len(base)), lucky)
    assert torch.equal(whole[others], kept[others])
    assert torch.equal(calls[others], kept[others])
    assert torch.equal(paid, grpo_advantages(grounded, rollouts, INDEX))
    assert (paid[lucky].sum(1) < 0).any()
    # With TAPO on top it pays for calls of a lucky success that a grounded one made, too.
    full = RULES["grounded"](base, rollouts, INDEX)[0]
    assert (full >= paid).all()
    assert (full[lucky] > paid[lucky]).any()


def test_step_groups_compare_turns_that_saw_the_same(batch):
    rollouts, base = batch
    added = RULES["step_groups"](base, rollouts, INDEX)[0] - base
    first = {}
    for row, episode in enumerate(rollouts.episodes):
        start, end = episode.turns[0].span
        assert (added[row, start:end] == added[row, start]).all()
        first.setdefault(INDEX[row], []).append(float(added[row, start]))
    for values in first.values():  # first turns of a prompt all saw nothing yet: one step group, normalised
        assert np.mean(values) == pytest.approx(0, abs=1e-4)
        assert np.std(values) == pytest.approx(1, abs=1e-3) or not np.any(values)
    assert (added[rollouts.mask == 0] == 0).all()


# runs


def test_log_probs_of_sampling_are_those_of_training():
    torch.manual_seed(0)
    policy, world = Policy(), WORLDS["one_hop"]
    prompts = draw_prompts(world, 4, np.random.default_rng(0))
    rollouts = sample(policy, world, prompts, 8, torch.Generator().manual_seed(0))
    with torch.no_grad():
        again = policy.log_probs(rollouts.tokens, rollouts.prompt_length)
    assert torch.allclose(again * rollouts.mask, rollouts.log_probs, atol=1e-4)
    assert rollouts.mask.any()


@pytest.mark.long
@pytest.mark.parametrize("loss", study.LOSSES)
def test_a_run_under_each_loss_is_its_seeds_alone(warm_starts, loss):
    run = Run("one_hop", loss, "tapo", 1e-3, 0, steps=2)
    first, second = train(run, warm_starts), train(run, warm_starts)
    pd.testing.assert_frame_equal(first, second)
    assert first["step"].tolist() == [0, 1, 2]
    assert (first["gradient_norm"].iloc[:2] > 0).all()
    assert first["entropy"].nunique() == 3  # the policy moves
    other = train(replace(run, seed=2), warm_starts)  # the same warm start
    assert not first["success"].equals(other["success"]) or not first["entropy"].equals(other["entropy"])


@pytest.mark.long
def test_beta_zero_trains_as_grpo_and_rules_differ_from_the_first_update_on(warm_starts):
    runs = {
        rule: train(Run("one_hop", "vanilla", rule, 1e-3, 0, steps=2), warm_starts)
        for rule in ("grpo", "tapo", "tapo/beta=0.0")
    }
    of_policy = ["success", "entropy", "push_right", "gradient_norm", "held_out_success"]
    pd.testing.assert_frame_equal(runs["grpo"][of_policy], runs["tapo/beta=0.0"][of_policy])
    assert runs["grpo"]["entropy"][0] == runs["tapo"]["entropy"][0]  # the same rollouts
    assert runs["grpo"]["push_right"][0] < runs["tapo"]["push_right"][0]


def tiny(seeds):
    rate = study.LEARNING_RATES["vanilla"]
    return [Run("one_hop", "vanilla", rule, rate, seed, steps=1) for seed in seeds for rule in ("grpo", "tapo")]


@pytest.mark.long
def test_a_study_resumes_and_reports(warm_starts, tmp_path, monkeypatch, capsys):
    even = tiny(range(0, 4, 2))  # those of the one warm start
    study.run_all({"main": even[:1]}, tmp_path, warm_starts, 1)
    before = pd.read_parquet(tmp_path / "main.parquet")
    assert "1/1" in capsys.readouterr().out
    study.run_all({"main": even, "rivals": even[:2]}, tmp_path, warm_starts, 1)
    assert "3/3" in capsys.readouterr().out  # what was there is not run again, and what two sweeps share runs once
    results = study.load(tmp_path)
    assert study.done(results) == set(even)
    assert len(results) == 2 * len(even)
    pd.testing.assert_frame_equal(results.head(2).drop(columns="sweep"), before)
    assert list(tmp_path.glob("*.partial")) == []
    said = study.table({"main": [*even, Run("plain", "gspo", "grpo", 1e-3, 0)]}, results, 1)
    assert "1 runs left" in said
    assert (tmp_path / "versions.json").exists()
    with monkeypatch.context() as patch:  # results of a world that is another now are not this world's
        patch.setitem(WORLDS, "one_hop", replace(WORLDS["one_hop"], flaky=0.5))
        assert study.load(tmp_path).empty
    tables, documented = report.write(tmp_path)
    assert "one_hop | vanilla | 2 | success early" in tables
    assert documented["main"] in tables
    assert (tmp_path / "success.png").stat().st_size > 10_000


def test_two_studies_do_not_write_to_one_folder(tmp_path):
    with study._only_one(tmp_path), pytest.raises(SystemExit, match="another study"):
        study.run_all({}, tmp_path, tmp_path, 1)


# the report


def test_tables_stand_between_their_marks():
    text = "before\n<!-- main: report.py -->\nold\n<!-- end -->\n<!-- other: report.py -->\nkept\n<!-- end -->\nafter\n"
    table = report._markdown(["world", *report.COLUMNS["main"][1:], "final, gspo"], [list("abcdef")])
    narrow = report._markdown(report.COLUMNS["main"], [list("abcde")])
    filled = report.fill(text, {"main": table})
    assert filled == text.replace("old\n", narrow)
    assert report.fill(filled, {"main": table}) == filled


def test_the_trainer_s_table_pairs_seeds_that_all_arms_have_completed():
    arms = {"grpo": 0.0, "tapo": 0.1, f"tapo/{report.SWITCHES}": 0.2}
    rows = [
        {"advantage": arm, "seed": seed, "step": step, "success": seed / 10 + added if step > 0 else None}
        for arm, added in arms.items()
        for seed in (1, 2, 3)
        for step in range(9 if (arm, seed) != ("tapo", 3) else 5)
    ]
    # The second half is better by 0.1 than the first, with TAPO by 0.3; "final" averages the last 5 of 8 steps.
    for row in rows:
        row["held_out"] = {0: 0.05, 8: row["seed"] / 10 + 2 * arms[row["advantage"]]}.get(row["step"])
        if row["step"] > 4:
            row["success"] += 0.3 if row["advantage"] == "tapo" else 0.1
    table = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in report.trainer_table(pd.DataFrame(rows)).splitlines()
    ]
    grpo, tapo, grounded = (dict(zip(table[0], row, strict=True)) for row in table[2:])
    assert [row["rule"] for row in (grpo, tapo, grounded)] == ["grpo", "tapo", "grounded"]
    assert {row["seeds"] for row in (grpo, tapo, grounded)} == {"2"}
    assert [grpo[name].partition(" ")[0] for name in ("early", "final", "held out")] == ["15.0", "23.0", "15.0"]
    assert [row["above 50"] for row in (grpo, tapo, grounded)] == ["0", "1", "0"]
    assert grpo["early - GRPO"] == grpo["early - TAPO"] == tapo["early - TAPO"] == ""
    assert tapo["early - GRPO"].startswith("**+10.0 ± 0.0")
    assert tapo["final - GRPO"].startswith("**+26.0 ± 0.0")
    assert tapo["held out - GRPO"].startswith("**+20.0 ± 0.0")
    assert grounded["final - TAPO"].startswith("**-6.0 ± 0.0")
    assert grounded["held out - TAPO"].startswith("**+20.0 ± 0.0")
    without = report.trainer_table(pd.DataFrame([row for row in rows if row["advantage"] != "tapo"])).splitlines()[-1]
    # Seed 3 counts now.
    assert without.split("|")[1:3] == [" grounded ", " 3 "]
    assert [cell.strip().partition(" ")[0] for cell in without.split("|")[7:10]] == ["**+20.0"] * 2 + ["**+40.0"]
    assert [cell.strip() for cell in without.split("|")[10:13]] == [""] * 3


@pytest.mark.long
def test_the_document_s_tables_are_those_of_the_results(tmp_path, monkeypatch):
    for name in ("plot_curves", "plot_rules"):
        monkeypatch.setattr(report, name, lambda *args: None)
    _, documented = report.write(study.RESULTS)
    text = report.DOCUMENT.read_text()
    assert {name for _, name, _ in report.MARK.findall(text)} == set(report.COLUMNS) <= set(documented)
    assert report.fill(text, documented) == text


def test_steps_to_a_level_are_interpolated_and_a_run_that_never_gets_there_counts_as_long_as_it_is():
    curve = np.array([0.1, 0.2, 0.4, 0.3, 0.8])
    assert report._first(curve, 0.3) == pytest.approx(1.5)
    assert report._first(curve, 0.05) == 0
    assert report._first(curve, 0.9) == 5


def test_differences_are_paired_by_world_and_seed():
    summary = pd.DataFrame({"rule": ["grpo", "tapo", "grpo", "tapo"], "seed": [0, 0, 1, 1], "early": [1.0, 2, 10, 13]})
    summary = pd.concat([summary.assign(world="a"), summary[:2].assign(world="b", early=[5.0, 9.0])])
    assert report.paired(summary, "tapo", "grpo", "early").tolist() == [1, 3, 4]
    assert len(report.paired(summary, "clamp", "grpo", "early")) == 0
    assert report._mean([1, 3], 2) == "2.00 ± 12.71"  # t(1 degree of freedom) is 12.706, the standard error 1
