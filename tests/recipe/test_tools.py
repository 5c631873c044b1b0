"""The recipe's tools as veRL calls them: faults told apart, any JSON answered, images counted and bounded."""

import asyncio
import io
import re
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from search_agent.tools import ImageSearch, TextSearch, Visit, Zoom
from search_agent.tools.toolbox import load_tools, main

from search_backends.errors import InfrastructureError, ModelError
from search_backends.results import ImageHit, Page, Passage
from search_backends.toolbox import Toolbox
from verl_tapo.calls.parsing import answer_is_error


class Stub:
    """A provider that answers, or does what its query says."""

    identity = "stub 1"

    def __init__(self):
        self.asked = []

    async def search(self, what, topk, key=None):
        self.asked.append((what, topk, key))
        if what == "hang":
            await asyncio.sleep(60)
        if what == "down":
            raise InfrastructureError("the back end at 10.0.0.1 is down")
        if what == "defect":
            raise KeyError("defect")
        if what == "nothing":
            return []
        if isinstance(what, bytes):
            return [ImageHit(f"hit {number}", "a caption", "", png((640, 480))) for number in range(topk)]
        return [Passage(f"{what} is number {number}", f"title {number}") for number in range(topk)]

    async def read(self, url):
        if url == "http://refused/":
            raise ModelError("this address cannot be read, choose another")
        return Page(url, "word " * 5000, "A page")

    async def close(self):
        pass


def png(size):
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture
def stub():
    return Stub()


@pytest.fixture
def make(stub, monkeypatch):
    def make(cls, **config):
        if hasattr(cls, "make_provider"):
            monkeypatch.setattr(cls, "make_provider", staticmethod(lambda _: stub))
        return cls({"type": "native", **config})

    return make


def execute(tool, arguments, images=(), created=None, calls=1):
    """What veRL's loop does for one call."""

    async def run():
        instance, _ = await tool.create(create_kwargs=created or {})
        agent = SimpleNamespace(image_data=list(images) or None, tool_calls=[None] * calls)
        response, _, metrics = await tool.execute(instance, arguments, agent_data=agent)
        await tool.release(instance)
        return response, metrics

    return asyncio.run(run())


def test_text_search(make, stub):
    response, metrics = execute(make(TextSearch, topk=2), {"query": " Who? "})
    assert "Who? is number 0" in response.text
    assert "title 1" in response.text
    assert metrics == {"results": 2, "chars": len(response.text)}
    assert stub.asked == [("Who?", 2, None)]
    assert execute(make(TextSearch), {"query": "nothing"})[0].text == "No results."


def test_the_cache_answers_equal_calls(make, stub, tmp_path):
    tool = make(TextSearch, cache=str(tmp_path / "cache.sqlite"))
    assert execute(tool, {"query": "Who?"})[1]["cache_hit"] is False
    assert execute(tool, {"query": "Who?"})[1]["cache_hit"] is True
    assert len(stub.asked) == 1
    for _ in range(2):  # failures are not kept
        assert execute(tool, {"query": "down"})[1] == {"fault": "infrastructure"}
    assert len(stub.asked) == 3


@pytest.mark.parametrize(
    ("query", "fault", "told"),
    [
        (5, "model", "query must be a non-empty string"),
        ("  ", "model", "query must be a non-empty string"),
        ("x" * 5000, "model", "query has 5000 characters; at most 512 are allowed"),
        (["a", "b"], "model", "query must be a non-empty string"),
        ("down", "infrastructure", "temporarily unavailable"),
        ("hang", "infrastructure", "temporarily unavailable"),
        ("defect", "infrastructure", "temporarily unavailable"),
    ],
)
def test_whose_fault_it_is(make, query, fault, told):
    response, metrics = execute(make(TextSearch, timeout_s=0.2), {"query": query})
    assert metrics == {"fault": fault}
    assert told in response.text
    assert "10.0.0.1" not in response.text
    assert answer_is_error(response.text, ())  # in rollouts without a record too


def test_waiting_for_a_place_takes_of_the_call_s_time(make):
    tool = make(TextSearch, concurrency=1, timeout_s=0.3)

    async def run():
        agent = SimpleNamespace(image_data=None, tool_calls=[])
        calls = [tool.execute("x", {"query": query}, agent_data=agent) for query in ("hang", "Who?")]
        return await asyncio.gather(*calls)

    assert [metrics["fault"] for _, _, metrics in asyncio.run(run())] == ["infrastructure"] * 2


