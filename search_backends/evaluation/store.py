"""The output folder. Finished work survives an interrupted run, and only runs with equal settings
continue in it."""

from __future__ import annotations

import fcntl
import hashlib
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

# What `report` wants of a line.
_NUMBER = (int, float)
_OF_ENTRY = {
    "id": str,
    "data_source": str,
    "acc": _NUMBER,
    "ending": str,
    "turns": int,
    "prompt_tokens": int,
    "completion_tokens": int,
    "seconds": _NUMBER,
    "tapo_steps": dict,
}
_OF_FAILURE = {"id": str, "steps": list}
_OF_STEP = {"tool", "status", "metrics", "latency_s"}


class Store:
    """One evaluation's folder.

    - ``transcripts.jsonl``: a line for every finished question, on the disk before the next is begun;
    - ``failures.jsonl``: a line for every attempt that a failing server or back end ended;
    - ``images/``: what the transcripts show, by content;
    - ``settings.json``.

    Args:
        folder: the output folder; it is created if missing.
        settings: what must be the same whenever the evaluation is continued; plain JSON. The hashes under ``data``
            must agree for the files that both runs name.

    Raises:
        ValueError: the folder's results have other or unknown settings or cannot be read, or another
            process is writing to it.
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
            entries = read_lines(folder / DONE, _OF_ENTRY)
            self._done = {entry["id"]: _without_messages(entry) for entry in entries}
        except BaseException:
            self.close()
            raise

    def _agree(self, settings: Mapping[str, Any]) -> None:
        file = self.folder / SETTINGS
        settings = dict(settings)
        if not file.exists():
            for name in (DONE, FAILED):
                if (self.folder / name).stat().st_size:
                    raise ValueError(
                        f"{self.folder} holds {name} and no {SETTINGS}: nobody knows how the results were made. Bring "
                        "it back, or name another folder"
                    )
        else:
            before = _read_settings(file)
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
        """All entries, including those of earlier runs."""
        return read_lines(self.folder / FAILED, _OF_FAILURE)

    def write(self, name: str, text: str) -> None:
        """Writes a file into the folder, whole or not at all."""
        _write_whole(self.folder / name, text)

    def close(self) -> None:
        self._done_file.close()
        self._failed_file.close()


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_lines(file: Path, kinds: Mapping[str, Any] = {"id": str}) -> Iterator[dict[str, Any]]:
    """The entries of a file of JSON lines.

    Args:
        file: is read as it is iterated over.
        kinds: the required keys of each entry, and their types.

    Raises:
        ValueError: naming the first line that is no such entry.
    """
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                entry = None
            problem = "is no JSON object" if not isinstance(entry, dict) else _problem(entry, kinds)
            if problem:
                raise ValueError(f"{file}, line {number}, {problem}: the file was changed; remove that line")
            yield entry


def _problem(entry: Mapping[str, Any], kinds: Mapping[str, Any]) -> str:
    """Returns what is wrong with an entry, or an empty text."""
    wrong = next((name for name, kind in kinds.items() if not isinstance(entry.get(name), kind)), None)
    if wrong is not None:
        return f"has {entry[wrong]!r:.60} as {wrong}" if wrong in entry else f"has no {wrong}"
    record = entry.get("tapo_steps") or entry
    steps = record.get("steps", [])
    if not isinstance(steps, list) or not all(isinstance(step, dict) and step.keys() >= _OF_STEP for step in steps):
        return f"has calls without {', '.join(sorted(_OF_STEP))}"
    return ""


def _read_settings(file: Path) -> dict[str, Any]:
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(settings, dict) and isinstance(settings.get("data"), dict):
            return settings
        problem = "it is no JSON object with data"
    except ValueError as error:
        problem = str(error)
    raise ValueError(
        f"{file} cannot be read ({problem}): nobody knows how the results beside it were made. Bring it back, or name "
        "another folder"
    )


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
