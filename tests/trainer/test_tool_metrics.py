"""What is said of a batch's tools, and when a run ends for want of them."""

import numpy as np
import pytest

from verl_tapo.calls.call import fault_of
from verl_tapo.records import CallRecord, TrajectoryRecord
from verl_tapo.settings import TapoSettings
from verl_tapo.trainer.tool_metrics import (
    ToolOutage,
    check_outage,
    executed_tools,
    odd_reward_parts,
    reward_metrics,
    tool_metrics,
)


def record(*steps):
    calls = [
        CallRecord(tool, {}, (0, 1), (0, 1), status, latency, metrics=metrics, answer_tokens=tokens)
        for tool, status, latency, metrics, tokens in steps
    ]
    return TrajectoryRecord(calls).to_dict()


BATCH = [
    record(
        ("search", "ok", 1.0, {"cache_hit": True, "hits": 3, "note": "text"}, 40),
        ("search", "ok", 3.0, {"cache_hit": False, "hits": 5, "odd": float("nan")}, 20),
        ("zoom", "error", 0.1, {"fault": "model"}, 9),
    ),
    record(("search", "error", 2.0, {}, 10), ("search", "timeout", 2.0, {}, 10), ("none", "unknown_tool", 0, {}, 7)),
    record(("malformed", "malformed", 0, {}, 7), ("search", "not_executed", 0, {}, 0)),
    None,
]


def test_by_hand():
    metrics = tool_metrics(BATCH)
    assert metrics == pytest.approx(
        {
            "tools/malformed": 1 / 8,
            "tools/unknown_tool": 1 / 8,
            "tools/over_limit": 0,
            "tools/calls_per_trajectory": 8 / 3,
            "tools/infrastructure_faults": 2 / 5,
            "tools/abandoned": 0,
            "tools/search/calls_per_trajectory": 4 / 3,
            "tools/search/ok": 1 / 2,
            "tools/search/model_faults": 0,
            "tools/search/infrastructure_faults": 1 / 2,
            "tools/search/latency_s": 2.0,
            "tools/search/latency_p95_s": 2.85,
            "tools/search/answer_tokens": 20,
            "tools/search/cache_hit": 1 / 2,
            "tools/search/hits": 4,
            "tools/zoom/calls_per_trajectory": 1 / 3,
            "tools/zoom/ok": 0,
            "tools/zoom/model_faults": 1,
            "tools/zoom/infrastructure_faults": 0,
            "tools/zoom/latency_s": 0.1,
            "tools/zoom/latency_p95_s": 0.1,
            "tools/zoom/answer_tokens": 9,
        }
    )
    assert tool_metrics([None, None]) == {}


def test_a_policy_that_stopped_calling_leaves_no_gap():
    """Shares and counts are 0, of every tool that was executed before; means of nothing are left out."""
    silent = tool_metrics([None, TrajectoryRecord().to_dict()])
    everything = [
        "malformed",
        "unknown_tool",
        "over_limit",
        "calls_per_trajectory",
        "infrastructure_faults",
        "abandoned",
    ]
    assert silent == {f"tools/{name}": 0.0 for name in everything}
    seen = executed_tools(BATCH)
    assert seen == {"search", "zoom"}
    silent = tool_metrics([TrajectoryRecord().to_dict()], seen)
    names = ["calls_per_trajectory", "ok", "model_faults", "infrastructure_faults"]
    assert silent == {
        **{f"tools/{name}": 0.0 for name in everything},
        **{f"tools/{tool}/{name}": 0.0 for tool in seen for name in names},
    }
    half = tool_metrics(BATCH[:1], seen | {"python"})
    assert {name for name in half if name.startswith("tools/python/")} == {f"tools/python/{name}" for name in names}
    assert half["tools/search/ok"] == 1.0


def test_calls_that_were_left_behind():
    records = [record(("search", "timeout", 2.0, {}, 0), ("zoom", "ok", 1.0, {}, 0)) for _ in range(2)]
    records[0]["steps"][0]["abandoned"] = True
    assert tool_metrics(records)["tools/abandoned"] == 1 / 4
    del records[1]["steps"][0]["abandoned"]  # of an earlier revision
    assert tool_metrics(records)["tools/abandoned"] == 1 / 4


NO_NUMBERS = [10**400, -(10**5000), float("nan"), float("-inf"), 1j, np.complex64(1), np.float32("inf")]
NO_NUMBERS += ["1", None, [1.0], {}, b"1", object(), np.array([1.0, 2.0])]


@pytest.mark.parametrize("value", NO_NUMBERS, ids=type)
def test_what_is_no_finite_number_is_left_out_of_means(value):
    """A tool's own metrics, and parts of rewards; what is a number is named with how often it was none."""
    records = [record(("search", "ok", 1.0, {"hits": number, "other": 1}, 0)) for number in (2, value)]
    metrics = tool_metrics(records)
    assert (metrics["tools/search/hits"], metrics["tools/search/other"]) == (2.0, 1.0)
    infos = [{"part": 2}, {"part": value, "other": 1}, {"part": value}]
    assert reward_metrics(infos) == {"reward/part": 2.0, "reward/other": 1.0}
    odd = odd_reward_parts(infos)
    if isinstance(value, int | float | complex | np.number):
        assert (list(odd), odd["part"][0]) == (["part"], 2)
    else:
        assert odd == {}


def test_means_of_huge_numbers_are_finite():
    infos = [{"a": 1.5e308, "b": np.float64(0.1)}] * 10
    assert reward_metrics(infos) == {"reward/a": pytest.approx(1.5e308), "reward/b": 0.1}
    assert reward_metrics([{3: 1.0}]) == {"reward/3": 1.0}


@pytest.mark.parametrize(
    ("status", "metrics", "fault"),
    [
        ("ok", {"fault": "model"}, None),
        ("not_executed", {}, None),
        ("malformed", {}, "model"),
        ("unknown_tool", {}, "model"),
        ("over_limit", {}, "model"),
        ("timeout", {"fault": "model"}, "infrastructure"),
        ("error", {"fault": "model"}, "model"),
        ("error", {"fault": "infrastructure"}, "infrastructure"),
        ("error", {}, "infrastructure"),
    ],
)
def test_whose_fault(status, metrics, fault):
    assert fault_of({"status": status, "metrics": metrics}) == fault


def test_a_run_ends_beyond_the_rate_only():
    metrics = tool_metrics(BATCH)
    check_outage(metrics, None)
    check_outage(metrics, 0.4)
    check_outage({}, 0.0)
    with pytest.raises(ToolOutage, match=r"40% .* \(search 50%, zoom 0%\); .* allows 39%"):
        check_outage(metrics, 0.39)


@pytest.mark.parametrize("rate", [-0.1, 1.1, "half", True])
def test_bad_rates(rate):
    with pytest.raises(ValueError, match="max_fault_rate must be null or a number from 0 to 1"):
        TapoSettings.from_mapping({"max_fault_rate": rate})


def test_parts_of_rewards():
    infos = [
        {"acc": 1.0, "used": True, "why": "text"},
        {"acc": np.float32(0.0), "used": False},
        {},
        {"acc": float("nan")},
    ]
    assert reward_metrics(infos) == {"reward/acc": 0.5, "reward/used": 0.5}
