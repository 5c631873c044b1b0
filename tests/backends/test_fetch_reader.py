"""Pages as text: kinds, character sets, robots.txt, limits; over real sockets and with real extraction."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from importlib.metadata import version
from typing import Any

import httpcore
import pytest
from raw_server import Answer, RawServer, response

from search_backends.errors import InfrastructureError, ModelError
from search_backends.fetch import DirectReader
from search_backends.fetch.extract import ExtractionFailed, Extractor, PageAtFault
from search_backends.providers import make_page_provider
from search_backends.results import Page

ARTICLE = """<!DOCTYPE html><html><head><title> The Eiffel
  Tower </title><style>p { color: red }</style><script>var secret = 1;</script></head><body>
<nav><a href="/">Home</a> <a href="/login">Log in</a></nav>
<article><h1>Eiffel Tower</h1>
<p>The Eiffel Tower is a wrought-iron lattice tower on the Champ de Mars in Paris, France, named after the engineer
whose company designed and built the tower from 1887 to 1889.</p>
<p>It is 330 metres high, about as high as an 81-storey building, and the tallest structure in Paris. Its base is
square, measuring 125 metres on each side.</p>
<table><tr><th>Height</th><td>330 m</td></tr><tr><th>Architect</th><td>Stephen Sauvestre</td></tr></table>
</article><footer>Cookie settings</footer></body></html>"""


class Loopback(httpcore.AsyncNetworkBackend):
    def __init__(self, port: int) -> None:
        self._port, self._tcp = port, httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        assert host == "93.184.215.14"
        return await self._tcp.connect_tcp("127.0.0.1", self._port, timeout)


async def resolve(host: str, port: int) -> Sequence[str]:
    return ["10.0.0.1"] if host.startswith("inside") else ["93.184.215.14"]


def run(check: Callable[[DirectReader, RawServer], Awaitable[Any]], *answers: Answer, **settings: Any) -> Any:
    async def main() -> Any:
        async with RawServer(*answers) as server:
            config = {"attempts": 1, "respect_robots": False, "extraction_timeout_s": 120, **settings}
            reader = DirectReader(config, resolver=resolve, connector=Loopback(int(server.url.rpartition(":")[2])))
            try:
                return await check(reader, server)
            finally:
                await reader.close()

    return asyncio.run(main())


def read(answer: Answer, **settings: Any) -> Page:
    async def check(reader: DirectReader, server: RawServer) -> Page:
        return await reader.read("http://example.com/page")

    page = run(check, answer, **settings)
    assert isinstance(page, Page)
    return page


def html(text: str | bytes, content_type: str = "text/html; charset=utf-8") -> bytes:
    return response(text.encode() if isinstance(text, str) else text, content_type=content_type)


@pytest.fixture(scope="module")
def extractor() -> Iterator[Extractor]:
    made = Extractor()
    yield made
    made.close()


def _extract(extractor: Extractor, body: str | bytes, kind: str = "text/html") -> tuple[str, str]:
    data = body.encode() if isinstance(body, str) else body
    return extractor.extract(data, kind, max_chars=100_000, timeout_s=120)


def test_a_web_page_is_its_title_and_its_text() -> None:
    page = read(html(ARTICLE))
    assert (page.url, page.title) == ("http://example.com/page", "The Eiffel Tower")
    assert "It is 330 metres high" in page.text
    assert "Stephen Sauvestre" in page.text
    for rest in ("Log in", "Cookie", "secret", "color", "<"):
        assert rest not in page.text
    assert Page.from_json(json.loads(json.dumps(page.to_json()))) == page


def test_the_address_is_that_after_redirects() -> None:
    async def check(reader: DirectReader, server: RawServer) -> None:
        assert (await reader.read("http://example.com/a")).url == "http://other.example/b"

    run(check, response(b"", 302, Location="http://other.example/b"), html(ARTICLE))


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("text/plain", "a < b\n  and <p>this</p> stays"),
        ("text/markdown; charset=utf-8", "# Größe\n\n* 北京"),
        ("text/csv", "a,b\n1,2"),
        ("application/json", '{"a": [1, 2]}'),
        ("application/ld+json; charset=utf-8", '{"@type": "Thing"}'),
    ],
)
def test_texts_stay_as_they_are(extractor: Extractor, kind: str, body: str) -> None:
    assert _extract(extractor, body, kind) == ("", body)
    assert read(response(body.encode(), content_type=kind)).text == body


@pytest.mark.parametrize(
    "kind", ["application/pdf", "image/png", "application/octet-stream", "video/mp4", "application/zip", "nonsense"]
)
def test_other_kinds_are_not_read(kind: str) -> None:
    with pytest.raises(ModelError, match="which cannot be read; choose a web page or a text"):
        read(response(b"%PDF-1.4", content_type=kind))


@pytest.mark.parametrize("body", ["", " \n ", "<html></html>", "<html><body><script>1</script></body></html>"])
def test_pages_without_text_are_the_models_fault(body: str) -> None:
    with pytest.raises(ModelError, match="the page has no readable text"):
        read(html(body))


def test_short_pages_are_read_too(extractor: Extractor) -> None:
    _, text = _extract(extractor, "<html><head><title>T</title></head><body><div>Open until 6 pm.</div></body></html>")
    assert text == "Open until 6 pm."


WORDS = "Größe, naïve, café und so weiter: das ist ein Satz, der lang genug ist, um als Text zu gelten."


@pytest.mark.parametrize(
    ("kind", "encoding"),
    [
        ("text/html; charset=utf-8", "utf-8"),
        ("text/html; charset=ISO-8859-1", "latin-1"),
        ('text/html; charset="windows-1252"', "cp1252"),
        ("text/html;CHARSET=utf-16", "utf-16"),
        ("text/html; charset=no-such-thing", "utf-8"),
        ("text/html; charset=zip", "utf-8"),
        ("text/html; charset=ascii", "utf-8"),
        ("text/html; charset=", "utf-8"),
        ("text/html", "utf-8"),
        ("", "utf-8"),
    ],
)
def test_character_sets(extractor: Extractor, kind: str, encoding: str) -> None:
    body = f"<html><head><title>Größe</title></head><body><p>{WORDS}</p><p>{WORDS}</p></body></html>".encode(encoding)
    title, text = _extract(extractor, body, kind)
    assert title == "Größe"
    assert WORDS in text


def test_long_texts_are_cut() -> None:
    assert len(read(response(b"word " * 1000, content_type="text/plain"), max_chars=1000).text) == 1000


@pytest.mark.parametrize(
    "body",
    [
        "<div>" * 100_000 + "deep" + "</div>" * 100_000,
        "<table>" * 3000 + "<tr><td>x",
        "<a href='" * 50_000,
        "<!--" * 100_000,
        "&" * 100_000,
        "<p>" + "\0\ud83d".encode("utf-8", "surrogatepass").decode("latin-1") * 1000,
        "\x1f\x8b" * 1000,
        "<?xml version='1.0' encoding='utf-8'?><!DOCTYPE x [<!ENTITY a SYSTEM 'file:///etc/passwd'>]><p>&a;</p>",
    ],
    ids=range(8),
)
def test_absurd_pages_harm_nobody(extractor: Extractor, body: str) -> None:
    try:
        _, text = _extract(extractor, body)
        assert "root:" not in text
    except ExtractionFailed:  # it may have crashed
        pass
    assert "330 metres" in _extract(extractor, ARTICLE)[1]


def test_extraction_that_takes_too_long_is_ended(extractor: Extractor) -> None:
    process = extractor._process
    with pytest.raises(ExtractionFailed):
        extractor.extract(b"<p>x" * 1_000_000, "text/html", max_chars=10, timeout_s=0.01)
    assert process is None or process.returncode is not None
    assert "330 metres" in _extract(extractor, ARTICLE)[1]
    with pytest.raises(InfrastructureError, match=r"could not be extracted within 0\.01 s"):
        read(html("<p>x" * 1_000_000), extraction_timeout_s=0.01)


NAMES = " ".join(f"a{number}" for number in range(20_000))
MONSTERS = {
    "many attributes": f"<p {NAMES}>text</p>",
    "with values": "<p " + " ".join(f'a{number}="x"' for number in range(20_000)) + ">text</p>",
    "with ends of tags in values": "<p " + " ".join(f'a{number}=">"' for number in range(20_000)) + ">text</p>",
    "with tags in values": "<p " + " ".join(f"a{number}='<b>'" for number in range(20_000)) + ">text</p>",
    "without spaces": "<p " + "".join(f'a{number}=""' for number in range(20_000)) + ">text</p>",
    "that begin with =": "<p " + NAMES.replace("a", "=a") + ">text</p>",
    "between slashes": "<p/" + NAMES.replace(" ", "/") + ">text</p>",
    "behind a quote in the text": f'text ="<p {NAMES}>text</p>"',
    "behind a quote that is a name": f'<p " {NAMES}">text</p>',
    "behind an empty comment": f"<!--><p {NAMES}>text-->",
    "behind a script": f"<SCRIPT>'<p'</Script ><p {NAMES}>text</p>",
    "many tags": "<p>" + "<br>" * 100_000,
    "many kinds of tags": "<p>" + "<B>x<i/>" * 50_000,
    "many tags that close nothing": "</p>" * 100_000,
    "many tags with attributes": f"<p {NAMES[:5000]}>x</p>" * 1000,
}


@pytest.mark.parametrize("name", MONSTERS)
def test_monsters_are_refused_before_they_are_parsed(extractor: Extractor, name: str) -> None:
    _extract(extractor, ARTICLE)
    process = extractor._process
    with pytest.raises(PageAtFault):
        _extract(extractor, MONSTERS[name])
    assert extractor._process is process  # it did not take so long that it had to be ended
    assert "330 metres" in _extract(extractor, ARTICLE)[1]


@pytest.mark.parametrize(
    "body",
    ["<table><tr><td>x</td></tr></table>" * 6600, ("<div>" * 200 + "some words" + "</div>" * 200) * 100],
    ids=["tables", "deep"],
)
def test_pages_that_cost_more_than_their_tags_are_refused_once_parsed(extractor: Extractor, body: str) -> None:
    _extract(extractor, ARTICLE)
    process = extractor._process
    with pytest.raises(PageAtFault):
        extractor.extract(body.encode(), "text/html", max_chars=10, timeout_s=120, cpu_s=60)
    assert extractor._process is process
    assert "330 metres" in _extract(extractor, ARTICLE)[1]


@pytest.mark.long
@pytest.mark.parametrize(
    "body",
    [
        "<p class='a b' id=c>The word.</p>" * 20_000,
        "<p>The word.</p>" + ("<table>" + "<tr><td>1<td>2" * 10 + "</table>") * 500,
        "<section>" * 15 + "<p>The word.</p>" * 19_000,
        "<p>The word." * 45_000,
        f"<p title='{NAMES}'>The word.</p>",
        f"<!-- <p {NAMES}> --><p>The word.</p>",
        f"<script>if (a<b) x = '{NAMES}'</script><style>/* a<b {NAMES} */</style><p>The word.</p>",
        f"<p>The word. 1 < 2, {NAMES}</p>",
    ],
    ids=["many", "tables", "deep", "unclosed", "value", "comment", "script", "text"],
)
def test_large_pages_are_no_monsters(extractor: Extractor, body: str) -> None:
    page = f"<html><head><title>T</title></head><body><div>{body}</div></body></html>"
    text = extractor.extract(page.encode(), "text/html", max_chars=100, timeout_s=120, cpu_s=60)[1]
    assert text.startswith("The word.")


@pytest.mark.long
def test_a_page_that_costs_too_much_is_to_blame_and_not_the_machine(extractor: Extractor) -> None:
    body = b"<p>some words</p>" * 40_000
    with pytest.raises(PageAtFault):
        extractor.extract(body, "text/html", max_chars=10, timeout_s=120, cpu_s=0.05)
    assert extractor.extract(body, "text/html", max_chars=10, timeout_s=120, cpu_s=60)[1] == "some words"
    assert "330 metres" in _extract(extractor, ARTICLE)[1]  # the other page's time is not counted


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT"])
def test_a_page_that_crashes_the_process_is_to_blame(extractor: Extractor, name: str) -> None:
    def kill(number: int) -> None:
        _extract(extractor, ARTICLE)
        process = extractor._process
        assert process is not None
        threading.Timer(0.1, process.send_signal, [number]).start()
        with contextlib.suppress(ProcessLookupError):
            extractor.extract(b"<p>x" * 45_000, "text/html", max_chars=10, timeout_s=120, cpu_s=60)

    with pytest.raises(PageAtFault):
        kill(getattr(signal, name))
    with pytest.raises(ExtractionFailed) as caught:
        kill(signal.SIGKILL)  # by whoever watches the machine's memory
    assert not isinstance(caught.value, PageAtFault)


def test_pages_beyond_hope_are_refused_at_once_and_remembered() -> None:
    """Eight of them beside an ordinary one; then again, by their addresses and by others."""
    extractions = 0

    async def check(reader: DirectReader, server: RawServer) -> None:
        extractor = reader._extractors.get()
        extract = extractor.extract

        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal extractions
            extractions += 1
            return extract(*arguments, **options)

        extractor.extract = counted  # type: ignore[method-assign]
        reader._extractors.put(extractor)

        async def refused(number: int) -> None:
            with pytest.raises(ModelError, match="too large or too complex to read; choose another"):
                await reader.read(f"http://example.com/{number}")

        await asyncio.gather(*map(refused, range(8)))
        assert extractions == 1  # they are one page
        requests = len(server.requests)
        await refused(3)
        assert len(server.requests) == requests  # not fetched again
        server.answers = [html(ARTICLE)]
        assert (await reader.read("http://example.com/other")).title == "The Eiffel Tower"
        await refused(3)
        reader._refused.clear()
        assert (await reader.read("http://example.com/3")).title == "The Eiffel Tower"

    run(check, html(MONSTERS["many tags"]), extractors=1)


def test_processes_are_used_again_and_closed() -> None:
    async def check(reader: DirectReader, server: RawServer) -> None:
        for _ in range(3):
            await reader.read("http://example.com/")
        extractors = [reader._extractors.get() for _ in range(1)]
        process = extractors[0]._process
        reader._extractors.put(extractors[0])
        assert process is not None
        assert process.poll() is None
        await reader.close()
        assert process.returncode is not None
        assert "330 metres" in (await reader.read("http://example.com/")).text

    run(check, html(ARTICLE), extractors=1)


def test_one_reader_serves_several_event_loops() -> None:
    async def main() -> None:
        async with RawServer(html(ARTICLE)) as server:
            connector._port = int(server.url.rpartition(":")[2])
            pages = await asyncio.gather(*(reader.read(f"http://example.com/{number}") for number in range(5)))
            assert {page.title for page in pages} == {"The Eiffel Tower"}

    connector = Loopback(0)
    config = {"attempts": 1, "respect_robots": False, "per_host": 1, "extraction_timeout_s": 120}
    reader = DirectReader(config, resolver=resolve, connector=connector)
    asyncio.run(main())
    asyncio.run(main())
    asyncio.run(reader.close())


def test_addresses_of_the_network_are_refused() -> None:
    async def check(reader: DirectReader, server: RawServer) -> None:
        for url in ("http://127.0.0.1/", "http://inside.example/", "file:///etc/passwd", "http://example.com:8080/"):
            with pytest.raises(ModelError):
                await reader.read(url)
        assert not server.requests

    run(check, html(ARTICLE))
    run(check, html(ARTICLE), respect_robots=True)


# robots.txt


def robots(text: str) -> bytes:
    return response(text.encode(), content_type="text/plain")


@pytest.mark.parametrize(
    ("rules", "allowed"),
    [
        ("User-agent: *\nDisallow: /", False),
        ("User-agent: *\nDisallow: /private/", True),
        ("User-agent: *\nDisallow: /page?a=", False),
        ("User-agent: search-agent\nDisallow: /\n\nUser-agent: *\nDisallow:", False),
        ("User-agent: other\nDisallow: /", True),
        ("User-agent: *\nAllow: /page\nDisallow: /", True),
        ("", True),
        ("<html>not found</html>", True),
    ],
)
def test_robots_are_respected(rules: str, allowed: bool) -> None:
    async def check(reader: DirectReader, server: RawServer) -> None:
        url = "http://example.com/page?a=b"
        if allowed:
            assert (await reader.read(url)).title == "The Eiffel Tower"
        else:
            with pytest.raises(ModelError, match="does not let programs read this page"):
                await reader.read(url)
        paths = [request.path for request in server.requests]
        assert paths == ["/robots.txt", "/page?a=b"][: 1 + allowed]

    run(check, robots(rules), html(ARTICLE), respect_robots=True)


def test_robots_are_asked_once_for_a_site() -> None:
    async def check(reader: DirectReader, server: RawServer) -> None:
        for url in ("http://example.com/a", "http://example.com/b", "http://www.example.com/a"):
            await reader.read(url)
        assert [request.path for request in server.requests] == ["/robots.txt", "/a", "/b", "/robots.txt", "/a"]

    run(check, response(b"", 404), html(ARTICLE), html(ARTICLE), response(b"", 403), html(ARTICLE), respect_robots=True)


def test_robots_that_do_not_come_are_waited_for() -> None:
    async def check(reader: DirectReader, server: RawServer) -> None:
        with pytest.raises(InfrastructureError, match="answered 503"):
            await reader.read("http://example.com/a")
        assert (await reader.read("http://example.com/a")).title == "The Eiffel Tower"

    run(check, response(b"", 503), response(b"", 404), html(ARTICLE), respect_robots=True)


# Limits


def test_hosts_are_not_crowded() -> None:
    """Eight pages of one host at once, two of them at a time; a page of another host need not wait for them."""
    now: Counter[str] = Counter()
    most: Counter[str] = Counter()
    release = asyncio.Event()

    async def check(reader: DirectReader, server: RawServer) -> None:
        fetch = reader._fetcher.fetch

        async def counted(url: str, **options: Any) -> Any:
            host = url.split("/")[2]
            now[host] += 1
            most[host] = max(most[host], now[host])
            if host == "slow.example":
                await release.wait()
            try:
                return await fetch(url, **options)
            finally:
                now[host] -= 1

        reader._fetcher.fetch = counted  # type: ignore[method-assign]
        slow = [asyncio.create_task(reader.read(f"http://slow.example/{number}")) for number in range(8)]
        while now["slow.example"] < 2:
            await asyncio.sleep(0.01)
        assert (await reader.read("http://fast.example/")).title == "The Eiffel Tower"
        assert now["slow.example"] == 2
        release.set()
        await asyncio.gather(*slow)
        assert most["slow.example"] == 2

    run(check, html(ARTICLE), per_host=2, concurrency=3)


def test_waiting_for_a_place_is_limited() -> None:
    async def silent(writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    async def check(reader: DirectReader, server: RawServer) -> None:
        results = await asyncio.gather(
            *(reader.read(f"http://example.com/{number}") for number in range(4)), return_exceptions=True
        )
        assert [type(result) for result in results] == [InfrastructureError] * 4
        assert all("example.com: no answer within 1 s" in str(result) for result in results)

    run(check, silent, timeout_s=1.0, per_host=1)


# Settings


def test_it_is_the_provider_direct() -> None:
    provider = make_page_provider({"provider": "direct"})
    assert isinstance(provider, DirectReader)
    assert version("trafilatura") in provider.identity
    assert provider.identity != make_page_provider({"provider": "direct", "max_chars": 1000}).identity


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"timeout": 3}, "timeout: Extra inputs"),
        ({"timeout_s": 0}, "timeout_s: Input should be greater than 0"),
        ({"per_host": 0}, "per_host: "),
        ({"user_agent": "a\nb"}, "user_agent must be printable ASCII"),
        ({"allowed_ports": [99999]}, "allowed_ports must be numbers of ports"),
    ],
)
def test_settings_are_checked(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DirectReader(config)
