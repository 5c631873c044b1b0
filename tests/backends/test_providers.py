"""Providers: what they send and understand, as the services document it; what they refuse."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import logging
import sqlite3
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from raw_server import RawServer, Request, response

from search_backends.cache import Cache
from search_backends.errors import InfrastructureError, ModelError
from search_backends.fetch import DirectReader
from search_backends.providers import (
    CachedImages,
    CachedPages,
    CachedText,
    make_image_provider,
    make_page_provider,
    make_text_provider,
    precomputed,
    service,
)
from search_backends.results import ImageHit, Page, Passage

KEYS = {name: f"s3cret-{name}" for name in ("SERPER_API_KEY", "TAVILY_API_KEY", "SERPAPI_API_KEY", "JINA_API_KEY")}
IMAGE = b"\x89PNG of the question"
IMAGE_KEY = hashlib.sha256(IMAGE).hexdigest()


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, key in KEYS.items():
        monkeypatch.setenv(name, key)
    monkeypatch.setenv("NO_PROXY", "*")


@pytest.fixture
def addresses(tmp_path: Path) -> str:
    file = tmp_path / "addresses.json"
    file.write_text(json.dumps({IMAGE_KEY: "https://images.org/1.jpg"}))
    return str(file)


def ask(
    make: Callable[[Any], Any], config: dict[str, Any], call: Callable[[Any], Coroutine[Any, Any, Any]], *answers: bytes
) -> tuple[Any, list[Request]]:
    """What ``call`` makes of the provider's answers, and the requests that the service got."""

    async def main() -> tuple[Any, list[Request]]:
        async with RawServer(*answers) as server:
            address = "url" if config["provider"] == "service" else "base_url"
            provider = make({**config, address: server.url, "attempts": 1})
            try:
                return await call(provider), server.requests
            finally:
                await provider.close()

    return asyncio.run(main())


def search(query: str = "tall tower", topk: int = 2) -> Callable[[Any], Any]:
    return lambda provider: provider.search(query, topk)


def search_image(topk: int = 2, key: str | None = IMAGE_KEY) -> Callable[[Any], Any]:
    return lambda provider: provider.search(IMAGE, topk, key)


HALF_PAIRS = ("\ud800", "tower \udfff", "\ude00\ud83d")


@pytest.mark.parametrize("name", ["service", "serper", "tavily"])
def test_texts_that_cannot_be_sent_are_the_models_fault(name: str, tmp_path: Path) -> None:
    healthy = response({"identity": "1"})

    def cached(provider: Any) -> CachedText:
        return CachedText(provider, Cache(tmp_path / "cache"))

    for query in HALF_PAIRS:
        with pytest.raises(ModelError, match="an unpaired surrogate"):
            ask(
                make_text_provider, {"provider": name}, lambda provider, query=query: provider.search(query, 3), healthy
            )
        with pytest.raises(ModelError, match="an unpaired surrogate"):
            ask(make_text_provider, {"provider": name}, lambda p, query=query: cached(p).search(query, 3), healthy)


def test_addresses_that_cannot_be_sent_are_the_models_fault() -> None:
    for half in HALF_PAIRS:
        with pytest.raises(ModelError):
            ask(make_page_provider, {"provider": "jina"}, lambda p, half=half: p.read(f"http://e.org/{half}"), b"")
        for url in (f"http://e.org/{half}", f"http://{half}.org/", half):
            with pytest.raises(ModelError):
                asyncio.run(make_page_provider({"provider": "direct"}).read(url))


# serper.dev


SERPER = {
    "searchParameters": {"q": "tall tower", "type": "search", "engine": "google"},
    "organic": [
        {"title": "Eiffel Tower", "link": "https://e.org", "snippet": "330 m tall.", "position": 1},
        {"title": "Towers", "link": "https://t.org", "position": 2},
        {"title": "Third", "link": "https://3.org", "snippet": "...", "position": 3},
    ],
    "credits": 1,
}


def test_serper_text() -> None:
    config = {"provider": "serper", "gl": "de", "hl": "fr"}
    found, (request,) = ask(make_text_provider, config, search(), response(SERPER))
    assert found == [
        Passage("330 m tall.", "Eiffel Tower", "https://e.org"),
        Passage("", "Towers", "https://t.org"),
    ]
    assert (request.method, request.path) == ("POST", "/search")
    assert request.headers["x-api-key"] == KEYS["SERPER_API_KEY"]
    assert request.json() == {"q": "tall tower", "num": 2, "gl": "de", "hl": "fr"}


