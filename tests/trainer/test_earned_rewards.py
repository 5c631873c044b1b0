"""The rewards that ``grounding.luck`` leaves to the base estimator."""

import dataclasses

import numpy as np
import pytest
import torch

from verl_tapo import ToolStep
from verl_tapo.trainer.grounding import earned_rewards, recognisable_answers
from verl_tapo.trainer.rollout import RolloutBatch, Sessions

MASK = torch.tensor([[1, 1, 0, 1, 0]] * 4)
"""Two turns with a tool's answer between, and a place of padding."""


def search(row, seen):
    return ToolStep(row, "text_search", {"query": "a flag"}, (0, 2), (0, 2), True, seen)


def rollout_of(scores, **more):
    rows = len(scores)
    return RolloutBatch(
        base=lambda *arguments: pytest.fail("the base is not asked here"),
        scores=np.array(scores),
        reward_infos=[{}] * rows,
        records=[None] * rows,
        tokens=lambda: None,
        prompt_ids=lambda row: [],
        lengths=np.full(rows, 4),
        padding=np.zeros(rows, dtype=bool),
        **more,
    )


def rewards_of(scores, at=3):
    rewards = torch.zeros(len(scores), 5)
    rewards[:, at] = torch.tensor(scores)
    return rewards


SUCCESS = np.array([True, True, False, False])
STEPS = [search(0, True), search(1, False), search(2, False), search(3, None)]
INDEX = ["u"] * 4
NONE = np.zeros(4, dtype=bool)
"""Of no rollout but by its steps is it known that an answer can be recognised."""


@pytest.mark.parametrize(
    ("scores", "left"),
    [
        ([1.0, 1.0, 0.0, 0.0], 0.0),
        ([1.0, 1.0, -1.0, -1.0], -1.0),
        # Parts for the format: what a failure earns on average.
        ([1.1, 1.0, 0.1, 0.3], 0.2),
        # A success that earns less than failures do keeps that.
        ([1.0, 0.2, 0.5, 0.5], 0.2),
    ],
)
def test_a_lucky_success_earns_what_its_group_s_failures_do(scores, left):
    given = rewards_of(scores)
    before = given.clone()
    result = earned_rewards(rollout_of(scores), SUCCESS, STEPS, given, MASK, INDEX, NONE)
    assert torch.equal(given, before)
    assert result[1].tolist() == pytest.approx([0, 0, 0, left, 0])
    assert torch.equal(result[[0, 2, 3]], before[[0, 2, 3]])


def test_where_no_sibling_fails_it_earns_nothing():
    result = earned_rewards(
        rollout_of([1.0, 1.0]), SUCCESS[:2], STEPS[:2], rewards_of([1.0, 1.0]), MASK[:2], INDEX[:2], NONE[:2]
    )
    assert result.sum(1).tolist() == [1.0, 0.0]


def test_scores_that_were_equal_are_so_to_the_last_bit():
    """GRPO divides by the group's standard deviation: a rounding error would become an advantage."""
    scores = [0.9, 0.9, 0.1, 0.1]
    unknown = [search(0, None), *STEPS[1:]]
    won = np.array([False, True, False, False])
    result = earned_rewards(
        rollout_of(rewards_of([0.1, *scores[1:]]).sum(1).double().numpy()),
        won,
        unknown,
        rewards_of([0.1, *scores[1:]]),
        MASK,
        INDEX,
        NONE,
    )
    assert len(set(result[:, 3].tolist())) == 1


def test_other_prompts_failures_do_not_matter():
    scores, index = [1.0, 1.0, 0.4, 0.2], ["u", "v", "v", "u"]
    result = earned_rewards(rollout_of(scores), SUCCESS, STEPS, rewards_of(scores), MASK, index, NONE)
    assert result.sum(1).tolist() == pytest.approx([1.0, 0.4, 0.4, 0.2])


def test_penalties_of_other_tokens_remain():
    """With ``use_kl_in_reward`` every policy token has one."""
    scores = [1.0, 1.0, 0.0, 0.0]
    rewards = rewards_of(scores) - 0.125 * MASK
    result = earned_rewards(rollout_of(scores), SUCCESS, STEPS, rewards, MASK, INDEX, NONE)
    assert result[1].tolist() == [-0.125, -0.125, 0, -0.125, 0]


