"""Confidence intervals of an accuracy, and of the difference between two."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

MOST_COMBINATIONS = 1_000_000
RANDOM_SIGNS = 100_000


def wilson(mean: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a rate that was ``mean`` in ``count`` trials."""
    if not count:
        return 0.0, 1.0
    spread = z * z / count
    middle = (mean + spread / 2) / (1 + spread)
    half = z * math.sqrt(mean * (1 - mean) / count + spread / (4 * count)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def mcnemar(first: npt.NDArray[np.float64], second: npt.NDArray[np.float64]) -> float:
    """Exact two-sided p value of paired scores (N,): as many better as worse, by chance."""
    better, worse = int((second > first).sum()), int((second < first).sum())
    differ = better + worse
    tail = sum(math.comb(differ, number) for number in range(min(better, worse) + 1))
    return min(1.0, float(2 * tail / 2**differ))


def interval(differences: Sequence[npt.NDArray[np.float64]]) -> tuple[float, float]:
    """The 95 % interval of the mean over benchmarks of the mean difference.

    It holds for few questions too: each benchmark counts one more question that got better and one
    that got worse (Bonett and Price 2012).

    Args:
        differences: for each benchmark, its questions' differences (N,), from -1 to 1.
    """
    counted = [np.concatenate([values, [1.0, -1.0]]) for values in differences]
    middle = float(np.mean([values.mean() for values in counted]))
    half = 1.96 * math.sqrt(sum(values.var() / len(values) for values in counted)) / len(counted)
    return max(-1.0, middle - half), min(1.0, middle + half)


def sign_test(differences: Sequence[npt.NDArray[np.float64]], seed: int = 0) -> float:
    """The two-sided p value of the mean over benchmarks of the mean difference.

    By chance, each question's difference might as well have the other sign. For one benchmark this
    is McNemar's exact test.

    Args:
        differences: see `interval`.
        seed: the seed of the random signs that are used if there are too many combinations to count.
    """
    observed = abs(sum(values.mean() for values in differences))
    # Differences of one size in one benchmark: how many there are, and what one of them adds.
    alike = [
        (int(count), size / len(values))
        for values in differences
        for size, count in zip(*np.unique(np.abs(values), return_counts=True), strict=True)
        if size
    ]
    if math.prod(count + 1 for count, _ in alike) <= MOST_COMBINATIONS:
        totals, chances = np.zeros(1), np.ones(1)
        for count, weight in alike:
            pluses = np.arange(count + 1)
            binomial = np.array([math.comb(count, number) / 2**count for number in pluses.tolist()])
            totals = np.add.outer(totals, (2 * pluses - count) * weight).ravel()
            chances = np.multiply.outer(chances, binomial).ravel()
        return float(min(1.0, chances[np.abs(totals) >= observed - 1e-9].sum()))
    generator = np.random.default_rng(seed)
    drawn = np.zeros(RANDOM_SIGNS)
    for count, weight in alike:
        drawn += (2 * generator.binomial(count, 0.5, RANDOM_SIGNS) - count) * weight
    # One more of each, the sample itself: no p value is 0.
    return float((1 + (np.abs(drawn) >= observed - 1e-9).sum()) / (1 + RANDOM_SIGNS))
