"""Links between the repository's documents: the file is there, and so is the heading."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
CODE = re.compile(r"```.*?```", re.DOTALL)
LINK = re.compile(r"\]\((?!https?:|mailto:)([^)#\s]*)(?:#([^)\s]+))?\)")
OURS = ("docs", "examples", "recipes", "benchmarks", "search_backends", "patches", "verl_tapo")
# What runs write, and what tests keep.
DOCUMENTS = sorted(
    path
    for path in [*ROOT.glob("*.md"), *(path for name in OURS for path in (ROOT / name).rglob("*.md"))]
    if not {"out", "outputs", "node_modules"} & set(path.relative_to(ROOT).parts)
)


@cache
def anchors(document: Path) -> frozenset[str]:
    """The headings' anchors, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", CODE.sub("", document.read_text()), re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return frozenset(re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in plain)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    for path, anchor in LINK.findall(CODE.sub("", document.read_text())):
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), path
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{path}#{anchor}"


def test_links_are_found():
    assert len(DOCUMENTS) > 15
    assert sum(len(LINK.findall(path.read_text())) for path in DOCUMENTS) > 50
    assert "similar-is-not-the-same" in anchors(ROOT / "docs" / "evidence.md")
