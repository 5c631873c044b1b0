"""Compares answers by rules that work in many languages.

What makes no difference: case, width and other compatibility forms (NFKC), accents, Arabic and Hebrew vowel signs,
punctuation, a leading article (English, French, German, Spanish, Italian), the script of digits, separators of
thousands (1,234,567; 1 234 567; 1'234'567; 1.234.567), a decimal comma, the zeros of 0.5 and 3.50; in `exact`, spaces,
except between digits. What does: signs (-5, <5, ±5, A-, C++), percent, currencies, the way in which a date is written.
1.234 alone stays a decimal.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from functools import lru_cache
from typing import TypeAlias

from verl_tapo.answers.letters import ALONE, ARABIC_LETTERS, ARABIC_VOWELS, HEBREW_VOWELS, TATWEEL

Tokens: TypeAlias = tuple[str, ...]

_ARTICLES = frozenset(
    "the a an le la les un une des der die das den dem ein eine einen einem einer eines el los las unos unas "
    "il lo i gli uno una".split()
)
_ELISION = re.compile(r"^\W*(?:l|gl|un)'(?=\w)")

# Characters that are written for one another, after NFKC.
_ALIKE = str.maketrans(
    {
        **dict.fromkeys("\u2018\u2019\u02bc\u02b9\u2032\u00b4`", "'"),
        **dict.fromkeys("\u2266\u2a7d", "\u2264"),
        **dict.fromkeys("\u2267\u2a7e", "\u2265"),
        "\u066a": "%",
        "\u066b": ".",
        "\u066c": ",",
        "\u266f": "#",
        TATWEEL: None,
    }
)
_DASHES = str.maketrans(dict.fromkeys("\u2010\u2012\u2013\u2014\u2015\u2212", "-"))
# A long dash right after a word is punctuation where more words follow, and a sign at the end (Cl–).
# A hyphen there is punctuation after a word that is no formula, grade or blood group.
_PARTING_DASH = re.compile(r"(?<=\w)[\u2013-\u2015](?=\s*\w)|(?<=[^\W\d_]{4})-(?=\s+\w)")
# 10⁶ and 1½: NFKC would make them 106 and 11⁄2.
_RAISED = re.compile("(?<=[0-9₀-₉])(?=[⁺⁻]?[⁰¹²³⁴-⁹]|[½¼¾⅐-⅞↉])")
_OTHER_DIGIT = re.compile(r"[^\D0-9]")

# Signs are put right before their number: "< 5", "-$5", "minus 5", and "- 5" as the whole answer.
_COMPARING = "<>±\u2213\u2260\u2264\u2265"
_CURRENCIES = "$\u00a2-\u00a5\u0e3f\u20a0-\u20c0"
_LONG_SIGNS = re.compile(r"(\+/-|\+-(?=\.?\d))|(<=)|>=")
_TAG = re.compile(r"</?([a-z]\w{0,20})>")
_ONLY_MINUS = re.compile(r"\s*- +(?=\.?\d)")
_SAID_MINUS = re.compile(r"(?<!\d )\b(?:minus|negative) (?=\.?\d)")
_BARE_FRACTION = re.compile(r"(?<![\w.,'])\.(?=\d)")
_COMPARED = re.compile(rf"([{_COMPARING}]) (?=-?\d)")
_SIGN_OF_MONEY = re.compile(rf"(?<!\w)([-{_COMPARING}]) ?([{_CURRENCIES}]) ?(?=\d)")

# A run of digits and single separators is read as a whole, so that no digit is looked at twice.
_RUN = re.compile(r"\d+(?:[.,' ]\d+)*")
_BY_SPACES = re.compile(r"[1-9]\d{0,2}(?: \d{3})+(?:\.\d+|,\d{1,2})?")
# Groups of three (of two in India), then maybe a fraction.
_BY_COMMAS = re.compile(r"(?:[1-9]\d{0,2}(?:,\d{3})+|[1-9]\d?(?:,\d{2})+,\d{3}|[1-9]\d{0,2}(?:'\d{3})+)(?:\.\d+)?")
_BY_DOTS = re.compile(r"[1-9]\d{0,2}(?:(?:\.\d{3})+,\d+|(?:\.\d{3}){2,})")
_DECIMAL_COMMA = re.compile(r"\d+,\d{1,2}|0,\d+")
_DECIMAL = re.compile(r"\d+\.\d+")
_NUMBER = re.compile(r"(?:(?<!\w)-)?\d+(?:\.\d+)?(?:e[-+]?\d{1,3})?")

_TOKEN = re.compile(f"[{ALONE}]|[^\\s{ALONE}]+")
_ODD = re.compile(r"[^\w\s]|_")

# Accents, of Cyrillic too (but a short i is a letter of its own), and vowel signs.
_MARKS = re.compile(f"[\u0301\u0308]|(?<!\u0438)[\u0300-\u036f]|[{HEBREW_VOWELS}{ARABIC_VOWELS}]")
_LETTERS = str.maketrans(
    {"ø": "o", "ł": "l", "đ": "d", "ð": "d", "ı": "i", "æ": "ae", "œ": "oe", "þ": "th", **ARABIC_LETTERS}
)
_BEYOND_ASCII = re.compile(r"[^\x00-\x7f]+")
_BETWEEN_WORDS = re.compile(r"(?<!\d) | (?!\d)")


def tokens(text: str) -> Tokens:
    """Returns an answer's words in the form in which they are compared; single characters in
    scripts without spaces.

    Empty only for blank text: a text of nothing but punctuation stays as it is.
    """
    text = _plain(text)
    words = _TOKEN.findall(_ODD.sub(_kept, _ELISION.sub("", text)))
    if len("".join(words[1:])) > 1 and words[0] in _ARTICLES and not words[1][0].isdecimal():
        del words[0]
    folded = unicodedata.normalize("NFC", _MARKS.sub("", unicodedata.normalize("NFD", " ".join(words))))
    return tuple(folded.translate(_LETTERS).split()) or tuple(text.split())


def folded(text: str) -> str:
    """Returns the text with its letters folded as in `tokens`, without the marks that may occur
    inside a word.

    Every word of letters in ``tokens(text)`` is a part of it, which costs a hundredth to find out.
    """
    text = text.casefold()
    text = text if text.isascii() else _BEYOND_ASCII.sub(_fold, text)
    return text.replace("'", "").replace("`", "").replace(".", "")


@lru_cache(maxsize=10_000)
def _fold_run(run: str) -> str:
    run = unicodedata.normalize("NFKC", run).casefold().translate(_ALIKE)
    run = unicodedata.normalize("NFC", _MARKS.sub("", unicodedata.normalize("NFD", run))).translate(_LETTERS)
    return "".join(character for character in run if unicodedata.category(character) != "Cf")


def _fold(match: re.Match[str]) -> str:
    return _fold_run(match[0])


def numbers(text: str) -> list[float]:
    """Returns the numbers in an answer, in order; a hyphen after a digit is not a sign."""
    return [float(number) for number in _NUMBER.findall(_plain(text))]


def _plain(text: str) -> str:
    """The text with one case, one kind of digits, and one way to write a number and its sign."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", _RAISED.sub("^", text).casefold())
    text = text.casefold().translate(_ALIKE)
    text = _PARTING_DASH.sub(" - ", text).translate(_DASHES)
    text = _OTHER_DIGIT.sub(lambda match: str(unicodedata.decimal(match[0])), text)
    text = _LONG_SIGNS.sub(lambda match: "±" if match[1] else "\u2264" if match[2] else "\u2265", text)
    text = _TAG.sub(r" \1 ", text)
    if "\n" not in text.strip():
        text = _ONLY_MINUS.sub("-", text, 1) if _ONLY_MINUS.match(text) else text
    text = _BARE_FRACTION.sub("0.", _SAID_MINUS.sub("-", text))
    text = _SIGN_OF_MONEY.sub(r"\2\1", _COMPARED.sub(r"\1", text))
    return _RUN.sub(_read_run, text)