def test_image_search(make, stub):
    images = [Image.new("RGB", (100, 80), "blue"), Image.new("RGB", (50, 40), "red")]
    tool = make(ImageSearch, topk=3, thumbnails=2, max_pixels=100 * 100)
    created = {"image_keys": ["key of the first"]}
    response, metrics = execute(tool, {"image": 1}, images, created)
    assert metrics["results"] == 3
    assert len(response.image) == 2
    assert all(image.width * image.height <= 100 * 100 for image in response.image)
    assert "hit 2" in response.text
    with Image.open(io.BytesIO(stub.asked[0][0])) as sent:
        assert sent.size == (100, 80)
    execute(tool, {"image": "2"}, images, created)
    assert [key for _, _, key in stub.asked] == ["key of the first", None]
    full = make(ImageSearch, thumbnails=2, max_images=2)
    response, metrics = execute(full, {"image": 1}, images)
    assert response.image is None  # no room: the captions stand alone
    assert "hit 0" in response.text


def test_zoom(make):
    image = Image.new("RGB", (200, 100), "white")
    image.paste((255, 0, 0), (100, 0, 200, 50))
    response, _ = execute(make(Zoom), {"image": 1, "bbox": [500, 0, 1000, 500]}, [image])
    assert response.text.startswith("Image 2 is the region of image 1")
    assert response.image[0].getpixel((20, 20)) == (255, 0, 0)
    absolute, _ = execute(make(Zoom), {"bbox": [100, 0, 200, 50]}, [image], {"coordinates": "absolute"})
    assert absolute.image[0].tobytes() == response.image[0].tobytes()
    beside, _ = execute(make(Zoom), {"image": 1, "bbox": [500, 0, 1000, 500]}, [image], calls=2)
    assert beside.text.startswith("This image")  # another call of the turn may return one first


def test_images_are_bounded(make):
    image = Image.new("RGB", (400, 400))
    tool = make(Zoom, max_pixels=300 * 300, total_pixels=510 * 510, max_images=3)
    box = {"image": 1, "bbox": [0, 0, 1000, 1000]}
    images = [image]
    while (response := execute(tool, box, images)[0]).image:
        images += response.image
    assert len(images) == 3
    assert "no more images" in response.text
    assert sum(each.width * each.height for each in images[:-1]) <= 510 * 510


def test_visit(make):
    response, _ = execute(make(Visit, limit_chars=500), {"url": "http://example.org/"})
    assert len(response.text) <= 500
    assert "A page" in response.text
    response, metrics = execute(make(Visit), {"url": "http://refused/"})
    assert metrics == {"fault": "model"}
    assert "choose another" in response.text


def test_visit_reaches_no_private_address():
    tool = Visit({"type": "native", "provider": {"provider": "direct"}})
    response, metrics = execute(tool, {"url": "http://127.0.0.1:8080/admin"})
    assert metrics == {"fault": "model"}
    assert response.text.startswith("Error executing tool 'visit'")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_json_is_answered(make, data):
    cls = data.draw(st.sampled_from([TextSearch, ImageSearch, Zoom, Visit]))
    names = list(cls.schema["parameters"]["properties"])
    arguments = data.draw(st.dictionaries(st.sampled_from(names), JSON) | JSON)
    images = [Image.new("RGB", (64, 48))] * data.draw(st.integers(0, 2))
    response, metrics = execute(make(cls), arguments, images)
    assert ("fault" in metrics) == answer_is_error(response.text, ())
    assert metrics.get("fault") != "infrastructure"


def nested(depth, wrap):
    value = wrap(0)
    for _ in range(depth):
        value = wrap(value)
    return value


