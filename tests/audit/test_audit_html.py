"""The HTML report of an audit, in a real headless Chromium (Debian's `chromium`) driven by playwright."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

import pytest
from audit_pages import audit_result
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_tapo.audit import audit
from verl_tapo.audit.html import write_report
from verl_tapo.audit.units import percent, points
from verl_tapo.rule import figures as meaning

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH: the report is not opened")

HOSTILE = (
    "<script>window.pwned=1</script></script><!--<script><img src=x onerror='window.pwned=2'>"
    "<iframe srcdoc='<script>parent.pwned=3</script>'></iframe><svg onload=alert(1)>]]>-->"
    "${pwned}\"'`javascript:alert(2)"
    "\u202egnp.exe\u2066\u200b\x00\x1b[31m\u2028\u2029\ud800\U000e0041 & &lt;b&gt; http://example.com/x.png"
)


class Report:
    """A page, and whatever it did that it should not."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.noise: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda message: self.noise.append(message.text))
        page.on("pageerror", lambda error: self.noise.append(str(error)))
        page.on("dialog", lambda dialog: (self.noise.append("dialog"), dialog.dismiss()))
        page.on("popup", lambda _: self.noise.append("popup"))
        page.on("request", lambda request: self.requests.append(request.url.partition("#")[0]))

    def found(self) -> str:
        return self.page.locator("#found").inner_text()

    def listed(self) -> list[int]:
        """Positions of the groups on the list's page."""
        links = self.page.eval_on_selector_all("#group-list a", "links => links.map(a => a.getAttribute('href'))")
        return [int(link.removeprefix("#g")) for link in links]

    def selected(self) -> str | None:
        """The id of the selected call."""
        return self.page.evaluate("document.querySelector('.call[aria-current]')?.id ?? null")

    def focused(self) -> str:
        return self.page.evaluate("document.activeElement.id")

    def hash(self) -> str:
        return self.page.evaluate("location.hash")

    def until(self, happened: Callable[[], object]) -> None:
        """Waits; the page's policy forbids playwright's own waiting for a function."""
        end = time.monotonic() + 30
        while not happened():
            assert time.monotonic() < end, "it did not happen within 30 s"
            self.page.wait_for_timeout(20)

    def search(self, words: str) -> None:
        """Types and waits for the list to change."""
        before = self.page.locator("#group-list").inner_html()
        self.page.fill("#filter-text", words)
        self.until(lambda: self.page.locator("#group-list").inner_html() != before)

    def unfold(self, summary: Any) -> None:
        """Clicks and waits for the content, which is made when the browser tells that the part was opened."""
        summary.click()
        summary.locator("xpath=following-sibling::*").first.wait_for()

    def open_details(self) -> None:
        self.page.eval_on_selector_all("details", "all => all.forEach(one => { one.open = true })")
        empty = self.page.locator("details[open]:not(:has(> :not(summary)))")
        self.until(lambda: empty.count() == 0)

    def cards(self) -> list[str]:
        """The ids of the calls on the page, from the left to the right and down."""
        return self.page.eval_on_selector_all("#group .call", "all => all.map(one => one.id)")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no chromium on the PATH: the report is not opened")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_report(chromium: Any, tmp_path: Path) -> Iterator[Any]:
    """Opens the report of an audit; at the end checks that the page was quiet and fetched nothing."""
    opened: list[tuple[Report, str]] = []

    def open_it(result: dict[str, Any], fragment: str = "", **options: Any) -> Report:
        path = tmp_path / "report.html"
        write_report(result, path)
        page = chromium.new_page(**{"viewport": {"width": 1280, "height": 900}, **options})
        report = Report(page)
        opened.append((report, path.as_uri()))
        page.goto(path.as_uri() + fragment)
        return report

    yield open_it
    for report, uri in opened:
        report.page.close()
        assert report.noise == []
        assert report.requests == [uri]


