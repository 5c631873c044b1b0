"""Scripted trajectories, right and sloppy ones, to warm-start a model on; the calls really run.

Also made-up worlds: a model that only ever sees real names learns them by heart instead of copying them.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass

from PIL import Image

from flags_and_facts.questions import Question, cell_box
from flags_and_facts.search import Index, zoom
from flags_and_facts.world import ATTRIBUTES, NEIGHBOUR, Country, World


@dataclass(frozen=True)
class Turn:
    """The model's text, and the answer of the tool it calls (nothing after the last turn)."""

    said: str
    answer: str | None = None
    image: Image.Image | None = None


@dataclass(frozen=True)
class Slips:
    """The script's error rates, each a probability per occasion."""

    malformed: float = 0.02
    wrong_cell: float = 0.2
    no_zoom: float = 0.15
    wrong_image: float = 0.12
    wrong_attribute: float = 0.15
    wrong_country: float = 0.1
    no_search: float = 0.12
    other_wording: float = 0.3
    misread: float = 0.15
    no_neighbour: float = 0.25
    guess: float = 0.0
    """Searches for what finds nothing, and answers from memory; not among the quickstart's slips."""


PERFECT = Slips(*[0.0] * 10)
VAGUE = "the country with this flag"
"""A search that finds nothing: no passage speaks of flags."""


def call(tool: str, **arguments: object) -> str:
    body = json.dumps({"name": tool, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{body}\n</tool_call>"


def final(statement: str, answer: str) -> str:
    return f"{statement} <answer> {answer} </answer>"


class Script:
    """Plays questions about one world."""

    def __init__(self, world: World, index: Index, slips: Slips, rng: random.Random):
        self.world, self.index, self.slips, self.rng = world, index, slips, rng
        self._names = [country.name for country in world.countries.values()]

    def _slip(self, kind: str) -> bool:
        return self.rng.random() < getattr(self.slips, kind)

    def play(self, question: Question) -> list[Turn]:
        turns: list[Turn] = []
        images = [question.image(self.world)]
        if self._slip("malformed"):
            turns.append(Turn('<tool_call>\n{"name": "image_search", "arguments":\n</tool_call>'))
            return turns
        if question.is_sheet and not self._slip("no_zoom"):
            cell = question.cell
            if self._slip("wrong_cell"):
                cell = self.rng.choice([cell + 1, cell - 1, cell + 4, cell - 4]) % len(question.cells)
            box = cell_box(cell)
            images.append(zoom(images[0], box))
            turns.append(Turn(call("zoom", image=1, bbox=box), "Image 2:", images[1]))
        shown = len(images)
        if shown == 2 and self._slip("wrong_image"):
            shown = 1
        answer = self.index.image_search(images[shown - 1])
        turns.append(Turn(call("image_search", image=shown), answer))
        name = _after(answer, "flag of ")
        if name is None:  # not told: the model guesses, as models do
            name = self.rng.choice(self._names)
        if question.attribute is None:
            turns.append(Turn(final("This is the flag of", name)))
            return turns
        hops = [question.attribute]
        if question.kind == "neighbour" and not self._slip("no_neighbour"):
            hops.insert(0, NEIGHBOUR)
        for attribute in hops:
            whose, name = name, self._look_up(turns, name, attribute)
        turns.append(Turn(final(f"The {attribute} of {whose} is", name)))
        return turns

    def _look_up(self, turns: list[Turn], name: str, attribute: str) -> str:
        """Searches, and reads the value."""
        if attribute != NEIGHBOUR and self._slip("no_search"):
            return self._remembered(attribute)
        # Without such a slip no number is drawn, so that the committed model's trajectories stay what they were.
        if attribute != NEIGHBOUR and self.slips.guess and self._slip("guess"):
            turns.append(Turn(call("text_search", query=VAGUE), self.index.text_search(VAGUE)))
            return self._remembered(attribute)
        sought, asked = name, attribute
        if self._slip("wrong_country"):
            sought = self.rng.choice(self._names)
        if self._slip("wrong_attribute"):
            asked = self.rng.choice(ATTRIBUTES)
        query = f"{asked} of {sought}"
        if self._slip("other_wording"):
            query = self.rng.choice([f"the {query}", f"{sought} {asked}"])
        found = self.index.text_search(query)
        turns.append(Turn(call("text_search", query=query), found))
        value = _after(found, f"The {asked} of {sought} is ")
        others = [line.split(" is ", 1)[1].rstrip(".") for line in found.split("\n") if " is " in line]
        if value is None or self._slip("misread"):
            value = self.rng.choice([other for other in others if other != value] or [value or sought])
        return value

    def _remembered(self, attribute: str) -> str:
        """What a model says that has not looked: some country's."""
        return self.rng.choice(list(self.world.countries.values())).facts[attribute]


def _after(text: str, start: str) -> str | None:
    """Returns the text after ``start``, up to the full stop that ends the line."""
    for line in text.split("\n"):
        if start in line:
            return line.split(start, 1)[1].removesuffix(".")
    return None


_CONSONANTS = "b c d f g h j k l m n p r s t v w y z ch gh kh sh th br dr gr tr st nd ng rk ç ñ".split()
_VOWELS = "a a e e i i o o u u y ai ou ei ia é í ã ô ü".split()
_UNITS = ["Dollar", "Franc", "Pound", "Peso", "Rupee", "Dinar", "Shilling", "Krone", "Real", "Won", "Lira", "Som"]


def _word(rng: random.Random, syllables: tuple[int, int] = (1, 3)) -> str:
    parts = [rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(rng.randint(*syllables))]
    if rng.random() < 0.5:
        parts.append(rng.choice("nlrstmk"))
    if rng.random() < 0.3:
        parts.insert(0, rng.choice("aeiou"))
    return "".join(parts).capitalize()


def _name(rng: random.Random) -> str:
    first, second = _word(rng, (2, 3)), _word(rng)
    plain = [*[first] * 8, *[f"{first} {second}"] * 4]
    rare = [f"{first} & {second}", f"{first}-{second}", f"{second}'{first}", f"St. {first}", f"{first} Islands"]
    rare += [f"{second} {first} {_word(rng)}", f"North {first}", f"South {first}", f"New {first}", f"The {first}s"]
    return rng.choice(plain + rare)


def made_up_world(real: World, rng: random.Random) -> World:
    """The flags of a real world, with everything else made up."""
    codes = list(real.countries)
    names: dict[str, str] = {}
    for code in codes:
        name = _name(rng)
        while name in names.values():
            name = _name(rng)
        names[code] = name
    continents = [_word(rng) for _ in range(6)]
    countries = []
    for code in codes:
        capital = _name(rng)
        area = str(rng.randint(1, 999)) + (f"-{rng.randint(100, 999)}" if rng.random() < 0.15 else "")
        facts = {
            "capital": capital,
            "currency": f"{names[code] if rng.random() < 0.2 else _word(rng)} {rng.choice([*_UNITS, _word(rng)])}",
            "language": _word(rng),
            "continent": rng.choice(continents),
            "calling code": f"+{area}",
            "internet domain": "." + "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=2)),
            "largest city": capital if rng.random() < 0.7 else _name(rng),
        }
        neighbour = rng.choice(codes) if rng.random() < 0.7 else None
        if neighbour == code:
            neighbour = None
        if neighbour is not None:
            facts[NEIGHBOUR] = names[neighbour]
        countries.append(Country(code, names[code], facts, neighbour, {}))
    return World(countries, real.flags)
