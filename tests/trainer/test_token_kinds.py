"""Negative log-probs and shares of tokens by their kind, computed by hand; through the trainers' adapters in
test_trainer_v0.py and test_trainer_v1.py."""

import numpy as np
import pytest

from verl_tapo import ToolStep
from verl_tapo.trainer.rollout import Sampled, Sessions
from verl_tapo.trainer.token_kinds import token_metrics


def step(row, turn, call):
    return ToolStep(row, "search", {"query": "q"}, turn, call, True)


def sampled(masks, log_probs):
    offsets = np.concatenate([[0], np.cumsum([len(mask) for mask in masks], dtype=np.int64)])
    flat = None if log_probs is None else np.array([p for row in log_probs for p in row], dtype=np.float32)
    return Sampled(np.array([bit for mask in masks for bit in mask], dtype=np.int64), flat, offsets)


def metrics(masks, log_probs, steps, padding=None, sessions=None):
    padding = np.array(padding or [0] * len(masks), dtype=bool)
    return token_metrics(sampled(masks, log_probs), steps, padding, sessions)


def test_by_hand():
    """A thought of two tokens, a call of two, the turn's end, an answer of the tool, an answer of three tokens."""
    mask = [1, 1, 1, 1, 1, 0, 0, 1, 1, 1]
    log_probs = [-1, -3, -0.5, -0.1, -0.2, -9, -9, -2, -4, -6]
    found = metrics([mask], [log_probs], [step(0, (0, 5), (2, 4))])
    assert found == pytest.approx(
        {
            "tapo/nll/calls": 0.8 / 3,
            "tapo/nll/thoughts": 4 / 2,
            "tapo/nll/answers": 12 / 3,
            "tapo/tokens/calls": 3 / 8,
            "tapo/tokens/thoughts": 2 / 8,
            "tapo/tokens/answers": 3 / 8,
        }
    )


def test_several_turns_and_parallel_calls():
    """Turns without a call count as thoughts where a call follows."""
    mask = [1, 1, 1, 0, 1, 1, 0, 1, 1, 0, 1]
    log_probs = [-1, -2, -3, 0, -4, -5, 0, -6, -7, 0, -8]
    steps = [step(0, (7, 9), (7, 8)), step(0, (0, 3), (0, 1)), step(0, (0, 3), (2, 3))]
    found = metrics([mask], [log_probs], steps)
    assert found["tapo/nll/calls"] == pytest.approx((1 + 3 + 6 + 7) / 4)
    assert found["tapo/nll/thoughts"] == pytest.approx((2 + 4 + 5) / 3)
    assert found["tapo/nll/answers"] == pytest.approx(8)
    assert [found[f"tapo/tokens/{kind}"] for kind in ("calls", "thoughts", "answers")] == [4 / 8, 3 / 8, 1 / 8]


def test_a_rollout_without_calls_is_an_answer():
    found = metrics([[1, 1, 0, 1]], [[-1, -2, -5, -3]], [])
    assert found == pytest.approx(
        {
            "tapo/nll/answers": 2.0,
            "tapo/tokens/calls": 0.0,
            "tapo/tokens/thoughts": 0.0,
            "tapo/tokens/answers": 1.0,
        }
    )


def test_a_rollout_that_is_cut_off_in_its_call_has_no_answer():
    found = metrics([[1, 1, 1]], [[-1, -2, -4]], [step(0, (0, 9), (1, 9))])
    assert found["tapo/nll/calls"] == pytest.approx(3.0)
    assert found["tapo/nll/thoughts"] == pytest.approx(1.0)
    assert "tapo/nll/answers" not in found
    assert found["tapo/tokens/answers"] == 0.0


def test_spans_keep_to_their_row():
    """A span beyond its row's end touches no token of the next row."""
    found = metrics([[1, 1], [1, 1]], [[-1, -1], [-5, -5]], [step(0, (0, 4), (1, 4))])
    assert found["tapo/nll/calls"] == 1.0
    assert found["tapo/nll/answers"] == 5.0


def test_padding_rows_and_tokens_of_tools_do_not_count():
    rows = [[1, 1, 0], [1, 1, 1]]
    log_probs = [[-1, -3, -100], [-100, -100, -100]]
    found = metrics(rows, log_probs, [step(0, (0, 2), (1, 2))], padding=[0, 1])
    assert found["tapo/nll/calls"] == 3.0
    assert found["tapo/nll/thoughts"] == 1.0
    assert "tapo/nll/answers" not in found
    assert found["tapo/tokens/calls"] == 1 / 2


def test_log_probs_that_are_no_numbers_are_left_out_of_the_mean():
    nan, inf = float("nan"), float("inf")
    found = metrics([[1] * 6], [[nan, -2, -inf, -4, nan, inf]], [step(0, (0, 4), (2, 4))])
    assert found["tapo/nll/calls"] == 4.0
    assert found["tapo/nll/thoughts"] == 2.0
    assert "tapo/nll/answers" not in found  # both are no numbers
    assert found["tapo/tokens/answers"] == pytest.approx(2 / 6)  # and tokens all the same


def test_several_outputs_of_a_rollout():
    """In the order of their numbers, not of their rows: what comes before the output with the last call is thought."""
    keys = ["u_0_2", "u_0_0", "u_1_0", "u_0_1"]
    masks = [[1, 1], [1, 1], [1], [1, 1, 1]]
    log_probs = [[-1, -2], [-3, -4], [-5], [-6, -7, -8]]
    found = metrics(masks, log_probs, [step(3, (0, 2), (1, 2))], sessions=Sessions.from_keys(keys))
    assert found["tapo/nll/calls"] == pytest.approx(7)
    assert found["tapo/nll/thoughts"] == pytest.approx((3 + 4 + 6) / 3)
    assert found["tapo/nll/answers"] == pytest.approx((8 + 1 + 2 + 5) / 4)


def test_without_log_probs_there_are_shares():
    found = metrics([[1, 1, 0, 1, 1]], None, [step(0, (0, 2), (1, 2))])
    assert found == {"tapo/tokens/calls": 1 / 4, "tapo/tokens/thoughts": 1 / 4, "tapo/tokens/answers": 2 / 4}


def test_nothing_at_all():
    nothing = {f"tapo/tokens/{kind}": 0.0 for kind in ("calls", "thoughts", "answers")}
    assert metrics([], [], []) == nothing
    assert metrics([[], [0, 0]], [[], [-1, -1]], []) == nothing
    assert metrics([[1]], [[-1]], [], padding=[1]) == nothing
