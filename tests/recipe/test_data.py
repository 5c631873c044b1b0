"""Data preparation, on small files of the shapes in which the public data sets come."""

import asyncio
import base64
import csv
import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from PIL import Image
from search_agent.data import prepare
from search_agent.prompts import system_prompt
from search_agent.tools import ImageSearch, TextSearch, Zoom

from search_backends.datasets import convert_image_results

MODEL = Path(__file__).resolve().parents[2] / "examples" / "quickstart" / "flags_and_facts" / "model"


def picture(number, size=(80, 60), kind="PNG", **options):
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    coarse.resize(size, Image.Resampling.BICUBIC).save(buffer, format=kind, **options)
    return buffer.getvalue()


def fvqa(number, question=None, answer=None, image=None):
    return {
        "data_id": f"fvqa_{number}",
        "prompt": [{"role": "user", "content": question or f"Who built house {number}?"}],
        "images": [{"bytes": image or picture(number), "path": None}],
        "reward_model": {
            "ground_truth": answer or f"builder {number}",
            "candidate_answers": json.dumps([f"Mr Builder {number}", f"builder {number}"]),
            "style": "rule",
        },
        "data_source": "mmsearch_r1/fvqa",
        "category": "search_required",
    }


def write_parquet(path, rows):
    parquet.write_table(arrow.Table.from_pylist(rows), path)
    return path


def rows_of(path):
    return parquet.read_table(path).to_pylist()


def run(tmp_path, *arguments):
    return prepare.main([*map(str, arguments), "--out", str(tmp_path / "out")])


def summary(tmp_path):
    return {each["name"]: each for each in json.loads((tmp_path / "out" / "summary.json").read_text())["sources"]}


def test_fvqa(tmp_path, capsys):
    file = write_parquet(tmp_path / "fvqa.parquet", [fvqa(number) for number in range(3)])
    assert run(tmp_path, f"fvqa_train={file}") == 0
    (first, *_), out = rows_of(tmp_path / "out" / "fvqa_train.parquet"), capsys.readouterr().out
    assert first["data_source"] == "fvqa_train"
    assert first["prompt"] == [{"role": "user", "content": "<image>Who built house 0?"}]
    assert first["images"] == [{"bytes": picture(0)}]
    assert first["reward_model"] == {"style": "rule", "ground_truth": ["builder 0", "Mr Builder 0"]}
    info = first["extra_info"]
    assert (info["split"], info["data_id"], info["category"]) == ("train", "fvqa_0", "search_required")
    assert info["question"] == "Who built house 0?"
    assert info["image_keys"] == [hashlib.sha256(picture(0)).hexdigest()]
    assert "tools_kwargs" not in info  # tools may change, and the data stays
    assert "fvqa_train" in out
    assert "reward_model" in out


