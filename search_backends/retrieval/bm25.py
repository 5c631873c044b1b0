"""BM25 in bm25s's files, built without holding the corpus and searched without holding the GIL.

The scores are bm25s's (Lucene's formula, k1 = 1.5, b = 0.75; a test compares them), and bm25s can
load the folder. We replace bm25s's builder (it holds the corpus in memory) and its search (it
scores every passage, and does not break ties by position).
"""

from __future__ import annotations

import re
import shutil
import threading
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt
from numba import njit

from search_backends.retrieval.bm25s_alone import bm25s
from search_backends.retrieval.manifest import IndexProblem, write_json
from verl_tapo.answers.letters import ALONE, ARABIC_LETTERS, ARABIC_VOWELS, HEBREW_VOWELS, TATWEEL, combining_marks

K1, B = 1.5, 0.75
SETTINGS = {
    "method": "lucene",
    "k1": K1,
    "b": B,
    "words": "lower case, no accents or vowel signs; CJK, Korean, Thai and the like by character",
    "stopwords": "en",
}

Hits = list[tuple[int, float]]
"""Positions and scores, best first, ties by position."""

_MARKS = combining_marks()
# A word is one character of a script without spaces, or a run of letters and digits. Its combining
# marks belong to it: without them Hindi falls apart.
_WORD = re.compile(rf"(?=[^\W_])[{ALONE}][{_MARKS}]*|[^\W_{ALONE}]+(?:[{_MARKS}]+[^\W_{ALONE}]*)*")
_ASCII_WORD = re.compile("[a-z0-9]+")
# Accents, vowel signs that most texts leave out, and what is not seen within a word.
_LEFT_OUT = re.compile(f"[\u0300-\u036f{HEBREW_VOWELS}{ARABIC_VOWELS}{TATWEEL}\u00ad\u200c\u200d\u2060\ufeff]")
_LETTERS = str.maketrans(ARABIC_LETTERS)
_STOPWORDS = frozenset(bm25s.stopwords.STOPWORDS_EN)
_CHUNK = 50_000  # passages


def words(text: str) -> list[str]:
    """Returns the words by which a text is searched."""
    text, pattern = text.lower(), _ASCII_WORD
    if not text.isascii():
        text, pattern = unicodedata.normalize("NFKC", _LEFT_OUT.sub("", unicodedata.normalize("NFKD", text))), _WORD
    return [word for word in pattern.findall(text.translate(_LETTERS)) if word not in _STOPWORDS]


def build(texts: Iterable[str], folder: Path, advance: Callable[[int], None]) -> None:
    """Writes the index of the texts.

    Only the vocabulary and a chunk of passages are in memory. The postings go through a file and
    are then sorted by word in memory-mapped arrays. ``advance`` is called with the passages done,
    twice for each: when read, and when sorted.
    """
    shutil.rmtree(folder, ignore_errors=True)  # what an interrupted build left
    folder.mkdir(parents=True)
    postings = folder / "postings.partial"
    with postings.open("w+b") as file:
        vocabulary, lengths, distinct = _count(texts, file, advance)
        passages, terms = len(lengths), len(vocabulary)
        if not terms:
            raise IndexProblem("no passage holds a word that could be searched")
        frequency = np.zeros(terms, dtype=np.int64)
        for _, tokens, _ in _chunks(file, distinct):
            frequency += np.bincount(tokens, minlength=terms)
        idf = np.log(1 + (passages - frequency + 0.5) / (frequency + 0.5)).astype(np.float32)
        starts = np.concatenate([[0], np.cumsum(frequency)])
        shape = (int(starts[-1]),)
        # NumPy gives it no types before 2.3.
        open_memmap: Any = np.lib.format.open_memmap
        data = open_memmap(folder / "data.csc.index.npy", "w+", np.float32, shape)
        indices = open_memmap(folder / "indices.csc.index.npy", "w+", np.int32, shape)
        heads, average = starts[:-1].copy(), float(lengths.mean())
        for first, tokens, counts in _chunks(file, distinct):
            chunk = slice(first, first + _CHUNK)
            _sort_in(tokens, counts, distinct[chunk], lengths[chunk], first, idf, average, heads, data, indices)
            advance(len(distinct[chunk]))
        data.flush()
        indices.flush()
    np.save(folder / "indptr.csc.index.npy", starts)
    write_json(folder / "vocab.index.json", vocabulary)
    own = {"k1": K1, "b": B, "delta": 0.5, "method": "lucene", "idf_method": "lucene", "dtype": "float32"}
    write_json(
        folder / "params.index.json",
        {**own, "int_dtype": "int32", "num_docs": passages, "version": bm25s.__version__, "backend": "numpy"},
    )
    postings.unlink()


