"""Encoding that survives an interruption, and FAISS indexes of the encoded vectors."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from search_backends.retrieval.bm25 import Hits
from search_backends.retrieval.encoders import Encoder, Vectors
from search_backends.retrieval.manifest import IndexProblem

FLAT_UP_TO = 200_000
"""More vectors than these are searched through lists (IVF), with 8 bits a value up to `QUANTISED_UP_TO`, beyond that
with 8 bits for every four values (PQ)."""
QUANTISED_UP_TO = 2_000_000
TRAINED_ON = 64
"""Vectors for each list that IVF learns from."""
PROBED = 64
"""Lists that a query looks through."""

# Otherwise FAISS multiplies matrices for 20 queries or more at a time, and rounds by how many there are.
faiss.cvar.distance_compute_blas_threshold = 1 << 30


def encode(
    folder: Path,
    count: int,
    read: Callable[[int, int], Sequence[Any]],
    encoder: Encoder,
    shard: int,
    advance: Callable[[int], None],
) -> None:
    """Encodes items into files of ``shard`` each; existing files are kept.

    Args:
        read: gives the items of a range of positions.
        advance: called with the number of items done.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file, start, stop in _shards(folder, count, shard):
        if not file.exists():
            vectors = encoder.encode(read(start, stop))
            if not encoder.binary:
                if not np.isfinite(vectors).all():
                    raise IndexProblem(
                        f"the encoder gives values that are not finite, between items {start} and {stop}"
                    )
                vectors = vectors.astype(np.float16)
            partial = file.with_suffix(".partial")
            with partial.open("wb") as out:
                np.save(out, vectors)
                out.flush()
                os.fsync(out.fileno())
            partial.replace(file)
        advance(stop - start)


def build(folder: Path, count: int, shard: int, kind: str | None, out: Path) -> str:
    """Makes the FAISS index of what `encode` wrote, and returns its kind.

    Args:
        kind: a FAISS factory string; None chooses by size. Hashes are always compared one by one.

    Raises:
        IndexProblem: FAISS cannot make such an index.
    """
    shards = [file for file, _, _ in _shards(folder, count, shard)]
    first = np.load(shards[0], mmap_mode="r")
    if first.dtype == np.uint8:
        kind = "BFlat"
        index: Any = faiss.IndexBinaryFlat(8 * first.shape[1])
        for file in shards:
            index.add(np.load(file))
        write: Callable[[Any, str], None] = faiss.write_index_binary
    else:
        kind = kind or choose_kind(count, first.shape[1])
        try:
            index = faiss.index_factory(first.shape[1], kind, faiss.METRIC_INNER_PRODUCT)
            if not index.is_trained:
                index.train(_sample(shards, count, TRAINED_ON * getattr(index, "nlist", count)))
            for file in shards:
                index.add(np.load(file).astype(np.float32))
        except RuntimeError as error:
            raise IndexProblem(f"FAISS cannot make an index {kind} of {count} vectors: {str(error).strip()}") from error
        write = faiss.write_index
    partial = out.with_suffix(".partial")
    write(index, str(partial))
    partial.replace(out)
    return kind