def shapes(tmp_path):
    """A file of each public data set's shape: name -> source, more arguments, question, accepted answers."""
    images = tmp_path / "images"
    (images / "deep").mkdir(parents=True)
    (images / "deep" / "oven_1.jpg").write_bytes(picture(1, kind="JPEG"))
    (images / "2.png").write_bytes(picture(2))
    more = ["--images", images]
    infoseek = tmp_path / "infoseek_val.jsonl"
    row = {"data_id": "v1", "image_id": "oven_1", "question": "How high?", "answer": ["12 m"], "data_split": "val"}
    infoseek.write_text(
        json.dumps({**row, "answer_eval": ["12 metres", {"wikidata": ["12.0"], "range": [11, 13]}]}) + "\n"
    )
    yield "infoseek", infoseek, more, "How high?", ["12 m", "12 metres", "12.0", '{"range": [11.0, 13.0]}']

    encoded = base64.b64encode(picture(3, size=(300, 200))).decode()
    simple = {"data_id": 7, "image": encoded, "question": "这是什么?", "answer": "塔", "vqa_category": "logo"}
    yield "simplevqa", write_parquet(tmp_path / "simple.parquet", [simple]), [], "这是什么?", ["塔"]

    live = tmp_path / "qa.json"
    entry = {"sample_id": 5, "query": "Which match?", "gt_answer": "the final", "img_path": "images/2.png"}
    live.write_text(json.dumps({"version": 1, "data": [{**entry, "Ground_Truth_List": ["the final", "final"]}]}))
    yield "livevqa", live, [], "Which match?", ["the final", "final"]

    search = {"sample_id": "m1", "query": "When?", "query_image": {"bytes": picture(4), "path": "a.png"}}
    search |= {"gt_answer": "2024", "alternative_gt_answers": ["in 2024"], "area": "news"}
    yield "mmsearch", write_parquet(tmp_path / "end2end.parquet", [search]), [], "When?", ["2024", "in 2024"]

    high = {"id": "h1", "question": "What is written there?", "answer": "exit", "image": {"bytes": picture(5)}}
    yield "hr_mmsearch", write_parquet(tmp_path / "hr.parquet", [high]), [], "What is written there?", ["exit"]

    mat = tmp_path / "MAT-Search.json"
    mat.write_text(json.dumps([{"id": 1, "question": "Who?", "answer": ["Ada", "Ada L."], "image_path": "2.png"}]))
    yield "mat_search", mat, more, "Who?", ["Ada", "Ada L."]

    own = tmp_path / "own.csv"
    with own.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["q", "a", "file"], ["Red?", "yes", "images/2.png"]])
    yield "custom_own", own, ["--map", "question=q,answer=a,image=file"], "Red?", ["yes"]


def test_every_data_set_s_shape(tmp_path):
    for name, file, more, question, answers in shapes(tmp_path):
        assert run(tmp_path, f"{name}={file}", *more) == 0, name
        (row,) = rows_of(tmp_path / "out" / f"{name}.parquet")
        assert row["extra_info"]["question"] == question
        assert row["reward_model"]["ground_truth"] == answers
        assert len(row["images"]) == 1
        assert row["extra_info"]["split"] == "test"


def test_all_files_have_the_same_columns(tmp_path):
    schemas = set()
    for name, file, more, *_ in shapes(tmp_path):
        run(tmp_path, f"{name}={file}", *more)
        schemas.add(str(parquet.read_schema(tmp_path / "out" / f"{name}.parquet")))
    assert len(schemas) == 1


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ({"wikidata": 0, "range": [0, 0]}, ["0", '{"range": [0.0, 0.0]}']),
        ({"wikidata": 1.0, "range": [0.9, 1.1]}, ["1.0", '{"range": [0.9, 1.1]}']),
        (0, ["0"]),
        ({"target": ["Paris"]}, ["Paris"]),
        ({"text": "Paris"}, "no answer: ground_truth is a mapping of ['text']; answers are read from target, "),
        (float("nan"), "no answer: ground_truth has no accepted answer"),
        ("", "no answer"),
    ],
)
def test_answers_of_other_forms(tmp_path, answer, expected):
    (tmp_path / "p.png").write_bytes(picture(0))
    good = {"question": "Who?", "answer": "Ada", "image": "p.png"}
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, [good, {**good, "question": "Q", "answer": answer}])))
    assert run(tmp_path, f"custom_own={tmp_path / 'own.jsonl'}", "--max-dropped", "0.5") == 0
    if isinstance(expected, list):
        assert rows_of(tmp_path / "out" / "custom_own.parquet")[1]["reward_model"]["ground_truth"] == expected
    else:
        (note,) = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
        assert note["reason"].startswith(expected)
        assert summary(tmp_path)["custom_own"]["dropped"] == {"no answer": 1}