NUMBERS = [10**400, -(10**400), 10**5000, -(10**5000), 1e308, 5e-324, -0.0, 2.5, -1, 0, 99]
NUMBERS += [float("inf"), float("-inf"), float("nan"), True, False, None]
TEXTS = ["", " ", "\0", "a\0b", "\x7f", "\u200b", "\ufeff", "\uffff", "x" * 10_000_000, "1" * 10_000_000, "1" * 400]
TEXTS += ["1" * 200 + "x", "nan", "inf", "1e999", "-" * 200, "." * 200, "1e" * 100, "１", "²", "٣", "①", "0x10", "½"]
TEXTS += ["[1, 2, 3]", "1e400 1 2 3", "<|box_start|>(1,2),(3,4)<|box_end|>", "{", "null"]
HALVES = ["\ud800", "a\udfffb", "\ude00\ud83d", "http://example.org/\ud800", "http://\udfff.org/"]
KINDS = [
    b"bytes",
    bytearray(b"x"),
    {},
    [],
    [None],
    [[]],
    [1, 2],
    {"x": 1},
    {1: 2},
    set(),
    (1, 2, 3, 4),
    range(4),
    object(),
    1j,
]
KINDS += [nested(50_000, lambda value: [value]), nested(5_000, lambda value: {"a": value})]
ODD = [*NUMBERS, *TEXTS, *HALVES, *KINDS]
ODD += [[value] for value in ODD] + [[value] * 4 for value in ODD]
GOOD = {"query": "Who?", "image": 1, "bbox": [0, 0, 500, 500], "url": "http://example.org/"}


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("cls", [TextSearch, ImageSearch, Zoom, Visit])
def test_whatever_a_model_writes_is_its_own_fault(make, stub, tmp_path, cls, cached):
    """Nothing is raised, nothing counts as an outage, and what cannot be sent is not sent."""
    tool = make(cls, **({"cache": str(tmp_path / "cache")} if cached and cls is not Zoom else {}))
    good = {name: GOOD[name] for name in cls.schema["parameters"]["properties"]}
    images = [Image.new("RGB", (64, 48))] * 2

    async def run():
        for value in ODD:
            for arguments in [{**good, name: value} for name in good] + [value, {**good, "more": value}]:
                agent = SimpleNamespace(image_data=images, tool_calls=[None])
                response, _, metrics = await tool.execute("x", arguments, agent_data=agent)
                assert metrics.get("fault") != "infrastructure"
                assert ("fault" in metrics) == answer_is_error(response.text, ())
                response.text.encode()

    asyncio.run(run())
    for asked in stub.asked:
        if isinstance(asked[0], str):
            asked[0].encode()
            assert "\0" not in asked[0]


@pytest.mark.parametrize("half", HALVES)
def test_half_a_surrogate_pair_is_told_to_the_model(make, stub, half):
    for cls, name in ((TextSearch, "query"), (Visit, "url")):
        response, metrics = execute(make(cls), {name: half})
        assert metrics == {"fault": "model"}
        assert f"{name} contains an unpaired surrogate" in response.text
    assert not stub.asked
    execute(make(TextSearch), {"query": "\ud83d\ude00"})  # both halves are a character
    assert stub.asked[0][0] == "😀"


class Defective(TextSearch):
    async def answer(self, call):
        raise {"exit": SystemExit(3), "defect": KeyError("\ud800")}[call.created["does"]]


@pytest.mark.parametrize("does", ["exit", "defect"])
def test_a_tools_own_failure_ends_nothing(make, does, caplog):
    """Whatever the model wrote: some values cannot even be shown in the log."""
    tool = make(Defective)
    for value in (10**5000, nested(50_000, lambda value: [value]), "\ud800"):
        response, metrics = execute(tool, {"query": value}, created={"does": does})
        assert metrics == {"fault": "infrastructure"}
        assert response.text == "Error executing tool 'text_search': the tool is temporarily unavailable"
    assert "text_search failed on dict (ValueError)" in caplog.text


def test_what_a_back_end_says_of_a_query_is_cleaned(make, stub, monkeypatch):
    async def search(*arguments):
        raise ModelError("this was refused: <|im_end|> \ud800<tool_call>")

    monkeypatch.setattr(stub, "search", search)
    response, _ = execute(make(TextSearch), {"query": "Who?"})
    assert response.text == "Error executing tool 'text_search': this was refused: \ufffd \ufffd\ufffd"


@pytest.mark.parametrize(
    ("cls", "config", "message"),
    [
        (TextSearch, {"topk": 0}, "the tool text_search: topk: .*greater than or equal to 1, got 0"),
        (TextSearch, {"top_k": 3}, "top_k: .*not permitted"),
        (TextSearch, {"provider": {"provider": "gogle"}}, "the tool text_search: provider: .*got 'gogle'"),
        (Zoom, {"coordinates": "auto"}, "coordinates: .*'absolute' or 'thousandths'"),
        (Zoom, {"max_pixels": 3}, "max_pixels"),
        (Visit, {"timeout_s": 0}, "the tool visit: timeout_s"),
    ],
)
def test_bad_settings(cls, config, message):
    with pytest.raises(ValueError, match=message):
        cls({"type": "native", **config})


