"""Hand-computed batches, one for every branch of the rule."""

import pytest
import torch

from verl_tapo import TapoConfig, ToolStep, build_tool_mask, transfer_credit

TOOLS = {"search": {"query": "text"}, "zoom": {"bbox": "iou"}, "lookup": {"id": "exact"}}
A = "capital of France"


def step(row, query=A, turn=(0, 2), call=None, tool="search", ok=True, **arguments):
    return ToolStep(row, tool, arguments or {"query": query}, turn, call or turn, ok)


def run(values, success, steps, index=None, mask=None, length=4, **settings):
    """Rows with one advantage each; returns the (B, L) result and the report."""
    base = torch.tensor(values)[:, None].repeat(1, length)
    mask = torch.ones(len(values), length, dtype=torch.int64) if mask is None else torch.tensor(mask)
    cfg = TapoConfig(tools=TOOLS, **settings)
    return transfer_credit(base * mask, mask, index or ["u"] * len(values), success, steps, cfg)


def test_equal_call_in_the_only_success_lifts_the_failing_turn():
    result, report = run([1.0, -1.0], [True, False], [step(0), step(1)])
    # m = 1, sup = 1/1, alpha = 1, A' = -1 + 0.8 * 1 * 1
    assert result[1].tolist() == pytest.approx([-0.2, -0.2, -1.0, -1.0])
    assert result[0].tolist() == [1.0] * 4
    witness, failing = report.steps
    assert (witness.role, witness.gate, failing.role, failing.gate) == ("witness", "", "failing", "corrected")
    assert (failing.similarity, failing.support, failing.alpha, failing.reference_advantage) == (1.0, 1.0, 1.0, 1.0)
    assert failing.transfer == pytest.approx(0.8)
    assert report.changed_tokens == 2


def test_never_past_zero_unless_the_clip_is_off():
    steps = [step(0), step(1)]
    assert run([2.0, -0.5], [True, False], steps)[0][1].tolist() == [0.0, 0.0, -0.5, -0.5]
    assert run([2.0, -0.5], [True, False], steps, clip=False)[0][1].tolist() == pytest.approx([1.1, 1.1, -0.5, -0.5])


def test_support_is_the_share_of_successes_that_hold_the_call():
    # Two of four successes hold it, with advantages 1 and 2: abar 1.5, alpha 0.5; one success used no tool at all.
    values, success = [1.0, 2.0, 1.0, 1.0, -2.0], [True] * 4 + [False]
    steps = [step(0), step(0, turn=(2, 4)), step(1), step(2, "river in Peru"), step(4)]
    result, report = run(values, success, steps)
    assert report.steps[4].support == 0.5
    assert report.steps[4].reference_advantage == 1.5  # row 0 counts once
    assert result[4].tolist() == pytest.approx([-2 + 0.8 * 0.5 * 1.5] * 2 + [-2.0, -2.0])
    without, report = run(values, success, steps, use_support=False)
    assert report.steps[4].alpha == 1.0
    assert without[4, 0].item() == pytest.approx(-2 + 0.8 * 1.5)


def test_similarity_scales_the_confidence():
    _, report = run([1.0, -1.0], [True, False], [step(0), step(1, "capital of france now")])
    # 17 and 21 letters: ratio 2 * 17 / 38
    assert report.steps[1].similarity == pytest.approx(34 / 38)
    assert report.steps[1].transfer == pytest.approx(0.8 * 34 / 38)


def test_gates():
    witness = [step(0), step(1, "x"), step(2, "x")]
    values, success = [1.0, 1.0, 1.0, -1.0], [True, True, True, False]
    below_theta, report = run(values, success, [*witness, step(3, "river in Peru")])
    assert report.steps[3].gate == "below_theta"
    assert 0 < report.steps[3].similarity < 0.8
    below_alpha, report = run(values, success, [*witness, step(3)], alpha_min=0.34)
    assert report.steps[3].gate == "below_alpha"
    assert report.steps[3].alpha == pytest.approx(1 / 3)
    assert report.steps[3].transfer == 0.0
    no_witness, report = run(values, success, [*witness, step(3, tool="lookup", id=7)])
    assert report.steps[3].gate == "no_witness"
    for result in (below_theta, below_alpha, no_witness):
        assert (result[3] == -1.0).all()
    # at the gates themselves the transfer happens
    assert run(values, success, [*witness, step(3)], alpha_min=1 / 3)[1].steps[3].gate == "corrected"


def test_reference_groups_are_connected_components():
    boxes = [[0, 0, 10, 10], [2, 0, 12, 10], [4, 0, 14, 10]]  # neighbours overlap by 2/3, the ends by 3/7
    steps = [step(row, tool="zoom", bbox=box) for row, box in enumerate(boxes)]
    steps.append(step(3, tool="zoom", bbox=boxes[0]))
    values, success = [1.0, 2.0, 3.0, -4.0], [True, True, True, False]
    _, report = run(values, success, steps, theta=0.6)
    assert (report.steps[3].support, report.steps[3].reference_advantage) == (1.0, 2.0)
    _, report = run(values, success, steps, theta=0.7)
    assert report.steps[3].support == pytest.approx(1 / 3)
    assert report.steps[3].reference_advantage == 1.0


