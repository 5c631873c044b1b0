"""Builds an index of passages, images or both.

    python -m search_backends.retrieval.build --corpus passages.jsonl --images images.parquet --out INDEX

Passages: .jsonl, .jsonl.gz or .parquet with `id`, `title`, `contents` or `text`, and `url`.
Search-R1's corpora, whose first line is the title in quotes, are read unchanged. Images: .parquet
with `id`, `title`, `text`, `url` and `image` (bytes, {bytes, path}, or a path), or a folder of
images, whose names are their titles.

After an interruption the same command resumes; the index is the same as without it.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from search_backends.retrieval import bm25, corpus, encoders, pictures, vectors
from search_backends.retrieval.documents import Records, RecordWriter, text_of
from search_backends.retrieval.manifest import (
    MANIFEST,
    VERSION,
    IndexProblem,
    identity,
    read_manifest,
    run_main,
    write_json,
)

PROGRAM = "search_backends.retrieval.build"
BEGUN = "building.json"
"""The settings of a build that is not finished."""

LOCK = "lock"
NOTHING_YET = {LOCK, f"{BEGUN}.partial"}
"""The files left by a build that ended before it had begun."""

TEXT_SEARCHES = ("bm25", "dense")


@dataclass(frozen=True)
class Plan:
    """The parts to build; ``corpus`` and ``images`` are each optional."""

    out: Path
    corpus: tuple[Path, ...] = ()
    text: tuple[str, ...] = ("bm25",)
    encoder: str | None = None
    query_prompt: str | None = None
    """None: the encoder's own prompt."""
    passage_prompt: str | None = None
    faiss: str | None = None
    """A FAISS factory string for dense search; None chooses by size."""
    images: Path | None = None
    image_encoder: str = encoders.PHASH
    max_bad: int = 0
    shard: int = 8192
    """The number of passages or images that are encoded between two checkpoints."""

    def __post_init__(self) -> None:
        if not self.corpus and self.images is None:
            raise IndexProblem("nothing to index: give --corpus, --images, or both")
        unknown = set(self.text) - set(TEXT_SEARCHES)
        if unknown or not self.text:
            raise IndexProblem(f"--text is {','.join(self.text) or 'empty'}, expected bm25, dense or bm25,dense")
        if self.corpus and ("dense" in self.text) != (self.encoder is not None):
            raise IndexProblem("--text dense and --encoder MODEL go together")
        if self.max_bad < 0 or self.shard < 1:
            raise IndexProblem("--max-bad must be at least 0, --shard at least 1")


def build(plan: Plan) -> dict[str, Any]:
    """Builds the index or finishes a build that was interrupted; returns its manifest.

    Raises:
        IndexProblem: Bad settings, files or rows; or ``out`` holds something else.
    """
    corpus.check_corpus(plan.corpus)
    files = corpus.image_files(plan.images) if plan.images is not None else []
    there = {file.name for file in plan.out.iterdir()} if plan.out.is_dir() else set()
    if there - NOTHING_YET and not there & {BEGUN, MANIFEST}:
        raise IndexProblem(f"--out: {plan.out} is not empty and holds no index")
    plan.out.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    with _locked(plan.out), Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        return _Build(plan, files, progress).run()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise IndexProblem(f"another process is building {folder}") from error
        yield


