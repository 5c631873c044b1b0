"""Questions of one to three steps, each with the calls that answer it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from flags_and_facts.search import Index, zoom
from flags_and_facts.world import ATTRIBUTES, NEIGHBOUR, Country, World

Kind = Literal["flag", "fact", "neighbour", "sheet", "sheet fact"]

WEIGHTS: dict[Kind, int] = {"flag": 1, "fact": 4, "neighbour": 3, "sheet": 1, "sheet fact": 3}
COLUMNS, ROWS = 4, 3

SYSTEM = (
    "Answer the question about the image. Look things up with the tools; give the answer as <answer> answer </answer>."
)


@dataclass(frozen=True)
class Question:
    kind: Kind
    text: str
    cells: tuple[str, ...]
    """Codes of the flags in the image: one, or the cells of a sheet, row by row."""
    cell: int
    """The cell that is asked about."""
    attribute: str | None
    answers: tuple[str, ...]
    """The first is the one the passages give."""

    @property
    def code(self) -> str:
        return self.cells[self.cell]

    @property
    def is_sheet(self) -> bool:
        return len(self.cells) > 1

    def image(self, world: World) -> Image.Image:
        """RGB; 84 x 63 pixels for one flag, four by three times that for a sheet."""
        flags = [world.flags[code] for code in self.cells]
        if not self.is_sheet:
            return flags[0]
        width, height = flags[0].size
        sheet = Image.new("RGB", (COLUMNS * width, ROWS * height))
        for position, flag in enumerate(flags):
            sheet.paste(flag, (position % COLUMNS * width, position // COLUMNS * height))
        return sheet


def cell_box(cell: int) -> list[int]:
    """The cell's region in thousandths of the sheet: left, top, right, bottom."""
    row, column = divmod(cell, COLUMNS)
    return [
        round(1000 * column / COLUMNS),
        round(1000 * row / ROWS),
        round(1000 * (column + 1) / COLUMNS),
        round(1000 * (row + 1) / ROWS),
    ]


def ask(world: World, rng: random.Random, kind: Kind, attributes: Sequence[str] = ATTRIBUTES) -> Question:
    """A question about a country of this world; ``attributes``: what may be asked of it."""
    countries = list(world.countries.values())
    if kind == "neighbour":
        countries = [country for country in countries if country.neighbour in world.countries]
    country = rng.choice(countries)
    attribute = None if kind in ("flag", "sheet") else rng.choice(attributes)
    cells, cell = (country.code,), 0
    shown = "this flag"
    if kind in ("sheet", "sheet fact"):
        others = rng.sample([code for code in world.countries if code != country.code], COLUMNS * ROWS - 1)
        cell = rng.randrange(COLUMNS * ROWS)
        cells = (*others[:cell], country.code, *others[cell:])
        row, column = divmod(cell, COLUMNS)
        shown = f"the flag in row {row + 1}, column {column + 1}"
    about: Country = country
    whose = f"the country with {shown}"
    if kind == "neighbour":
        assert country.neighbour is not None
        about = world.countries[country.neighbour]
        whose = f"the {NEIGHBOUR} of {whose}"
    if attribute is None:
        return Question(kind, f"Which country has {shown}?", cells, cell, None, (country.name,))
    answers = (about.facts[attribute], *about.accepted.get(attribute, ()))
    text = f"What is the {attribute} of {whose}?"
    return Question(kind, text, cells, cell, attribute, tuple(dict.fromkeys(answers)))


def answerable(question: Question, world: World, index: Index) -> bool:
    """Returns whether the direct way leads to the answer; search engines have blind spots, and so
    has this one."""
    image = question.image(world)
    if question.is_sheet:
        image = zoom(image, cell_box(question.cell))
    country = world.countries[question.code]
    if f" {country.name}." not in index.image_search(image):
        return False
    hops = [NEIGHBOUR] if question.kind == "neighbour" else []
    if question.attribute is not None:
        hops.append(question.attribute)
    for attribute in hops:
        if f"The {attribute} of {country.name} is {country.facts[attribute]}." not in index.text_search(
            f"{attribute} of {country.name}"
        ):
            return False
        if attribute == NEIGHBOUR:
            country = world.countries[country.neighbour or ""]
    return True


def questions(
    world: World,
    index: Index,
    count: int,
    rng: random.Random,
    attributes: Sequence[str] = ATTRIBUTES,
    kinds: Sequence[Kind] = tuple(WEIGHTS),
) -> list[Question]:
    """``count`` different questions of these kinds, all of them answerable; with some attributes only, they ask for
    those alone."""
    named = len(attributes) == len(ATTRIBUTES)
    weights = {kind: WEIGHTS[kind] for kind in kinds if named or kind not in ("flag", "sheet")}
    if not weights:
        raise ValueError(f"questions of the kinds {', '.join(kinds)} ask for no attribute")
    chosen, parts = list(weights), list(weights.values())
    return different(
        count,
        lambda: ask(world, rng, rng.choices(chosen, parts)[0], attributes),
        lambda question: answerable(question, world, index),
    )


def different(count: int, draw: Callable[[], Question], fits: Callable[[Question], bool]) -> list[Question]:
    """``count`` questions that differ in text or country, of those that ``draw`` returns and that fit.

    Raises:
        ValueError: A hundred times as many draws did not bring so many.
    """
    found: dict[tuple[str, str], Question] = {}
    for _ in range(100 * count):
        if len(found) == count:
            break
        question = draw()
        if fits(question):
            found.setdefault((question.text, question.code), question)
    if len(found) < count:
        raise ValueError(f"{count} different questions cannot be asked: {len(found)} were found")
    return list(found.values())
