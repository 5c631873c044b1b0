"""The manifest of an index: its settings, its counts and the identity that caches use."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

VERSION = 1
"""The version of an index's files. It is raised when older files can no longer be read."""

MANIFEST = "manifest.json"
"""Written last: a folder without it is no index."""


class IndexProblem(ValueError):
    """An index, its sources or its settings are wrong; the message is one sentence for the user."""


def identity(settings: Mapping[str, Any], digests: Mapping[str, str]) -> str:
    """Names whatever may change an answer: files' version, settings of the searches, content of the documents."""
    content = json.dumps([VERSION, settings, digests], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def read_manifest(index: Path) -> dict[str, Any]:
    """The manifest of a finished index.

    Raises:
        IndexProblem: There is no index, it is unfinished, or of another version.
    """
    file = index / MANIFEST
    if not index.is_dir():
        raise IndexProblem(f"there is no index {index}; make one with python -m search_backends.retrieval.build")
    if not file.is_file():
        raise IndexProblem(f"{index} has no {MANIFEST}: it is no index, or its build was not finished (run that again)")
    try:
        manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        version = manifest["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise IndexProblem(f"{file} is damaged: {error!r}") from error
    if version != VERSION:
        raise IndexProblem(
            f"{index} is an index of version {version}, this program reads version {VERSION}: rebuild it"
        )
    counts = manifest.get("counts")
    whole = isinstance(counts, dict) and all(
        type(counts.get(name)) is int and counts[name] >= 0 for name in ("passages", "images")
    )
    if not whole or not isinstance(manifest.get("settings"), dict) or not isinstance(manifest.get("identity"), str):
        raise IndexProblem(f"{file} is damaged: it has no counts, settings or identity")
    return manifest


def write_json(file: Path, content: Any) -> None:
    """Writes the whole file or, when interrupted, nothing."""
    partial = file.with_name(file.name + ".partial")
    with partial.open("w", encoding="utf-8") as out:
        json.dump(content, out, indent=2, ensure_ascii=False)
        out.write("\n")
        out.flush()
        os.fsync(out.fileno())
    partial.replace(file)


def run_main(program: str, main: Callable[[], int]) -> int:
    """Runs a command: a problem is one line, and exit code 2."""
    try:
        return main()
    except IndexProblem as problem:
        print(f"{program}: {problem}", file=sys.stderr)
        return 2