def test_serper_says_that_nothing_was_found() -> None:
    found, _ = ask(make_text_provider, {"provider": "serper"}, search(), response({"organic": []}))
    assert found == []


@pytest.mark.parametrize(
    ("message", "kind"),
    [("Query not allowed.", ModelError), ("Not enough credits", InfrastructureError)],
)
def test_serper_refusals_are_told_apart(message: str, kind: type[Exception]) -> None:
    answer = response({"message": message, "statusCode": 400}, 400)
    with pytest.raises(kind, match=message):
        ask(make_text_provider, {"provider": "serper"}, search(), answer)


def test_serper_lens(addresses: str) -> None:
    lens = {"organic": [{"title": "Tower", "source": "E", "link": "https://e.org", "imageUrl": "https://e.org/i"}]}
    config = {"provider": "serper", "image_urls": addresses}
    found, (request,) = ask(make_image_provider, config, search_image(), response(lens))
    assert found == [ImageHit("Tower", "E", "https://e.org")]
    assert request.path == "/lens"
    assert request.json() == {"url": "https://images.org/1.jpg", "gl": "us", "hl": "en"}


# tavily.com


def test_tavily() -> None:
    results = [{"title": "Eiffel Tower", "url": "https://e.org", "content": "330 m", "score": 1, "raw_content": None}]
    answer = response({"query": "tall tower", "answer": None, "images": [], "results": results, "response_time": 1.0})
    config = {"provider": "tavily", "search_depth": "advanced"}
    found, (request,) = ask(make_text_provider, config, search(topk=50), answer)
    assert found == [Passage("330 m", "Eiffel Tower", "https://e.org", 1.0)]
    assert (request.method, request.path) == ("POST", "/search")
    assert request.headers["authorization"] == f"Bearer {KEYS['TAVILY_API_KEY']}"
    assert request.json() == {"query": "tall tower", "max_results": 20, "search_depth": "advanced"}


# serpapi.com