class _Build:
    def __init__(self, plan: Plan, image_files: Sequence[Path], progress: Progress):
        self.plan, self.image_files, self.progress = plan, image_files, progress
        self.out = plan.out

    def run(self) -> dict[str, Any]:
        plan, out = self.plan, self.out
        dense, image = self._encoders()
        settings = self._settings(dense, image)
        if (out / MANIFEST).exists():
            manifest = read_manifest(out)
            _agree(out, manifest["settings"], settings)
            return manifest
        if (out / BEGUN).exists():
            _agree(out, json.loads((out / BEGUN).read_text(encoding="utf-8")), settings)
        write_json(out / BEGUN, settings)

        digests: dict[str, str] = {}
        counts = {"passages": 0, "images": 0, "bad_rows": 0}
        found: dict[str, dict[str, Any]] = {}  # of FAISS's files
        if plan.corpus:
            done = self._once("passages", self._keep_passages)
            digests["passages"], counts["passages"] = done["digest"], done["count"]
            counts["bad_rows"] += done["bad"]
            passages = Records(out / "passages")
            if "bm25" in plan.text:
                self._once("bm25", lambda: self._index_words(passages))
            if dense is not None:
                found["dense"] = self._once(
                    "dense", lambda: self._index_vectors("dense", dense, passages, text_of, plan.faiss)
                )
        if image is not None:
            done = self._once("images", self._keep_images)
            digests["images"], counts["images"] = done["digest"], done["count"]
            counts["bad_rows"] += done["bad"]
            pictures_kept = Records(out / "thumbnails")
            found["image"] = self._once(
                "image", lambda: self._index_vectors("image", image, pictures_kept, pictures.read_image, None)
            )
        manifest = {
            "version": VERSION,
            "identity": identity(settings, digests),
            "counts": counts,
            "faiss": {name: of["kind"] for name, of in found.items()},
            # A build that an older version began has none.
            "seals": {f"{name}.faiss": of["seal"] for name, of in found.items() if "seal" in of},
            "digests": digests,
            "settings": settings,
        }
        write_json(out / MANIFEST, manifest)
        for left in ("dense.shards", "image.shards"):
            shutil.rmtree(out / left, ignore_errors=True)
        for left in (BEGUN, *(f"{stage}.done.json" for stage in ("passages", "bm25", "dense", "images", "image"))):
            (out / left).unlink(missing_ok=True)
        return manifest

    def _encoders(self) -> tuple[encoders.SentenceTransformerEncoder | None, encoders.Encoder | None]:
        plan, dense, image = self.plan, None, None
        if plan.corpus and plan.encoder is not None:
            dense = encoders.SentenceTransformerEncoder(plan.encoder, plan.passage_prompt, "document")
        if plan.images is not None:
            image = encoders.image_encoder(plan.image_encoder)
        return dense, image

    def _settings(
        self, dense: encoders.SentenceTransformerEncoder | None, image: encoders.Encoder | None
    ) -> dict[str, Any]:
        plan = self.plan
        settings: dict[str, Any] = {"max_bad": plan.max_bad}
        if plan.corpus:
            settings["corpus"] = self._fingerprint("reading the corpus", plan.corpus)
            if "bm25" in plan.text:
                settings["bm25"] = bm25.SETTINGS
        if dense is not None:
            assert plan.encoder is not None
            query = encoders.SentenceTransformerEncoder(plan.encoder, plan.query_prompt, "query")
            prompts = {"query_prompt": query.prompt, "passage_prompt": dense.prompt}
            settings["dense"] = {**dense.settings, **prompts, "faiss": plan.faiss, "shard": plan.shard}
        if image is not None:
            settings["images"] = self._fingerprint("reading the images", self.image_files)
            settings["image"] = {**image.settings, "shard": plan.shard}
        return settings

    def _fingerprint(self, what: str, files: Sequence[Path]) -> str:
        with self._bar(what, sum(file.stat().st_size for file in files)) as advance:
            return corpus.fingerprint(files, advance)

    def _once(self, stage: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Returns a stage's result; the stage runs only if it was not finished before."""
        file = self.out / f"{stage}.done.json"
        if not file.exists():
            write_json(file, work())
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return found

    @contextmanager
    def _bar(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        task = self.progress.add_task(what, total=total)
        yield lambda done: self.progress.advance(task, done)

    def _keep_passages(self) -> dict[str, Any]:
        seen, bad = corpus.SeenIds(), corpus.BadRows()
        total = sum(file.stat().st_size for file in self.plan.corpus)
        with self._bar("passages", total) as advance, RecordWriter(self.out / "passages") as writer:
            for row in corpus.corpus_rows(self.plan.corpus, advance):
                try:
                    identifier, document = corpus.passage(row)
                    seen.add(identifier)
                except corpus.BadRow as reason:
                    bad.add(row.place, reason)
                else:
                    writer.append(document)
            bad.refuse_beyond(self.plan.max_bad)
            if not len(writer):
                raise IndexProblem("the corpus has no passages")
        return {"count": len(writer), "digest": writer.digest, "bad": bad.count}

    def _keep_images(self) -> dict[str, Any]:
        assert self.plan.images is not None
        seen, bad = corpus.SeenIds(), corpus.BadRows()
        total = corpus.count_images(self.plan.images, self.image_files)
        with (
            self._bar("images", total) as advance,
            RecordWriter(self.out / "images") as documents,
            RecordWriter(self.out / "thumbnails") as thumbnails,
        ):
            for row in corpus.image_rows(self.plan.images, self.image_files):
                try:
                    identifier, document, data = corpus.picture(row)
                    small = _thumbnail(data)
                    seen.add(identifier)
                except corpus.BadRow as reason:
                    bad.add(row.place, reason)
                else:
                    documents.append(document)
                    thumbnails.append(small)
                advance(1)
            bad.refuse_beyond(self.plan.max_bad)
            if not len(documents):
                raise IndexProblem("there are no images")
        return {"count": len(documents), "digest": documents.digest + thumbnails.digest, "bad": bad.count}

    def _index_words(self, passages: Records) -> dict[str, Any]:
        with self._bar("BM25", 2 * len(passages)) as advance:
            bm25.build(map(text_of, passages), self.out / "bm25", advance)
        return {}

    def _index_vectors(
        self, name: str, encoder: encoders.Encoder, records: Records, read: Callable[[bytes], Any], kind: str | None
    ) -> dict[str, Any]:
        shards, count = self.out / f"{name}.shards", len(records)
        with self._bar(f"{name} vectors", count) as advance:
            vectors.encode(
                shards,
                count,
                lambda start, stop: [read(records[position]) for position in range(start, stop)],
                encoder,
                self.plan.shard,
                advance,
            )
        file = self.out / f"{name}.faiss"
        return {"kind": vectors.build(shards, count, self.plan.shard, kind, file), "seal": vectors.seal(file)}


def _thumbnail(data: bytes) -> bytes:
    try:
        image = pictures.read_image(data)
    except ValueError as error:
        raise corpus.BadRow(str(error)) from error
    return pictures.encode_thumbnail(pictures.thumbnail(image), data)


def _agree(out: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises IndexProblem: What is in the folder was made of something else."""
    changed = [
        f"{name}: {json.dumps(old)} is now {json.dumps(new)}" for name, old, new in _leaves(before, now) if old != new
    ]
    if changed:
        raise IndexProblem(
            f"{out} was built with other settings ({'; '.join(changed)}); choose another --out, or delete that folder"
        )


def _leaves(before: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted({*before, *now}):
            yield from _leaves(before.get(key), now.get(key), f"{name}.{key}" if name else key)
    else:
        yield name, before, now


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the index")
    parser.add_argument("--corpus", type=Path, nargs="+", default=[], help="passages")
    parser.add_argument("--text", default="bm25", help="bm25, dense or bm25,dense (default: bm25)")
    parser.add_argument("--encoder", help="sentence-transformers model for dense search: a folder or a name")
    parser.add_argument("--query-prompt", help='put before queries, as in "query: " for E5 (default: the model\'s own)')
    parser.add_argument("--passage-prompt", help='put before passages, as in "passage: " (default: the model\'s own)')
    parser.add_argument("--faiss", help="FAISS factory string of dense search (default: chosen by size)")
    parser.add_argument("--images", type=Path, help="images: a .parquet file or a folder")
    parser.add_argument("--image-encoder", default=encoders.PHASH, help="phash, or a CLIP model (default: phash)")
    parser.add_argument("--max-bad", type=int, default=0, help="bad rows that may be left out (default: 0)")
    parser.add_argument("--shard", type=int, default=Plan.shard, help="rows encoded between two points to go on from")
    values = vars(parser.parse_args(argv))
    values |= {"corpus": tuple(values["corpus"]), "text": tuple(values["text"].split(","))}
    return run_main(PROGRAM, lambda: _report(Plan(**values)))


def _report(plan: Plan) -> int:
    started = time.monotonic()
    manifest = build(plan)
    counts = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in manifest["counts"].items())
    kinds = "".join(f"; {name}: FAISS {kind}" for name, kind in manifest["faiss"].items())
    print(f"{plan.out}: {counts}{kinds}; identity {manifest['identity']}; {time.monotonic() - started:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
