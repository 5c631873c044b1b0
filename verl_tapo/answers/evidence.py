"""Searches a text, such as a tool's answer, for an accepted answer of the prompt [ours].

Texts are compared as the rewards compare answers (`verl_tapo.answers.matching`), as whole words. A chance hit costs
more than a missed one, so that answers which many pages hold anyway tell nothing: yes, a colour, a year.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from verl_tapo.answers.accepted import Range, accepted_answers
from verl_tapo.answers.letters import ALONE
from verl_tapo.answers.matching import Tokens, folded, tokens
from verl_tapo.rule.values import canonical, prints

LONGEST_TEXT = 200_000
"""Only this many characters of a text are searched; an answer after them is missed."""
LONGEST_ANSWER = 200
"""Characters of an accepted answer that a page may hold word for word; longer ones are worded anew."""
MOST_NAMES = 100
"""Accepted answers that are looked for."""
_KEPT = 10_000
_MOST_PARTS = 1_000

_LEAST_LETTERS = 4
_LEAST_CHARACTERS = 6
_YEARS = range(1000, 2101)
_COMMON = frozenset(
    """
    yes no true false none unknown both neither either maybe same different all some any other left right up down top
    bottom front back center middle north south east west northern southern eastern western red orange yellow green
    blue purple violet pink brown black white gray grey gold golden silver beige dark light zero one two three four
    five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty
    thirty forty fifty sixty seventy eighty ninety hundred thousand million billion first second third fourth fifth
    once twice january february march april may june july august september october november december monday tuesday
    wednesday thursday friday saturday sunday spring summer autumn fall winter morning evening night day week month
    year years days hours minutes meters metres kilometers kilometres miles feet inches percent male female man woman
    men women boy girl child children person people water fire wood metal stone glass paper plastic city town country
    state river mountain lake house home school company group team game book film movie song music red-and-white
    animal bird fish tree flower food good bad high low large small big long short old new early late english french
    german spanish italian chinese japanese american british oui non si ja nein vrai faux rouge bleu vert noir blanc
    rot blau gelb schwarz weiss
    """.split()
)
_ALONE = re.compile(f"[{ALONE}]")
_EDGE = re.compile(rf"\s+|[{ALONE}]|[^\w\s.,'\u2019+#&%$-]")
"""Matches what separates words, and never matches within a number."""
_POSSESSIVE = re.compile("['\u2019]s\\b")
_AROUND = " \t\r\n.,;:!?"
_LETTERS_ONLY = re.compile(r"[^\W\d_]+")


class Evidence:
    """The accepted answers of one prompt, to be looked for in many texts."""

    def __init__(self, accepted: Sequence[str | Range]) -> None:
        texts = [text for text in accepted if isinstance(text, str)][:MOST_NAMES]
        words = [tokens(text) for text in texts if len(text) <= LONGEST_ANSWER]
        self._telling = [_Phrase(each) for each in words if each and tells(each)]
        self._doubtful = [_Phrase(each) for each in words if each and not tells(each)]

    @property
    def tells(self) -> bool:
        """False if no accepted answer is rare enough for a match to mean something."""
        return bool(self._telling)

    def seen_in(self, text: str) -> bool | None:
        """Returns whether the text holds an accepted answer.

        Returns:
            True: it holds one that means something. None: unknown, because it holds one that many texts hold, or
            only its beginning was searched. False: it holds none.
        """
        if not self._telling:
            return None
        searched = text[:LONGEST_TEXT]
        loose = folded(searched)
        telling = [phrase for phrase in self._telling if phrase.may_be_in(loose)]
        doubtful = [phrase for phrase in self._doubtful if phrase.may_be_in(loose)]
        if telling or doubtful:
            # "Kinshasa's mayor" is about Kinshasa, and McDonald's is no McDonald.
            readings = [f" {' '.join(tokens(each))} " for each in {searched, _POSSESSIVE.sub("", searched)}]
            if any(phrase.text in words for phrase in telling for words in readings):
                return True
            if any(phrase.text in words for phrase in doubtful for words in readings):
                return None
        return None if len(text) > LONGEST_TEXT else False

    def place_in(self, text: str) -> tuple[int, int] | None:
        """Finds the first accepted answer that means something, including adjacent text without a
        space.

        Returns:
            the first and the last + 1 of its characters; None where `seen_in` is not True.
        """
        if not self.seen_in(text):
            return None
        text = text[:LONGEST_TEXT]
        edges = sorted({0, len(text), *(edge for found in _EDGE.finditer(text) for edge in found.span())})
        end = edges[bisect_left(edges, True, key=lambda edge: self.seen_in(text[:edge]) is True)]
        start = edges[bisect_left(edges, True, key=lambda edge: self.seen_in(text[edge:end]) is not True) - 1]
        bare = _POSSESSIVE.sub("", text[start:end].strip(_AROUND))
        inner = text.find(bare, start, end)
        return (inner, inner + len(bare)) if inner >= 0 and self.seen_in(bare) else (start, end)

    @property
    def no_sight(self) -> bool | None:
        """`sight` of a call without an answer."""
        return False if self.tells else None

    def sight(self, arguments: Mapping[str, Any], text: str, *, images: bool = False) -> bool | None:
        """Returns whether the answer to a call showed an accepted answer (`ToolStep.seen`).

        The answer may echo what the call asked for, and an image may show anything; both cases are unknown.

        Args:
            arguments: the call's arguments.
            text: the whole answer's.
            images: whether the answer holds images.
        """
        seen = self.seen_in(text)
        return None if (self.asked_for(arguments) if seen else images) else seen

    def asked_for(self, arguments: Mapping[str, Any]) -> bool:
        """Returns whether a call's arguments hold an accepted answer, or one that is common in many
        texts."""
        return self.seen_in(_written(arguments)) is not False


class _Phrase:
    """An answer's words. Comparing texts takes milliseconds, most texts do not even hold the letters."""

    def __init__(self, words: Tokens) -> None:
        self.text = f" {' '.join(words)} "
        self._letters = [word for word in words if _LETTERS_ONLY.fullmatch(word)]

    def may_be_in(self, loose: str) -> bool:
        return all(word in loose for word in self._letters)