def test_toolbox(make):
    toolbox = Toolbox([make(TextSearch), make(Zoom)], timeout_s=0.2)

    def call(*arguments):
        return asyncio.run(toolbox.call(*arguments))

    assert [schema["function"]["name"] for schema in toolbox.schemas] == ["text_search", "zoom"]
    assert call("text_search", '{"query": "Who?"}').status == "ok"
    assert call("text_search", {"query": 3}).metrics == {"fault": "model"}
    assert call("text_search", "{").status == "malformed"
    assert call("serch", {}).status == "unknown_tool"
    assert call("text_search", {"query": "hang"}).status == "timeout"
    answer = call("zoom", {"image": 1, "bbox": [0, 0, 500, 500]}, [Image.new("RGB", (90, 90))])
    assert len(answer.images) == 1
    with pytest.raises(FileNotFoundError, match="no file"):
        load_tools("/no/such.yaml")


class Foreign:
    """A tool that is none of the recipe's, and whose code calls ``exit``."""

    name = "foreign"

    async def create(self, create_kwargs):
        return "x", None

    async def execute(self, instance, arguments, agent_data):
        raise SystemExit(arguments)

    async def release(self, instance):
        pass


def test_whatever_a_model_writes_is_an_answer_of_the_toolbox(make):
    toolbox = Toolbox([make(TextSearch), Foreign()])
    texts = [
        "1" * 5000,
        '{"query": ' + "1" * 5000 + "}",
        "[" * 100_000,
        '{"query": "\\ud800"}',
        "NaN",
        "\ud800",
        "\0",
        "",
    ]
    for name, status in (("\ud800" * 1000, "unknown_tool"), ("text_search", None), ("foreign", None)):
        for arguments in texts + ODD:
            answer = asyncio.run(toolbox.call(name, arguments))
            answer.text.encode()
            assert len(answer.text) < 10_000
            assert status is None or answer.status == status
            assert answer.metrics.get("fault") != "infrastructure"
    answer = asyncio.run(toolbox.call("foreign", {}))
    assert (answer.status, answer.text) == ("error", "Error executing tool 'foreign': the tool called exit")


ZOOM = """
tools:
  - class_name: search_agent.tools.Zoom
    config: {type: native}
"""


def test_toolbox_on_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tools.yaml").write_text(ZOOM)
    Image.new("RGB", (90, 90), "red").save("a.png")
    assert main(["tools.yaml", "zoom", '{"bbox": [0, 0, 500, 500]}', "a.png"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("Image 2 is the region of image 1")
    assert said.out.count("\n") == 1  # and nothing else, such as a schema
    assert said.err == f"ok  {{'chars': {len(said.out) - 1}}}\nimage-2.png\n"
    with Image.open("image-2.png") as image:
        assert image.getpixel((5, 5)) == (255, 0, 0)
    assert main(["tools.yaml", "zoom", '{"bbox": 3}', "a.png"]) == 1
    assert "bbox must be [left, top" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a list", "tools.yaml: "),
        ("{", "tools.yaml: "),
        (ZOOM.replace("Zoom", "Zom"), "tools.yaml: class_name: there is no search_agent.tools.Zom"),
        (ZOOM.replace("search_agent", "serch_agent"), "tools.yaml: No module named 'serch_agent'"),
        (ZOOM.replace("search_agent.tools.", ""), "tools.yaml: class_name: there is no Zoom"),
        (ZOOM.replace("type: native", "timeout_s: 3"), "tools.yaml: Missing key type"),
        (ZOOM.replace("native", "native, colour: red"), "the tool zoom: colour: "),
        (ZOOM.replace("native", "native, max_pixels: '${oc.env:NO_SUCH}'"), "'NO_SUCH' not found"),
        (
            ZOOM.replace("Zoom", "TextSearch").replace("native", "native, provider: {provider: serper}"),
            "SERPER_API_KEY",
        ),
    ],
)
def test_toolbox_says_what_is_wrong(tmp_path, monkeypatch, capsys, text, message):
    monkeypatch.chdir(tmp_path)
    for name in ("SERPER_API_KEY", "NO_SUCH"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "tools.yaml").write_text(text)
    assert main(["tools.yaml", "zoom", "{}"]) == 2
    said = capsys.readouterr()
    assert re.match(f"search_agent.tools.toolbox: .*{message}", said.err)
    assert said.err.count("\n") == 1
    assert not said.out


def test_toolbox_names_images_that_it_cannot_read(tmp_path, capsys):
    (tmp_path / "tools.yaml").write_text(ZOOM)
    (tmp_path / "text.png").write_text("text")
    for name, message in (("text.png", "not an image of a known kind"), ("none.png", "No such file")):
        assert main([str(tmp_path / "tools.yaml"), "zoom", "{}", str(tmp_path / name)]) == 2
        error = capsys.readouterr().err
        assert name in error
        assert message in error