def seal(file: Path) -> dict[str, Any]:
    """The size of an index file and a hash of its content: the manifest keeps them."""
    digest = hashlib.blake2b(digest_size=16)
    with file.open("rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
    return {"bytes": file.stat().st_size, "blake2b": digest.hexdigest()}


# Only so much is asked of it: whether FAISS survives reading the file and searching in it.
_TRIAL = """
import resource, sys
import faiss, numpy

file, binary, memory = sys.argv[1], sys.argv[2] == "True", int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
index = (faiss.read_index_binary if binary else faiss.read_index)(file)
vector = numpy.zeros((1, index.d // 8), "uint8") if binary else numpy.ones((1, index.d), "float32")
index.search(vector, max(1, min(100, index.ntotal)))
"""
_TRIAL_S = 600.0
_TRIAL_BYTES = 4 << 30  # besides twice the file's size


def check_file(file: Path, sealed: Any, *, binary: bool) -> None:
    """Checks that a FAISS file is the one that was built: FAISS trusts its input and may crash on
    another.

    Args:
        file: the file of an index.
        sealed: what `seal` said when it was built. None for an index of before there were seals: a process of its own
            reads it then, and searches in it once.
        binary: whether it holds hashes.

    Raises:
        IndexProblem: It is another, it is not there, or FAISS does not survive it.
    """
    try:
        size = file.stat().st_size
        if sealed is not None:
            if not isinstance(sealed, dict) or sealed.get("bytes") != size:
                raise IndexProblem(f"the index is damaged: {file} has {size} bytes, not those it was built with")
            if sealed != seal(file):
                raise IndexProblem(f"the index is damaged: {file} has another content than was built")
            return
    except OSError as error:
        raise IndexProblem(f"the index is damaged: {file}: {error.strerror}") from error
    command = [sys.executable, "-c", _TRIAL, str(file), str(binary), str(2 * size + _TRIAL_BYTES)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_TRIAL_S)
    except subprocess.TimeoutExpired:
        raise IndexProblem(f"the index is damaged: FAISS is not done with {file} in {_TRIAL_S:g} s") from None
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        why = signal.Signals(-done.returncode).name if done.returncode < 0 else said[-1] if said else "no reason given"
        raise IndexProblem(f"the index is damaged: FAISS cannot read {file} ({why})")


def choose_kind(count: int, dimension: int) -> str:
    """The FAISS factory string for so many vectors."""
    if count <= FLAT_UP_TO:
        return "Flat"
    lists = 2 ** round(np.log2(4 * np.sqrt(count)))
    return f"IVF{lists},PQ{dimension // 4}" if count > QUANTISED_UP_TO and dimension % 4 == 0 else f"IVF{lists},SQ8"


def _sample(shards: Sequence[Path], count: int, wanted: int) -> Vectors:
    """Vectors at even distances through all shards."""
    step = max(1, count // wanted)
    sampled: Vectors = np.concatenate([np.load(file, mmap_mode="r")[::step] for file in shards]).astype(np.float32)
    return sampled


def _shards(folder: Path, count: int, shard: int) -> Iterator[tuple[Path, int, int]]:
    for number, start in enumerate(range(0, count, shard)):
        yield folder / f"{number:06}.npy", start, min(start + shard, count)


class VectorSearch:
    """Searches a FAISS index with an encoder's vectors.

    Scores are inner products of vectors of length 1 or, for hashes, the share of equal bits. The
    last digits of a model's vectors depend on what is encoded in the same batch.

    Args:
        file: a FAISS index. One from an unknown source is checked by `check_file` first.

    Raises:
        IndexProblem: Damaged, or made for another encoder or number of documents.
    """

    def __init__(self, file: Path, encoder: Encoder, count: int):
        self._encoder = encoder
        try:
            self._index = (faiss.read_index_binary if encoder.binary else faiss.read_index)(str(file))
        except RuntimeError as error:
            raise IndexProblem(f"{file} cannot be read: {str(error).splitlines()[-1]}") from error
        if self._index.ntotal != count:
            raise IndexProblem(f"{file} holds {self._index.ntotal} vectors, expected {count}: rebuild the index")
        if hasattr(self._index, "nprobe"):
            self._index.nprobe = PROBED

    def search(self, items: Sequence[Any], topk: int) -> list[Hits]:
        """The best ``topk`` of each item."""
        vectors = self._encoder.encode(items)
        return [self._search(vectors[item : item + 1], topk) for item in range(len(items))]

    def _search(self, vector: Vectors, topk: int) -> Hits:
        total = self._index.ntotal
        wanted = min(topk + 8, total)
        while True:
            values, positions = self._index.search(vector, wanted)
            # FAISS leaves open which of equal ones it drops, so all that equal the last one are asked for.
            if wanted == total or positions[0, -1] < 0 or values[0, -1] != values[0, topk - 1]:
                break
            wanted = min(4 * wanted, total)
        scores = 1 - values[0] / (8 * vector.shape[1]) if self._encoder.binary else values[0]
        hits = [hit for hit in zip(positions[0].tolist(), scores.tolist(), strict=True) if hit[0] >= 0]
        return sorted(hits, key=lambda hit: (-hit[1], hit[0]))[:topk]


def fuse(rankings: Sequence[Hits], topk: int, constant: int = 60) -> Hits:
    """Reciprocal rank fusion: a document scores the sum of 1 / (constant + rank), ranks from 1."""
    scores: dict[int, float] = {}
    for hits in rankings:
        for rank, (position, _) in enumerate(hits, 1):
            scores[position] = scores.get(position, 0.0) + 1 / (constant + rank)
    return sorted(scores.items(), key=lambda hit: (-hit[1], hit[0]))[:topk]