def test_training_rows_that_occur_in_evaluation_are_left_out(tmp_path):
    near = io.BytesIO()
    Image.open(io.BytesIO(picture(2))).resize((160, 120)).save(near, format="JPEG", quality=60)
    rows = [
        fvqa(0),
        fvqa(1, question="  WHO built   house 1"),  # the same question of the same image
        fvqa(9, question="Name the builder", answer="Builder 2", image=near.getvalue()),  # same answer, near image
        fvqa(3, answer="someone else", image=picture(2)),  # the same image, something else is asked
        fvqa(0),  # twice
    ]
    train = write_parquet(tmp_path / "train.parquet", rows)
    test = write_parquet(tmp_path / "test.parquet", [fvqa(1), fvqa(2)])
    assert run(tmp_path, f"fvqa_train={train}", f"fvqa_test={test}") == 0
    assert [row["extra_info"]["data_id"] for row in rows_of(tmp_path / "out" / "fvqa_train.parquet")] == [
        "fvqa_0",
        "fvqa_3",
    ]
    assert summary(tmp_path)["fvqa_train"]["dropped"] == {"twin in evaluation": 2, "twin within the set": 1}
    notes = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
    assert [note["row"] for note in notes] == ["train.parquet, row 2", "train.parquet, row 3", "train.parquet, row 5"]
    assert "fvqa_test" in notes[0]["reason"]
    made_earlier = tmp_path / "out" / "fvqa_test.parquet"
    arguments = [f"fvqa_train={train}", "--dedupe-against", made_earlier]
    assert prepare.main([*map(str, arguments), "--out", str(tmp_path / "again")]) == 0
    assert rows_of(tmp_path / "again" / "fvqa_train.parquet") == rows_of(tmp_path / "out" / "fvqa_train.parquet")


@pytest.mark.long
def test_bad_rows_are_counted_and_many_are_refused(tmp_path, capsys):
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, format="PNG")
    rows = [fvqa(number) for number in range(5)]
    rows[1]["images"] = [{"bytes": b"no image", "path": None}]
    rows[2]["images"] = [{"bytes": bomb.getvalue(), "path": None}]
    rows[3]["prompt"] = [{"role": "user", "content": " <image> "}]
    rows[4]["images"] = []
    file = write_parquet(tmp_path / "bad.parquet", rows)
    assert run(tmp_path, f"fvqa_test={file}") == 1
    assert "4 of 5 rows of fvqa_test cannot be used" in capsys.readouterr().err
    assert summary(tmp_path)["fvqa_test"]["dropped"] == {"image unreadable": 2, "no image": 1, "no question": 1}
    assert run(tmp_path, f"fvqa_test={file}", "--max-dropped", "0.9") == 0


def small(kind, **options):
    return picture(1, size=(30, 28), kind=kind, **options)


TINY = small("JPEG", quality=5)
ENCODED = base64.b64encode(TINY).decode()


def one_image(tmp_path, value, **more):
    """What becomes of a row with that image, beside a good one: the image's key, or the reason."""
    (tmp_path / "good.png").write_bytes(picture(0))
    rows = [{"question": "Q", "answer": "a", "image": "good.png"}, {"question": "R", "answer": "a", "image": value}]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = [part for name, option in more.items() for part in (f"--{name}", option)]
    assert run(tmp_path, f"custom_own={tmp_path / 'own.jsonl'}", "--max-dropped", "0.5", *options) == 0
    notes = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
    if notes:
        assert len(rows_of(tmp_path / "out" / "custom_own.parquet")) == 1
        return notes[0]["reason"]
    row = rows_of(tmp_path / "out" / "custom_own.parquet")[1]
    return row["extra_info"]["image_keys"]


