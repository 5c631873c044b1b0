"""`search_backends.evaluation.compare` and the statistics of evaluation."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from search_backends.evaluation import statistics
from search_backends.evaluation.compare import compare, main
from search_backends.evaluation.statistics import interval, mcnemar, sign_test, wilson
from search_backends.evaluation.tables import order


def evaluation(folder, label, scores, **settings):
    """An evaluation's folder; ``scores`` by benchmark, a list for its questions."""
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps({"label": label, "settings": {"temperature": 0, **settings}}))
    entries = [
        {"id": f"{name}/{number}", "data_source": name, "acc": score}
        for name, values in scores.items()
        for number, score in enumerate(values)
        if score is not None
    ]
    (folder / "transcripts.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return folder


@given(st.integers(0, 60), st.integers(1, 60))
def test_wilson_is_scipy_s(right, wrong):
    count = right + wrong
    expected = binomtest(right, count).proportion_ci(0.95, "wilson")
    assert wilson(right / count, count) == pytest.approx(tuple(expected), abs=1e-4)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=80))
def test_mcnemar_is_the_exact_sign_test(pairs):
    first, second = np.array(pairs, dtype=float).T
    better, worse = int((second > first).sum()), int((second < first).sum())
    expected = binomtest(better, better + worse).pvalue if better + worse else 1.0
    assert mcnemar(first, second) == pytest.approx(expected)
    assert mcnemar(second, first) == mcnemar(first, second)


@pytest.mark.parametrize("sizes", [(40, 200), (8,), (8, 12), (30, 30, 30)])
@pytest.mark.parametrize("effect", [0.0, 0.4])
def test_the_interval_covers_what_it_should(sizes, effect):
    # 95 of 100 intervals hold the real effect, and a few more where there are few questions.
    rng = np.random.default_rng(1)
    chances = [0.25 * (1 - effect), 0.5 * (1 - effect), 0.25 * (1 - effect) + effect]
    covered = 0
    for _ in range(600):
        low, high = interval([rng.choice([-1.0, 0.0, 1.0], size, p=chances) for size in sizes])
        covered += low <= effect <= high
    assert 0.93 <= covered / 600 <= 0.99


@pytest.mark.parametrize(("sizes", "most"), [((40, 200), 0.065), ((8,), 0.05), ((8, 12), 0.06)])
def test_p_values_are_as_small_as_they_should_be_by_chance(sizes, most):
    rng = np.random.default_rng(0)
    small = 0
    for _ in range(1000):
        differences = [(rng.integers(0, 2, size) - rng.integers(0, 2, size)).astype(float) for size in sizes]
        small += sign_test(differences) < 0.05
    assert small / 1000 <= most


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=80))
def test_of_one_benchmark_both_tests_are_the_same(pairs):
    first, second = np.array(pairs, dtype=float).T
    assert sign_test([second - first]) == pytest.approx(mcnemar(first, second))


def test_eight_questions_say_little():
    better = np.array([1.0] * 4 + [0.0] * 4)
    assert sign_test([better]) == pytest.approx(0.125)
    low, high = interval([better])
    assert low < 0 < 0.5 < high


def test_random_signs_say_what_counting_says(monkeypatch):
    rng = np.random.default_rng(3)
    differences = [rng.choice([-1.0, 0.0, 0.5, 1.0], size, p=[0.15, 0.5, 0.1, 0.25]) for size in (20, 40)]
    counted = sign_test(differences)
    monkeypatch.setattr(statistics, "MOST_COMBINATIONS", 0)
    assert 0.001 < counted < 0.9
    assert sign_test(differences) == pytest.approx(counted, abs=0.01)
    assert sign_test([np.ones(1000)]) == pytest.approx(0, abs=1e-4)


def test_every_benchmark_counts_the_same_in_the_average():
    few, many = np.ones(10), np.zeros(1000)
    low, high = interval([few, many])
    assert low < 0.5 < high
    assert sign_test([few, many]) == pytest.approx(2 * 0.5**10)  # as McNemar's of the few
    assert sign_test([many]) == 1.0


def test_a_table_of_two(tmp_path, capsys):
    grpo = evaluation(tmp_path / "a", "GRPO", {"FVQA-test": [1, 0] * 20, "MMSearch": [0] * 10})
    tapo = evaluation(tmp_path / "b", "TAPO", {"FVQA-test": [1, 1] * 20, "MMSearch": [0] * 9 + [1]})
    found = compare([grpo, tapo])
    assert found["questions"] == {"MMSearch": 10, "FVQA-test": 40}
    first, second = found["rows"]
    assert first["average"] == pytest.approx(0.25)
    assert second["average"] == pytest.approx(0.55)
    assert second["p"] == pytest.approx({"MMSearch": 1.0, "FVQA-test": 2 * 0.5**20})
    low, high = second["difference"]["interval"]
    assert second["difference"]["average"] == pytest.approx(0.3)
    assert low < 0.3 < high
    assert second["difference"]["p"] < 0.001
    assert main([str(grpo), str(tapo)]) == 0
    said = capsys.readouterr().out
    assert "| GRPO | 0.00 | 50.00 | **25.00** |  |" in said
    assert "| TAPO | 10.00 (p = 1.000) | 100.00 (p < 0.001) | **55.00** | +30.00 [" in said
    assert "**Few questions**: MMSearch (10)." in said
    assert main(["--json", str(grpo), str(tapo)]) == 0
    assert json.loads(capsys.readouterr().out) == found


def test_only_questions_that_all_have_done_are_compared(tmp_path, capsys):
    one = evaluation(tmp_path / "a", "one", {"FVQA-test": [1, 1, None, 0], "InfoSeek": [1]})
    two = evaluation(tmp_path / "b", "two", {"FVQA-test": [1, None, 1, 1]}, temperature=0.7)
    found = compare([one, two])
    assert found["questions"] == {"FVQA-test": 2}
    assert [row["left_out"] for row in found["rows"]] == [2, 1]
    assert [row["accuracy"]["FVQA-test"] for row in found["rows"]] == [0.5, 1.0]
    assert main([str(one), str(two)]) == 0
    assert "**two was evaluated with other settings**: temperature" in capsys.readouterr().out


def test_what_cannot_be_compared(tmp_path, capsys):
    one = evaluation(tmp_path / "a", "one", {"FVQA-test": [1]})
    two = evaluation(tmp_path / "b", "two", {"InfoSeek": [1]})
    assert main([str(one), str(two)]) == 2
    assert "no question in common" in capsys.readouterr().err
    assert main([str(one), str(tmp_path / "c")]) == 2
    assert "holds no evaluation" in capsys.readouterr().err
    for text in ("", "[]", "{}", '{"label": "x", "settings": null}', "null"):
        (two / "results.json").write_text(text)
        assert main([str(one), str(two)]) == 2
        assert f"{two / 'results.json'} is not what an evaluation writes" in capsys.readouterr().err
    evaluation(tmp_path / "d", "four", {"FVQA-test": [1]})
    (tmp_path / "d" / "transcripts.jsonl").write_text('{"id": "FVQA-test/0", "data_source": "FVQA-test"}\n')
    assert main([str(one), str(tmp_path / "d")]) == 2
    assert "transcripts.jsonl, line 1, has no acc" in capsys.readouterr().err


def test_the_paper_s_order_however_benchmarks_are_written():
    assert order(["zeta", "livevqa", "fvqa_test", "mmsearch", "HR-MMSearch", "mat_search"]) == [
        "mmsearch",
        "HR-MMSearch",
        "fvqa_test",
        "livevqa",
        "mat_search",
        "zeta",
    ]
