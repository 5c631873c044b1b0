"""The floor that `search_backends` stands on: it runs without veRL and knows no recipe."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import flags_and_facts
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


def imports(module):
    imported = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module)
    return imported


@pytest.mark.parametrize("module", MODULES, ids=[str(module.relative_to(FOLDER)) for module in MODULES])
def test_no_module_imports_verl_a_recipe_or_more_of_the_plug_in_than_it_must(module):
    roots = {name.split(".")[0] for name in imports(module) - KNOWN}
    foreign = {"verl", "verl_tapo", "search_agent", "omegaconf"} | (
        set() if str(module.relative_to(FOLDER)) in ON_RAY else {"ray"}
    )
    assert not roots & foreign


SEARCH = ["search_backends.retrieval.bm25", "flags_and_facts.search"]


@pytest.mark.parametrize("before", ["", "import jax, jax.lax", "import jax"])
@pytest.mark.parametrize("module", SEARCH)
def test_searching_starts_no_jax(module, before, tmp_path):
    """Its CUDA build would take three quarters of a GPU's memory; and sort equal scores by another rule."""
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax" / "__init__.py").touch()
    (tmp_path / "jax" / "lax.py").write_text("def top_k(scores, k):\n    raise SystemExit('JAX was started')\n")
    script = f"""
import sys
{before}
loaded = {{name: sys.modules[name] for name in ("jax", "jax.lax") if name in sys.modules}}
import {module}
assert loaded == {{name: sys.modules[name] for name in ("jax", "jax.lax") if name in sys.modules}}
import bm25s.selection
assert not bm25s.selection.JAX_IS_AVAILABLE
import jax.lax
"""
    examples = Path(flags_and_facts.__file__).parents[1]
    path = os.pathsep.join(map(str, [tmp_path, examples, FOLDER.parent]))
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_bm25s_is_imported_in_one_place():
    modules = [*MODULES, *(FOLDER.parent / "examples").rglob("*.py"), *(FOLDER.parent / "recipes").rglob("*.py")]
    importing = {module.name for module in modules if "bm25s" in {name.split(".")[0] for name in imports(module)}}
    assert importing == {"bm25s_alone.py"}