def _written(arguments: Mapping[str, Any]) -> str:
    """Returns the texts and numbers in a call's arguments, up to a limit."""
    texts: list[str] = []
    waiting: list[Any] = list(arguments.values())
    for _ in range(_MOST_PARTS):
        if not waiting:
            break
        value = waiting.pop()
        if isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value
        elif isinstance(value, str) or (isinstance(value, int | float) and prints(value)):
            texts.append(str(value))
    return " ".join(texts)


def tells(words: Tokens) -> bool:
    """Returns whether an answer with these words is rare enough for a match in a text to mean
    something."""
    if sum(bool(_ALONE.fullmatch(word)) for word in words) > 1:
        return True
    if all(word in _COMMON for word in words):
        return False
    if len(words) > 1 and sum(map(len, words)) >= _LEAST_CHARACTERS:
        return True
    return any(_informs(word) for word in words)


def _informs(word: str) -> bool:
    if word in _COMMON or len(word) < _LEAST_LETTERS:
        return False
    return not (word.isdecimal() and int(word) in _YEARS)


def ground_truth_of(reward_model: Any) -> Any:
    """Returns the ground truth in the column ``reward_model`` of veRL's data sets, or None without
    one."""
    return reward_model.get("ground_truth") if isinstance(reward_model, Mapping) else None


_known: dict[Hashable, Evidence] = {}


def evidence_of(ground_truth: Any) -> Evidence:
    """The evidence to look for, by a data set's ground truth (see `accepted_answers`); it never raises.

    What cannot be read as answers tells nothing. Rollouts of a prompt share theirs, so it is made once.
    """
    key = canonical(ground_truth)
    if key not in _known:
        if len(_known) >= _KEPT:
            _known.clear()
        try:
            _known[key] = Evidence(accepted_answers(ground_truth))
        except ValueError:
            _known[key] = Evidence(())
    return _known[key]
