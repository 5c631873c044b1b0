"""`docs/rule.md` links each part of the rule to its lines: each link is to the first line of the function it names.

python tests/rule/test_docs_rule.py mends the lines.
"""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "rule.md"
LINK = re.compile(r"\[`(\w+)`\]\(\.\./([\w/]+\.py)#L(\d+)\)")


def line_of(name, file):
    """Where the file defines a function of that name."""
    lines = (ROOT / file).read_text().splitlines()
    places = [number for number, line in enumerate(lines, 1) if re.match(rf"\s*def {name}\(", line)]
    assert places, f"{file} has no function {name}"
    return places[0]


def mended(text):
    return LINK.sub(lambda m: f"[`{m[1]}`](../{m[2]}#L{line_of(m[1], m[2])})", text)


def test_every_part_is_linked_to_its_lines():
    text = DOCUMENT.read_text()
    assert len(LINK.findall(text)) >= 20
    assert mended(text) == text


def test_the_parts_are_numbered_alike_everywhere():
    names = re.findall(r"^\| (\d)\. ([A-Z][\w ]+?) \|", DOCUMENT.read_text(), re.MULTILINE)
    assert [int(number) for number, _ in names] == list(range(1, 10))
    code = (ROOT / "verl_tapo" / "rule" / "credit.py").read_text()
    readme = (ROOT / "README.md").read_text()
    for number, name in names:
        assert re.search(rf"^{number}\. {name}:", readme, re.MULTILINE) or (number, name) == ("9", "Grounding"), name
        assert re.search(rf"^    {number}\. ", code, re.MULTILINE)


if __name__ == "__main__":
    DOCUMENT.write_text(mended(DOCUMENT.read_text()))
