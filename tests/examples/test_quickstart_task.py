"""Flags & Facts: the questions can be answered, the held-out countries stay out, the tools take whatever comes."""

from __future__ import annotations

import asyncio
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import prepare
import pytest
from flags_and_facts import search
from flags_and_facts.questions import WEIGHTS, ask, cell_box, questions
from flags_and_facts.reward import compute_score
from flags_and_facts.script import PERFECT, Script, Slips, made_up_world
from flags_and_facts.search import Index, load_index, zoom
from flags_and_facts.world import load_world

from search_backends.toolbox import Toolbox
from verl_tapo.calls.call import fault_of

COUNTS = {"train": 60, "val": 20, "heldout": 30}
CONTINENTS = {"Africa", "Asia", "North America", "Europe", "Oceania", "South America"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    prepare.prepare(folder, COUNTS)
    return {name: pd.read_parquet(folder / f"{name}.parquet") for name in COUNTS}


def test_splits_share_no_country_and_no_question(data):
    train, heldout = load_world("train"), load_world("heldout")
    assert not set(train.countries) & set(heldout.countries)
    assert len(train.countries) + len(heldout.countries) == len(load_world().countries) > 180
    assert {name: len(frame) for name, frame in data.items()} == COUNTS
    rows = pd.concat(data.values())
    texts = rows["prompt"].map(lambda prompt: prompt[1]["content"])
    asked = list(zip(texts, rows["extra_info"].map(lambda info: info["country"]), strict=True))
    assert len(set(asked)) == len(asked)


def test_questions_may_be_such_that_guessing_pays(tmp_path):
    prepare.prepare(tmp_path, {"train": 30, "val": 2, "heldout": 4}, attributes=["continent"])
    for name in ("train", "val", "heldout"):
        rows = pd.read_parquet(tmp_path / f"{name}.parquet")
        assert all("the continent of" in prompt[1]["content"] for prompt in rows["prompt"])
        assert {answer for model in rows["reward_model"] for answer in model["ground_truth"]} <= CONTINENTS


def test_questions_may_be_of_some_kinds_alone(tmp_path):
    prepare.prepare(tmp_path, {"train": 30, "val": 2, "heldout": 4}, kinds=["flag", "sheet fact"])
    assert set(pd.read_parquet(tmp_path / "train.parquet")["ability"]) == {"flag", "sheet fact"}
    with pytest.raises(ValueError, match="the kinds flag, sheet ask for no attribute"):
        questions(load_world("train"), load_index("train"), 3, random.Random(0), ["capital"], ["flag", "sheet"])


def test_training_never_names_a_heldout_country(data):
    heldout = {country.name for country in load_world("heldout").countries.values()}
    assert not heldout & set(data["train"]["extra_info"].map(lambda info: info["country"]))
    for text in load_world("train").passages:  # all that training questions can find
        assert not any(f" of {name} is " in text or text.endswith(f" is {name}.") for name in heldout), text
    splits = {info["tools_kwargs"]["text_search"]["create_kwargs"]["split"] for info in data["train"]["extra_info"]}
    assert splits == {"train"}


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_every_question_can_be_answered_with_the_tools(split):
    world = load_world(split)
    index = load_index("train" if split == "train" else None)
    rng = random.Random(3)
    asked = questions(world, index, 80, rng)
    assert {question.kind for question in asked} == set(WEIGHTS)
    script = Script(world, index, PERFECT, rng)
    for question in asked:
        turns = script.play(question)
        assert compute_score("", turns[-1].said, question.answers)["acc"] == 1, question


def test_sloppy_scripts_fail_often_and_not_always():
    world, rng = load_world("train"), random.Random(5)
    index = load_index("train")
    script = Script(world, index, Slips(), rng)
    acc = [
        compute_score("", script.play(question)[-1].said, question.answers)["acc"]
        for question in questions(world, index, 200, rng)
    ]
    assert 0.3 < np.mean(acc) < 0.6


def test_a_script_that_guesses_finds_nothing_and_is_right_by_chance():
    world, index, rng = load_world("train"), load_index("train"), random.Random(5)
    script = Script(world, index, replace(PERFECT, guess=1.0), rng)
    acc = []
    for question in questions(world, index, 130, rng, ["continent"], ["fact"]):
        image, vague, said = script.play(question)
        assert "image_search" in image.said
        assert "text_search" in vague.said
        assert vague.answer == "Nothing found."
        acc.append(compute_score("", said.said, question.answers)["acc"])
    assert 0.1 < np.mean(acc) < 0.35


def test_made_up_worlds_share_no_name_with_the_real_one():
    real = load_world()
    names = {country.name for country in real.countries.values()}
    made_up = made_up_world(load_world("train"), random.Random(0))
    assert not names & {country.name for country in made_up.countries.values()}
    assert set(made_up.flags) == set(load_world("train").flags)


def test_a_sheet_has_to_be_zoomed_into():
    world, index = load_world("train"), load_index("train")
    for seed in range(10):
        question = ask(world, random.Random(seed), "sheet")
        sheet = question.image(world)
        assert index.image_search(sheet) == "No single flag found in this image."
        crop = zoom(sheet, cell_box(question.cell))
        assert world.countries[question.code].name in index.image_search(crop)
        left, top, right, bottom = cell_box(question.cell)
        nearly = zoom(sheet, [left + 5, top + 5, right + 5, bottom - 5])
        assert index.image_search(nearly) == index.image_search(crop)


SENSELESS = [
    ("text_search", {}),
    ("text_search", {"query": ["capital"]}),
    ("image_search", {"image": 2}),
    ("image_search", {"image": "1"}),
    ("zoom", {"image": 1, "bbox": "here"}),
    ("zoom", {"image": 1, "bbox": [0, 0, 1, 1]}),
    ("zoom", {"image": 1, "bbox": [0, 0, float("nan"), 1000]}),
    ("zoom", {"image": 1, "bbox": [600, 0, 400, 1000]}),
    ("zoom", {"image": 0, "bbox": [0, 0, 500, 500]}),
    ("calculator", {"image": 1}),
]


@pytest.mark.parametrize(("tool", "arguments"), SENSELESS)
def test_senseless_arguments_are_told_to_the_model(tool, arguments):
    image = ask(load_world("train"), random.Random(0), "flag").image(load_world("train"))
    with pytest.raises(ValueError, match=r"."):
        load_index("train").run(tool, arguments, [image])


@pytest.mark.parametrize(("tool", "arguments"), [case for case in SENSELESS if case[0] in prepare.TOOLS])
def test_senseless_arguments_are_the_models_fault(tool, arguments):
    """In veRL's own words for a tool that raises; but not counted as a tool that failed."""
    image = ask(load_world("train"), random.Random(0), "flag").image(load_world("train"))
    answer = asyncio.run(Toolbox(verls_tools()).call(tool, arguments, [image], {"split": "train"}))
    assert answer.status == "error"
    assert answer.text.startswith(f"Error executing tool '{tool}': ")
    assert fault_of({"status": answer.status, "metrics": answer.metrics}) == "model"


def test_a_broken_index_is_the_tools_own_fault(monkeypatch):
    tools = verls_tools()
    monkeypatch.setattr(sys.modules[type(tools[0]).__module__], "load_index", lambda split: None)
    answer = asyncio.run(Toolbox(tools).call("text_search", {"query": "France"}))
    assert answer.status == "error"
    assert fault_of({"status": answer.status, "metrics": answer.metrics}) == "infrastructure"


@pytest.mark.parametrize("query", ["", "the of", "🏴", "capital of " + "x" * 10_000, "SELECT *"])
def test_any_query_gets_an_answer(query):
    assert load_index("train").text_search(query)


def verls_tools():
    from verl.tools.tool_registry import initialize_tools_from_config

    return initialize_tools_from_config(str(Path(prepare.__file__).parent / "tools.yaml"))


def test_the_tools_are_verls():
    tools = {tool.name: tool for tool in verls_tools()}
    assert set(tools) == set(prepare.TOOLS)
    world = load_world("train")
    question = ask(world, random.Random(1), "sheet")
    agent_data = SimpleNamespace(image_data=[question.image(world)])

    async def use(name, arguments):
        instance, _ = await tools[name].create(create_kwargs={"split": "train"})
        response, _, _ = await tools[name].execute(instance, arguments, agent_data=agent_data)
        await tools[name].release(instance)
        return response

    async def play():
        zoomed = await use("zoom", {"image": 1, "bbox": cell_box(question.cell)})
        agent_data.image_data += zoomed.image
        return zoomed, await use("image_search", {"image": 2})

    zoomed, found = asyncio.run(play())
    assert zoomed.text == "Image 2:"
    assert found.text == f"This is the flag of {question.answers[0]}."


@pytest.mark.parametrize(
    ("said", "acc", "answered"),
    [
        ("The capital of X is <answer> São Tomé </answer>", 1, 1),
        ("<answer>sao tome</answer>", 1, 1),
        ("<answer>São Tomé</answer> no, <answer>Lisbon</answer>", 0, 1),
        ("São Tomé", 0, 0),
        ("<answer></answer>", 0, 1),
        ("", 0, 0),
    ],
)
def test_reward(said, acc, answered):
    score = compute_score("", said, np.array(["São Tomé"], dtype=object))
    assert score == {"score": acc, "acc": acc, "answered": answered}


def test_an_index_is_the_same_whoever_builds_it():
    world = load_world("train")
    first, second = Index(world), Index(load_world("train"))
    for country in list(world.countries.values())[:30]:
        query = f"currency of {country.name}"
        assert first.text_search(query) == second.text_search(query)


def test_rollouts_that_ask_at_once_share_an_index():
    search._index.cache_clear()
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(load_index, ["heldout"] * 8))) == 1
