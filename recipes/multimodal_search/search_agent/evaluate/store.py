"""The output folder: what is done survives whatever ends the run, and only runs with the same settings go on in it."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

DONE = "transcripts.jsonl"
FAILED = "failures.jsonl"
SETTINGS = "settings.json"
IMAGES = "images"


class Store:
    """One evaluation's folder.

    - ``transcripts.jsonl``: a line for every finished question, on the disk before the next is begun;
    - ``failures.jsonl``: a line for every attempt that a failing server or back end ended;
    - ``images/``: what the transcripts show, by content;
    - ``settings.json``.

    Args:
        folder: made where there is none.
        settings: what must be the same whenever the evaluation is continued; plain JSON. The hashes under ``data``
            must agree for the files that both runs name.

    Raises:
        ValueError: the folder holds results of other settings, or another process is writing to it.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        self.folder = folder
        self._writing = threading.Lock()
        (folder / IMAGES).mkdir(parents=True, exist_ok=True)
        self._done_file = (folder / DONE).open("ab")
        self._failed_file = (folder / FAILED).open("ab")
        try:
            _lock(self._done_file, folder)
            self._agree(settings)
            for name in (DONE, FAILED):
                _repair(folder / name)
            self._done = {entry["id"]: _without_messages(entry) for entry in read_lines(folder / DONE)}
        except BaseException:
            self.close()
            raise

    def _agree(self, settings: Mapping[str, Any]) -> None:
        file = self.folder / SETTINGS
        settings = dict(settings)
        if file.exists():
            before = json.loads(file.read_text(encoding="utf-8"))
            data = {**before["data"], **settings["data"]}
            changed = [
                f"{name}: {_short(before.get(name))} is now {_short(settings.get(name))}"
                for name in sorted({*before, *settings} - {"data"})
                if before.get(name) != settings.get(name)
            ]
            changed += [f"the content of {name}" for name in before["data"] if data[name] != before["data"][name]]
            if changed:
                raise ValueError(
                    f"{self.folder} holds results of other settings. Changed: {'; '.join(changed)}. "
                    "Name another folder, or remove this one"
                )
            settings["data"] = data
        _write_whole(file, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")

    @property
    def done(self) -> Mapping[str, dict[str, Any]]:
        """Finished questions by their id, without their messages, which are many."""
        return self._done

    def finish(self, entry: dict[str, Any], images: Mapping[str, bytes]) -> None:
        """Keeps a finished question, once; ``entry`` has an ``id``. May be called from any thread."""
        if entry["id"] in self._done:
            raise ValueError(f"{entry['id']} is finished already")
        with self._writing:
            for name, content in images.items():
                file = self.folder / IMAGES / name
                if not file.exists():
                    _write_whole(file, content)
            _append(self._done_file, entry)
            self._done[entry["id"]] = _without_messages(entry)

    def fail(self, entry: Mapping[str, Any]) -> None:
        """Notes an attempt that says nothing of the model."""
        _append(self._failed_file, entry)

    def failures(self) -> Iterator[dict[str, Any]]:
        """All of them, of earlier runs too."""
        return read_lines(self.folder / FAILED)

    def write(self, name: str, text: str) -> None:
        """Writes a file into the folder, whole or not at all."""
        _write_whole(self.folder / name, text)

    def close(self) -> None:
        self._done_file.close()
        self._failed_file.close()


def read_lines(file: Path) -> Iterator[dict[str, Any]]:
    """The entries of a file of JSON lines.

    Raises:
        ValueError: naming the first line that is no JSON object.
    """
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
            except ValueError:
                entry = None
            if not isinstance(entry, dict):
                raise ValueError(f"{file}, line {number}, is no JSON object: the file was changed; remove that line")
            yield entry


def _without_messages(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name != "messages"}


def _append(file: BinaryIO, entry: Mapping[str, Any]) -> None:
    text = json.dumps(entry, ensure_ascii=False)
    file.write(text.encode("utf-8", "replace") + b"\n")
    file.flush()
    os.fsync(file.fileno())


def _repair(file: Path) -> None:
    """Takes off a last line that was cut short, when a process died while writing it."""
    with file.open("rb+") as opened:
        end = opened.seek(0, os.SEEK_END)
        position = end
        while position:
            start = max(0, position - (1 << 16))
            opened.seek(start)
            newline = opened.read(position - start).rfind(b"\n")
            if newline >= 0:
                position = start + newline + 1
                break
            position = start
        if position < end:
            opened.truncate(position)
            os.fsync(opened.fileno())


def _lock(file: BinaryIO, folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ValueError(f"another evaluation is writing to {folder}") from None


def _write_whole(file: Path, content: str | bytes) -> None:
    part = file.with_name(f"{file.name}.part")
    part.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(part, file)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