@pytest.mark.parametrize(
    "text",
    [
        ENCODED,
        "\n".join(ENCODED[start : start + 76] for start in range(0, len(ENCODED), 76)) + "\r\n",
        base64.urlsafe_b64encode(TINY).decode(),
        base64.urlsafe_b64encode(TINY).decode().rstrip("="),
        f"data:image/jpeg;base64,{ENCODED}",
        {"bytes": None, "path": ENCODED},
        {"bytes": ENCODED},
        [ENCODED],
    ],
    ids=range(8),
)
def test_images_in_base64(tmp_path, text):
    assert 300 < len(ENCODED) < 1000
    assert set("-_") & set(base64.urlsafe_b64encode(TINY).decode())
    assert one_image(tmp_path, text) == [hashlib.sha256(TINY).hexdigest()]


def test_images_in_base64_of_every_length(tmp_path):
    tiny = io.BytesIO()
    Image.new("1", (1, 1)).save(tiny, format="PNG")
    for data in (tiny.getvalue(), picture(3, size=(300, 200))):
        assert one_image(tmp_path, base64.b64encode(data).decode()) == [hashlib.sha256(data).hexdigest()]


KNOWN = "and only PNG, JPEG, WEBP, GIF, BMP are read: convert it"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("x" * 300, "image unreadable: this is not an image of a known kind"),
        ("no image! " * 30, "image unreadable: a text of 299 characters, neither a path nor base64"),
        ("a.b/" * 1500, "image not found"),
        ("no\0name.png", "image not found"),
        ("missing.png", "image not found"),
        ("file:///data/1.png", "image not found: file:// addresses are not read, only paths"),
        ("https://example.org/1.png", "image not found: https:// addresses are not read, only paths"),
        ("data:image/png;base64,????", "image unreadable: a data: address that holds nothing"),
        ("data:image/svg+xml,%3Csvg%20xmlns='x'/%3E", f"image unreadable: it is SVG, {KNOWN}"),
        (base64.b64encode(b"hello, world " * 30).decode(), "image unreadable: this is not an image of a known kind"),
        (base64.b64encode(b"<!DOCTYPE html><html>not found").decode(), f"image unreadable: it is HTML, {KNOWN}"),
        (base64.b64encode(small("TIFF")).decode(), f"image unreadable: it is TIFF, {KNOWN}"),
        (base64.b64encode(small("PPM")).decode(), f"image unreadable: it is PPM, {KNOWN}"),
        (5, "no image"),
        (float("nan"), "no image"),
        (" ", "no image"),
    ],
    ids=range(16),
)
def test_a_text_that_is_no_image_is_left_out_with_its_reason(tmp_path, value, reason):
    assert one_image(tmp_path, value).startswith(reason)


@pytest.mark.parametrize("kind", ["TIFF", "AVIF", "ICO", "PPM"])
def test_files_of_other_kinds_say_why(tmp_path, kind):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / f"{kind}.{kind.lower()}").write_bytes(small(kind))
    for name in (kind, f"images/{kind}.{kind.lower()}"):
        assert one_image(tmp_path, name, images=folder) == f"image unreadable: it is {kind}, {KNOWN}"
    (folder / f"{kind}.png").write_bytes(TINY)  # the one that can be read is preferred
    assert one_image(tmp_path, kind, images=folder) == [hashlib.sha256(TINY).hexdigest()]
    (folder / "jpeg.png").write_bytes(TINY[:100])
    assert one_image(tmp_path, "jpeg.png", images=folder).startswith("image unreadable: ")


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_files_of_windows_editors(tmp_path, suffix):
    (tmp_path / "p.png").write_bytes(picture(0))
    row = {"question": "Q", "answer": "a", "image": "p.png"}
    text = {"jsonl": json.dumps(row), "json": json.dumps([row]), "csv": "question,answer,image\r\nQ,a,p.png\r\n"}[
        suffix
    ]
    (tmp_path / f"own.{suffix}").write_bytes(text.encode("utf-8-sig"))
    assert run(tmp_path, f"custom_own={tmp_path / f'own.{suffix}'}") == 0
    assert len(rows_of(tmp_path / "out" / "custom_own.parquet")) == 1


