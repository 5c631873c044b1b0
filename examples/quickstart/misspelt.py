"""Counts the text searches of a run that name no country, and shows what TAPO makes of them.

    python examples/quickstart/misspelt.py out/quickstart/rollouts                   # the rollouts of one or more runs

Of a query that names none, like "capital of Bazil", the search finds something else: it is not the action of a witness
that asks for "capital of Brazil", however similar the two are.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from flags_and_facts.world import load_world

from verl_tapo.audit import audit
from verl_tapo.rule.figures import EQUAL

ENDS = 5  # steps


def searches(runs: Sequence[Path]) -> pd.DataFrame:
    """The text searches of all runs, a row each, with ``names_country`` and ``match``: "equal", "similar", "none"."""
    frames = [found.assign(last=found["step"].max()) for found in (audit(run).calls for run in runs)]
    calls = pd.concat(frames)
    calls = calls[calls["tool"] == "text_search"]
    names = "|".join(re.escape(country.name) for country in load_world().countries.values())
    query = calls["arguments"].map(lambda text: str(json.loads(text).get("query")))
    match = (calls["similarity"] >= EQUAL).map({True: "equal", False: "similar"}).where(calls["gate"] == "corrected")
    return calls.assign(
        names_country=query.str.contains(rf"(?<!\w)(?:{names})(?!\w)", case=False, regex=True),
        match=match.fillna("none"),
    )


def table(calls: pd.DataFrame) -> pd.DataFrame:
    """Failing searches with and without a country: how many were corrected, and their mean advantage."""
    failing = calls[calls["role"] == "failing"]
    groups = failing.groupby("names_country")
    counts = failing.groupby(["names_country", "match"]).size().unstack(fill_value=0)
    counts = counts.reindex(columns=["equal", "similar", "none"], fill_value=0)
    return counts.assign(before=groups["before"].mean(), after=groups["after"].mean())


def main() -> int:
    """Prints the table, and how often no country is named early and late."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("runs", type=Path, nargs="+", help="a folder of rollouts that veRL dumped")
    calls = searches(arguments.parse_args().runs)
    print("Text searches of failing rollouts, by the witness that corrects them, and their mean advantage:")
    print(table(calls).rename(index={True: "a country", False: "no country"}).round(2).to_string())
    for when, of in (
        ("first", calls[calls["step"] <= ENDS]),
        ("last", calls[calls["step"] > calls["last"] - ENDS]),
    ):
        print(f"{1 - of['names_country'].mean():.1%} of all text searches name no country in the {when} {ENDS} steps")
    return 0


if __name__ == "__main__":
    sys.exit(main())
