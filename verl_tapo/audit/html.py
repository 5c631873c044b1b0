"""The audit as one self-contained HTML file: plots and a trajectory browser, see `write_report`.

What a rollout says is untrusted. It is embedded as JSON that cannot end its element, set as text only, and the file's
Content-Security-Policy runs nothing but the page's own scripts, loads nothing, and turns HTML from strings off.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

_SCRIPTS = ("text.js", "plots.js", "browser.js", "main.js")  # in this order: each uses those before it

# What could end or confuse the element that holds JSON, and lone surrogates, which UTF-8 cannot hold. All of it can
# stand in strings only, where JSON allows an escape.
_UNSAFE = re.compile("[<>&\u2028\u2029\ud800-\udfff]")


def write_report(result: Mapping[str, Any], path: Path) -> None:
    """Writes the report of an audit.

    Args:
        result: what `verl-tapo audit --json` holds, version 1. Spans are in characters (code points) of the text.
        path: the file to write. It grows with the texts of ``result["groups"]``, which are written one by one.

    Raises:
        ValueError: for a result of another version, or one that JSON cannot hold (NaN, infinity).
        OSError: where the file cannot be written.
    """
    if result.get("version") != 1:
        raise ValueError(f"the audit has version {result.get('version')!r}, expected 1")
    page = resources.files("verl_tapo.audit").joinpath("page")
    style = page.joinpath("report.css").read_text("utf-8")
    scripts = [page.joinpath(name).read_text("utf-8") for name in _SCRIPTS]
    html = Template(page.joinpath("report.html").read_text("utf-8")).substitute(
        policy=_policy(style, scripts),
        style=style,
        scripts="\n".join(f"<script>{script}</script>" for script in scripts),
    )
    head, tail = html.split("<!-- data -->")
    summary = {key: value for key, value in result.items() if key != "groups"}
    with path.open("wb") as file:
        file.write(head.encode())
        file.write(_data_block("summary", summary))
        for group in result["groups"]:
            file.write(_data_block("group", group))
        file.write(_data_block("bytes", file.tell() + len(tail)))
        file.write(tail.encode())


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