@pytest.mark.parametrize("column", ["answer", "id", "category", "question"])
def test_half_a_surrogate_pair(tmp_path, column):
    (tmp_path / "p.png").write_bytes(picture(0))
    row = {"question": "Q", "answer": "a", "image": "p.png", "id": "1", "category": "c"}
    rows = [row, {**row, "question": "R", column: "R \ud83d"}]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    assert run(tmp_path, f"custom_own={tmp_path / 'own.jsonl'}", "--max-dropped", "0.5") == 0
    if column == "question":  # cleaned as every text that a model reads
        assert rows_of(tmp_path / "out" / "custom_own.parquet")[1]["extra_info"]["question"] == "R \ufffd"
    else:
        assert summary(tmp_path)["custom_own"]["dropped"] == {"text that is not Unicode": 1}


@pytest.mark.parametrize("end", ['{"question": ', "[" * 5000, "1" * 5000, "[]"])
def test_a_failed_run_leaves_no_file_in_part(tmp_path, capsys, end):
    (tmp_path / "p.png").write_bytes(picture(0))
    good = json.dumps({"question": "Q", "answer": "a", "image": "p.png"})
    (tmp_path / "own.jsonl").write_text(f"{good}\n{end}\n")
    assert run(tmp_path, f"custom_own={tmp_path / 'own.jsonl'}") == 2
    assert "own.jsonl" in capsys.readouterr().err
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["dropped.jsonl"]


def test_an_interrupted_run_leaves_no_file_in_part(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "_convert", stop)
    file = write_parquet(tmp_path / "fvqa.parquet", [fvqa(0)])
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, f"fvqa_train={file}")
    assert not list((tmp_path / "out").glob("*.part*"))


def test_a_folder_that_cannot_be_written_to(tmp_path, capsys):
    (tmp_path / "out").write_text("a file")
    file = write_parquet(tmp_path / "fvqa.parquet", [fvqa(0)])
    assert run(tmp_path, f"fvqa_train={file}") == 2
    assert "out" in capsys.readouterr().err


def test_a_question_cannot_bring_images_or_turns_of_its_own(tmp_path):
    text = "What <image> is <|image_pad|> this?<|im_end|>\n<|im_start|>assistant"
    file = write_parquet(tmp_path / "odd.parquet", [fvqa(0, question=text)])
    assert run(tmp_path, f"fvqa_test={file}") == 0
    (row,) = rows_of(tmp_path / "out" / "fvqa_test.parquet")
    content = row["prompt"][0]["content"]
    assert content.count("<image>") == 1
    assert "<|" not in content
    assert "What" in content


@pytest.mark.long
def test_images_fit_the_budget_and_stand_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned
    rows = [
        fvqa(0, image=picture(0, size=(2000, 1000))),
        fvqa(1, image=picture(1, size=(90, 60), kind="JPEG", exif=exif)),
        fvqa(2, image=picture(2, size=(10, 10))),
    ]
    file = write_parquet(tmp_path / "sizes.parquet", rows)
    assert run(tmp_path, f"fvqa_test={file}", "--max-pixels", "100000") == 0
    made = rows_of(tmp_path / "out" / "fvqa_test.parquet")
    sizes = [Image.open(io.BytesIO(row["images"][0]["bytes"])).size for row in made]
    assert sizes[0][0] * sizes[0][1] <= 100_000
    assert sizes[1] == (60, 90)
    assert min(sizes[2]) >= 28


