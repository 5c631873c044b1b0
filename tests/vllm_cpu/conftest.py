"""The recipe, its retrieval service and its data, as in its own tests; and what the text-only runs share."""

import pytest
from recipe.test_recipe_run import data, index, recipe, service

__all__ = ["data", "index", "recipe", "service", "text_world"]


@pytest.fixture(scope="session")
def text_world(tmp_path_factory):
    from vllm_cpu.text_world import make_text_world  # needs vLLM

    return make_text_world(tmp_path_factory.mktemp("text"))
