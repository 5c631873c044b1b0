"""Splits an index for BM25 into shards, for corpora beyond one machine's memory.

    python -m search_backends.retrieval.shards INDEX --count 4 --out SHARDS

A shard holds a run of passages with the scores that the whole index has of them, which depend on the
statistics of the whole corpus. So the best of all shards' best are exactly the whole index's best,
ties included (`merge`). Each shard is an index, in a folder of its own.
"""

from __future__ import annotations

import argparse
import heapq
import json
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from numba import njit

from search_backends.retrieval import bm25
from search_backends.retrieval.bm25 import Hits
from search_backends.retrieval.documents import Records, RecordWriter
from search_backends.retrieval.manifest import (
    MANIFEST,
    VERSION,
    IndexProblem,
    identity,
    read_manifest,
    run_main,
    write_json,
)

PROGRAM = "search_backends.retrieval.shards"
IntArray: TypeAlias = npt.NDArray[np.int64]


def split(index: Path, count: int, out: Path) -> list[Path]:
    """Writes ``count`` shards and returns their folders.

    Raises:
        IndexProblem: There is no such index, it has no BM25 or fewer passages, or ``out`` is not empty.
    """
    manifest = read_manifest(index)
    passages = manifest["counts"]["passages"]
    if manifest["settings"].get("bm25") != bm25.SETTINGS:
        raise IndexProblem(f"{index} has no BM25 of this version: only that can be split")
    if not 1 <= count <= passages:
        raise IndexProblem(f"--count must be between 1 and the number of passages, {passages}")
    if out.is_dir() and any(out.iterdir()):
        raise IndexProblem(f"--out: {out} is not empty")
    bm25.Bm25(index / "bm25", passages)  # checks every number
    records = Records(index / "passages")
    edges = [int(edge) for edge in np.linspace(0, passages, count + 1)]
    indices, starts = (
        np.load(index / "bm25" / f"{name}.csc.index.npy", mmap_mode="r") for name in ("indices", "indptr")
    )
    bounds = [_bounds(indices, starts, edge) for edge in edges]
    if not all((after > before).any() for before, after in pairwise(bounds)):
        raise IndexProblem(f"--count {count}: a shard would hold no word; take fewer")
    folders = []
    for number in range(count):
        folder, first, stop = out / f"{number:03d}", edges[number], edges[number + 1]
        (folder / "bm25").mkdir(parents=True)
        with RecordWriter(folder / "passages") as writer:
            for position in range(first, stop):
                writer.append(records[position])
        _split_words(index / "bm25", folder / "bm25", bounds[number], bounds[number + 1], first, stop)
        of = {"number": number, "count": count, "first": first, "passages": passages, "whole": manifest["identity"]}
        settings = {"bm25": bm25.SETTINGS, "shard": of}
        digests = {"passages": writer.digest}
        write_json(
            folder / MANIFEST,
            {
                "version": VERSION,
                "identity": identity(settings, digests),
                "counts": {"passages": stop - first, "images": 0, "bad_rows": 0},
                "digests": digests,
                "settings": settings,
            },
        )
        folders.append(folder)
    return folders


def _split_words(whole: Path, part: Path, begins: IntArray, ends: IntArray, first: int, stop: int) -> None:
    data, indices = (np.load(whole / f"{name}.csc.index.npy", mmap_mode="r") for name in ("data", "indices"))
    lengths = ends - begins
    held = np.flatnonzero(lengths)
    own = np.concatenate([[0], np.cumsum(lengths[held])])
    open_memmap: Any = np.lib.format.open_memmap  # NumPy gives it no types before 2.3
    new_data = open_memmap(part / "data.csc.index.npy", "w+", np.float32, (int(own[-1]),))
    new_indices = open_memmap(part / "indices.csc.index.npy", "w+", np.int32, (int(own[-1]),))
    _copy(data, indices, begins[held], own, first, new_data, new_indices)
    new_data.flush()
    new_indices.flush()
    np.save(part / "indptr.csc.index.npy", own)
    numbers = {int(token): number for number, token in enumerate(held)}
    vocabulary: dict[str, int] = json.loads((whole / "vocab.index.json").read_text(encoding="utf-8"))
    write_json(
        part / "vocab.index.json",
        {word: numbers[token] for word, token in vocabulary.items() if token in numbers},
    )
    params = json.loads((whole / "params.index.json").read_text(encoding="utf-8"))
    write_json(part / "params.index.json", {**params, "num_docs": stop - first})


@njit
def _bounds(indices: Any, starts: Any, passage: int) -> Any:
    """Where in each word's postings, which are sorted, those from ``passage`` on begin."""
    bounds = np.empty(len(starts) - 1, np.int64)
    for token in range(len(bounds)):
        low, high = starts[token], starts[token + 1]
        while low < high:
            middle = (low + high) // 2
            if indices[middle] < passage:
                low = middle + 1
            else:
                high = middle
        bounds[token] = low
    return bounds


@njit
def _copy(data: Any, indices: Any, begins: Any, own: Any, first: int, new_data: Any, new_indices: Any) -> None:
    for token in range(len(begins)):
        for entry in range(own[token + 1] - own[token]):
            new_data[own[token] + entry] = data[begins[token] + entry]
            new_indices[own[token] + entry] = indices[begins[token] + entry] - first


def shards_in(folder: Path) -> list[dict[str, Any]] | None:
    """The manifests of a folder's shards in order; None if the folder holds none.

    Raises:
        IndexProblem: Some are missing, or they are of different indexes.
    """
    files = sorted(folder.glob(f"*/{MANIFEST}"))
    manifests = [manifest for file in files if "shard" in (manifest := read_manifest(file.parent))["settings"]]
    if not manifests:
        return None
    shards = [manifest["settings"]["shard"] for manifest in manifests]
    wanted = [{**shards[0], "number": number} for number in range(shards[0]["count"])]
    if [{**shard, "first": 0} for shard in shards] != [{**shard, "first": 0} for shard in wanted]:
        there = ", ".join(f"{shard['number']} of {shard['count']} of {shard['whole']}" for shard in shards)
        raise IndexProblem(f"{folder} does not hold all shards of one index, only: {there}")
    return manifests


def merge(found: Sequence[Hits], topk: int) -> Hits:
    """The best of all shards' best hits, whose positions are those in the whole index."""
    return heapq.nsmallest(topk, (hit for hits in found for hit in hits), key=lambda hit: (-hit[1], hit[0]))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("index", type=Path)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    values = parser.parse_args(argv)

    def run() -> int:
        folders = split(values.index, values.count, values.out)
        print(f"{values.out}: {len(folders)} shards")
        return 0

    return run_main(PROGRAM, run)


if __name__ == "__main__":
    sys.exit(main())