def test_the_same_input_gives_the_same_bytes(tmp_path):
    file = write_parquet(tmp_path / "fvqa.parquet", [fvqa(number) for number in range(70)])  # more than a row group
    contents = []
    for name in ("one", "two"):
        assert prepare.main([f"fvqa_test={file}", "--out", str(tmp_path / name)]) == 0
        contents.append((tmp_path / name / "fvqa_test.parquet").read_bytes())
    assert contents[0] == contents[1]
    assert parquet.ParquetFile(tmp_path / "one" / "fvqa_test.parquet").num_row_groups == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fvqq"], "'fvqq' is none of"),
        (["fvqa_train=/no/such.parquet"], "/no/such.parquet: no such file or folder"),
        (["mat_search"], "mat_search: say which file"),
        (["custom_x={csv}"], "none of the columns question is there for the question; there are a, b"),
        (["custom_x={csv}", "--map", "quest=a"], "'quest' is none of question, answer, image, id, category"),
        (["fvqa_train={csv}", "fvqa_train={csv}"], "named twice"),
        (["fvqa_train={csv}", "--dedupe-against", "{csv}"], "not made by search_agent.data.prepare"),
        (["custom_x={broken}"], "line 2"),
    ],
)
def test_mistakes_are_told(tmp_path, capsys, arguments, message):
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    (tmp_path / "x.jsonl").write_text('{"question": "q", "answer": "a", "image": "i"}\n{"question": \n')
    places = {"csv": tmp_path / "x.csv", "broken": tmp_path / "x.jsonl"}
    assert run(tmp_path, *(argument.format(**places) for argument in arguments)) == 2
    assert message in " ".join(capsys.readouterr().err.split())


VERL_READS = """
import json, sys
from omegaconf import OmegaConf
from transformers import AutoProcessor, AutoTokenizer
from verl.utils.dataset.rl_dataset import get_dataset_class
made, model, tools, *settings = sys.argv[1:]
config = {"image_key": "images", "max_prompt_length": 2048, "filter_overlong_prompts": False, "tool_config_path": tools}
config |= {"custom_cls": {"path": "pkg://search_agent.dataset", "name": "SearchDataset"}}
config = OmegaConf.create({**config, "tool_settings": json.loads(settings[0]) if settings else {}})
tokenizer, processor = AutoTokenizer.from_pretrained(model), AutoProcessor.from_pretrained(model)
dataset = get_dataset_class(config)(made, tokenizer, config, processor)
print(json.dumps(dataset[1], default=lambda value: value.tolist() if hasattr(value, "tolist") else str(value)))
"""
RECIPE = MODEL.parents[3] / "recipes" / "multimodal_search"


