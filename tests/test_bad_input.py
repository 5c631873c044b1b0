"""Bad input of the API: always a ValueError that names the argument and the row or step."""

import re

import pytest
import torch

from verl_tapo import TapoConfig, TapoSettings, ToolStep, build_tool_mask, transfer_credit
from verl_tapo.steps import MAX_DEPTH

BASE, MASK = torch.tensor([[1.0, 1.0], [-1.0, -1.0]]), torch.ones(2, 2, dtype=torch.int64)
GOOD = [ToolStep(0, "search", {"query": "a"}, (0, 2), (0, 1)), ToolStep(1, "search", {"query": "a"}, (0, 2), (0, 1))]


def call(base=BASE, mask=MASK, index=("u", "u"), success=(True, False), steps=GOOD, cfg=None):
    return transfer_credit(base, mask, index, success, steps, cfg)


def test_the_good_case_is_good():
    assert call()[1].steps[1].gate == "corrected"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base": BASE[0]}, "base must be a (B, L)"),
        ({"base": BASE.long()}, "base must be a (B, L) floating-point"),
        ({"base": [[1.0]]}, "base must be a (B, L)"),
        ({"mask": MASK[:, :1]}, "response_mask must have base's shape (2, 2)"),
        ({"mask": MASK * 3}, "response_mask[0] must be 0/1"),
        ({"mask": MASK * 0.25}, "response_mask[0] must be 0/1"),
        ({"index": ["u"]}, "index has 1 entries, base has 2 rows"),
        ({"index": ["u", ["v"]]}, "index[1] is not hashable"),
        ({"success": [True]}, "success has 1 entries"),
        ({"success": [True, 0.5]}, "success[1] must be a bool, got 0.5"),
        ({"success": [float("nan"), True]}, "success[0] must be a bool, got nan"),
        ({"success": ["yes", True]}, "success[0] must be a bool"),
        ({"base": torch.tensor([[1.0, 1.0], [-1.0, float("nan")]])}, "base[1, 1] is nan under the response mask"),
        ({"base": torch.tensor([[1.0, float("inf")], [-1.0, 0.0]])}, "base[0, 1] is inf"),
    ],
)
def test_bad_batches(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"row": 2}, "row 2 is outside the batch of 2 rows"),
        ({"row": -1}, "row -1 is outside"),
        ({"row": 0.0}, "row 0.0 is outside"),
        ({"row": 10**30}, "is outside the batch"),
        ({"turn": (1, 0)}, "turn (1, 0) is reversed"),
        ({"turn": (0, 3)}, "turn (0, 3) is outside the response of 2 tokens"),
        ({"turn": (-1, 2)}, "turn (-1, 2) is outside"),
        ({"turn": (0, 1, 2)}, "turn must be a (start, end) pair"),
        ({"turn": (0.5, 1)}, "turn must hold two integers"),
        ({"turn": None}, "turn must be a (start, end) pair"),
        ({"call": (0, 2), "turn": (0, 1)}, "call (0, 2) is outside its turn (0, 1)"),
        ({"call": (1, 0)}, "call (1, 0) is reversed"),
        ({"tool": None}, "tool must be a string"),
        ({"arguments": "query"}, "arguments must be a mapping"),
        ({"ok": None}, "ok must be a bool"),
    ],
)
def test_bad_steps(changes, message):
    steps = [GOOD[0], GOOD[1]._replace(**changes)]
    with pytest.raises(ValueError, match=re.escape("steps[1]: ") + ".*" + re.escape(message)):
        call(steps=steps)
    with pytest.raises(ValueError, match=re.escape("steps[1]: ")):
        build_tool_mask(steps, MASK)


def test_a_step_that_is_no_step():
    with pytest.raises(ValueError, match=r"steps\[1\]: expected a ToolStep, got dict"):
        call(steps=[GOOD[0], GOOD[1]._asdict()])


def test_nesting_without_end():
    value: object = 1
    for _ in range(MAX_DEPTH + 10):
        value = [value]
    steps = [step._replace(arguments={"id": value}) for step in GOOD]
    with pytest.raises(ValueError, match=r"steps\[0\]: argument 'id': .* nested deeper than"):
        call(steps=steps)


def test_unusual_but_valid_steps():
    import numpy as np

    steps = [step._replace(row=np.int64(step.row), turn=[0, 2], ok=np.True_) for step in GOOD]
    assert torch.equal(call(steps=steps)[0], call()[0])
    huge = [step._replace(arguments={"query": "x" * 5_000_000}) for step in GOOD]
    assert call(steps=huge)[1].steps[1].similarity == 1.0
    assert call(steps=[huge[0], GOOD[1]])[1].steps[1].similarity == 0.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": -0.1}, "beta must be a number >= 0, got -0.1"),
        ({"beta": float("inf")}, "beta must be a number"),
        ({"beta": True}, "beta must be a number"),
        ({"theta": 1.5}, "theta must be a number in [0, 1], got 1.5"),
        ({"alpha_min": "0.2"}, "alpha_min must be a number in [0, 1], got '0.2'"),
        ({"token_scope": "turn"}, "token_scope must be 'step' or 'call', got 'turn'"),
        ({"scope": "all"}, "scope must be one of 'group', 'batch', got 'all'"),
        ({"clip": 1}, "clip must be true or false"),
        ({"tools": ["search"]}, "tools must map tool names"),
        ({"tools": {"search": {"query": "fuzzy"}}}, "tools['search']: unknown kernel 'fuzzy'; known kernels: "),
        ({"tools": {"search": {"page": "number"}}}, "tools['search']: kernel 'number': bad options"),
        (
            {"tools": {"search": {"page": {"kernel": "number", "scale": 0}}}},
            "tools['search']: kernel 'number': scale must be a positive number, got 0",
        ),
        (
            {"tools": {"search": {"page": {"kernel": "iou", "scale": 1}}}},
            "tools['search']: kernel 'iou': bad options ['scale']",
        ),
        ({"tools": {"search": "text"}}, "tools['search'] must map parameters to kernels"),
    ],
)
def test_bad_configuration(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TapoConfig(**settings)
    with pytest.raises(ValueError, match=re.escape("algorithm.tapo." + message)):
        TapoSettings.from_mapping(settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bta": 1}, "algorithm.tapo.bta: unknown setting; did you mean 'beta'?"),
        ({"xyz": 1}, "algorithm.tapo.xyz: unknown setting; known: "),
        ({"base_estimator": "tapo"}, "base_estimator must be another estimator"),
        ({"success_threshold": None}, "success_threshold must be a finite number"),
        ({"step_source": "both"}, "step_source must be one of 'auto', 'recorded', 'parsed'"),
        ({"image_index_base": 2}, "image_index_base must be one of None, 0, 1"),
        ({"error_markers": "Oops"}, "error_markers must be a list of non-empty strings"),
        ({"patience": -1}, "patience must be a whole number"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TapoSettings.from_mapping(settings)
