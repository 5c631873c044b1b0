"""The floor that `search_backends` stands on: it runs without veRL and knows no recipe."""

import ast
from pathlib import Path

import pytest

import search_backends

FOLDER = Path(search_backends.__file__).parent
MODULES = sorted(FOLDER.rglob("*.py"))


# What is said once: what accepted answers are, which letters words are made of, how calls are
# written in a text, and how errors begin.
KNOWN = {
    "verl_tapo.answers.accepted",
    "verl_tapo.answers.letters",
    "verl_tapo.calls.formats",
    "verl_tapo.calls.limits",
}
ON_RAY = {"nodes.py", "retrieval/on_ray.py"}  # which are about Ray


@pytest.mark.parametrize("module", MODULES, ids=[str(module.relative_to(FOLDER)) for module in MODULES])
def test_no_module_imports_verl_a_recipe_or_more_of_the_plug_in_than_it_must(module):
    imported = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module)
    roots = {name.split(".")[0] for name in imported - KNOWN}
    foreign = {"verl", "verl_tapo", "search_agent", "omegaconf"} | (
        set() if str(module.relative_to(FOLDER)) in ON_RAY else {"ray"}
    )
    assert not roots & foreign