def test_serpapi(addresses: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    match = {"position": 1, "title": "Tower", "link": "https://e.org", "source": "E", "thumbnail": "https://g.org/t"}
    answer = response({"search_metadata": {"status": "Success"}, "visual_matches": [match, match, match]})
    config = {"provider": "serpapi", "image_urls": addresses}
    found, (request,) = ask(make_image_provider, config, search_image(), answer)
    assert found == [ImageHit("Tower", "E", "https://e.org")] * 2
    assert (request.method, request.path.partition("?")[0]) == ("GET", "/search")
    for parameter in ("engine=google_lens", "type=visual_matches", "hl=en", f"api_key={KEYS['SERPAPI_API_KEY']}"):
        assert parameter in request.path
    assert "HTTP Request: GET" in caplog.text  # httpx tells the address, but not the key in it
    assert KEYS["SERPAPI_API_KEY"] not in caplog.text


def test_serpapi_says_that_nothing_was_found_or_that_it_failed(addresses: str) -> None:
    config = {"provider": "serpapi", "image_urls": addresses}
    nothing = "Google Lens hasn't returned any results for this query."
    answer = response({"search_metadata": {"status": "Success"}, "error": nothing})
    assert ask(make_image_provider, config, search_image(), answer)[0] == []
    for status, error in [("Error", "We couldn't get valid results."), ("Processing", ""), ("Success", "")]:
        answer = response({"search_metadata": {"status": status}, "error": error})
        with pytest.raises(InfrastructureError, match=error or "no visual_matches"):
            ask(make_image_provider, config, search_image(), answer)


# Both lenses need the image's address.


@pytest.mark.parametrize("name", ["serper", "serpapi"])
def test_lenses_need_addresses(name: str, addresses: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="image_urls"):
        make_image_provider({"provider": name})
    with pytest.raises(ValueError, match=r"image_urls.*No such file"):
        make_image_provider({"provider": name, "image_urls": str(tmp_path / "none")})
    (tmp_path / "list").write_text("[1]")
    with pytest.raises(ValueError, match="must hold a JSON object of addresses"):
        make_image_provider({"provider": name, "image_urls": str(tmp_path / "list")})
    config = {"provider": name, "image_urls": addresses}
    with pytest.raises(ModelError, match="only the images of the question"):
        ask(make_image_provider, config, search_image(key=None))
    with pytest.raises(InfrastructureError, match="no address of the image 00ff"):
        ask(make_image_provider, config, search_image(key="00ff"))


# jina.ai


def read(url: str = "https://e.org/#tower") -> Callable[[Any], Any]:
    return lambda provider: provider.read(url)


def test_jina() -> None:
    data = {"title": "Eiffel Tower", "url": "https://e.org/", "content": "330 m", "usage": {"tokens": 5}}
    answer = response({"code": 200, "status": 20000, "data": data})
    page, (request,) = ask(make_page_provider, {"provider": "jina"}, read(), answer)
    assert page == Page("https://e.org/#tower", "330 m", "Eiffel Tower")
    assert (request.method, request.path) == ("POST", "/")
    assert request.headers["authorization"] == f"Bearer {KEYS['JINA_API_KEY']}"
    assert request.headers["accept"] == "application/json"
    assert request.json() == {"url": "https://e.org/#tower"}


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (response({"data": {"content": "", "title": "t"}}), "no readable text"),
        (response({"data": {"content": "x", "warning": "Target URL returned error 404: Not Found"}}), "404"),
        (response({"data": None, "code": 422, "message": "Failed to goto https://e.org"}, 422), "Failed to goto"),
        (response({"data": None, "code": 400, "message": "Invalid URL or TLD"}, 400), "Invalid URL"),
    ],
)
def test_pages_that_cannot_be_read_are_the_models_choice(answer: bytes, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        ask(make_page_provider, {"provider": "jina"}, read(), answer)


@pytest.mark.parametrize("url", ["e.org", "file:///etc/passwd", "https://", "http://[", "javascript:alert(1)"])
def test_what_is_no_address_is_not_asked_for(url: str) -> None:
    with pytest.raises(ModelError, match="http:// or https://"):
        ask(make_page_provider, {"provider": "jina"}, read(url))


# The retrieval service


def health(identity: str = "v1") -> bytes:
    return response({"status": "ok", "identity": identity, "searches": ["bm25"], "passages": 3, "images": 1})


def results(*documents: dict[str, Any], score: float | None = 2.5) -> bytes:
    return response({"result": [[{"document": document, "score": score} for document in documents]]})


def test_service_text() -> None:
    documents = [
        {"id": "1", "title": "Eiffel Tower", "contents": "330 m", "url": "https://e.org"},
        {"id": 2, "contents": '"Towers"\nThere are many.'},  # as Search-R1's servers answer
        {"id": "3", "contents": "no title\nat all"},
    ]

    async def call(provider: Any) -> Any:
        return await provider.search("tall tower", 3), provider.identity

    (found, identity), requests = ask(make_text_provider, {"provider": "service"}, call, health(), results(*documents))
    assert found == [
        Passage("330 m", "Eiffel Tower", "https://e.org", 2.5),
        Passage("There are many.", "Towers", "", 2.5),
        Passage("no title\nat all", "", "", 2.5),
    ]
    assert identity == "service v1"
    assert [(request.method, request.path) for request in requests] == [("GET", "/health"), ("POST", "/retrieve")]
    assert requests[1].json() == {"queries": ["tall tower"], "topk": 3, "return_scores": True}


def test_service_images() -> None:
    thumbnail = base64.b64encode(b"jpeg").decode()
    document = {"id": "1", "title": "Tower", "contents": "A tower.", "url": "https://e.org", "image": thumbnail}
    answers = [health(), results(document, {"contents": "x"})]
    found, requests = ask(make_image_provider, {"provider": "service"}, search_image(), *answers)
    assert found == [ImageHit("Tower", "A tower.", "https://e.org", b"jpeg", 2.5), ImageHit("", "x", "", None, 2.5)]
    assert requests[1].path == "/retrieve_images"
    image = base64.b64encode(IMAGE).decode()
    assert requests[1].json() == {"images": [image], "topk": 2, "return_scores": True, "return_images": True}
    with pytest.raises(InfrastructureError, match="not base64"):
        ask(make_image_provider, {"provider": "service"}, search_image(), health(), results({**document, "image": "?"}))


def test_service_says_that_nothing_was_found() -> None:
    assert ask(make_text_provider, {"provider": "service"}, search(), health(), results())[0] == []


@pytest.mark.parametrize(
    "answer",
    [
        {"result": []},
        {"result": [[], []]},
        {"results": [[]]},
        {"result": [[{"score": 1.0}]]},
        {"result": [[{"document": {"title": "t"}, "score": 1.0}]]},
        {"result": [[{"document": {"contents": None}, "score": 1.0}]]},
        {"result": [[{"document": {"contents": "x"}, "score": "high"}]]},
        {"result": None},
    ],
)
def test_service_answers_of_another_form_are_no_results(answer: Any) -> None:
    with pytest.raises(InfrastructureError, match="not the documented form"):
        ask(make_text_provider, {"provider": "service"}, search(), health(), response(answer))


@pytest.mark.parametrize(
    ("detail", "kind"),
    [
        ("queries[0] has 9000 characters, at most 4096 are taken", ModelError),
        ([{"loc": ["body", "queries", 0], "msg": "too long"}], ModelError),
        ("topk: Input should be less than or equal to 100", InfrastructureError),
    ],
)
def test_service_refusals_are_told_apart(detail: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind):
        ask(make_text_provider, {"provider": "service"}, search(), health(), response({"detail": detail}, 422))


def test_a_service_that_comes_back_with_another_index_is_not_confused_with_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hang_up(writer: asyncio.StreamWriter) -> None:
        pass

    async def main() -> None:
        async with RawServer() as server:

            def script(*answers: Any) -> None:
                server.answers = [*[b""] * len(server.requests), *answers]

            provider, cache = make_text_provider({"provider": "service", "url": server.url}), Cache(tmp_path / "cache")
            cached = CachedText(provider, cache)
            script(health("old"), results({"contents": "old"}))
            assert await cached.search("q", 1) == ([Passage("old", score=2.5)], False)
            assert await cached.search("q", 1) == ([Passage("old", score=2.5)], True)
            # It is killed during a call; the call is tried again, and another index answers it.
            script(hang_up, results({"contents": "new"}), health("new"))
            with pytest.raises(InfrastructureError, match="service old became service new during the call"):
                await cached.search("other", 1)
            # From now on its answers are kept under its own name.
            script(results({"contents": "new"}))
            assert await cached.search("other", 1) == ([Passage("new", score=2.5)], False)
            assert await cached.search("q", 1) == ([Passage("new", score=2.5)], False)
            # One that was replaced between two calls is noticed by its age.
            monkeypatch.setattr(service, "_RECHECK_S", 0.0)
            script(results({"contents": "newest"}), health("newest"))
            with pytest.raises(InfrastructureError, match="became service newest"):
                await cached.search("third", 1)
            await provider.close()
            await cache.close()

    asyncio.run(main())


def test_a_server_without_health_is_named_by_its_address(caplog: pytest.LogCaptureFixture) -> None:
    async def call(provider: Any) -> str:
        await provider.search("q", 1)
        return provider.identity

    answers = [response({"detail": "Not Found"}, 404), results({"contents": "x"})]
    identity, _ = ask(make_text_provider, {"provider": "service"}, call, *answers)
    assert identity.startswith("service 127.0.0.1:")
    assert "does not say which index it serves" in caplog.text


# Results computed beforehand


HITS = [
    ImageHit("Tower", "A tower.", "https://e.org", b"\xff\xd8 jpeg", 0.9),
    ImageHit("Other"),
]


def test_precomputed(tmp_path: Path) -> None:
    file = tmp_path / "new" / "results?#%.sqlite"
    assert precomputed.write(file, iter([(IMAGE_KEY, HITS), ("00ff", [])])) == 2
    provider = make_image_provider({"provider": "precomputed", "path": str(file)})

    async def main() -> None:
        assert await provider.search(b"", 5, IMAGE_KEY) == HITS
        assert await provider.search(b"", 1, IMAGE_KEY) == HITS[:1]
        assert await provider.search(b"", 5, "00ff") == []
        with pytest.raises(InfrastructureError, match="no results for the image 1234"):
            await provider.search(b"", 5, "1234")
        with pytest.raises(ModelError, match="only the images of the question"):
            await provider.search(b"", 5)
        lenient = make_image_provider({"provider": "precomputed", "path": str(file), "on_missing": "empty"})
        assert await lenient.search(b"", 5, "1234") == await lenient.search(b"", 5) == []
        assert lenient.identity != provider.identity
        await lenient.close()
        await provider.close()

    asyncio.run(main())


def test_precomputed_identity_follows_the_content(tmp_path: Path) -> None:
    def identity(name: str, *rows: tuple[str, list[ImageHit]]) -> str:
        precomputed.write(tmp_path / name, rows)
        return make_image_provider({"provider": "precomputed", "path": str(tmp_path / name)}).identity

    assert identity("a", ("k", HITS)) == identity("b", ("k", HITS))
    assert len({identity("a", ("k", HITS)), identity("a", ("k", HITS[:1])), identity("a", ("l", HITS))}) == 3


def test_precomputed_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "results"
    precomputed.write(file, [("k", HITS)])
    before = file.read_bytes()
    with pytest.raises(ValueError, match="the key k comes twice"):
        precomputed.write(file, [("k", HITS), ("k", [])])
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["results"]


def test_precomputed_files_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="path: there is no file"):
        make_image_provider({"provider": "precomputed", "path": str(tmp_path / "none")})
    (tmp_path / "text").write_text("no results, but long enough to be read as a file of a data base" * 100)
    sqlite3.connect(tmp_path / "other").execute("CREATE TABLE t (x)")
    for name in ("text", "other"):
        with pytest.raises(ValueError, match="holds no image results"):
            make_image_provider({"provider": "precomputed", "path": str(tmp_path / name)})


