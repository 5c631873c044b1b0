"""Image results that were computed beforehand: a SQLite file, read only, made by `write`."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sqlite3
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from search_backends.errors import InfrastructureError
from search_backends.providers.base import Settings, require_key, settings_of
from search_backends.results import ImageHit, read_list


class PrecomputedSettings(Settings):
    """Settings of ``provider: precomputed``."""

    path: str
    on_missing: Literal["error", "empty"] = "error"
    """``error``: an image without results is a fault of the data. ``empty``: nothing was found for
    it."""


def write(path: str | Path, results: Iterable[tuple[str, list[ImageHit]]]) -> int:
    """Writes a file of results, completely or not at all; returns the number of images.

    Args:
        path: replaced where it exists.
        results: key and hits, best first; a key is the sha256 (hexadecimal) of the prompt image's bytes as the data set
            has them.

    Raises:
        ValueError: A key comes twice.
    """
    path, digest, count = Path(path), hashlib.sha256(), 0
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    try:
        with closing(sqlite3.connect(partial)) as database, database:
            database.execute("CREATE TABLE results (key TEXT PRIMARY KEY, hits TEXT NOT NULL) WITHOUT ROWID")
            database.execute("CREATE TABLE about (identity TEXT NOT NULL)")
            for key, hits in results:
                text = json.dumps([hit.to_json() for hit in hits])
                try:
                    database.execute("INSERT INTO results VALUES (?, ?)", (key, text))
                except sqlite3.IntegrityError:
                    raise ValueError(f"the key {key} comes twice") from None
                digest.update(f"{key} {text}\n".encode())
                count += 1
            database.execute("INSERT INTO about VALUES (?)", (digest.hexdigest()[:16],))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return count


class PrecomputedImages:
    """Results of the prompts' own images, by key."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._settings = settings_of(PrecomputedSettings, "precomputed", config)
        path = Path(self._settings.path)
        if not path.is_file():
            raise ValueError(f"the provider precomputed: path: there is no file {path}")
        try:
            # Immutable: it is replaced, never changed; so it may lie on a network or read-only file system.
            self._database = sqlite3.connect(
                f"file:{quote(str(path.resolve()))}?immutable=1", uri=True, check_same_thread=False
            )
            (identity,) = self._database.execute("SELECT identity FROM about").fetchone()
            self._database.execute("SELECT key, hits FROM results LIMIT 1").fetchone()
        except (sqlite3.Error, TypeError) as error:
            raise ValueError(f"the provider precomputed: path: {path} holds no image results: {error}") from None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="precomputed-images")
        self.identity = f"precomputed {identity} {self._settings.on_missing}"

    async def search(self, image: bytes, topk: int, key: str | None = None) -> list[ImageHit]:
        if self._settings.on_missing == "error":
            require_key(key)
        try:
            row = await asyncio.get_running_loop().run_in_executor(self._thread, self._read, key)
        except sqlite3.Error as error:
            raise InfrastructureError(f"precomputed: {self._settings.path}: {error}") from None
        if row is None:
            if self._settings.on_missing == "empty":
                return []
            raise InfrastructureError(f"precomputed: {self._settings.path} has no results for the image {key}")
        try:
            return read_list(ImageHit, json.loads(row[0]))[:topk]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise InfrastructureError(f"precomputed: {self._settings.path}: the image {key}: {error!r}") from None

    async def close(self) -> None:
        self._thread.shutdown()
        self._database.close()

    def _read(self, key: str | None) -> Any:
        return self._database.execute("SELECT hits FROM results WHERE key = ?", (key,)).fetchone()
