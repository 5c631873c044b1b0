"""The fast rule against a slow one written from the specification, and the specification's laws as properties."""

import dataclasses
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from slow_kernels import similarity

from verl_tapo import TapoConfig, ToolStep, transfer_credit
from verl_tapo.rule import matching
from verl_tapo.rule.arrays import numbered
from verl_tapo.rule.config import Grounding
from verl_tapo.rule.grounding import earned, found_nothing
from verl_tapo.rule.reference import Reference, call_similarity
from verl_tapo.rule.steps import SIGHTS
from verl_tapo.selftest.random_batches import TOOLS, random_batch, random_config

SEEDS = st.integers(0, 1_000_000)
laws = settings(max_examples=150, deadline=None)


def random_flags(seed):
    """Of 100 rows: whether an accepted answer could be recognised."""
    return np.random.default_rng(seed).random(100) < 0.3


@pytest.mark.parametrize("block", [0, 1, *(pytest.param(block, marks=pytest.mark.long) for block in range(2, 10))])
def test_equals_the_reference(block):
    corrected = 0
    for seed in range(block * 200, block * 200 + 200):
        batch, cfg, recognisable = random_batch(seed), random_config(seed), random_flags(seed)
        recognisable = recognisable[: len(batch[0])]
        result, report = transfer_credit(*batch, cfg, recognisable=recognisable)
        expected, records = Reference(*batch, cfg, similarity, recognisable).transfer()
        torch.testing.assert_close(result, expected, atol=1e-6, rtol=0, msg=lambda m, seed=seed: f"seed {seed}: {m}")
        for got, want in zip(report.steps, records, strict=True):
            assert (got.role, got.gate) == (want.role, want.gate), seed
            assert got.witness in (want.witnesses or {None}), seed
            assert (got.forgiven, got.withheld) == (want.forgiven, want.withheld), seed
            for name in ("similarity", "support", "alpha", "reference_advantage", "transfer"):
                assert getattr(got, name) == pytest.approx(getattr(want, name), abs=1e-6), (seed, name)
        corrected += any(s.gate == "corrected" for s in report.steps)
    assert corrected > 10  # the random batches do exercise the rule


def test_the_kernels_equal_slow_ones():
    """Of all pairs of calls in random batches."""
    pairs = 0
    for seed in range(300):
        (*_, steps), cfg = random_batch(seed), random_config(seed)
        for u, v in combinations(steps, 2):
            if u.tool == v.tool and cfg.takes_part(u.tool):
                assert call_similarity(u, v, cfg) == pytest.approx(similarity(u, v, cfg), abs=1e-6), (seed, u, v)
                pairs += 1
    assert pairs > 1000


def test_pairs_and_rows_go_through_in_blocks(monkeypatch):
    batch = random_batch(3, rows=40, group_size=40)
    cfg = TapoConfig(tools=TOOLS, theta=0.4, alpha_min=0.0)
    whole, report = transfer_credit(*batch, cfg)
    assert report.changed_tokens > 20
    for name in ("matching._PAIR_BLOCK", "tokens._TOKEN_BLOCK", "inputs._ROW_BLOCK"):
        monkeypatch.setattr(f"verl_tapo.rule.{name}", 7)
    pieces, again = transfer_credit(*batch, cfg)
    assert torch.equal(whole, pieces)
    assert report.steps == again.steps