@pytest.mark.parametrize(
    ("holders", "support", "reference"),
    [
        ([(0, "left"), (1, "left"), (2, "right")], 2 / 3, 1.5),  # larger support first, although its abar is smaller
        ([(0, "left"), (2, "right")], 1 / 3, 5.0),  # equal support: the larger abar
    ],
)
def test_ties_of_the_best_match(holders, support, reference):
    # Both boxes overlap the failing one by a third, and each other not at all.
    boxes = {"left": [-5, 0, 5, 10], "right": [5, 0, 15, 10]}
    steps = [step(row, tool="zoom", bbox=boxes[side]) for row, side in holders]
    steps.append(step(3, tool="zoom", bbox=[0, 0, 10, 10]))
    _, report = run([1.0, 2.0, 5.0, -1.0], [True, True, True, False], steps, theta=0.3, alpha_min=0.0)
    assert report.steps[-1].similarity == pytest.approx(1 / 3)
    assert report.steps[-1].support == pytest.approx(support)
    assert report.steps[-1].reference_advantage == reference


def test_only_policy_tokens_of_the_turn_with_negative_advantage():
    base = torch.tensor([[1.0, 1.0, 1.0, 1.0], [-1.0, 0.5, -1.0, -1.0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 1]])
    result, report = transfer_credit(
        base, mask, ["u", "u"], [True, False], [step(0), step(1, turn=(0, 3))], TapoConfig(tools=TOOLS, clip=False)
    )
    assert result[1].tolist() == pytest.approx([-0.2, 0.5, -1.0, -1.0])
    assert report.changed_tokens == 1


def test_token_scope_call():
    result, _ = run([1.0, -1.0], [True, False], [step(0), step(1, turn=(0, 4), call=(2, 3))], token_scope="call")
    assert result[1].tolist() == pytest.approx([-1.0, -1.0, -0.2, -1.0])


def test_a_turn_is_corrected_only_as_far_as_its_weakest_call():
    witness = [step(0), step(0, "river in Peru")]
    same_turn = [step(1), step(1, "river in Peru")]
    assert run([1.0, -1.0], [True, False], witness + same_turn)[0][1, 0].item() == pytest.approx(-0.2)
    unmatched = [step(1), step(1, "something else")]
    assert run([1.0, -1.0], [True, False], witness + unmatched)[0][1].tolist() == [-1.0] * 4
    failed = [step(1), step(1, "river in Peru", ok=False)]
    assert run([1.0, -1.0], [True, False], witness + failed)[0][1].tolist() == [-1.0] * 4
    undeclared = [step(1), step(1, tool="python", code="1")]
    assert run([1.0, -1.0], [True, False], witness + undeclared)[0][1].tolist() == [-1.0] * 4
    # with the calls' own tokens in question each call stands for itself
    apart = [step(1, turn=(0, 4), call=(0, 1)), step(1, "something else", turn=(0, 4), call=(2, 3))]
    result = run([1.0, -1.0], [True, False], witness + apart, token_scope="call")[0]
    assert result[1].tolist() == pytest.approx([-0.2, -1.0, -1.0, -1.0])


def test_partly_overlapping_turns_take_the_smaller_transfer_where_they_overlap():
    steps = [step(0), step(1, "x"), step(2, turn=(0, 3)), step(2, "x", turn=(2, 4))]
    result, _ = run([1.0, 2.0, -4.0], [True, True, False], steps)
    assert result[2].tolist() == pytest.approx([-3.6, -3.6, -3.6, -3.2])


def test_who_can_be_a_witness_and_who_can_be_corrected():
    values = [1.0, -1.0]
    for steps in (
        [step(0, ok=False), step(1)],
        [step(0), step(1, ok=False)],
        [step(0, tool="python", code="1"), step(1, tool="python", code="1")],
    ):
        result, report = run(values, [True, False], steps)
        assert (result[1] == -1.0).all()
        assert not any(s.gate == "corrected" for s in report.steps)
    # a success below average is no witness; a failure above average is not corrected
    assert run([-0.5, -1.0], [True, False], [step(0), step(1)])[1].steps[1].gate == "no_witness"
    assert run([1.0, 0.5], [True, False], [step(0), step(1)])[1].steps[1].role == "none"


def test_scope():
    values, success, index = [1.0, 1.0, -1.0, 3.0], [True, True, False, True], ["a", "a", "b", "c"]
    steps = [step(0), step(2)]
    assert run(values, success, steps, index)[1].steps[1].gate == "no_witness"
    result, report = run(values, success, steps, index, scope="batch")
    # support: one of the two successes of prompt group a; group c holds no step of G
    assert report.steps[1].support == 0.5
    assert result[2, 0].item() == pytest.approx(-0.6)