def calls_of(result: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for g, group in enumerate(result["groups"]):
        for t, trajectory in enumerate(group["trajectories"]):
            for c, call in enumerate(trajectory["calls"]):
                yield f"g{g}t{t}c{c}", call


def first_call(result: dict[str, Any], **wanted: Any) -> tuple[str, dict[str, Any]]:
    return next((id, call) for id, call in calls_of(result) if all(call[key] == wanted[key] for key in wanted))


def result_call(result: dict[str, Any], id: str) -> dict[str, Any]:
    return dict(calls_of(result))[id]


def groups_with(result: dict[str, Any], **wanted: Any) -> list[int]:
    """Positions of the groups that hold such a call, in order."""
    ids = [id for id, call in calls_of(result) if all(call[key] == wanted[key] for key in wanted)]
    return sorted({int(re.match(r"g(\d+)", id)[1]) for id in ids})  # type: ignore[index]


def narrow_to(report: Report, result: dict[str, Any], **wanted: Any) -> None:
    """Sets filters of calls and waits for the list of what matches."""
    for name, value in wanted.items():
        report.page.select_option(f"#filter-{name}", value)
    report.until(lambda: report.listed() == groups_with(result, **wanted))


def put_hostile_text_everywhere(result: dict[str, Any]) -> None:
    result["title"] = HOSTILE
    result["sources"] = [HOSTILE]
    result["warnings"][0]["text"] = result["warnings"][0]["advice"] = HOSTILE
    result["problems"] = [{"file": HOSTILE, "line": 1, "reason": HOSTILE}]
    result["tools"][HOSTILE] = result["tools"]["zoom"]
    group = result["groups"][0]
    group["prompt"] = HOSTILE + group["prompt"] + HOSTILE
    group["uid"] = group["ground_truth"] = HOSTILE
    for trajectory in group["trajectories"]:
        trajectory["text"] = HOSTILE + trajectory["text"] + HOSTILE
        trajectory["name"] = HOSTILE
        for call in trajectory["calls"]:
            call.update(tool=HOSTILE, arguments={HOSTILE: HOSTILE, "__proto__": {"x": [HOSTILE]}}, result=HOSTILE)
            call.update(status=HOSTILE, ok=False, seen=True, found=HOSTILE)


# The file


class Scripts(HTMLParser):
    """The contents of the script elements, as a browser would cut them, and the other elements' names."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.scripts: list[tuple[str | None, str]] = []
        self.others: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "script":
            self.scripts.append((dict(attrs).get("data-kind"), ""))
        else:
            self.others.append(tag)

    def handle_data(self, data: str) -> None:
        if self.lasttag == "script" and self.scripts:
            kind, text = self.scripts[-1]
            self.scripts[-1] = (kind, text + data)


@settings(max_examples=30, deadline=None)
@given(text=st.text(st.characters()) | st.sampled_from(["</script>", "<!--<script>", "\ud800\u2028&amp;\x00"]))
def test_any_text_is_embedded_as_it_is_and_ends_no_element(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "report.html"
    result = audit_result(groups=1, rollouts=2)
    write_report(result, path)
    harmless = Scripts(path.read_text("utf-8"))
    result["title"] = text
    result["groups"][0]["trajectories"][0]["text"] = text
    result["groups"][0]["prompt"] = text
    write_report(result, path)
    written = Scripts(path.read_text("utf-8"))
    assert written.others == harmless.others
    data = [(kind, json.loads(block)) for kind, block in written.scripts if kind in ("summary", "group")]
    summary = {key: value for key, value in result.items() if key != "groups"}
    assert data == [("summary", summary), ("group", result["groups"][0])]


def test_what_the_page_cannot_show_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="version 2, expected 1"):
        write_report(audit_result(version=2), tmp_path / "report.html")
    with pytest.raises(ValueError, match="JSON"):
        write_report(audit_result(title=float("nan")), tmp_path / "report.html")


def test_a_report_is_replaced_only_by_a_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(audit_result(groups=1), path)
    before = path.read_bytes()
    torn = audit_result(groups=3)
    torn["groups"][2]["interest"] = float("nan")
    with pytest.raises(ValueError, match="JSON"):
        write_report(torn, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    link = tmp_path / "latest.html"
    link.symlink_to(path)
    write_report(audit_result(groups=2), link)
    assert link.is_symlink()
    assert len(path.read_bytes()) > len(before)


def test_a_report_goes_down_a_pipe(tmp_path: Path) -> None:
    result = audit_result(groups=2)
    write_report(result, tmp_path / "report.html")
    read, write = os.pipe()
    with ThreadPoolExecutor(1) as pool, open(read, "rb") as end:
        received = pool.submit(end.read)
        write_report(result, Path(f"/dev/fd/{write}"))
        os.close(write)
        assert received.result() == (tmp_path / "report.html").read_bytes()


@pytest.mark.parametrize(
    ("value", "share", "lift"),
    [
        (0.0, "0 %", "0 points"),
        (1.0, "100 %", "+100 points"),
        (0.08, "8 %", "+8 points"),
        (0.1, "10 %", "+10 points"),
        (0.125, "13 %", "+13 points"),  # halves go up, as in JavaScript
        (0.385, "39 %", "+39 points"),
        (0.004, "0.4 %", "+0.4 points"),
        (0.0097, "1 %", "+1 point"),
        (0.00001, "<0.1 %", "0 points"),
        (0.996, "99.6 %", "+100 points"),
        (0.99999, ">99.9 %", "+100 points"),
        (None, "–", "–"),
    ],
)
def test_shares_are_in_percent_and_lifts_in_points(value: float | None, share: str, lift: str) -> None:
    assert (percent(value), points(value)) == (share, lift)
    if value:
        assert points(-value) == lift.replace("+", "−")


# The page


@needs_browser
def test_the_script_writes_figures_as_the_rest_of_the_report(open_report: Any) -> None:
    page = open_report(audit_result()).page
    values = [None, *(k / 1600 for k in range(1601)), 1e-7, 1 - 1e-7]
    assert page.evaluate("all => all.map(percent)", values) == [percent(value) for value in values]
    signed = [*values, *(-value for value in values if value)]
    assert page.evaluate("all => all.map(points)", signed) == [points(value) for value in signed]


@needs_browser
def test_without_javascript_the_main_figures_are_there(open_report: Any) -> None:
    result = audit_result()
    put_hostile_text_everywhere(result)
    page = open_report(result, java_script_enabled=False).page
    figures = page.locator("#headline dd").all_inner_texts()
    totals = result["totals"]
    assert figures[5] == percent(totals["success_rate"])
    assert figures[4] == points(totals["lift"])
    assert page.locator("#title").inner_text().startswith("<script>window.pwned=1</script>")
    assert page.locator("#warnings .notice").count() == 2
    assert "JavaScript is off" in page.locator("noscript").inner_text()
    headings = [heading.inner_text() for heading in page.locator("h1, h2, h3").all() if heading.is_visible()]
    assert headings[1:] == ["At a glance"]  # none that nothing follows
    assert page.locator("main > section:visible, footer:visible, .skip:visible").count() == 1


@needs_browser
def test_headline_warnings_plots_and_tables(open_report: Any) -> None:
    result = audit_result()
    report = open_report(result)
    page, totals = report.page, result["totals"]
    headline = page.locator("#headline dd").all_inner_texts()
    shares = ("correctable_trajectories", "failing_trajectories"), ("misassigned_steps", "failing_steps")
    assert headline[:2] == [f"{100 * totals[part] / totals[whole]:.0f} %" for part, whole in shares]
    levels = page.eval_on_selector_all("#warnings .notice", "all => all.map(one => one.classList[1])")
    assert levels == ["warning", "info"]  # the worst first
    assert page.locator("#warnings .advice").all_inner_texts()[1] == result["warnings"][0]["advice"]
    assert page.locator("figure > svg[role=img]").count() == 6
    assert page.locator("#tools tbody th").all_inner_texts() == sorted(
        result["tools"], key=lambda tool: -result["tools"][tool]["calls"]
    )
    report.unfold(page.locator("#plots summary").first)
    rows = page.locator("#plots tbody tr")
    assert rows.count() == len(result["steps"])
    step = result["steps"][0]
    assert (
        rows.first.locator("td").first.inner_text()
        == f"{100 * step['misassigned_steps'] / step['failing_steps']:.0f} %"
    )
    # theta stands where its axis says
    line = page.locator("#plots figure").nth(2).locator("line.gate")
    bars = page.locator("#plots figure").nth(2).locator("svg[role=img] rect.bar.corrected")
    assert all(float(bar.get_attribute("x")) > float(line.get_attribute("x1")) for bar in bars.all())
    report.unfold(page.locator("#sweeps summary"))
    assert page.locator("#sweeps tbody tr").count() == len(result["sweeps"])
    assert "(in use)" in page.locator("#sweeps tr[aria-current]").inner_text()
    size = page.locator("#colophon").inner_text()
    assert re.search(r"This file: \d+ kB, with 12 prompt groups and 96 rollouts of 96 to read", size)


@needs_browser
def test_the_columns_of_tools_are_figures(open_report: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is added to them is a column, too."""
    before = open_report(audit_result()).page.locator("#tools thead th").all_inner_texts()
    made_up = meaning.Figure("made_up", "made_up_steps", "failing_steps", "made up", column="made up")
    monkeypatch.setattr(meaning, "FIGURES", [*meaning.FIGURES, made_up])
    result = audit_result()
    for of in result["tools"].values():
        of.update(failing_steps=8, made_up_steps=2)
    page = open_report(result).page
    assert page.locator("#tools thead th").all_inner_texts() == [*before, "Made up"]
    assert page.locator("#tools tbody td:last-child").all_inner_texts() == ["25 %"] * 3


@needs_browser
def test_an_audit_of_nothing(open_report: Any) -> None:
    result = audit_result(groups=1)
    totals = {key: (0 if isinstance(value, int) else None) for key, value in result["totals"].items()}
    empty = {key: [] for key in ("steps", "sweeps", "warnings", "problems", "groups", "support_alpha")}
    histogram = {key: [0] * 20 for key in ("corrected", "below_alpha", "below_theta")}
    histogram["edges"] = result["similarity_histogram"]["edges"]
    page = open_report(
        {**result, **empty, "totals": totals, "tools": {}, "similarity_histogram": histogram, "skipped": 0}
    )
    assert page.found() == "This report holds no trajectories."
    assert page.page.locator("#sweeps-section").is_hidden()


@needs_browser
def test_groups_come_by_interest_and_the_first_is_open(open_report: Any) -> None:
    result = audit_result(groups=45)
    result["groups"].reverse()
    report = open_report(result)
    interest = [group["interest"] for group in result["groups"]]
    order = sorted(range(45), key=lambda g: (-interest[g], g))
    assert report.listed() == order[:20]
    assert report.page.locator("#group h3").get_attribute("id") == f"g{order[0]}"
    assert report.page.locator(".rollout").count() == 8
    report.page.click("#page-after")
    assert report.listed() == order[20:40]
    assert report.page.locator("#group-list").get_attribute("start") == "21"


@needs_browser
def test_a_call_says_what_the_rule_found(open_report: Any) -> None:
    result = audit_result()
    report = open_report(result)
    for gate in ("corrected", "below_theta", "no_witness"):
        id, call = first_call(result, gate=gate)
        report.page.evaluate("id => { location.hash = id }", id)
        report.until(lambda id=id: report.selected() == id)
        card = report.page.locator(f"#{id}")
        text = card.inner_text()
        assert call["tool"] in card.locator("h5").inner_text()
        assert all(name in text for name in call["arguments"])
        numbers = (
            [f"{call['before']:+.2f}", f"{call['after']:+.2f}"] if gate == "corrected" else [f"{call['before']:+.2f}"]
        )
        shown = card.locator(".advantage b").all_inner_texts()
        assert shown == [
            number.replace("-", "−").replace("+0.00", "0.00").replace("−0.00", "0.00") for number in numbers
        ]
        if gate == "corrected":
            names, values = (card.locator(f".figures {part}").all_inner_texts() for part in ("dt", "dd"))
            figures = dict(zip(names, values, strict=True))
            assert figures["similarity"] == f"{call['similarity']:.2f}"
            assert figures["support"] == f"{call['support']:.2f}"
            assert figures["alpha"] == f"{call['alpha']:.2f}"
            assert figures["reference advantage"] == f"{call['reference_advantage']:+.2f}"
        if gate == "below_theta":
            assert f"similarity {call['similarity']:.2f}, below theta 0.8" in text
        # Spans count characters; the emoji before the call takes two in JavaScript.
        card.get_by_text("As written").click()
        _, t, c = re.findall(r"\d+", id)
        group, trajectory = result["groups"][int(id[1 : id.index("t")])], int(t)
        start, end = group["trajectories"][trajectory]["calls"][int(c)]["call_span"]
        assert card.locator("details .text").inner_text() == group["trajectories"][trajectory]["text"][start:end]


@needs_browser
def test_how_much_of_the_blame_is_taken_back(open_report: Any) -> None:
    """All of it, a part, none; by a call that was made too, or by one that is only similar."""
    result = audit_result()
    ids = [id for id, call in calls_of(result) if id.startswith("g1t") and call["gate"] == "corrected"][:4]
    calls = dict(calls_of(result))
    for id, after, inexact in zip(ids, (0.0, -0.25, -0.999, -1.0), (False, True, False, False), strict=True):
        calls[id].update(before=-1.0, after=after, inexact=inexact)
    page = open_report(result, "#g1").page
    texts = [page.locator(f"#{id} .why").first.inner_text() for id in ids]
    assert texts == [
        "A successful sibling made this call too: all of the blame is taken back.",
        "A successful sibling made a similar call: 75 % of the blame is taken back.",
        "A successful sibling made this call too: 0.1 % of the blame is taken back.",
        "A successful sibling made this call too; its tokens stay as they are, since another call of the same turn "
        "got no credit.",
    ]


@needs_browser
def test_below_theta_there_is_a_nearest_call_and_no_witness(open_report: Any) -> None:
    result = audit_result()
    id, call = first_call(result, gate="below_theta")
    nearest = f"{id.split('t')[0]}t{call['witness']['trajectory']}c{call['witness']['call']}"
    report = open_report(result, f"#{id}")
    page = report.page
    text = page.locator(f"#{id}").inner_text()
    assert page.locator(f"#{id} .witness-link a").inner_text().startswith("≠ Nearest call: rollout ")
    assert "witness" not in text.lower()
    assert "–" not in text  # no support, no alpha: not a word about them
    assert page.locator(f"#{id} .figures").count() == 0
    # in which parameters it differs, on the spot
    other = page.locator(f"#{id} .witness-link .arguments").inner_text()
    assert all(str(value) in other for value in result_call(result, nearest)["arguments"].values())
    assert page.locator(".its-nearest").get_attribute("id") == nearest
    assert page.locator(".its-witness").count() == 0
    page.keyboard.press("w")
    assert report.selected() == nearest
    # what it speaks for are those at theta or above
    group = id.split("t")[0]
    heard = page.locator(f"#{nearest} .witness-link a").evaluate_all("all => all.map(a => a.getAttribute('href'))")
    expected = [
        f"#{other}"
        for other, c in calls_of(result)
        if other.startswith(f"{group}t") and c["gate"] == "corrected" and c["witness"] == call["witness"]
    ]
    assert heard == expected[:8]


@needs_browser
def test_one_success_in_a_group_tells_nothing_of_luck(open_report: Any) -> None:
    result = audit_result()
    for _, call in calls_of(result):
        call["lift"] = 0.07 if call["gate"] == "corrected" else None
    single, several = (
        next(
            id
            for id, call in calls_of(result)
            if call["gate"] == "corrected"
            and (sum(t["success"] for t in result["groups"][int(id[1 : id.index("t")])]["trajectories"]) == 1) == one
        )
        for one in (True, False)
    )
    page = open_report(result, f"#{single}").page
    assert "only one success in this group" in page.locator(f"#{single} .figures").inner_text()
    assert "points" not in page.locator(f"#{single} .figures").inner_text()
    assert "Only one success in this group" in page.locator("#group").inner_text()
    page.evaluate("id => { location.hash = id }", several)
    page.locator(f"#{several}").wait_for()
    assert "+7 points" in page.locator(f"#{several} .figures").inner_text()
    assert "success in this group" not in page.locator("#group").inner_text()


@needs_browser
def test_expected_answers_are_words(open_report: Any) -> None:
    truths = [["Kinshasa"], ["a, b", "c", 3], {"target": ["x", "y"]}, [f"n{k}" for k in range(15)], [], None, "plain"]
    result = audit_result(groups=len(truths))
    for group, truth in zip(result["groups"], truths, strict=True):
        group["ground_truth"] = truth
    page = open_report(result).page
    shown = []
    for number in range(len(truths)):
        page.click(f"#group-list a[href='#g{number}']")
        shown.append(page.locator("#group .facts", has_text="Expected").all_inner_texts())
    many = " or ".join(f"n{k}" for k in range(12)) + " or one of 3 more"
    assert shown == [
        ["Expected: Kinshasa"], ["Expected: a, b or c or 3"], ["Expected: target: x or y"], [f"Expected: {many}"],
        [], [], ["Expected: plain"],
    ]  # fmt: skip


GROUNDED = {
    "told_trajectories": 90,
    "told_successes": 40,
    "grounded_successes": 30,
    "told_failures": 50,
    "grounded_failures": 17,
    "never_found_trajectories": 43,
}


@pytest.mark.long
@needs_browser
def test_whether_the_tools_found_the_answer_in_plain_sentences(open_report: Any) -> None:
    """Without JavaScript, too; nothing where it cannot be told, as in audits of before."""
    result = audit_result()
    assert open_report(result, java_script_enabled=False).page.locator("#grounding").is_hidden()
    result["totals"] |= GROUNDED
    page = open_report(result, java_script_enabled=False).page
    assert page.locator("#grounding").inner_text().replace("\n\n", "\n").split("\n") == [
        "Did the tools find the answer?",
        "75 %",
        "of the successes had found the answer; the others guessed, or knew.",
        "34 %",
        "of the failures had found the answer and did not give it: a reading problem.",
        "48 %",
        "of the rollouts never found it: a search problem.",
        "Of 94 % of the rollouts it can be told whether a tool’s answer held an accepted answer.",
    ]
    result["totals"] |= {"told_successes": 0, "grounded_successes": 0}
    assert page.locator("#grounding li").count() == 3
    assert open_report(result).page.locator("#grounding li").count() == 2


@needs_browser
def test_filter_by_grounding(open_report: Any) -> None:
    result = audit_result(groups=3)
    states = [True, False, None]
    for number, group in enumerate(result["groups"]):
        for trajectory in group["trajectories"]:
            trajectory["grounded"] = states[number]
    del result["groups"][2]["trajectories"][0]["grounded"]  # an audit of before
    report = open_report(result)
    said = "#group .rollout .facts:has-text('grounded')"
    assert report.page.locator(said).all_inner_texts() == ["grounded: a tool found the answer"] * 8
    for number, value in enumerate(("true", "false", "null")):
        report.page.select_option("#filter-grounding", value)
        report.until(lambda expected=number: report.listed() == [expected])
        assert report.found() == "1 of 3 prompt groups with 8 matching rollouts"
        assert report.page.locator(said).count() == (8 if value != "null" else 0)
    result["groups"][2]["trajectories"][0]["success"] = True
    right = sum(trajectory["success"] for trajectory in result["groups"][2]["trajectories"])
    report = open_report(result)
    report.page.select_option("#filter-grounding", "null")
    report.page.select_option("#filter-success", "yes")
    report.until(lambda: f"with {right} matching" in report.found())
    report.page.click("#filters button[type=reset]")
    report.until(lambda: len(report.listed()) == 3)


@needs_browser
@pytest.mark.parametrize(
    ("truth", "page", "marked"),
    [
        ("Kinshasa", "The Kinshasans, and KINSHASA's mayor. (Kinshasa)", ["KINSHASA", "Kinshasa"]),
        ("São Paulo", "<b>In Sao Paulo</b>, São Paulo.", ["Sao Paulo"]),
        ("東京", "日本の首都は東京です。", ["東京"]),
        ("1,234,567", "It was 1234567; 12345678 is another.", ["1234567"]),
        ("C++ language", "Written in the C++ language, since 1985", ["C++ language"]),
        ("Kinshasa", "x " * 5000 + "to Kinshasa now", ["Kinshasa"]),
        ("Kinshasa", "nothing of it", []),
    ],
)
def test_the_answer_is_marked_where_a_tool_found_it(
    open_report: Any, tmp_path: Path, truth: str, page: str, marked: list[str]
) -> None:
    """As it stands there, in the call's result and in the text between the turns; not in what the model writes."""
    said = json.dumps({"name": "search", "arguments": {"query": "q"}})
    call = f"<tool_call>\n{said}\n</tool_call>\nuser\n<tool_response>\n{page}\n</tool_response>\nassistant\n"
    lines = [
        {"input": "q?", "output": f"{truth}? {call}{truth}", "gts": [truth], "score": float(k), "step": 1}
        for k in (0, 1)
    ]
    (tmp_path / "1.jsonl").write_text("\n".join(map(json.dumps, lines)))
    result = audit(tmp_path / "1.jsonl").result
    report = open_report(result, "#g0t0c0")
    for button in report.page.locator("#g0t0c0 .result .more").all():
        assert "the answer among them" in button.inner_text()
        button.click()
    assert report.page.locator("#g0t0c0 .result mark.answer").all_inner_texts() == marked
    assert report.page.locator("#g0t0c0 .badge.held").count() == bool(marked)
    assert len(report.page.locator("#g0t0c0 .result").inner_text()) < 3000
    between = report.page.locator(".between").first
    assert ("the answer" in between.locator("summary").inner_text()) == bool(marked)
    report.unfold(between.locator("summary"))
    for button in between.locator(".more").all():
        button.click()
    assert between.locator("mark.answer").all_inner_texts() == marked
    report.page.fill("#filter-text", truth)
    report.page.locator("#group .turn > .text mark").first.wait_for()
    assert report.page.locator("#group .turn > .text mark.answer").count() == 0
    assert report.page.locator("#group .facts mark:not(.answer)").first.inner_text() == truth


@needs_browser
def test_values_are_shown_as_they_are(open_report: Any) -> None:
    result = audit_result(groups=1)
    result["groups"][0]["trajectories"][0]["calls"][0]["arguments"] = {
        "a": ["x,y", "[ 1\n ]"],
        "b": {"c": [1, 2]},
        "d": [],
    }
    page = open_report(result, "#g0t0c0").page
    values = page.locator("#g0t0c0 .arguments dd").all_inner_texts()
    assert values[:3] == ['["x,y", "[ 1\\n ]"]', '{"c": [1, 2]}', "[]"]


@needs_browser
def test_the_tint_follows_the_advantage(open_report: Any) -> None:
    """Blame and praise differ in hue; a correction to 0 takes the tint away and leaves the edge."""
    result = audit_result()
    id, call = first_call(result, gate="corrected", after=0.0)
    report = open_report(result, f"#{id}")
    style = "node => { const s = getComputedStyle(node); return [s.backgroundColor, s.borderLeftColor] }"
    witness = call["witness"]
    praised = report.page.locator(f"#{id.split('t')[0]}t{witness['trajectory']}c{witness['call']}")
    corrected, edge = report.page.locator(f"#{id}").evaluate(style)
    assert corrected == "color(srgb 1 1 1)"

    def channels(color: str) -> list[float]:
        return [float(number) for number in re.findall(r"[\d.]+", color)][:3]

    assert channels(edge)[0] > channels(edge)[2]
    red, _, blue = channels(praised.evaluate(style)[0])
    assert blue > red


@needs_browser
def test_filters(open_report: Any) -> None:
    result = audit_result(groups=18, steps=6)
    report = open_report(result)
    page = report.page
    everything = sorted(report.listed())
    assert everything == list(range(18))

    page.select_option("#filter-gate", "below_theta")
    report.until(lambda: len(report.listed()) < 18)
    assert sorted(report.listed()) == groups_with(result, gate="below_theta")
    page.select_option("#filter-tool", "zoom")
    expected = groups_with(result, gate="below_theta", tool="zoom")  # one call must be both
    report.until(lambda: len(report.listed()) == len(expected))
    assert 0 < len(expected) < len(groups_with(result, gate="below_theta"))
    assert sorted(report.listed()) == expected
    assert report.found().startswith(f"{len(expected)} of 18 prompt group")
    page.click("#filters button[type=reset]")
    report.until(lambda: len(report.listed()) == 18)

    page.select_option("#filter-step", "3")
    report.until(lambda: len(report.listed()) == 3)
    assert sorted(report.listed()) == [g for g, group in enumerate(result["groups"]) if group["step"] == 3]
    page.select_option("#filter-role", "witness")
    page.select_option("#filter-success", "no")
    report.until(lambda: len(report.listed()) == 0)
    assert report.found() == "No prompt group matches these filters."
    assert page.locator("#group *").count() == 0


@needs_browser
@pytest.mark.parametrize("gate", ["corrected", "below_theta"])
def test_what_matches_comes_first_with_its_witness_in_view(open_report: Any, gate: str) -> None:
    result = audit_result()
    for group in result["groups"]:  # the witnesses far to the right, the failing calls late
        for trajectory in group["trajectories"]:
            trajectory["calls"].sort(key=lambda call: call["gate"] == gate)
    rejudge(result)
    report = open_report(result, viewport={"width": 1366, "height": 768})
    page = report.page
    narrow_to(report, result, gate=gate)
    page.evaluate("document.getElementById('filters').scrollIntoView()")
    for g in groups_with(result, gate=gate):
        page.locator(f"#group-list a[href='#g{g}']").click()
        matching = [id for id, call in calls_of(result) if id.startswith(f"g{g}t") and call["gate"] == gate]
        first, call = matching[0], dict(calls_of(result))[matching[0]]
        witness = f"g{g}t{call['witness']['trajectory']}c{call['witness']['call']}"
        headings = page.locator(".rollout h4").evaluate_all("all => all.map(one => one.id)")
        assert headings[:2] == [id.split("c")[0] for id in (first, witness)]
        for id in (first, witness):
            box = page.locator(f"#{id}").bounding_box()
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= 1366
            assert box["y"] + 150 < 768  # its name, what became of it, its parameters
        # then the others that match, and only then those that do not
        rollouts = [f"g{g}t{t}" for t in range(8)]
        held = {id.split("c")[0] for id in matching}
        partners = {
            f"g{g}t{c['witness']['trajectory']}" for id, c in calls_of(result) if id in matching and c["witness"]
        }
        assert set(headings[: len(held | partners)]) == held | partners
        assert sorted(headings) == rollouts
        beside = page.locator(".rollout.beside h4").evaluate_all("all => all.map(one => one.id)")
        assert beside == [id for id in rollouts if id not in held | partners]
        assert set(matching) <= set(report.cards())


def rejudge(result: dict[str, Any]) -> None:
    """Corrects the numbers of witnesses after their calls were moved."""
    for group in result["groups"]:
        for trajectory in group["trajectories"]:
            for call in trajectory["calls"]:
                if call["witness"]:
                    holder = group["trajectories"][call["witness"]["trajectory"]]
                    tools = [other["tool"] for other in holder["calls"]]
                    call["witness"] = {**call["witness"], "call": tools.index(call["tool"])}


@needs_browser
def test_calls_that_do_not_match_are_folded_and_one_click_away(open_report: Any) -> None:
    result = audit_result()
    report = open_report(result)
    page = report.page
    narrow_to(report, result, tool="text_search", gate="corrected")
    matching = [
        id for id, call in calls_of(result)
        if id.startswith("g0t") and (call["tool"], call["gate"]) == ("text_search", "corrected")
    ]  # fmt: skip
    every = dict(calls_of(result))
    witnesses = {f"g0t{every[id]['witness']['trajectory']}c{every[id]['witness']['call']}" for id in matching}
    assert set(report.cards()) == {*matching, *witnesses}
    folded = page.locator(".rollout").first.locator("summary", has_text="image_search ▲ corrected").first
    assert folded.inner_text().startswith("Call 1")
    report.unfold(folded)
    hidden = f"{matching[0].split('c')[0]}c0"
    assert hidden in report.cards()
    # a link leads to a call that is folded away
    away = next(id for id, _ in calls_of(result) if id.startswith("g0t") and id not in report.cards())
    page.evaluate("id => { location.hash = id }", away)
    report.until(lambda: report.selected() == away)
    # and n goes through those that match as they stand
    page.click("#group-list a[href='#g0']")
    visited = []
    for _ in matching:
        page.keyboard.press("n")
        visited.append(report.selected())
    assert visited == [id for id in report.cards() if id in matching]
    page.click("#filters button[type=reset]")
    report.until(lambda: len(report.cards()) == sum(id.startswith("g0t") for id in every))


@needs_browser
def test_a_match_among_thousands_of_calls_is_drawn(open_report: Any) -> None:
    """In one turn, and in as many turns as calls."""
    result = audit_result()
    for t, apart in ((0, False), (1, True)):
        trajectory = result["groups"][0]["trajectories"][t]
        call = {**trajectory["calls"][0], "gate": "no_witness", "role": "failing", "witness": None}
        spans = [[k, k + 1] if apart else call["span"] for k in range(3000)]
        trajectory["calls"] = [{**call, "span": span, "call_span": span} for span in spans]
        trajectory["text"] += "x" * 3000
        trajectory["calls"][2500] = {**trajectory["calls"][2500], "gate": "corrected", "lucky": True}
    report = open_report(result)
    report.page.select_option("#filter-gate", "lucky")
    report.until(lambda: report.listed() == [0])
    assert report.cards() == ["g0t0c2500", "g0t1c2500"]
    assert report.page.evaluate("document.querySelectorAll('*').length") < 3000
    report.page.evaluate("location.hash = '#g0t0c7'")
    report.until(lambda: report.selected() == "g0t0c7")


@needs_browser
def test_search_looks_in_prompts_arguments_and_texts(open_report: Any) -> None:
    result = audit_result(groups=10)
    result["groups"][3]["prompt"] += "Zebra.*"
    result["groups"][4]["trajectories"][1]["calls"][0]["arguments"]["note"] = "a ZEBRA.* too"
    result["groups"][5]["trajectories"][2]["text"] += "zebra.*"
    result["groups"][6]["trajectories"][2]["text"] += "zebra and more"  # what is searched for is no pattern
    report = open_report(result)
    report.search("zebra.*")
    assert sorted(report.listed()) == [3, 4, 5]
    assert report.found() == "3 of 10 prompt groups with 10 matching rollouts"
    report.page.click("#group-list a[href='#g5']")
    assert report.page.locator("#group mark").all_inner_texts() == ["zebra.*"]
    assert report.page.locator(".rollout:not(.beside)").count() == 1
    report.page.focus("#filter-text")
    report.page.keyboard.press("Escape")
    report.until(lambda: len(report.listed()) == 10)
    assert report.page.input_value("#filter-text") == ""


@pytest.mark.long
@needs_browser
def test_keyboard(open_report: Any) -> None:
    result = audit_result(groups=25)
    report = open_report(result)
    press = report.page.keyboard.press
    press("j")
    assert (report.hash(), report.focused()) == ("#g1", "g1")
    press("k")
    press("k")  # no further
    assert report.hash() == "#g0"
    ids = [id for id, _ in calls_of(result) if id.startswith("g0t")]
    visited = []
    for _ in ids:
        press("n")
        visited.append(report.selected())
        assert report.focused() == visited[-1]
    assert visited == ids
    press("p")
    assert report.selected() == ids[-2]
    report.page.go_back()
    report.until(lambda: report.selected() == ids[-1])

    press("/")
    assert report.focused() == "filter-text"
    press("j")  # a letter, here
    assert report.page.input_value("#filter-text") == "j"
    press("z")
    report.until(lambda: report.listed() == [])
    press("Escape")
    report.until(lambda: len(report.listed()) == 20)
    press("?")
    assert report.page.locator("#help").is_visible()
    before = report.hash()
    press("j")
    assert report.hash() == before
    press("Escape")
    assert report.page.locator("#help").is_hidden()

    report.page.focus("#group-list a[href='#g0']")
    for _ in range(20):  # over the end of the list's page
        press("ArrowDown")
    assert report.hash() == "#g20"
    assert report.page.evaluate("document.activeElement.getAttribute('href')") == "#g20"

    report.page.click("#help-button")
    report.page.uncheck("#shortcuts")
    press("Escape")
    press("k")
    assert report.hash() == "#g20"


@needs_browser
def test_the_next_call_is_one_that_matches(open_report: Any) -> None:
    result = audit_result()
    report = open_report(result)
    report.page.select_option("#filter-gate", "corrected")
    expected = [id for id, call in calls_of(result) if id.startswith("g0t") and call["gate"] == "corrected"]
    report.until(lambda: report.listed() == groups_with(result, gate="corrected"))
    report.page.locator("#g0").focus()
    for id in expected:
        report.page.keyboard.press("n")
        assert report.selected() == id


@needs_browser
def test_a_link_to_a_call_opens_it_and_its_witness_is_a_click_away(open_report: Any) -> None:
    result = audit_result(groups=45)
    id, call = [(id, call) for id, call in calls_of(result) if call["gate"] == "corrected"][-1]
    report = open_report(result, f"#{id}")
    page = report.page
    assert report.selected() == report.focused() == id
    assert page.locator(f"#{id}").evaluate(
        "node => { const r = node.getBoundingClientRect(); return r.top >= 0 && r.top < innerHeight }"
    )
    group = id.split("t")[0]
    assert (
        page.locator("#group-list [aria-current]").get_attribute("href") == f"#{group}"
    )  # on another page of the list
    witness = f"{group}t{call['witness']['trajectory']}c{call['witness']['call']}"
    assert page.locator(".its-witness").get_attribute("id") == witness
    page.locator(f"#{id} .witness-link a").click()
    assert report.selected() == witness
    back = page.locator(f"#{witness} .witness-link a").evaluate_all("links => links.map(a => a.getAttribute('href'))")
    speaks_for = [
        f"#{other}"
        for other, c in calls_of(result)
        if other.startswith(group + "t") and c["witness"] == call["witness"]
    ]
    assert back == speaks_for[:8]
    page.go_back()
    report.until(lambda: report.selected() == id)
    page.keyboard.press("w")
    assert report.selected() == witness


@needs_browser
def test_a_link_to_nowhere_breaks_nothing(open_report: Any) -> None:
    report = open_report(audit_result(), "#g999")
    for fragment in ("#g0t99c3", "#g0t0c99", "#main", "#g-1", "#gxt<script>"):
        report.page.evaluate("fragment => { location.hash = fragment }", fragment)
        assert report.page.locator("#group h3").count() == 1
        assert report.selected() is None


# Figures


@needs_browser
def test_lift_is_in_points_with_its_sign_everywhere(open_report: Any) -> None:
    result = audit_result()
    for figures in (result["totals"], *result["steps"], *result["tools"].values()):
        figures["lift"] = 0.313
    result["tools"]["zoom"]["lift"] = -0.04
    report = open_report(result)
    page = report.page
    assert page.locator("#headline dd").nth(4).inner_text() == "+31 points"
    tools = page.locator("#tools tbody tr").all()
    lifts = {row.locator("th").inner_text(): row.locator("td").last.inner_text() for row in tools}
    assert lifts == {"image_search": "+31 points", "text_search": "+31 points", "zoom": "−4 points"}
    outcome = page.locator("#plots figure").nth(1)
    ticks = outcome.locator("svg[role=img] .tick").all_text_contents()
    assert not any("%" in tick for tick in ticks)
    assert outcome.locator("svg[role=img] .label").all_text_contents()[1] == "success in percent, lift in points"
    report.unfold(outcome.locator("summary"))
    assert outcome.locator("tbody tr").first.locator("td").last.inner_text() == "+31 points"


@pytest.mark.long
@needs_browser
def test_ticks_have_as_many_decimals_as_they_need(open_report: Any) -> None:
    result = audit_result()
    for top, expected in ((0.1, ["0 %", "2 %", "4 %"]), (0.01, ["0.0 %", "0.2 %", "0.4 %"]), (1.0, ["0 %", "20 %"])):
        for figures in result["steps"]:
            figures.update(failing_steps=1000, misassigned_steps=1000 * top, corrected_steps=0)
            figures.update(failing_trajectories=1, correctable_trajectories=0)
        page = open_report(result).page
        ticks = page.locator("#plots figure").first.locator("svg[role=img] .tick[text-anchor=end]").all_text_contents()
        assert ticks[: len(expected)] == expected
        assert len(set(ticks)) == len(ticks)


@pytest.mark.long
@needs_browser
def test_two_lines_that_are_one_are_both_seen(open_report: Any) -> None:
    result = audit_result()
    assert all(figures["misassigned_steps"] == figures["corrected_steps"] for figures in result["steps"])
    page = open_report(result).page
    plot = page.locator("#plots figure").first
    lines = plot.locator("svg[role=img] path.line")
    paths = [line.get_attribute("d") for line in lines.all()]
    assert paths[0] == paths[1]
    style = "all => all.map(one => parseFloat(getComputedStyle(one).strokeWidth))"
    lower, upper = lines.evaluate_all(style)[:2]
    assert lower > 2 * upper  # the one beneath looks out on both sides
    assert "Here they are the same" in plot.locator("figcaption").inner_text()
    result["steps"][0]["corrected_steps"] -= 1
    assert "the same" not in open_report(result).page.locator("#plots figcaption").first.inner_text()


@needs_browser
def test_plots_with_nothing_to_show_say_so(open_report: Any) -> None:
    result = audit_result()
    result["support_alpha"] = []
    for sweep in result["sweeps"]:
        sweep.update(corrected_steps=0, mean_lifted_advantage=None)
    for figures in result["steps"]:
        figures.update(failing_steps=0, misassigned_steps=0, corrected_steps=0, failing_trajectories=0)
    for gate in ("corrected", "below_alpha", "below_theta"):
        result["similarity_histogram"][gate] = [0] * 20
    page = open_report(result).page
    assert page.locator("#plots svg .empty").all_text_contents() == [
        "no failing calls",
        "no failing call has a witness of its tool",
        "no failing call matches a witness",
    ]
    assert page.locator("#sweep-plots figure").count() == 0
    assert page.locator("#sweep-plots").inner_text() == "No call is corrected under any of the settings tried."


@pytest.mark.long
@needs_browser
@pytest.mark.parametrize("width", [390, 800, 1024, 1366, 1920])
def test_no_card_stands_beside_a_hole(open_report: Any, width: int) -> None:
    result = audit_result()
    in_use = next(sweep for sweep in result["sweeps"] if (sweep["beta"], sweep["theta"]) == (0.8, 0.8))
    result["sweeps"] += [{**in_use, "alpha_min": value} for value in (0.0, 0.4, 0.6)]
    page = open_report(result, viewport={"width": width, "height": 900}).page
    for place in ("#plots", "#sweep-plots"):
        boxes = [figure.bounding_box() for figure in page.locator(f"{place} figure").all()]
        assert len(boxes) == {"#plots": 4, "#sweep-plots": 3}[place]
        across = page.locator(place).bounding_box()
        for top in {round(box["y"]) for box in boxes}:
            row = [box for box in boxes if round(box["y"]) == top]
            assert max(box["x"] + box["width"] for box in row) == pytest.approx(across["x"] + across["width"], abs=1)


@needs_browser
@pytest.mark.parametrize("width", [320, 390, 1024, 1366])
def test_a_list_entry_breaks_between_its_facts_only(open_report: Any, width: int) -> None:
    page = open_report(audit_result(), viewport={"width": width, "height": 900}).page
    facts = page.locator("#group-list .facts > span")
    assert facts.first.inner_text() == "Step 1 · 1 of 8 right"
    assert re.fullmatch(r"\d+ of \d+ failing calls corrected", facts.nth(1).inner_text())
    lines = facts.evaluate_all("all => all.map(one => one.getBoundingClientRect().height)")
    assert max(lines) < 1.5 * min(lines)
    assert len(lines) == 24


@pytest.mark.long
@needs_browser
def test_a_table_that_is_cut_off_says_so(open_report: Any) -> None:
    for width, cut in ((390, True), (1366, False)):
        page = open_report(audit_result(), viewport={"width": width, "height": 800}).page
        hint = page.locator("#tools .more-columns")
        hint.wait_for(state="visible" if cut else "hidden")
        table = page.locator("#tools .scroll")
        assert table.evaluate("box => box.scrollWidth > box.clientWidth") == cut


# Untrusted text


@needs_browser
def test_a_hostile_rollout_does_nothing(open_report: Any) -> None:
    calm = audit_result()
    scripts = "document.querySelectorAll('script').length"
    elements = "document.querySelectorAll('img, iframe, object, embed, form, base, link').length"
    before = [open_report(calm).page.evaluate(what) for what in (scripts, elements)]
    hostile = copy.deepcopy(calm)
    put_hostile_text_everywhere(hostile)
    report = open_report(hostile, "#g0t0c0")
    page = report.page
    report.open_details()
    report.search("<script>")
    page.locator("#group mark").first.wait_for()
    assert page.evaluate("window.pwned") is None
    assert [page.evaluate(what) for what in (scripts, elements)] == before
    page.select_option("#filter-gate", "corrected")  # calls that do not match are folded away by their names
    page.locator("#group summary", has_text=re.compile(r"^Calls? \d.*: <script>")).first.wait_for()
    report.open_details()
    assert page.evaluate("window.pwned") is None
    assert [page.evaluate(what) for what in (scripts, elements)] == before
    marks = set(page.locator("#group .invisible").all_inner_texts())
    assert {"U+202E", "U+2066", "U+200B", "U+0000", "U+001B", "U+2028", "U+D800", "U+E0041"} <= marks
    assert not re.search("[\u202e\u2066\x00]", page.locator("body").inner_text() + page.title())
    assert "<script>window.pwned=1</script>" in page.locator("#g0t0c0 h5").inner_text()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@needs_browser
def test_the_policy_stops_what_might_slip_through(open_report: Any) -> None:
    report = open_report(audit_result())
    server = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{server.getsockname()[1]}/"
    attempts = {
        "HTML": "document.body.innerHTML = '<b>x</b>'",
        "handler": "document.body.setAttribute('onclick', 'window.pwned = 1'); document.body.click()",
        "eval": "(0, eval)('window.pwned = 1')",
        "script": "const s = document.createElement('script'); s.text = 'window.pwned = 1'; document.body.append(s)",
        "image": f"const i = new Image(); i.src = '{url}'; document.body.append(i)",
        "request": f"fetch('{url}').catch(() => {{}})",
        "style": "const s = document.createElement('style'); s.textContent = '*{color:red}'; document.body.append(s)",
    }
    for code in attempts.values():
        report.noise.clear()
        # Later: while playwright evaluates, Chromium lets code from strings through.
        report.page.evaluate(f"setTimeout(() => {{ {code} }})")
        report.until(lambda: any("olicy" in line or "Trusted" in line for line in report.noise))
    assert report.page.evaluate("window.pwned") is None
    assert report.page.locator("body > b").count() == 0
    server.setblocking(False)
    with server, pytest.raises(BlockingIOError):
        server.accept()  # nobody called
    report.noise.clear()
    del report.requests[1:]  # what the policy stopped is listed as well


@pytest.mark.long
@needs_browser
def test_long_lines_are_cut_until_asked_for(open_report: Any) -> None:
    result = audit_result()
    line = "A" * 1_000_000
    trajectory = result["groups"][0]["trajectories"][0]
    trajectory["calls"][0]["arguments"] = {"query": line}
    trajectory["text"] += line
    result["tools"][line] = result["tools"]["zoom"]
    trajectory["name"] = trajectory["calls"][1]["tool"] = trajectory["calls"][1]["status"] = line
    trajectory["calls"][1].update(ok=False, arguments={f"{line[:100]}{key}": "x" for key in range(100)})
    result["groups"][0]["uid"] = result["groups"][0]["ground_truth"] = line
    result["groups"][0]["prompt"] += line
    report = open_report(result, "#g0t0c0")
    page = report.page
    assert len(page.locator("#group").inner_text()) < 50_000
    assert len(page.locator("#tools").inner_text()) < 1000
    argument = page.locator("#g0t0c0 .arguments .text")
    more = argument.locator("button.more")
    assert more.inner_text() == "Show more (999,700 characters left)"
    more.click()
    assert more.inner_text() == "Show more (979,700 characters left)"
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.long
@needs_browser
def test_a_rollout_of_ten_thousand_calls(open_report: Any) -> None:
    result = audit_result()
    trajectory = result["groups"][0]["trajectories"][0]
    trajectory["calls"] = [{**trajectory["calls"][0], "tool": f"tool_{c}"} for c in range(10_000)]
    report = open_report(result, "#g0")
    page = report.page
    assert page.evaluate("document.querySelectorAll('*').length") < 10_000
    page.get_by_role("button", name="Show more (9,960 calls left)").click()
    assert report.selected() == "g0t0c40"
    page.evaluate("location.hash = '#g0t0c200'")
    report.until(lambda: report.selected() == "g0t0c200")


# Size, width, access


@pytest.mark.long
@needs_browser
def test_ten_thousand_trajectories(open_report: Any) -> None:
    result = audit_result(groups=1250, rollouts=8, steps=50, filler=400)
    report = open_report(result)
    count = "document.querySelectorAll('*').length"
    assert report.page.evaluate(count) < 5_000
    assert report.found() == "1,250 of 1,250 prompt groups with 10,000 matching rollouts"
    report.search("photo 777")
    assert len(report.listed()) == 1
    report.page.keyboard.press("Escape")
    report.until(lambda: len(report.listed()) == 20)
    for _ in range(30):
        report.page.keyboard.press("j")
    assert report.page.evaluate(count) < 5_000


@pytest.mark.long
@needs_browser
def test_a_group_of_a_thousand_rollouts_is_shown_in_parts(open_report: Any) -> None:
    report = open_report(audit_result(groups=1, rollouts=1000))
    assert report.page.locator(".rollout").count() == 16
    report.page.get_by_role("button", name="Show more (984 rollouts left)").click()
    assert report.page.locator(".rollout").count() == 32
    assert report.focused() == "g0t16"


@needs_browser
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_no_width_scrolls_the_page_sideways(open_report: Any, width: int) -> None:
    report = open_report(audit_result(), "#g2t1c0", viewport={"width": width, "height": 800})
    assert report.page.evaluate("document.documentElement.scrollWidth") == width
    report.open_details()
    assert report.page.evaluate("document.documentElement.scrollWidth") == width
    if width <= 390:  # one rollout at a time, and the next one's edge
        assert 200 < report.page.locator(".rollout").first.bounding_box()["width"] < width


@pytest.mark.long
@needs_browser
def test_it_prints(open_report: Any) -> None:
    report = open_report(audit_result(), "#g0t0c0", viewport={"width": 680, "height": 1000})  # A4, about
    report.page.emulate_media(media="print")
    assert report.page.evaluate("document.documentElement.scrollWidth") == 680
    hidden = ("#filters", ".picker", ".permalink")
    assert all(report.page.locator(what).first.is_hidden() for what in hidden)
    boxes = [rollout.bounding_box() for rollout in report.page.locator(".rollout").all()]
    assert all(b["y"] >= a["y"] + a["height"] for a, b in pairwise(boxes))  # one below the other
    assert len(report.page.pdf()) > 10_000


@pytest.mark.long
@needs_browser
def test_names_headings_and_landmarks(open_report: Any) -> None:
    report = open_report(audit_result(), "#g0t0c0")
    page = report.page
    report.open_details()
    levels = page.eval_on_selector_all(
        "h1, h2, h3, h4, h5, h6", "all => all.filter(h => h.checkVisibility()).map(h => +h.tagName[1])"
    )
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    nameless = """all => all.filter(one => !one.labels?.length && !one.getAttribute('aria-label') &&
        !one.textContent.trim()).map(one => one.outerHTML)"""
    assert page.eval_on_selector_all("a, button, input, select, summary, [role=region], [role=img]", nameless) == []
    assert page.locator("html").get_attribute("lang") == "en"
    assert [
        page.locator(tag).count() for tag in ("main", "nav[aria-label]", "header.page-head", "footer", "[role=search]")
    ] == [1] * 5
    assert page.locator("#found").get_attribute("aria-live") == "polite"
    assert page.locator("th:not([scope])").count() == 0
    assert page.locator("table:not(:has(caption))").count() == 0
    ids = page.eval_on_selector_all("[id]", "all => all.map(one => one.id)")
    assert len(ids) == len(set(ids))
    dangling = "all => all.filter(one => !document.getElementById(one.getAttribute('aria-labelledby'))).length"
    assert page.eval_on_selector_all("[aria-labelledby]", dangling) == 0
    page.keyboard.press("Tab")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


CONTRAST = """() => {
  const parse = (text) => {
    const [r, g, b, a = 1] = text.match(/[\\d.]+(e-\\d+)?/g).map(Number);
    return text.startsWith("color(") ? [r, g, b, a] : [r / 255, g / 255, b / 255, a];
  };
  const light = (c) => c.slice(0, 3).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, k) => sum + v * [0.2126, 0.7152, 0.0722][k], 0);
  const ground = (node) => {
    for (; node; node = node.parentElement) {
      const color = parse(getComputedStyle(node).backgroundColor);
      if (color[3] === 1) return color;
    }
    return null;
  };
  const low = new Set();
  for (const node of document.body.querySelectorAll("*")) {
    const says = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
    if (!says || !node.checkVisibility() || node.matches("[disabled], option")) continue;
    const style = getComputedStyle(node);
    const [a, b] = [light(parse(node instanceof SVGElement ? style.fill : style.color)), light(ground(node))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) low.add(`${node.outerHTML.slice(0, 60)} ${ratio.toFixed(2)}`);
  }
  return [...low];
}"""


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(open_report: Any, scheme: str) -> None:
    """WCAG 2.2 AA: 4.5 to 1 for all text, on any tint."""
    result = audit_result()
    put_hostile_text_everywhere(result)
    calls = [call for _, call in calls_of(result)]
    for call, strength in zip(calls, cycle([-9.0, 9.0, -1.0, 1.0]), strict=False):
        call.update(before=strength, after=strength)
    report = open_report(result, "#g1t0c0", color_scheme=scheme)
    page = report.page
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(re.findall(r"\d+", ground)[0]) < 60) == (scheme == "dark")
    assert page.evaluate(CONTRAST) == []
    report.search("flag")
    page.click("#group-list a[href='#g0']")
    assert page.evaluate(CONTRAST) == []
    page.select_option("#filter-gate", "below_theta")
    page.locator("#group summary", has_text=re.compile("^Call")).first.wait_for()
    assert page.evaluate(CONTRAST) == []


