"""Bad input of the API: always a ValueError that names the argument and the row or step."""

import collections
import re
import types

import numpy as np
import odd_values
import pytest
import torch

from verl_tapo import TapoConfig, TapoSettings, ToolStep, build_tool_mask, transfer_credit
from verl_tapo.rule.values import MAX_DEPTH

BASE, MASK = torch.tensor([[1.0, 1.0], [-1.0, -1.0]]), torch.ones(2, 2, dtype=torch.int64)
GOOD = [ToolStep(0, "search", {"query": "a"}, (0, 2), (0, 1)), ToolStep(1, "search", {"query": "a"}, (0, 2), (0, 1))]


def call(base=BASE, mask=MASK, index=("u", "u"), success=(True, False), steps=GOOD, cfg=None, **more):
    return transfer_credit(base, mask, index, success, steps, cfg, **more)


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
        # they add up like 0/1
        ({"mask": torch.tensor([[1, 1], [2, 0]])}, "response_mask[1] must be 0/1, its entry 0 is 2"),
        ({"mask": torch.tensor([[1, 1], [2, -1]])}, "response_mask[1] must be 0/1, its entry 0 is 2"),
        ({"mask": torch.tensor([[0.5, 0.5], [1, 1]])}, "response_mask[0] must be 0/1, its entry 0 is 0.5"),
        ({"mask": torch.tensor([[1, 1], [1, torch.nan]])}, "response_mask[1] must be 0/1, its entry 1 is nan"),
        (
            {"mask": torch.tensor([[1, 1], [1, 1e-50]], dtype=torch.float64)},
            "response_mask[1] must be 0/1, its entry 1",
        ),
        ({"mask": MASK * 1j}, "response_mask must have base's shape (2, 2), got torch.complex64 (2, 2)"),
        ({"mask": MASK.numpy()}, "response_mask must have base's shape (2, 2), got ndarray"),
        ({"mask": None}, "response_mask must have base's shape (2, 2), got NoneType"),
        ({"mask": MASK.to_sparse()}, "response_mask must have base's shape"),
        (
            {"base": torch.nested.nested_tensor([BASE[0], BASE[1]], layout=torch.jagged)},
            "base must be a (B, L) floating-point tensor",
        ),
        ({"base": BASE * 1j}, "base must be a (B, L) floating-point tensor, got torch.complex64"),
        ({"base": BASE.to_sparse()}, "base must be a (B, L) floating-point tensor"),
        ({"base": None}, "base must be a (B, L) floating-point tensor, got NoneType"),
        ({"cfg": {"beta": 1}}, "cfg must be a TapoConfig, got dict"),
        *(
            ({name: value}, f"{name} must {text}")
            for name in ("index", "success", "trajectory", "recognisable")
            for value, text in [
                ((value for value in (0, 1)), "be a sequence with one entry for each row, got generator"),
                ("uv", "be a sequence with one entry for each row, got str"),
                ({0, 1}, "be a sequence with one entry for each row, got set"),
                ({0: 0, 1: 1}, "be a sequence with one entry for each row, got dict"),
                (7, "be a sequence with one entry for each row, got int"),
                (torch.ones(2, 1), "have one entry for each row, got the shape (2, 1)"),
                (np.ones((1, 2)), "have one entry for each row, got the shape (1, 2)"),
                (torch.tensor(1), "have one entry for each row, got the shape ()"),
            ]
        ),
        ({"index": None}, "index must be a sequence with one entry for each row, got NoneType"),
        ({"success": None}, "success must be a sequence with one entry for each row, got NoneType"),
        ({"index": [torch.ones(2), torch.ones(2)]}, "index[0] is not hashable by value: Tensor"),
        ({"index": [("u", torch.tensor(1)), "u"]}, "index[0] is not hashable by value: tuple"),
        ({"index": np.array(["u", float("nan")], dtype=object)}, "index[1] is nan, which equals nothing"),
        ({"trajectory": ["t", {}]}, "trajectory[1] is not hashable by value: dict"),
        ({"trajectory": ["t"]}, "trajectory has 1 entries, base has 2 rows"),
        ({"success": [[True], [False]]}, "success[0] must be a bool, got [True]"),
        ({"success": [True, None]}, "success[1] must be a bool, got None"),
        ({"success": [True, 2]}, "success[1] must be a bool, got 2"),
        ({"success": [True, 10**5000]}, "success[1] must be a bool"),
        ({"success": torch.tensor([1.0, 0.5], dtype=torch.bfloat16)}, "success[1] must be a bool, got 0.5"),
        ({"success": [torch.ones(2), True]}, "success[0] must be a bool"),
        ({"steps": None}, "steps must be a list of ToolSteps, got NoneType"),
        ({"steps": (step for step in GOOD)}, "steps must be a list of ToolSteps, got generator"),
        ({"steps": np.zeros((2, 6))}, "steps must be a list of ToolSteps, got ndarray"),
        ({"steps": "steps"}, "steps must be a list of ToolSteps, got str"),
        ({"steps": {0: GOOD[0]}}, "steps must be a list of ToolSteps, got dict"),
        ({"steps": GOOD[0]}, "steps[0]: expected a ToolStep, got int"),
        ({"index": ["u"]}, "index has 1 entries, base has 2 rows"),
        ({"index": ["u", ["v"]]}, "index[1] is not hashable"),
        ({"success": [True]}, "success has 1 entries"),
        ({"recognisable": [True, "yes"]}, "recognisable[1] must be a bool, got 'yes'"),
        (
            {"recognisable": [True, False], "success": [True, True], "trajectory": [0, 0]},
            "recognisable[1] differs from that of an earlier row of the same trajectory",
        ),
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
    "arguments",
    [
        {"index": torch.tensor([0, 0])},
        {"index": np.array([0.5, 0.5])},
        {"index": [torch.tensor(3), torch.tensor(3)]},
        {"index": np.array(["u", "u"])},
        {"index": range(0, 2), "steps": []},
        {"index": [None, None]},
        {"index": [("u", 1), ("u", 1.0)]},
        {"success": [1, 0.0]},
        {"success": np.array([1, 0], dtype=np.int8)},
        {"success": torch.tensor([1, 0], dtype=torch.bfloat16)},
        {"success": [torch.tensor(True), np.False_]},
        {"trajectory": torch.tensor([4, 7])},
        {"recognisable": torch.tensor([0.0, 1.0])},
        {"mask": MASK.bool()},
        {"mask": MASK.to(torch.bfloat16)},
        {"mask": MASK.to(torch.uint8)},
        {"base": BASE.requires_grad_(False).clone().requires_grad_()},
        {"base": BASE.t().contiguous().t(), "mask": MASK.t().contiguous().t()},
        {"steps": tuple(GOOD)},
        {"steps": collections.deque(GOOD)},
    ],
    ids=str,
)
def test_unusual_but_valid_batches(arguments):
    result, report = call(**arguments)
    if arguments.get("steps") != []:
        assert torch.equal(result, call()[0])
        assert report.steps[1].gate == "corrected"


