"""Writes the questions as parquet files in veRL's format.

    python examples/quickstart/prepare.py --out examples/quickstart/out/data

``train.parquet`` and ``val.parquet`` ask about the training countries, ``heldout.parquet`` about the others, which
occur in no training question, in no training image and in no answer of a tool during training.
"""

from __future__ import annotations

import argparse
import io
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pandas as pd
from flags_and_facts.questions import SYSTEM, WEIGHTS, Kind, Question, questions
from flags_and_facts.search import load_index
from flags_and_facts.world import ATTRIBUTES, Split, World, load_world

TOOLS = ("image_search", "text_search", "zoom")
COUNTS = {"train": 1024, "val": 96, "heldout": 96}
"""Questions in each file."""


def row(question: Question, world: World, index: int, name: str, searched: Split | None) -> dict[str, Any]:
    """Returns one question as veRL's `RLHFDataset` reads it; ``searched`` limits what the tools may find."""
    image = io.BytesIO()
    question.image(world).save(image, format="PNG")
    return {
        "data_source": f"flags_and_facts/{name}",
        "prompt": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": f"<image>{question.text}"}],
        "images": [{"bytes": image.getvalue()}],
        "ability": question.kind,
        "reward_model": {"style": "rule", "ground_truth": list(question.answers)},
        "extra_info": {
            "index": index,
            "kind": question.kind,
            "country": world.countries[question.code].name,
            "need_tools_kwargs": True,
            "tools_kwargs": {tool: {"create_kwargs": {"split": searched}} for tool in TOOLS},
        },
    }


def prepare(
    out: Path,
    counts: dict[str, int],
    seed: int = 0,
    attributes: Sequence[str] = ATTRIBUTES,
    kinds: Sequence[Kind] = tuple(WEIGHTS),
) -> None:
    """Writes ``{name}.parquet`` for each name in ``counts``; no question is in two of them.

    ``attributes`` and ``kinds``: what is asked. Few answers do not make this policy guess: it was warm-started to copy
    (`warm_start.py --guess` makes one that does).
    """
    out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    world, index = load_world("train"), load_index("train")
    asked = questions(world, index, counts["train"] + counts["val"], rng, attributes, kinds)
    heldout_world = load_world("heldout")
    # Held-out questions search among all countries: more to confuse, nothing to help.
    heldout = questions(heldout_world, load_index(), counts["heldout"], rng, attributes, kinds)
    parts: list[tuple[str, list[Question], World, Split | None]] = [
        ("train", asked[: counts["train"]], world, "train"),
        ("val", asked[counts["train"] :], world, "train"),
        ("heldout", heldout, heldout_world, None),
    ]
    for name, chosen, of, searched in parts:
        rows = [row(question, of, number, name, searched) for number, question in enumerate(chosen)]
        pd.DataFrame(rows).to_parquet(out / f"{name}.parquet")


def write(
    description: str | None,
    counts: dict[str, int],
    kinds: Sequence[Kind],
    prepare: Callable[..., None],
    switches: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """The command: asks ``prepare`` for the questions that the command line wants, and prints the files' sizes.

    ``switches``: further keyword arguments of ``prepare`` that are true or false, and what they mean.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    for name, count in counts.items():
        parser.add_argument(f"--{name}", type=int, default=count, help="number of questions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--attributes", nargs="+", choices=ATTRIBUTES, default=ATTRIBUTES, help="ask for these alone; default: all"
    )
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds, help="of questions; default: all")
    for name, meaning in switches.items():
        parser.add_argument(f"--{name.replace('_', '-')}", action="store_true", help=meaning)
    args = parser.parse_args()
    numbers = {name: getattr(args, name) for name in counts}
    chosen = {name: getattr(args, name) for name in switches}
    try:
        prepare(args.out, numbers, args.seed, args.attributes, args.kinds, **chosen)
    except ValueError as problem:
        parser.error(str(problem))
    print(*(f"{file}  {file.stat().st_size // 1024} KiB" for file in sorted(args.out.glob("*.parquet"))), sep="\n")


if __name__ == "__main__":
    write(__doc__, COUNTS, tuple(WEIGHTS), prepare)