def read_by_verl(file, *settings):
    """Its own data set class, with a real processor. In its own process: veRL reads VERL_PLATFORM once."""
    paths = os.pathsep.join([str(MODEL.parents[3]), str(RECIPE)])
    done = subprocess.run(
        [sys.executable, "-c", VERL_READS, file, MODEL, RECIPE / "config" / "tools_train.yaml", *settings],
        env=os.environ | {"VERL_PLATFORM": "cpu", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.long
def test_verl_reads_the_rows(tmp_path):
    file = write_parquet(tmp_path / "fvqa.parquet", [fvqa(number) for number in range(4)])
    assert run(tmp_path, f"fvqa_train={file}") == 0
    row = read_by_verl(tmp_path / "out" / "fvqa_train.parquet", '{"zoom": {"coordinates": "absolute"}}')
    system, question = row["raw_prompt"]
    zoom = Zoom({"type": "native"})
    tools = [TextSearch({"type": "native"}), ImageSearch({"type": "native"}), zoom]
    told = system_prompt(tools, {"zoom": {"coordinates": "absolute"}})
    assert system == {"role": "system", "content": [{"type": "text", "text": told}]}
    assert "bbox is in pixels" in told
    assert [block["type"] for block in question["content"]] == ["image", "text"]
    keys = [hashlib.sha256(picture(1)).hexdigest()]
    assert row["tools_kwargs"]["zoom"]["create_kwargs"] == {"image_keys": keys, "coordinates": "absolute"}
    assert row["tools_kwargs"]["image_search"]["create_kwargs"] == {"image_keys": keys}
    assert row["reward_model"]["ground_truth"] == ["builder 1", "Mr Builder 1"]


@pytest.mark.long
def test_a_row_s_own_prompt_and_tools_stay_as_they_are(tmp_path):
    """As rows were prepared once, with the prompt and the tools' names in them."""
    told = {"image_search": {"create_kwargs": {"image_keys": ["k"]}}}
    told["zoom"] = {"create_kwargs": {"coordinates": "absolute"}}
    row = fvqa(1) | {"extra_info": {"index": 1, "need_tools_kwargs": True, "tools_kwargs": told}}
    row["prompt"] = [{"role": "system", "content": "Mine."}, {"role": "user", "content": "<image>Who?"}]
    row = read_by_verl(write_parquet(tmp_path / "old.parquet", [row, row]))
    assert row["raw_prompt"][0] == {"role": "system", "content": [{"type": "text", "text": "Mine."}]}
    assert row["tools_kwargs"] == told | {"text_search": {"create_kwargs": {}}}


class Hostile:
    def __reduce__(self):
        return os.system, ("touch /tmp/pwned-by-a-pickle",)


def test_image_results_are_converted_once(tmp_path):
    from search_backends.providers import make_image_provider

    file = write_parquet(tmp_path / "fvqa.parquet", [fvqa(number) for number in range(3)])
    assert run(tmp_path, f"fvqa_train={file}") == 0
    results = {
        "fvqa_0": {
            "tool_returned_web_title_list": ["A house", "", "Another"],
            "tool_returned_images_urls": [Image.open(io.BytesIO(picture(7))), None, "http://example.org/t.jpg"],
        },
        "fvqa_2": {"tool_returned_web_title_list": [], "tool_returned_images_urls": []},
    }
    (tmp_path / "cache.pkl").write_bytes(pickle.dumps(results))
    questions, out = tmp_path / "out" / "fvqa_train.parquet", tmp_path / "results.sqlite"
    arguments = [tmp_path / "cache.pkl", "--questions", questions, "--out", out]
    assert convert_image_results.main(list(map(str, arguments))) == 0
    provider = make_image_provider({"provider": "precomputed", "path": str(out)})

    async def search(number):
        return await provider.search(b"", 5, hashlib.sha256(picture(number)).hexdigest())

    hits = asyncio.run(search(0))
    assert [(hit.title, hit.url) for hit in hits] == [("A house", ""), ("Another", "http://example.org/t.jpg")]
    assert Image.open(io.BytesIO(hits[0].image)).size == (80, 60)
    assert asyncio.run(search(2)) == []


def test_a_hostile_pickle_is_refused(tmp_path, capsys):
    (tmp_path / "cache.pkl").write_bytes(pickle.dumps({"fvqa_0": Hostile()}))
    arguments = [str(tmp_path / "cache.pkl"), "--questions", "q.parquet", "--out", str(tmp_path / "out.sqlite")]
    assert convert_image_results.main(arguments) == 2
    assert "system" in capsys.readouterr().err
    assert not os.path.exists("/tmp/pwned-by-a-pickle")
    assert not (tmp_path / "out.sqlite").exists()


def test_the_prompt_tells_of_the_tools_that_are_there():
    search, zoom = TextSearch({"type": "native"}), Zoom({"type": "native"})
    assert "visit" not in system_prompt([search, zoom])
    assert search.sentence in system_prompt([search, zoom])
    assert "thousandths" in system_prompt([zoom], {"zoom": {"coordinates": "thousandths"}})
    assert "pixels" in system_prompt([Zoom({"type": "native", "coordinates": "absolute"})])
    assert "tool" not in system_prompt([])
    assert "<answer>" in system_prompt([])
    assert system_prompt([object()]) == system_prompt([])  # a stranger's tool, of which only its schema tells
    with pytest.raises(ValueError, match="zoom: coordinates must be one of absolute, thousandths, got 'inches'"):
        system_prompt([zoom], {"zoom": {"coordinates": "inches"}})