@pytest.mark.parametrize("seen", [[True] * 4, [None] * 4, [True, True, False, False]])
def test_without_a_lucky_success_they_are_the_rewards_themselves(seen):
    rewards = rewards_of([1.0, 1.0, 0.0, 0.0])
    steps = [search(row, sight) for row, sight in enumerate(seen)]
    assert earned_rewards(rollout_of([1.0, 1.0, 0.0, 0.0]), SUCCESS, steps, rewards, MASK, INDEX, NONE) is rewards


def test_without_steps_luck_is_told_by_a_sibling_s_call():
    scores = [1.0, 1.0, 0.0, 0.0]
    of = rollout_of(scores)
    assert earned_rewards(of, SUCCESS, STEPS[2:3], rewards_of(scores), MASK, INDEX, NONE).sum() == 0
    assert earned_rewards(of, SUCCESS, STEPS[3:], rewards_of(scores), MASK, INDEX, NONE).sum() == 2


def test_without_any_call_luck_is_told_by_the_rollout():
    scores = [1.0, 1.0, 0.0, 0.25]
    some = np.array([True, False, True, True])
    result = earned_rewards(rollout_of(scores), SUCCESS, [], rewards_of(scores), MASK, INDEX, some)
    assert result.sum(1).tolist() == [0.125, 1.0, 0.0, 0.25]


PARIS, YES = {"ground_truth": ["Paris"]}, {"ground_truth": ["yes"]}


def test_records_say_where_an_answer_could_have_been_recognised():
    """A rollout without a record, such as one of a loop without tools, is not known to have had any."""
    of = dataclasses.replace(
        rollout_of([1.0] * 4, reward_model=lambda row: PARIS),
        records=[{"recognisable": True}, {"recognisable": False}, {}, None],
    )
    assert recognisable_answers(of).tolist() == [True, False, False, False]


@pytest.mark.parametrize(
    ("loop", "names", "expected"),
    [
        ("tool_agent", [], [True, False, False, False]),
        (None, [], [True, False, False, False]),
        ("single_turn_agent", ["tool_agent"], [True, False, False, False]),
        ("single_turn_agent", [], [False] * 4),
        ("tool_agent", ["tool_agent", "single_turn_agent"], [False] * 4),
    ],
)
def test_without_records_the_ground_truth_says_so(loop, names, expected):
    of = rollout_of(
        [1.0] * 4, reward_model=[PARIS, YES, None, PARIS].__getitem__, agent_loop=loop, agent_names=lambda: names
    )
    of.padding[3] = True
    assert recognisable_answers(of).tolist() == expected


def test_what_one_output_says_holds_for_all_of_its_rollout():
    of = dataclasses.replace(
        rollout_of([1.0] * 3, sessions=Sessions.from_keys(["u_0_0", "u_1_1", "u_1_0"])),
        records=[None, {"recognisable": True}, None],
    )
    assert recognisable_answers(of).tolist() == [False, True, True]


def test_rows_without_a_finite_reward_and_padding_count_for_nothing():
    scores = [1.0, 1.0, float("nan"), 0.5]
    of = dataclasses.replace(rollout_of(scores), padding=np.array([False, False, False, True]))
    result = earned_rewards(of, SUCCESS, STEPS, rewards_of(scores), MASK, INDEX, NONE)
    assert result.sum(1).tolist() == pytest.approx([1.0, 0.0, float("nan"), 0.5], nan_ok=True)


def test_of_several_outputs_the_last_one_earns():
    """Rows 1 and 2 are one rollout, whose first output made the call."""
    keys = ["u_0_0", "u_1_1", "u_1_0", "u_2_0"]
    scores = [1.0, 1.0, 0.0, 0.25]
    of = rollout_of(scores, sessions=Sessions.from_keys(keys))
    steps = [search(0, True), search(2, False), search(3, False)]
    result = earned_rewards(of, SUCCESS, steps, rewards_of(scores), MASK, INDEX, NONE)
    assert result.sum(1).tolist() == [1.0, 0.25, 0.0, 0.25]
    found = earned_rewards(of, SUCCESS, [*steps, search(2, True)], rewards_of(scores), MASK, INDEX, NONE)
    assert found.sum(1).tolist() == scores


def test_a_reward_at_a_token_of_a_tool_is_found():
    """A rollout that ends in a tool's answer has its reward there."""
    scores = [1.0, 1.0, 0.0, 0.0]
    mask = torch.tensor([[1, 1, 0, 0, 0]] * 4)
    result = earned_rewards(rollout_of(scores), SUCCESS, STEPS, rewards_of(scores, at=2), mask, INDEX, NONE)
    assert result[1].tolist() == [0.0] * 5
