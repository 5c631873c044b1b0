"""Whether two answers are the same, by rules that hold in many languages.

What makes no difference: case, width and other compatibility forms (NFKC), accents, Arabic and Hebrew vowel signs,
punctuation, a leading article (English, French, German, Spanish, Italian), the script of digits, separators of
thousands (1,234,567; 1 234 567; 1'234'567; 1.234.567), a decimal comma; in `exact`, spaces, except between digits.
What does: signs of numbers, percent, currencies, the way in which a date is written. 1.234 alone stays a decimal.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from typing import TypeAlias

Tokens: TypeAlias = tuple[str, ...]

_ARTICLES = frozenset(
    "the a an le la les un une des der die das den dem ein eine einen einem einer eines el los las unos unas "
    "il lo i gli uno una".split()
)
_ELISION = re.compile(r"^\W*(?:l|gl|un)'(?=\w)")
_APOSTROPHES = dict.fromkeys(map(ord, "\u2018\u2019\u02bc\u02b9\u2032\u00b4`"), "'")
_SIGNS = {ord("\u2212"): "-", ord("\u066b"): ".", ord("\u066c"): ",", ord("\u0640"): None}  # the last: Arabic tatweel

# Thousands: groups of three (of two in India), then maybe a fraction; not where a date or a list goes on.
_THOUSANDS = re.compile(
    r"(?<![\d.,'])(?<!\d )"
    r"(?:\d{1,3}(?:,\d{3})+|\d{1,2}(?:,\d{2})+,\d{3}|\d{1,3}(?:'\d{3})+|\d{1,3}(?: \d{3})+)"
    r"(?:\.\d+)?(?![.,' ]?\d)"
)
_THOUSANDS_BY_DOTS = re.compile(
    r"(?<![\d.,])(?:\d{1,3}(?:\.\d{3})+,\d+|\d{1,3}(?:\.\d{3}){2,}|\d{1,3}(?: \d{3})+,\d{1,2})(?![.,]?\d)"
)
_DECIMAL_COMMA = re.compile(r"(?<![\d.,])(\d+),(\d{1,2})(?![.,]?\d)")

# Scripts in which spaces do not mark words, and Korean, whose particles are written with the word.
_ALONE = (
    "\u0e00-\u0eff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u9fff"
    "\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
)
_TOKEN = re.compile(f"[{_ALONE}]|[^\\s{_ALONE}]+")

# Accents, of Cyrillic too (but a short i is a letter of its own), and vowel signs.
_MARKS = re.compile(
    "[\u0301\u0308]|(?<!\u0438)[\u0300-\u036f]|[\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7]"
    "|[\u0610-\u061a\u064b-\u065f\u0670\u06d6-\u06dc\u06df-\u06e8\u06ea-\u06ed]"
)
_LETTERS = str.maketrans(
    {"ø": "o", "ł": "l", "đ": "d", "ð": "d", "ı": "i", "æ": "ae", "œ": "oe", "þ": "th", "ی": "ي", "ى": "ي", "ک": "ك"}
)
_BETWEEN_WORDS = re.compile(r"(?<!\d) | (?!\d)")


def tokens(text: str) -> Tokens:
    """The words of an answer in the form in which they are compared; one character each where spaces mark no words.

    Empty only for text that is nothing but white space: what is nothing but signs stays as it is.
    """
    text = unicodedata.normalize("NFKC", text.casefold()).translate(_APOSTROPHES).translate(_SIGNS).casefold()
    text = "".join(_digit(character) for character in text)
    text = _THOUSANDS_BY_DOTS.sub(lambda match: _plain_number(match[0].replace(".", "").replace(",", ".")), text)
    text = _THOUSANDS.sub(lambda match: _plain_number(match[0].replace(",", "").replace("'", "")), text)
    text = _DECIMAL_COMMA.sub(r"\1.\2", text)
    words = _TOKEN.findall(_without_punctuation(_ELISION.sub("", text)))
    if len("".join(words[1:])) > 1 and words[0] in _ARTICLES and not words[1][0].isdecimal():
        del words[0]
    folded = unicodedata.normalize("NFC", _MARKS.sub("", unicodedata.normalize("NFD", " ".join(words))))
    return tuple(folded.translate(_LETTERS).split()) or tuple(text.split())


def _digit(character: str) -> str:
    return str(unicodedata.decimal(character)) if character.isdecimal() else character


def _plain_number(text: str) -> str:
    return text.replace(" ", "")


def _without_punctuation(text: str) -> str:
    """Signs that carry a meaning are kept, percent and currencies as words of their own."""
    kept = []
    for before, character, after in zip(f" {text}", text, f"{text[1:]} ", strict=False):
        category = unicodedata.category(character)
        if character in "%°" or category == "Sc":
            kept.append(f" {character} ")
        elif (
            character.isalnum()
            or category[0] == "M"
            or (character == "." and before.isdecimal() and after.isdecimal())
            or (character == "-" and after.isdecimal() and not before.isalnum())
            or (character in "+#" and (before.isalnum() or before == "+"))  # C++, C#, 18+
            or (character == "&" and before.isalnum() and after.isalnum())  # AT&T
        ):
            kept.append(character)
        elif character == "." and before.isalpha() and after.isalpha():  # U.S.A
            pass
        elif character != "'" and category != "Cf":  # an apostrophe; joiners and other marks that are not seen
            kept.append(" ")
    return "".join(kept)


def exact(answer: Tokens, accepted: Tokens) -> bool:
    """Whether they are the same but for spaces."""
    return _joined(answer) == _joined(accepted)


def _joined(words: Tokens) -> str:
    return _BETWEEN_WORDS.sub("", " ".join(words))


def substring(answer: Tokens, accepted: Tokens, ratio: float) -> bool:
    """Whether the accepted answer stands in the answer, word for word, and that is not more than ``ratio`` times as
    long: an answer that lists everything contains everything.
    """
    length = len(accepted)
    if len(answer) > ratio * length:
        return False
    return any(answer[start : start + length] == accepted for start in range(len(answer) - length + 1))


def f1(answer: Tokens, accepted: Tokens) -> float:
    """Harmonic mean of precision and recall of the words, each counted as often as it occurs."""
    common = (Counter(answer) & Counter(accepted)).total()
    return 2 * common / (len(answer) + len(accepted)) if common else 0.0
