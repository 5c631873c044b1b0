"""A check of the self-test: its name, and what it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch


class Failed(Exception):
    """What a check found to be wrong, in one line."""


class Skipped(Exception):
    """Why a check does not apply here."""


class Check(NamedTuple):
    """One line of the self-test."""

    name: str
    run: Callable[[], str]
    """Returns what was looked at, in a few words; raises `Failed` or `Skipped`. Whatever else it raises is a failure,
    too."""


class Outcome(NamedTuple):
    """What became of a check."""

    name: str
    verdict: str
    """"ok", "FAIL" or "skip"."""
    detail: str


def outcome(check: Check) -> Outcome:
    """Runs a check."""
    try:
        return Outcome(check.name, "ok", check.run())
    except Skipped as why:
        return Outcome(check.name, "skip", str(why))
    except Failed as why:
        return Outcome(check.name, "FAIL", str(why))
    except Exception as error:  # whatever is broken in veRL, in the environment or here
        return Outcome(check.name, "FAIL", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def require_equal(result: torch.Tensor, expected: torch.Tensor, tolerance: float = 0.0) -> None:
    """Raises `Failed` where two tensors differ by more than ``tolerance``; 0 means bit for bit."""
    if result.shape != expected.shape:
        raise Failed(f"shape {tuple(result.shape)}, expected {tuple(expected.shape)}")
    off = ~((result - expected).abs() <= tolerance) if tolerance else ~torch.eq(result, expected)
    if bool(off.any()):
        first = tuple(off.nonzero()[0].tolist())
        raise Failed(
            f"{int(off.sum())} of {off.numel()} advantages are wrong; the first, at {first}, is "
            f"{float(result[first]):.6g} and should be {float(expected[first]):.6g}"
        )
