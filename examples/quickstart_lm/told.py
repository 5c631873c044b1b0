"""Flags & Facts in words: the quickstart's questions about a named country, as parquet files in veRL's format.

    python examples/quickstart_lm/told.py --out examples/quickstart_lm/out/data

``train.parquet`` asks about the training countries, ``heldout.parquet`` about the others, which occur in no training
question and in no answer of a tool during training.

    python examples/quickstart_lm/told.py --out FOLDER --kinds neighbour --train 400
    python examples/quickstart_lm/told.py --out FOLDER --attributes continent --from-memory --train 200

ask for less, so that there are fewer different questions. With ``--from-memory`` one of the two worked examples answers
without a search. So does the model then, and it knows every third continent.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "quickstart"))

from flags_and_facts.questions import Kind, Question, answerable, ask, different
from flags_and_facts.search import Index, load_index
from flags_and_facts.world import ATTRIBUTES, Split, World, load_world
from prepare import write

COUNTS = {"train": 640, "heldout": 48}
"""Questions in each file."""
KINDS: dict[Kind, int] = {"fact": 3, "neighbour": 1}
"""How often each kind is asked, in parts."""
SYSTEM = "Look facts up with text_search, then give the <answer>."
EXAMPLES = (("currency", "Japan"), ("capital", "Kenya"))
"""What precedes every question: without two worked examples the model hardly ever writes a valid call."""
REMEMBERED = ("continent", "Kenya")
"""The worked example that answers from memory, where one is to."""


def questions(
    world: World,
    index: Index,
    count: int,
    rng: random.Random,
    attributes: Sequence[str] = ATTRIBUTES,
    kinds: Sequence[Kind] = tuple(KINDS),
) -> list[Question]:
    """``count`` different questions that name their country, all of them answerable.

    Raises:
        ValueError: There are not so many.
    """
    parts = [KINDS[kind] for kind in kinds]

    def draw() -> Question:
        question = ask(world, rng, rng.choices(kinds, parts)[0], attributes)
        name = world.countries[question.code].name
        return replace(question, text=question.text.replace("the country with this flag", name))

    return different(count, draw, lambda question: answerable(question, world, index))


def call(query: str) -> str:
    """A call of the search, as the format hermes has it."""
    arguments = json.dumps({"name": "text_search", "arguments": {"query": query}})
    return f"<tool_call>\n{arguments}\n</tool_call>"


def worked_example(attribute: str, name: str, from_memory: bool = False) -> list[dict[str, str]]:
    """A question, the call, what the search says, and the answer; the question and the answer ``from_memory``."""
    world = load_world("train")
    (country,) = (country for country in world.countries.values() if country.name == name)
    search = [
        {"role": "assistant", "content": call(f"{attribute} of {name}")},
        {"role": "tool", "content": load_index("train").text_search(f"{attribute} of {name}")},
    ]
    return [
        {"role": "user", "content": f"What is the {attribute} of {name}?"},
        *([] if from_memory else search),
        {"role": "assistant", "content": f"<answer>{country.facts[attribute]}</answer>"},
    ]


@cache
def beginning(from_memory: bool = False) -> list[dict[str, str]]:
    """The conversation before a question."""
    examples = [worked_example(*example) for example in EXAMPLES]
    if from_memory:
        examples = [worked_example(*REMEMBERED, from_memory=True), examples[0]]
    return [{"role": "system", "content": SYSTEM}, *chain.from_iterable(examples)]


def row(
    question: Question, world: World, index: int, name: str, searched: Split | None, from_memory: bool = False
) -> dict[str, Any]:
    """Returns one question as veRL's `RLHFDataset` reads it; ``searched`` limits what the tool may find."""
    return {
        "data_source": f"flags_and_facts/{name}",
        "prompt": [*beginning(from_memory), {"role": "user", "content": question.text}],
        "ability": question.kind,
        "reward_model": {"style": "rule", "ground_truth": list(question.answers)},
        "extra_info": {
            "index": index,
            "kind": question.kind,
            "country": world.countries[question.code].name,
            "need_tools_kwargs": True,
            "tools_kwargs": {"text_search": {"create_kwargs": {"split": searched}}},
        },
    }


def prepare(
    out: Path,
    counts: dict[str, int] = COUNTS,
    seed: int = 0,
    attributes: Sequence[str] = ATTRIBUTES,
    kinds: Sequence[Kind] = tuple(KINDS),
    from_memory: bool = False,
) -> None:
    """Writes ``train.parquet`` and ``heldout.parquet``; ``attributes`` and ``kinds``: what is asked.

    ``from_memory``: a worked example answers without a search.
    """
    out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    parts: list[tuple[str, Split, Split | None]] = [("train", "train", "train"), ("heldout", "heldout", None)]
    for name, split, searched in parts:
        world = load_world(split)
        asked = questions(world, load_index(searched), counts[name], rng, attributes, kinds)
        rows = [row(question, world, number, name, searched, from_memory) for number, question in enumerate(asked)]
        pd.DataFrame(rows).to_parquet(out / f"{name}.parquet")


def main() -> None:
    """The command."""
    write(__doc__, COUNTS, tuple(KINDS), prepare, {"from_memory": "a worked example answers without a search"})


if __name__ == "__main__":
    main()