def test_an_empty_batch():
    for shape in ((0, 0), (0, 3), (2, 0)):
        rows = shape[0]
        empty = torch.zeros(shape)
        steps = [ToolStep(row, "search", {"query": "a"}, (0, 0), (0, 0)) for row in range(rows)]
        result, report = transfer_credit(empty, empty, ["u"] * rows, [True] * rows, steps)
        assert result.shape == shape
        assert [credit.role for credit in report.steps] == ["none"] * rows
        assert not any(value != value for value in report.metrics().values())
        assert build_tool_mask(steps, empty).shape == shape


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"row": 2}, "row 2 is outside the batch of 2 rows"),
        ({"row": -1}, "row -1 is outside"),
        ({"row": 0.0}, "row 0.0 is outside"),
        ({"row": 10**30}, "is outside the batch"),
        ({"row": 10**5000}, "is outside the batch"),
        ({"row": True}, "row True is outside"),
        ({"row": None}, "row None is outside"),
        ({"turn": (1, 0)}, "turn (1, 0) is reversed"),
        ({"turn": (0, 3)}, "turn (0, 3) is outside the response of 2 tokens"),
        ({"turn": (-1, 2)}, "turn (-1, 2) is outside"),
        ({"turn": (0, 1, 2)}, "turn must be a (start, end) pair"),
        ({"turn": (0.5, 1)}, "turn must hold two integers"),
        ({"turn": None}, "turn must be a (start, end) pair"),
        ({"turn": {0, 2}}, "turn must be a (start, end) pair"),
        ({"turn": {0: 0, 2: 2}}, "turn must be a (start, end) pair"),
        ({"turn": "02"}, "turn must be a (start, end) pair"),
        ({"turn": (False, 2)}, "turn must hold two integers, got (False, 2)"),
        ({"call": (0, True)}, "call must hold two integers, got (0, True)"),
        ({"call": (0.0, 1.0)}, "call must hold two integers"),
        ({"call": (float("nan"), 1)}, "call must hold two integers"),
        ({"call": np.array([0.0, 1.0])}, "call must hold two integers"),
        ({"turn": (0, 10**5000)}, "is outside the response of 2 tokens"),
        ({"call": (0, 2), "turn": (0, 1)}, "call (0, 2) is outside its turn (0, 1)"),
        ({"call": (1, 0)}, "call (1, 0) is reversed"),
        ({"tool": None}, "tool must be a string"),
        ({"arguments": "query"}, "arguments must be a mapping"),
        ({"arguments": None}, "arguments must be a mapping"),
        ({"ok": None}, "ok must be a bool"),
        ({"ok": 1}, "ok must be a bool, got 1"),
        ({"ok": 0.5}, "ok must be a bool, got 0.5"),
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