def test_a_dump_all_the_way(open_report: Any, tmp_path: Path) -> None:
    """A dump with a hostile rollout, lucky witnesses and a call that is only similar, audited, written and opened."""
    lines = []
    for group in range(3):
        for rollout in range(8):
            query = "what helps" if rollout > 5 or group == 2 else "a guess"
            query = "what help" if (group, rollout) == (2, 1) else query
            said = json.dumps({"name": "search", "arguments": {"query": query}})
            hostile = HOSTILE if rollout == 0 else ""
            output = (
                f"{hostile}<tool_call>\n{said}\n</tool_call>\nuser\n<tool_response>\nfound {hostile}\n"
                "</tool_response>\nassistant\nend"
            )
            score = float(rollout in (0, 6, 7))
            uid = f"group {group}_{rollout}_0"
            truth = {} if group == 2 else {"gts": [HOSTILE]}
            lines.append({"input": "q?", "output": output, "score": score, "step": 1, "uid": uid} | truth)
    (tmp_path / "1.jsonl").write_text("\n".join(map(json.dumps, lines)))
    report = open_report(audit(tmp_path / "1.jsonl").result)
    assert report.listed() == [0, 1, 2]
    report.page.select_option("#filter-gate", "lucky")
    report.until(lambda: len(report.listed()) == 2)
    assert report.page.locator(".badge", has_text="lucky witness").count() == 5
    report.page.select_option("#filter-gate", "inexact")
    report.until(lambda: report.listed() == [2])
    assert report.page.locator(".badge", has_text="only similar").count() == 1
    shown = report.page.locator("#group").inner_text()
    assert "Expected" not in shown
    assert "false" not in shown  # a group without a ground truth
    report.page.select_option("#filter-gate", "lucky")
    report.until(lambda: len(report.listed()) == 2)
    report.open_details()
    assert "found <script>" in report.page.locator("#group").inner_text()
    assert report.page.evaluate("window.pwned") is None