def _read_run(match: re.Match[str]) -> str:
    """Reads numbers separated by single spaces, or one number whose thousands are separated by
    spaces."""
    run = match[0]
    if _BY_SPACES.fullmatch(run):
        run = run.replace(" ", "")
    return " ".join(_read_number(part) for part in run.split(" "))


def _read_number(text: str) -> str:
    if text.isdecimal():
        return text
    if _BY_COMMAS.fullmatch(text):
        text = text.replace(",", "").replace("'", "")
    elif _BY_DOTS.fullmatch(text):
        text = text.replace(".", "").replace(",", ".")
    elif _DECIMAL_COMMA.fullmatch(text):
        text = text.replace(",", ".")
    return text.rstrip("0").rstrip(".") if _DECIMAL.fullmatch(text) else text


def _kept(match: re.Match[str]) -> str:
    """Returns the replacement for a character that is not a letter, digit or space.

    Signs that carry a meaning are kept, percent and currencies as words of their own.
    """
    character, text, place = match[0], match.string, match.start()
    before, after = text[place - 1 : place] or " ", text[place + 1 : place + 2] or " "
    category = unicodedata.category(character)
    if character in "%‰°" or category == "Sc":
        return f" {character} "
    if category[0] == "M" or _is_sign(character, before, after):
        return character
    if character == "." and before.isalpha() and after.isalpha():  # U.S.A
        return ""
    if character == "'":  # 5'10 is not 510
        return " " if before.isdecimal() and after.isdecimal() else ""
    return "" if category == "Cf" else " "  # joiners and other marks that are not seen


