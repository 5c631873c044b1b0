"""Scripts, marks and letters that comparing answers and searching passages treat alike."""

from __future__ import annotations

import re
import sys
import unicodedata

# Scripts in which spaces do not mark words, and Korean, whose particles are written with the word.
ALONE = (
    "\u0e00-\u0eff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u9fff"
    "\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
)
"""Characters that are words by themselves, for a character class of a regular expression."""

HEBREW_VOWELS = "\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7"
ARABIC_VOWELS = "\u0610-\u061a\u064b-\u065f\u0670\u06d6-\u06dc\u06df-\u06e8\u06ea-\u06ed"
"""Vowel signs, which most texts leave out; for a character class."""

TATWEEL = "\u0640"
"""Makes an Arabic word longer on paper, and means nothing."""

ARABIC_LETTERS = {"ی": "ي", "ى": "ي", "ک": "ك"}
"""Letters that Persian, or a careless hand, writes for Arabic ones."""


def combining_marks() -> str:
    """All marks that belong to the letter before them, for a character class."""
    ranges: list[list[int]] = []
    for code in range(sys.maxunicode + 1):
        if unicodedata.category(chr(code))[0] == "M":
            if ranges and ranges[-1][1] == code - 1:
                ranges[-1][1] = code
            else:
                ranges.append([code, code])
    return "".join(f"{re.escape(chr(first))}-{re.escape(chr(last))}" for first, last in ranges)