def test_a_bad_step_is_named_whatever_its_arguments_hold():
    for value in odd_values.values().values():
        steps = [GOOD[0], GOOD[1]._replace(arguments={"query": value}, turn=(1, 0))]
        with pytest.raises(ValueError, match=r"^steps\[1\]: turn \(1, 0\) is reversed") as error:
            call(steps=steps)
        assert len(str(error.value)) < 500


def test_nesting_without_end():
    # A model can write it, so it must not end the training step: such values compare by their content, too.
    value: object = 1
    for _ in range(MAX_DEPTH + 10):
        value = [value]
    steps = [step._replace(arguments={"id": value}) for step in GOOD]
    assert call(steps=steps)[1].steps[1].gate == "corrected"
    assert call(steps=[steps[0], steps[1]._replace(arguments={"id": [value]})])[1].steps[1].gate == "below_theta"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"response_mask": None}, "response_mask must be a (B, L) tensor, got NoneType"),
        ({"response_mask": MASK[0]}, "response_mask must be a (B, L) tensor, got torch.int64 (2,)"),
        ({"response_mask": MASK.numpy()}, "response_mask must be a (B, L) tensor, got ndarray"),
        ({"response_mask": MASK * 2}, "response_mask[0] must be 0/1"),
        ({"response_mask": MASK * torch.nan}, "response_mask[0] must be 0/1"),
        ({"response_mask": torch.tensor([[1, 1], [0.5, 0.5]])}, "response_mask[1] must be 0/1"),
        ({"steps": None}, "steps must be a list of ToolSteps"),
        ({"steps": iter(GOOD)}, "steps must be a list of ToolSteps"),
        ({"token_scope": "turn"}, "token_scope must be one of 'step', 'call', got 'turn'"),
        ({"token_scope": ["step"]}, "token_scope must be one of 'step', 'call'"),
        ({"token_scope": None}, "token_scope must be one of 'step', 'call'"),
        ({"dtype": torch.float32}, "dtype must be an integer dtype"),
        ({"dtype": "int64"}, "dtype must be an integer dtype"),
        ({"dtype": torch.int8, "steps": GOOD * 128}, "dtype must be an integer dtype that holds 128, got torch.int8"),
    ],
)
def test_bad_input_of_the_tool_mask(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build_tool_mask(**{"steps": GOOD, "response_mask": MASK, **changes})


def test_unusual_but_valid_steps():
    steps = [step._replace(row=np.int64(step.row), turn=[0, 2], ok=np.True_) for step in GOOD]
    assert torch.equal(call(steps=steps)[0], call()[0])
    steps = [step._replace(turn=np.array([0, 2]), call=(np.int8(0), np.uint64(1))) for step in GOOD]
    assert torch.equal(call(steps=steps)[0], call()[0])
    steps = [step._replace(tool=np.str_("search"), arguments=types.MappingProxyType(step.arguments)) for step in GOOD]
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
        ({"token_scope": "turn"}, "token_scope must be one of 'step', 'call', got 'turn'"),
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
        ({"tools": {}}, "tools names no tool, so that nothing would be corrected: null decides by name, beta=0 turns"),
        ({"tools": {1: {}}}, "tools: a tool's name must be a text, got 1"),
        ({"tools": {"search": {1: "text"}}}, "tools['search']: a parameter's name must be a text, got 1"),
        ({"tools": {"search": {"query": None}}}, "tools['search']: unknown kernel None"),
        ({"tools": {"search": {"query": ["text"]}}}, "tools['search']: unknown kernel ['text']"),
        (
            {"tools": {"search": {"query": {"kernel": "embedding", "model": 3}}}},
            "tools['search']: kernel 'embedding': model must be a name or a folder, got 3",
        ),
        (
            {"tools": {"search": {"query": {"kernel": "embedding", "device": 0}}}},
            "tools['search']: kernel 'embedding': device must be a name or null, got 0",
        ),
        (
            {"tools": {"search": {"query": {"kernel": "number", "scale": "2"}}}},
            "tools['search']: kernel 'number': scale must be a positive number, got '2'",
        ),
        (
            {"tools": {"search": {"query": {"kernel": "number", "scale": 10**400}}}},
            "tools['search']: kernel 'number': scale must be a positive number",
        ),
        ({"beta": 10**400}, "beta must be a number >= 0"),
        ({"theta": None}, "theta must be a number in [0, 1], got None"),
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
        ({"image_index_base": True}, "image_index_base must be one of None, 0, 1, got True"),
        (
            {"error_markers": None},
            "error_markers must be a list of non-empty strings, got None; [] where there are none",
        ),
        ({"image_parameters": None}, "image_parameters must be a list of non-empty strings, got None; []"),
        ({"image_parameters": {"image": 1}}, "image_parameters must be a list of non-empty strings"),
        ({"success_threshold": 10**400}, "success_threshold must be a finite number"),
        ({"rule": {}}, "algorithm.tapo.rule: unknown setting"),
        ({1: 2}, "algorithm.tapo.1: unknown setting"),
        ([], "algorithm.tapo must be a block of settings, got []"),
        ("beta=1", "algorithm.tapo must be a block of settings, got 'beta=1'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TapoSettings.from_mapping(settings)


NULL_IS_A_VALUE = {"tools", "grounding", "tool_format", "image_index_base", "max_fault_rate", "record_dir"}


@pytest.mark.parametrize("setting", sorted(TapoSettings().to_mapping()))
def test_any_wrong_type_of_a_setting_is_refused_by_its_name(setting):
    refused = {}
    for name, value in odd_values.values().items():
        try:
            TapoSettings.from_mapping({setting: value})
        except ValueError as error:
            refused[name] = str(error)
    assert [name for name, text in refused.items() if not text.startswith(f"algorithm.tapo.{setting}")] == []
    assert max(map(len, refused.values())) < 500
    assert ("null" in refused) == (setting not in NULL_IS_A_VALUE)
    assert len(refused) > 60
