"""`misspelt.py` on the rollouts that `examples/audit` ships."""

from __future__ import annotations

import sys
from pathlib import Path

import misspelt

DATA = Path(__file__).parents[2] / "examples" / "audit" / "data"


def test_searches_for_names_that_are_none():
    calls = misspelt.searches([DATA, DATA])
    assert len(calls) == 2 * 348
    assert calls["last"].unique().tolist() == [6]
    names = calls.set_index("arguments")["names_country"].groupby(level=0).first()
    for query, expected in {
        "calling code of Pylippines": False,
        "capital of Bazil": False,
        "continent of Slovak": False,
        "the largest neighbour of Costa Rica": True,
        "internet domain of Taiwan": True,
        "capital of Congo - Kinshasa Islands": True,
    }.items():
        assert names[f'{{"query": "{query}"}}'] == expected
    failing = calls[calls["role"] == "failing"]
    assert (failing["match"] != "none").equals(failing["gate"] == "corrected")
    assert (failing.loc[failing["match"] == "equal", "similarity"] == 1.0).all()
    similar = failing[failing["match"] == "similar"]
    assert similar["similarity"].between(0.8, 1.0, inclusive="left").all()
    counts = misspelt.table(calls)
    assert counts.loc[False, ["equal", "similar", "none"]].tolist() == [0, 2 * 21, 2 * 48]
    assert counts.loc[True, ["equal", "similar", "none"]].tolist() == [2 * 28, 2 * 5, 2 * 53]
    assert (counts["before"] < counts["after"]).all()


def test_what_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["misspelt.py", str(DATA)])
    assert misspelt.main() == 0
    said = capsys.readouterr().out
    assert "no country         0       21    48   -0.73  -0.56" in said
    assert "30.1% of all text searches name no country in the first 5 steps" in said