# The registry


MAKERS = [make_text_provider, make_image_provider, make_page_provider]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("config", [{}, {"provider": "google"}, {"provider": ["service"]}])
def test_unknown_providers_are_refused_with_the_known_ones(make: Any, config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"there are .*(service|jina)"):
        make(config)


@pytest.mark.parametrize(
    ("make", "config", "words"),
    [
        (make_text_provider, {"provider": "service", "urll": "x"}, r"urll.*\(it takes .*timeout_s"),
        (
            make_text_provider,
            {"provider": "service", "url": "127.0.0.1:80"},
            r"url: .*must be an http or https address",
        ),
        (make_text_provider, {"provider": "serper", "timeout_s": 0}, "timeout_s: Input should be greater than 0"),
        (make_text_provider, {"provider": "serper", "attempts": "many"}, "attempts"),
        (make_text_provider, {"provider": "tavily", "search_depth": "deep"}, "search_depth: Input should be 'basic'"),
        (make_image_provider, {"provider": "precomputed"}, "path: Field required"),
        (make_image_provider, {"provider": "precomputed", "path": "x", "on_missing": "ignore"}, "on_missing"),
        (make_page_provider, {"provider": "jina", "api_key": "x"}, "api_key"),
    ],
)
def test_settings_are_checked(make: Any, config: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(config)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (make_text_provider, "serper"),
        (make_text_provider, "tavily"),
        (make_image_provider, "serpapi"),
        (make_image_provider, "serper"),
        (make_page_provider, "jina"),
    ],
)
def test_keys_come_from_the_environment_and_stay_hidden(
    make: Any, name: str, addresses: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"provider": name} | ({"image_urls": addresses} if make is make_image_provider else {})
    variable = f"{name.upper()}_API_KEY"
    provider = make(config)
    shown = repr(provider) + repr(vars(provider)) + provider.identity
    assert KEYS[variable] not in shown
    monkeypatch.setenv(variable, "two words")
    with pytest.raises(ValueError, match=variable) as caught:
        make(config)
    assert "two words" not in str(caught.value)
    monkeypatch.delenv(variable)
    with pytest.raises(ValueError, match=f"{variable} is not set"):
        make(config)