def test_exact_calls_are_matched_without_comparing_all_pairs(monkeypatch):
    """The number of pairs that are looked at grows with the calls, and with the square of those alike only."""

    counts = []
    whole = matching._similarities

    def counting(left, right, parameters):
        counts.append(len(left))
        return whole(left, right, parameters)

    monkeypatch.setattr(matching, "_similarities", counting)

    def pairs(tools, arguments):
        steps = [ToolStep(row, "lookup", given, (0, 1), (0, 1)) for row, given in enumerate(arguments)]
        base = torch.tensor([[1.0], [-1.0]]).repeat(len(steps) // 2, 1)
        success = [True, False] * (len(steps) // 2)
        counts.clear()
        _, report = transfer_credit(base, base.abs(), ["u"] * len(steps), success, steps, TapoConfig(tools=tools))
        return sum(counts), [step.gate for step in report.steps[1::2]]

    for calls in (200, 2000):
        count, gates = pairs({"lookup": {"id": "exact"}}, [{"id": number} for number in range(calls)])
        assert count <= calls
        assert set(gates) == {"below_theta"}
        zooms = [{"image": number // 4, "bbox": [number % 4, 0, 9, 9]} for number in range(calls)]
        count, gates = pairs({"lookup": {"image": "exact", "bbox": "iou"}}, zooms)
        assert count <= 4 * calls
        assert set(gates) == {"below_alpha"}  # each is like one of its two siblings with the same image


@given(SEEDS)
@laws
def test_nothing_to_transfer_leaves_the_base_bit_for_bit(seed):
    base, mask, index, success, steps = random_batch(seed)
    cfg = dataclasses.replace(random_config(seed), grounding=Grounding())
    nothing = [
        (base, mask, index, success, steps, dataclasses.replace(cfg, beta=0.0)),
        (base, mask, index, success, [], cfg),
        (base, mask, index, [True] * len(success), steps, cfg),
        (base, mask, index, [False] * len(success), steps, cfg),
        (torch.zeros_like(base), mask, index, success, steps, cfg),
        (base, torch.zeros_like(mask), index, success, steps, cfg),
    ]
    for batch in nothing:
        before = batch[0].clone()
        result, report = transfer_credit(*batch)
        assert torch.equal(result, before)
        assert torch.equal(batch[0], before)
        assert result.data_ptr() != batch[0].data_ptr()
        assert not any(np.isnan(v) for v in report.metrics().values())


@given(SEEDS)
@laws
def test_never_down_never_past_zero_never_outside_the_steps(seed):
    base, mask, index, success, steps = random_batch(seed)
    cfg = random_config(seed)
    cfg = dataclasses.replace(cfg, clip=True, grounding=dataclasses.replace(cfg.grounding, luck=False))
    result, report = transfer_credit(base, mask, index, success, steps, cfg)
    assert (result >= base).all()
    assert (result <= base.clamp(min=0)).all()
    outside = torch.ones_like(base, dtype=torch.bool)
    for step, credit in zip(steps, report.steps, strict=True):
        if credit.gate == "corrected" or credit.forgiven:
            start, end = step.span(cfg.token_scope)
            outside[step.row, start:end] = False
    outside |= mask == 0
    assert torch.equal(result[outside], base[outside])
    assert int((result != base).sum()) <= report.changed_tokens


ALL_SWITCHES = Grounding(witnesses=True, own=True, luck=True)


@given(SEEDS)
@laws
def test_what_cannot_be_told_changes_nothing(seed):
    base, mask, index, success, steps = random_batch(seed)
    cfg = dataclasses.replace(random_config(seed), grounding=Grounding())
    expected, report = transfer_credit(base, mask, index, success, steps, cfg)
    untold = [step._replace(seen=None) for step in steps]
    result, again = transfer_credit(
        base, mask, index, success, untold, dataclasses.replace(cfg, grounding=ALL_SWITCHES)
    )
    assert torch.equal(result, expected)
    assert again.steps == report.steps


@given(SEEDS)
@laws
def test_luck_takes_all_rewards_of_successes_that_found_nothing_and_nothing_else(seed):
    base, mask, index, success, steps = random_batch(seed)
    cfg = dataclasses.replace(random_config(seed), grounding=dataclasses.replace(ALL_SWITCHES, luck=False))
    luck = dataclasses.replace(cfg, grounding=ALL_SWITCHES)
    recognisable = random_flags(seed)[: len(base)]
    result, report = transfer_credit(base, mask, index, success, steps, luck, recognisable=recognisable)
    withheld = report.withheld_of_row
    # Else it is as if they had failed.
    failed = [won and not none for won, none in zip(success, withheld, strict=True)]
    kept, _ = transfer_credit(base, mask, index, failed, steps, cfg)
    lowered = result != kept
    assert torch.equal(result[lowered], torch.zeros_like(result[lowered]))
    assert (kept[lowered] > 0).all()
    for row in range(len(base)):
        sights = [step.seen for step in steps if step.row == row]
        # One without calls has found nothing where an answer can be recognised, as it or a sibling's call tells.
        told = any(step.seen is not None for step in steps if index[step.row] == index[row])
        found_nothing = all(seen is False for seen in sights) if sights else told or recognisable[row]
        assert withheld[row] == (success[row] and found_nothing)
        assert torch.equal(lowered[row], (kept[row] > 0) & (mask[row] == 1) & bool(withheld[row]))
    assert [credit.withheld for credit in report.steps] == [withheld[step.row] for step in steps]


@given(SEEDS, st.sampled_from([(0.0, 1.0), (-1.0, 1.0), (0.1, 0.9)]), st.booleans())
@laws
def test_a_success_that_found_nothing_scores_as_its_group_s_failures(seed, scale, formats):
    """Of the scores that the base estimator gets, against the loops."""
    base, mask, index, success, steps = random_batch(seed)
    parts = np.random.default_rng(seed).integers(0, 3, len(success)) / 10 if formats else np.zeros(len(success))
    scores = np.array([scale[won] for won in success]) + parts
    cfg = dataclasses.replace(random_config(seed), grounding=ALL_SWITCHES)
    group = numbered(index)[1]
    holder = np.array([step.row for step in steps], dtype=np.int64)
    seen, recognisable = (
        np.array([SIGHTS[step.seen] for step in steps], dtype=np.int64),
        random_flags(seed)[: len(base)],
    )
    result = earned(scores, group, np.array(success), found_nothing(holder, seen, group, recognisable))
    reference = Reference(base, mask, index, success, steps, cfg, recognisable=recognisable)
    assert result == pytest.approx(reference.earned(scores.tolist()), abs=1e-12)
    withheld = transfer_credit(base, mask, index, success, steps, cfg, recognisable=recognisable)[1].withheld_of_row
    assert (result <= scores).all()
    assert (result == scores)[~withheld].all()
    for row in np.flatnonzero(withheld):
        failures = scores[(group == group[row]) & ~np.array(success)]
        assert result[row] <= (failures.max() if len(failures) else 0.0) + 1e-12


@given(SEEDS)
@laws
def test_own_makes_penalties_zero_up_to_the_first_sight(seed):
    """Where a token is another step's, too, as far as that one is corrected."""
    base, mask, index, success, steps = random_batch(seed)
    without = dataclasses.replace(random_config(seed), clip=True, grounding=Grounding())
    cfg = dataclasses.replace(without, grounding=Grounding(own=True))
    kept, _ = transfer_credit(base, mask, index, success, steps, without)
    result, report = transfer_credit(base, mask, index, success, steps, cfg)
    changed = result != kept
    assert (kept[changed] < result[changed]).all()
    assert (result[changed] <= 0).all()
    free, bound = torch.zeros(2, *base.shape, dtype=torch.bool)
    for step, credit in zip(steps, report.steps, strict=True):
        first = min((s.turn[0] for s in steps if s.row == step.row and s.seen), default=-1)
        assert credit.forgiven == (credit.role == "failing" and step.turn[0] <= first)
        (free if credit.forgiven else bound)[step.row, slice(*step.span(cfg.token_scope))] = True
    assert (result[free & ~bound & (mask == 1)] >= 0).all()
    assert not (changed & ~free).any()


@given(SEEDS)
@laws
def test_ungrounded_successes_are_no_witnesses(seed):
    """With the switch it is as if their reward had been that of their group's mean: of no use to siblings."""
    base, mask, index, success, steps = random_batch(seed)
    cfg = dataclasses.replace(random_config(seed), grounding=Grounding(witnesses=True))
    result, _ = transfer_credit(base, mask, index, success, steps, cfg)
    sights = [[step.seen for step in steps if step.row == row] for row in range(len(base))]
    lucky = [row for row, seen in enumerate(sights) if success[row] and seen and all(s is False for s in seen)]
    without = base.clone()
    without[lucky] = 0
    cfg = dataclasses.replace(cfg, grounding=Grounding())
    expected, _ = transfer_credit(without, mask, index, success, steps, cfg)
    others = [row for row in range(len(base)) if row not in lucky]
    assert torch.equal(result[others], expected[others])


@given(SEEDS, st.randoms(use_true_random=False))
@laws
def test_permuting_rows_permutes_the_result(seed, random):
    base, mask, index, success, steps = random_batch(seed)
    cfg = random_config(seed)
    result, _ = transfer_credit(base, mask, index, success, steps, cfg)
    order = list(range(len(base)))
    random.shuffle(order)
    where = {row: position for position, row in enumerate(order)}
    moved = [step._replace(row=where[step.row]) for step in steps]
    random.shuffle(moved)
    permuted, _ = transfer_credit(
        base[order], mask[order], [index[i] for i in order], [success[i] for i in order], moved, cfg
    )
    torch.testing.assert_close(permuted, result[order], atol=1e-6, rtol=0)


@given(SEEDS)
@laws
def test_relabelling_and_unrelated_groups_change_nothing(seed):
    base, mask, index, success, steps = random_batch(seed)
    cfg = dataclasses.replace(random_config(seed), scope="group")
    result, report = transfer_credit(base, mask, index, success, steps, cfg)
    relabelled = [("new", 7 * int(uid[1:])) for uid in index]
    assert torch.equal(transfer_credit(base, mask, relabelled, success, steps, cfg)[0], result)
    other = random_batch(seed + 1)
    shift = len(base)
    both, both_report = transfer_credit(
        torch.cat([base, other[0]]),
        torch.cat([mask, other[1]]),
        index + [f"other {uid}" for uid in other[2]],
        success + other[3],
        steps + [step._replace(row=step.row + shift) for step in other[4]],
        cfg,
    )
    assert torch.equal(both[:shift], result)
    assert both_report.steps[: len(steps)] == report.steps


@given(SEEDS, st.floats(0, 2), st.floats(0, 2))
@laws
def test_monotone_in_beta(seed, one, other):
    batch, cfg = random_batch(seed), random_config(seed)
    low, _ = transfer_credit(*batch, dataclasses.replace(cfg, beta=min(one, other)))
    high, _ = transfer_credit(*batch, dataclasses.replace(cfg, beta=max(one, other)))
    assert (low <= high).all()


@given(SEEDS, st.floats(0, 1), st.floats(0, 1))
@laws
def test_antitone_in_alpha_min(seed, one, other):
    batch, cfg = random_batch(seed), random_config(seed)
    lax, _ = transfer_credit(*batch, dataclasses.replace(cfg, alpha_min=min(one, other)))
    strict, _ = transfer_credit(*batch, dataclasses.replace(cfg, alpha_min=max(one, other)))
    assert (strict <= lax).all()


@given(SEEDS, st.floats(0.01, 1), st.floats(0.01, 1))
@laws
def test_antitone_in_theta(seed, one, other):
    """Within a prompt group, with support, and successes of one advantage (a binary reward): then a finer partition
    can only lower ``sup * abar``. Elsewhere the law fails, see the next test."""
    base, mask, index, success, steps = random_batch(seed)
    rows = torch.tensor([1.0 if y else -1.0 for y in success])
    base = rows[:, None] * mask
    cfg = dataclasses.replace(random_config(seed), scope="group", use_support=True)
    lax, _ = transfer_credit(base, mask, index, success, steps, dataclasses.replace(cfg, theta=min(one, other)))
    strict, _ = transfer_credit(base, mask, index, success, steps, dataclasses.replace(cfg, theta=max(one, other)))
    assert (strict <= lax + 1e-6).all()


def test_theta_may_lift_where_support_is_off():
    """A finer partition may leave a failing call with the better of two references: not a law without support."""
    base = torch.tensor([[1.0], [3.0], [-4.0]])
    boxes = [[0, 0, 10, 10], [2, 0, 12, 10], [2, 0, 12, 10]]
    steps = [ToolStep(row, "zoom", {"bbox": box}, (0, 1), (0, 1)) for row, box in enumerate(boxes)]
    args = base, torch.ones(3, 1), ["u"] * 3, [True, True, False], steps
    cfg = TapoConfig(tools=TOOLS, use_support=False)
    coarse = transfer_credit(*args, dataclasses.replace(cfg, theta=0.5))[0][2]
    fine = transfer_credit(*args, dataclasses.replace(cfg, theta=0.9))[0][2]
    assert fine > coarse


@given(SEEDS)
@laws
def test_padding_rows_neither_give_nor_receive(seed):
    base, mask, index, success, steps = random_batch(seed)
    cfg = random_config(seed)
    result, _ = transfer_credit(base, mask, index, success, steps, cfg)
    assume(steps)
    copies = [step._replace(row=len(base)) for step in steps if step.row == steps[0].row]
    padded, _ = transfer_credit(
        torch.cat([base, base[:1] * 0]),
        torch.cat([mask, mask[:1] * 0]),
        [*index, "pad123"],
        [*success, False],
        steps + copies,
        cfg,
    )
    assert torch.equal(padded[:-1], result)
    assert (padded[-1] == 0).all()


@given(SEEDS, st.sampled_from([torch.float64, torch.float16, torch.bfloat16]))
@settings(max_examples=40, deadline=None)
def test_other_dtypes_and_masks(seed, dtype):
    base, mask, index, success, steps = random_batch(seed)
    cfg = dataclasses.replace(random_config(seed), theta=0.8)
    expected, _ = transfer_credit(base, mask, index, success, steps, cfg)
    result, _ = transfer_credit(base.to(dtype), mask.bool(), index, np.array(success), steps, cfg)
    assert result.dtype == dtype
    torch.testing.assert_close(result.float(), expected, atol=0.05, rtol=0.05)
    garbage = torch.where(mask == 0, torch.tensor(float("nan")), base)
    result, _ = transfer_credit(garbage, mask.float(), index, torch.tensor(success), steps, cfg)
    torch.testing.assert_close(result[mask == 1], expected[mask == 1], atol=1e-6, rtol=0)