def _is_sign(character: str, before: str, after: str) -> bool:
    in_word = before.isalnum()
    if character == "-":  # of a number; or at the end of a word: A-, Cl-
        return not after.isalnum() and after not in "->" if in_word else after.isdecimal()
    if character in _COMPARING:
        return (after.isdecimal() or after == "-") and before not in "-="  # an arrow's head is none
    if character == ".":
        return before.isdecimal() and after.isdecimal()
    if character in "+#\u266d":  # C++, C#, 18+, B♭
        return in_word or before == "+"
    if character in "√∛∜":
        return after.isalnum()
    return character == "&" and in_word and after.isalnum()  # AT&T


def exact(answer: Tokens, accepted: Tokens) -> bool:
    """Returns whether both answers are equal, ignoring spaces."""
    return _joined(answer) == _joined(accepted)


def _joined(words: Tokens) -> str:
    return _BETWEEN_WORDS.sub("", " ".join(words))


def substring(answer: Tokens, accepted: Tokens, ratio: float) -> bool:
    """Returns whether the answer contains the accepted answer word for word and is at most
    ``ratio`` times as long. Without the limit an answer that lists everything would contain
    everything."""
    if len(answer) > ratio * len(accepted):
        return False
    return f" {' '.join(accepted)} " in f" {' '.join(answer)} "  # no word holds a space


def f1(answer: Tokens, accepted: Tokens) -> float:
    """Returns the harmonic mean of word precision and recall; repeated words count as often as they
    occur."""
    common = (Counter(answer) & Counter(accepted)).total()
    return 2 * common / (len(answer) + len(accepted)) if common else 0.0


def in_range(answer: str, low: float, high: float) -> bool:
    """Returns whether an answer is right by InfoSeek's rule.

    Its first number must be in the range. Where it has two numbers and the first is not the larger,
    they are a range themselves, which must be within the other one or have an intersection over
    union of at least a half.
    """
    found = numbers(answer)[:2]
    if not found:
        return False
    first, last = found[0], found[-1]
    if first > last:
        last = first
    if low <= first and last <= high:
        return True
    overlap = min(last, high) - max(first, low)
    return 2 * overlap >= max(last, high) - min(first, low) > 0