def test_direct_pages_come_from_the_fetcher() -> None:
    assert isinstance(make_page_provider({"provider": "direct"}), DirectReader)


# Behind the cache


def test_cached_providers_tell_hits(tmp_path: Path) -> None:
    file = tmp_path / "results"
    precomputed.write(file, [(IMAGE_KEY, HITS)])

    class Reader:
        identity = "reader"
        read_count = 0

        async def read(self, url: str) -> Page:
            self.read_count += 1
            return Page(url, f"text {self.read_count}")

        async def close(self) -> None: ...

    async def main() -> None:
        cache = Cache(tmp_path / "cache")
        images = CachedImages(make_image_provider({"provider": "precomputed", "path": str(file)}), cache)
        assert await images.search(IMAGE, 2, IMAGE_KEY) == (HITS, False)
        assert await images.search(IMAGE, 2, IMAGE_KEY) == (HITS, True)
        assert await images.search(IMAGE, 1, IMAGE_KEY) == (HITS[:1], False)
        assert await images.search(b"another", 2, IMAGE_KEY) == (HITS, False)
        pages = CachedPages(Reader(), cache)
        assert await pages.read("https://e.org") == (Page("https://e.org", "text 1"), False)
        assert await pages.read("https://e.org ") == (Page("https://e.org", "text 1"), True)
        others = CachedPages(Reader(), cache, tool="read_page")
        assert (await others.read("https://e.org"))[1] is False
        for each in (images, pages, others):
            await each.close()
        await cache.close()

    asyncio.run(main())
