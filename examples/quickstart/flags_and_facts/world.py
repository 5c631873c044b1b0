"""The countries, their facts, and the passages that state them."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from PIL import Image

DATA = Path(__file__).parent / "data"

Split = Literal["train", "heldout"]

ATTRIBUTES = ("capital", "currency", "language", "continent", "calling code", "internet domain")
"""The attributes that questions ask for."""
NEIGHBOUR = "largest neighbour"
OTHERS = (NEIGHBOUR, "largest city")
"""Further attributes in the passages: a step on the way, and one that is easily taken for the
capital."""


@dataclass(frozen=True)
class Country:
    code: str
    name: str
    facts: dict[str, str]
    """The country's facts by attribute. "largest neighbour" is one of them, and missing on islands.
    """
    neighbour: str | None
    """Code of the largest neighbour, by area."""
    accepted: dict[str, tuple[str, ...]]
    """Answers that are right too: a country with several official languages."""


class World:
    """Some countries, their flags (RGB, 84 x 63 pixels) and the passages about them."""

    def __init__(self, countries: list[Country], flags: dict[str, Image.Image]):
        self.countries = {country.code: country for country in countries}
        self.flags = {code: flags[code] for code in self.countries}

    @cached_property
    def passages(self) -> list[str]:
        """One for each fact; a neighbour outside this world is not spoken of."""
        return [
            passage(country.name, attribute, country.facts[attribute])
            for country in self.countries.values()
            for attribute in (*ATTRIBUTES, *OTHERS)
            if attribute in country.facts and not (attribute == NEIGHBOUR and country.neighbour not in self.countries)
        ]


def passage(name: str, attribute: str, value: str) -> str:
    return f"The {attribute} of {name} is {value}."


def _country(entry: dict[str, Any], others: dict[str, dict[str, Any]]) -> Country:
    facts = {
        "capital": entry["capital"],
        "currency": entry["currency"],
        "language": entry["languages"][0],
        "continent": entry["continent"],
        "calling code": entry["calling_code"],
        "internet domain": entry["domain"],
        "largest city": entry["largest_city"],
    }
    neighbours = [code for code in entry["neighbours"] if code in others]
    largest = max(neighbours, key=lambda code: others[code]["area"], default=None)
    if largest is not None:
        facts[NEIGHBOUR] = others[largest]["name"]
    return Country(entry["code"], entry["name"], facts, largest, {"language": tuple(entry["languages"])})


def load_world(split: Split | None = None) -> World:
    """The countries of a split, or all of them. What is said of a country is the same in both."""
    entries = json.loads((DATA / "countries.json").read_text(encoding="utf-8"))
    others = {entry["code"]: entry for entry in entries}
    heldout = _heldout(others)
    codes = [code for code in others if split is None or (code in heldout) == (split == "heldout")]
    flags = {code: Image.open(DATA / "flags" / f"{code}.png").convert("RGB") for code in codes}
    return World([_country(others[code], others) for code in codes], flags)


def _heldout(entries: dict[str, dict[str, Any]]) -> set[str]:
    """Returns about a quarter of the countries, with some of their neighbours, so that questions can link them."""
    rng = random.Random(7)
    held: set[str] = set()
    while len(held) < len(entries) // 4:
        code = rng.choice(sorted(set(entries) - held))
        held.update([code, *sorted(entries[code]["neighbours"])[:3]])
    return held
