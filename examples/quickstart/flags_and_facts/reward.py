"""The reward: is the answer between the last ``<answer>`` tags right?"""

from __future__ import annotations

import re
import unicodedata
from typing import Any

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def normalised(text: str) -> str:
    """No accents, case, punctuation or blanks at the ends: "Sao Tome" is "São Tomé"."""
    letters = unicodedata.normalize("NFKD", text.casefold())
    kept = "".join(letter if letter.isalnum() else " " for letter in letters if not unicodedata.combining(letter))
    return " ".join(kept.split())


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: dict[str, Any] | None = None, **_: Any
) -> dict[str, float]:
    """VeRL's reward function: 1 if an accepted answer was given, else 0. TAPO reads ``acc``."""
    answers = _ANSWER.findall(solution_str)
    right = bool(answers) and normalised(answers[-1]) in {normalised(answer) for answer in ground_truth}
    return {"score": float(right), "acc": float(right), "answered": float(bool(answers))}
