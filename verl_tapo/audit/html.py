"""The audit as one self-contained HTML file: plots and a trajectory browser, see `write_report`.

What a rollout says is untrusted. It is embedded as JSON that cannot end its element, set as text only, and the file's
Content-Security-Policy runs nothing but the page's own scripts, loads nothing, and turns HTML from strings off.

The title, the main figures and the findings are plain HTML, so that the file says them without JavaScript too.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from verl_tapo.audit.units import percent, points
from verl_tapo.audit.writing import replacing
from verl_tapo.rule import figures as meaning

_SCRIPTS = ("text.js", "plots.js", "browser.js", "main.js")  # in this order: each uses those before it

# What could end or confuse the element that holds JSON, and lone surrogates, which UTF-8 cannot hold. All of it can
# stand in strings only, where JSON allows an escape.
_UNSAFE = re.compile("[<>&\u2028\u2029\ud800-\udfff]")

_LEVEL_NAMES = {"error": "✗ Error", "warning": "⚠ Warning", "info": "ℹ Note"}
_SOURCES_NAMED = 3


def write_report(result: Mapping[str, Any], path: Path) -> None:
    """Writes the report of an audit.

    Args:
        result: what `verl-tapo audit --json` holds, version 1. Spans are in characters (code points) of the text.
        path: the file to write. It grows with the texts of ``result["groups"]``, which are written one by one.

    Raises:
        ValueError: for a result of another version, or one that JSON cannot hold (NaN, infinity).
        OSError: where the file cannot be written. A report that was there before is left as it was.
    """
    if result.get("version") != 1:
        raise ValueError(f"the audit has version {result.get('version')!r}, expected 1")
    summary = _data_block("summary", {key: value for key, value in result.items() if key != "groups"})
    summary += _data_block("columns", list(map(_column, meaning.columns("page"))))
    page = resources.files("verl_tapo.audit").joinpath("page")
    style = page.joinpath("report.css").read_text("utf-8")
    scripts = [page.joinpath(name).read_text("utf-8") for name in _SCRIPTS]
    html = Template(page.joinpath("report.html").read_text("utf-8")).substitute(
        policy=_policy(style, scripts),
        style=style,
        scripts="\n".join(f"<script>{script}</script>" for script in scripts),
        title=_text(result["title"]),
        provenance=_text(_provenance(result["created"], result["sources"])),
        headline="\n".join(_headline(result["totals"])),
        grounding="\n".join(_grounding(result["totals"])),
        warnings="\n".join(_notices(result["warnings"])),
    )
    head, tail = (part.encode() for part in html.split("<!-- data -->"))
    with replacing(path) as file:
        size = file.write(head) + file.write(summary)
        for group in result["groups"]:
            size += file.write(_data_block("group", group))
        file.write(_data_block("bytes", size + len(tail)))
        file.write(tail)


def _column(figure: meaning.Figure) -> dict[str, str]:
    """A figure as the page's script needs it for its tables."""
    return {name: getattr(figure, name) for name in ("name", "part", "whole", "unit", "column", "meaning")}


# What cannot be seen, or reorders what is around it; the same in `page/text.js`.
_INVISIBLE = re.compile(
    "\r(?!\n)|[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)


def _text(untrusted: str) -> str:
    """Text as HTML, with invisible characters spelled out."""
    return escape(_INVISIBLE.sub(lambda match: f"⟨U+{ord(match.group()):04X}⟩", untrusted))


def _provenance(created: str, sources: Sequence[str]) -> str:
    named, more = list(sources[:_SOURCES_NAMED]), len(sources) - _SOURCES_NAMED
    return f"{created[:16].replace('T', ' ')} · from {', '.join(named + [f'{more:,} more'] * (more > 0))}"


def _headline(totals: Mapping[str, Any]) -> Iterator[str]:
    """The main figures, each with what it is of and what it says."""

    def share(part: str, whole: str) -> str:
        return percent(totals[part] / totals[whole] if totals[whole] else None)

    rollouts, prompts = totals["trajectories"], totals["prompts"]
    of_all = f"{rollouts:,} rollout{'s' * (rollouts != 1)} of {prompts:,} prompt{'s' * (prompts != 1)}"
    for value, of, says in (
        (
            share("correctable_trajectories", "failing_trajectories"),
            "of failing rollouts",
            "have a call that TAPO corrects",
        ),
        (share("misassigned_steps", "failing_steps"), "of failing calls", "match a call of a successful sibling"),
        (share("corrected_steps", "failing_steps"), "of failing calls", "pass both gates and are corrected"),
        (percent(totals["token_share"]), "of the policy’s tokens", "get another advantage"),
        (points(totals["lift"]), "lift of the witnesses", "above 0, they mark what leads to success"),
        (percent(totals["success_rate"]), "success rate", of_all),
    ):
        number, _, unit = value.partition(" ")
        unit = f"<small> {unit}</small>" if unit else ""
        yield f"<div><dt>{of}<span>{says}</span></dt><dd>{number}{unit}</dd></div>"


def _grounding(totals: Mapping[str, Any]) -> Iterator[str]:
    """Whether the tools found the answer, in plain sentences; none where that cannot be told."""
    if not totals.get("told_trajectories"):
        return
    yield "<h3>Did the tools find the answer?</h3>\n<ul>"
    for figure in meaning.GROUNDING:
        value = figure.read(totals)
        if figure.sentence and value is not None:
            yield f"<li><b>{percent(value)}</b> {figure.sentence}.</li>"
    told = percent(meaning.TOLD.read(totals))
    yield f"</ul>\n<p>Of {told} of the rollouts it can be told whether a tool’s answer held an accepted answer.</p>"


def summary_html(result: Mapping[str, Any]) -> str:
    """The title, the main figures and the findings of an audit as HTML without style or script, as for a notebook."""
    figures, notices = "\n".join(_headline(result["totals"])), "\n".join(_notices(result["warnings"]))
    notices = "\n".join([*_grounding(result["totals"]), notices])
    provenance = _provenance(result["created"], result["sources"])
    return f"<h3>{_text(result['title'])}</h3>\n<p>{_text(provenance)}</p>\n<dl>{figures}</dl>\n{notices}"


def _notices(warnings: Sequence[Mapping[str, str]]) -> Iterator[str]:
    """The findings, the gravest first."""
    for warned in sorted(warnings, key=lambda warned: list(_LEVEL_NAMES).index(warned["level"])):
        yield (
            f'<div class="notice {warned["level"]}"><p><b>{_LEVEL_NAMES[warned["level"]]}: </b>{_text(warned["text"])}'
            f'</p><p class="advice">{_text(warned["advice"])}</p></div>'
        )


def _policy(style: str, scripts: list[str]) -> str:
    """The Content-Security-Policy: nothing but these."""
    allowed = " ".join(map(_hash_source, scripts))
    return (
        f"default-src 'none'; script-src {allowed}; style-src {_hash_source(style)}; base-uri 'none'; "
        "form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )


def _hash_source(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _data_block(kind: str, value: object) -> bytes:
    data = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    safe = _UNSAFE.sub(lambda match: f"\\u{ord(match.group()):04x}", data)
    return f'<script type="application/json" data-kind="{kind}">{safe}</script>\n'.encode()