def _count(
    texts: Iterable[str], file: BinaryIO, advance: Callable[[int], None]
) -> tuple[dict[str, int], npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Writes each passage's words and how often it has them; returns vocabulary, lengths and numbers of words."""
    vocabulary: dict[str, int] = {}
    lengths, distinct = array("i"), array("i")
    tokens, counts = array("i"), array("i")
    for text in texts:
        found = words(text)
        counted = Counter(found)
        tokens.extend([vocabulary.setdefault(word, len(vocabulary)) for word in counted])
        counts.extend(counted.values())
        lengths.append(len(found))
        distinct.append(len(counted))
        if len(distinct) % _CHUNK == 0:
            _flush(file, tokens, counts)
            advance(_CHUNK)
    _flush(file, tokens, counts)
    advance(len(distinct) % _CHUNK)
    return vocabulary, np.frombuffer(lengths, dtype=np.int32), np.frombuffer(distinct, dtype=np.int32)


def _flush(file: BinaryIO, tokens: array[int], counts: array[int]) -> None:
    for values in (tokens, counts):
        values.tofile(file)
        del values[:]


def _chunks(
    file: BinaryIO, distinct: npt.NDArray[np.int32]
) -> Iterator[tuple[int, npt.NDArray[np.int32], npt.NDArray[np.int32]]]:
    """Reads what `_count` wrote: the first passage's position, words, and their counts."""
    file.seek(0)
    for first in range(0, len(distinct), _CHUNK):
        size = int(distinct[first : first + _CHUNK].sum())
        tokens, counts = (np.frombuffer(file.read(4 * size), dtype=np.int32) for _ in range(2))
        yield first, tokens, counts


@njit(nogil=True)
def _sort_in(
    tokens: Any,
    counts: Any,
    distinct: Any,
    lengths: Any,
    first: int,
    idf: Any,
    average: float,
    heads: Any,
    data: Any,
    indices: Any,
) -> None:
    """Writes a chunk's scores into their words' postings; ``heads`` holds the next free place of
    each word."""
    entry = 0
    for passage in range(len(distinct)):
        norm = K1 * (1 - B + B * lengths[passage] / average)
        for _ in range(distinct[passage]):
            token, count = tokens[entry], counts[entry]
            data[heads[token]] = np.float32(idf[token] * (count / (norm + count)))
            indices[heads[token]] = first + passage
            heads[token] += 1
            entry += 1


@njit(nogil=True)
def _search(
    data: Any, indices: Any, starts: Any, tokens: Any, ends: Any, topk: int, scores: Any, touched: Any
) -> tuple[Any, Any, Any]:
    """Returns the best ``topk`` of each query, whose words are ``tokens[ends[q]:ends[q + 1]]``.

    ``scores`` (all 0, and so again afterwards) and ``touched`` are as long as there are passages.
    """
    queries = len(ends) - 1
    positions = np.zeros((queries, topk), dtype=np.int32)
    values = np.zeros((queries, topk), dtype=np.float32)
    found = np.zeros(queries, dtype=np.int32)
    for query in range(queries):
        reached = 0
        for token in tokens[ends[query] : ends[query + 1]]:
            for entry in range(starts[token], starts[token + 1]):
                passage = indices[entry]
                if scores[passage] == 0:
                    touched[reached] = passage
                    reached += 1
                scores[passage] += data[entry]
        best, value, kept = positions[query], values[query], 0
        for passage in touched[:reached]:
            score = scores[passage]
            scores[passage] = 0
            if kept == topk:
                if score < value[-1] or (score == value[-1] and passage > best[-1]):
                    continue
            else:
                kept += 1
            place = kept - 1
            while place > 0 and (score > value[place - 1] or (score == value[place - 1] and passage < best[place - 1])):
                best[place], value[place] = best[place - 1], value[place - 1]
                place -= 1
            best[place], value[place] = passage, score
        found[query] = kept
    return positions, values, found


@njit(nogil=True)
def _wrong_postings(data: Any, indices: Any, passages: int) -> int:
    """The number of postings that name no passage or are not positive. `_search` trusts them."""
    wrong = 0
    for entry in range(len(data)):
        wrong += not (0 <= indices[entry] < passages and 0 < data[entry] < np.inf)
    return wrong


class Bm25:
    """Searches an index that `build` wrote. Memory-mapped; any number of threads may search at a time, each needs 8
    bytes a passage.

    Args:
        folder: the index's folder. It is read through once, so that no number in it can lead out of an array.
        passages: the number of passages.

    Raises:
        IndexProblem: A file is damaged, or they do not belong together.
    """

    def __init__(self, folder: Path, passages: int):
        try:
            loaded = bm25s.BM25.load(folder, mmap=True)
            self._vocabulary: dict[str, int] = dict(loaded.vocab_dict)
            self._arrays = tuple(np.asarray(loaded.scores[name]) for name in ("data", "indices", "indptr"))
            tokens = np.fromiter(self._vocabulary.values(), dtype=np.int64, count=len(self._vocabulary))
        except Exception as error:  # of many kinds, by what is wrong with the files
            raise IndexProblem(f"the index is damaged: {folder}: {error}") from error
        self._passages = passages
        data, indices, starts = self._arrays
        fits = (
            loaded.scores["num_docs"] == passages
            and [array.dtype for array in self._arrays] == [np.float32, np.int32, np.int64]
            and all(array.ndim == 1 for array in self._arrays)
            and len(starts) == len(tokens) + 1
            and starts[0] == 0
            and starts[-1] == len(data) == len(indices)
            and bool((starts[1:] >= starts[:-1]).all())
            and bool(((tokens >= 0) & (tokens < len(tokens))).all())
            and not cast(Any, _wrong_postings)(data, indices, passages)
        )
        if not fits:
            raise IndexProblem(f"the index is damaged: the files in {folder} do not belong together")
        self._own = threading.local()
        self.search(["compiled now, not at the first request"], 1)

    def search(self, queries: Sequence[str], topk: int) -> list[Hits]:
        """The best passages that hold a word of the query; may be fewer than ``topk``, or none."""
        known = [[self._vocabulary[word] for word in words(query) if word in self._vocabulary] for query in queries]
        ends = np.cumsum([0, *map(len, known)])
        tokens = np.fromiter((token for one in known for token in one), dtype=np.int64, count=int(ends[-1]))
        if not hasattr(self._own, "buffers"):
            self._own.buffers = np.zeros(self._passages, np.float32), np.empty(self._passages, np.int32)
        positions, values, found = cast(Any, _search)(*self._arrays, tokens, ends, topk, *self._own.buffers)
        return [
            list(zip(positions[query, :count].tolist(), values[query, :count].tolist(), strict=True))
            for query, count in enumerate(found.tolist())
        ]