def test_rows_of_one_trajectory_count_once():
    base = torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [-1.0, -1.0]])
    mask = torch.ones(4, 2, dtype=torch.int64)
    steps = [step(0), step(1), step(3)]
    args = base, mask, ["u"] * 4, [True, True, True, False], steps, TapoConfig(tools=TOOLS)
    assert transfer_credit(*args)[1].steps[2].support == pytest.approx(2 / 3)
    assert transfer_credit(*args, trajectory=["s0", "s0", "s1", "s2"])[1].steps[2].support == pytest.approx(1 / 2)
    with pytest.raises(ValueError, match=r"success\[3\] differs"):
        transfer_credit(*args, trajectory=["s0", "s0", "s1", "s1"])


def test_rows_without_policy_tokens_neither_give_nor_receive():
    mask = [[0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]
    result, report = run([1.0, -1.0, -1.0], [True, False, False], [step(0), step(1), step(2)], mask=mask)
    assert [s.role for s in report.steps] == ["none", "failing", "none"]
    assert (result[1] == -1.0).all()


def test_tool_mask():
    mask = torch.tensor([[1, 1, 0, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    steps = [
        step(0, turn=(3, 6), call=(4, 5)),
        step(0, turn=(0, 3), call=(0, 2)),
        step(0, turn=(3, 6), call=(5, 6)),
        step(1, turn=(2, 6), call=(3, 4)),
    ]
    assert build_tool_mask(steps, mask).tolist() == [[1, 1, 0, 2, 2, 2], [0, 0, 1, 1, 0, 0]]
    assert build_tool_mask(steps, mask, "call").tolist() == [[1, 1, 0, 0, 2, 3], [0, 0, 0, 1, 0, 0]]
    assert build_tool_mask([], mask).sum() == 0


def test_metrics():
    values, success = [1.0, 1.0, -1.0, -1.0], [True, True, False, False]
    steps = [step(0), step(2), step(2, "river in Peru", turn=(2, 4)), step(3, tool="lookup", id=1, ok=False)]
    metrics = run(values, success, steps)[1].metrics()
    assert metrics["tapo/misassigned_steps"] == 0.5
    assert metrics["tapo/corrected_steps"] == 0.5
    assert metrics["tapo/misassigned_trajectories"] == 0.5
    assert metrics["tapo/token_share"] == 2 / 16
    assert metrics["tapo/support"] == 0.5
    assert metrics["tapo/transfer"] == pytest.approx(0.4)
    assert metrics["tapo/successes_per_group"] == 2.0
    assert metrics["tapo/failed_calls"] == 0.25
    assert metrics["tapo/lift"] == 0.0  # one of the two holders succeeded, as in the whole group
    assert metrics["tapo/tool/search/corrected_steps"] == 0.5
    assert metrics["tapo/inexact_steps"] == metrics["tapo/tool/search/inexact_steps"] == 0.0
    assert all(key.startswith("tapo/") and isinstance(value, float) for key, value in metrics.items())


def test_steps_that_are_only_similar_are_told_from_equal_ones():
    steps = [step(0, "capital of Cambodia"), step(2, "cambodia CAPITAL of"), step(3, "capital of Cambohia")]
    steps.append(step(3, "river in Peru", turn=(2, 4)))  # no witness: not misassigned
    report = run([1.0, 1.0, -1.0, -1.0], [True, True, False, False], steps)[1]
    assert [credit.gate for credit in report.steps] == ["", "corrected", "corrected", "below_theta"]
    assert report.steps[1].similarity == 1.0
    assert 0.8 < report.steps[2].similarity < 1.0
    metrics = report.metrics()
    assert metrics["tapo/inexact_steps"] == metrics["tapo/tool/search/inexact_steps"] == 0.5
    assert "tapo/inexact_steps" not in run([1.0, -1.0], [True, False], [step(0)])[1].metrics()


def test_lift_tells_lucky_witnesses():
    lucky = [step(0), step(2), step(3), step(4)]  # one of four holders succeeds, two of five in the group
    metrics = run([1.0, 1.0, -1.0, -1.0, -1.0], [True, True, False, False, False], lucky)[1].metrics()
    assert metrics["tapo/lift"] == pytest.approx(1 / 4 - 2 / 5)
    assert metrics["tapo/lucky_steps"] == 1.0


def test_a_call_that_every_sibling_makes_is_not_lucky():
    everyone = [step(row) for row in range(5)]
    report = run([1.0, 1.0, -1.0, -1.0, -1.0], [True, True, False, False, False], everyone)[1]
    lifts = report.lifts()
    assert lifts.lift.tolist() == [pytest.approx(0.0)]
    assert (lifts.universal.tolist(), lifts.lucky.tolist()) == ([True], [False])
    assert lifts.of_step.tolist() == [-1, -1, 0, 0, 0]
    assert report.metrics()["tapo/lucky_steps"] == 0.0
