"""A tokenizer's tokens as bytes, and a search for markers in token ids.

For speed, a table over the vocabulary flags the few token ids in which a marker may begin. One
``take`` over the flat batch then finds all candidates, and only tokens between markers are turned
into text, by joining their bytes.
"""

from __future__ import annotations

import logging
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import accumulate
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from verl_tapo.rule.arrays import IntArray, sorted_unique, thread_count

logger = logging.getLogger(__name__)

# Kinds of markers, as bits. What answers begin with has the bits from ANSWER on, eight at most.
OPEN, CLOSE, IMAGE, ANSWER = 1, 2, 4, 32
ANSWERS = 255 * ANSWER
_WHOLE, _PARTLY = 8, 16  # a token holds a whole marker; one may begin in it that goes on in the next
_CHUNK = 1 << 17  # tokens that stay in a core's cache
_WINDOW = 64  # tokens that are decoded together at most, where a tokenizer cuts characters
_SAMPLES = (
    'Let me look: {"name": "zoom", "arguments": {"image": 0, "bbox": [1, 2.5, -3]}}\n\n',
    "def f(x):\n\treturn  x <= 3 and x != 'a'   # two  spaces\r\n",
    "北京 is Größe naïve 😀 кот — “x” ﷽\n",
)


def _byte_characters() -> dict[str, int]:
    """The printable character that byte-level BPE (GPT-2's) writes for each byte."""
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    shifted = (byte for byte in range(256) if byte not in plain)
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(shifted)}


_BYTES = _byte_characters()
_TO_LATIN = {ord(character): byte for character, byte in _BYTES.items()}
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_level_piece(token: str) -> bytes:
    return token.translate(_TO_LATIN).encode("latin-1") if _BYTES.keys() >= set(token) else token.encode()


def _metaspace_piece(token: str) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode("utf-8", "replace")


class Vocabulary:
    """A tokenizer's tokens as bytes.

    If ``exact``, joining the bytes gives what the tokenizer decodes; samples check it. Otherwise
    the bytes are those of each token on its own, which is enough to find markers, and the tokenizer
    decodes texts.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.tokens: dict[str, int] = dict(tokenizer.get_vocab())
        self.special = frozenset(tokenizer.all_special_ids)
        samples = [tokenizer.encode(sample, add_special_tokens=False) for sample in _SAMPLES]
        self._anchor = samples[0][-1:]
        # Added tokens (markers, most of all) between other text.
        added = tokenizer.get_added_vocab()
        added = sorted(added[token] for token in added if not _BYTE_TOKEN.fullmatch(token))[:512]
        samples.append([*samples[0], *added, *samples[0]])
        decoded = [self._decode(ids) for ids in samples]
        for piece in (_byte_level_piece, _metaspace_piece):
            self.pieces = {number: piece(token) for token, number in self.tokens.items()}
            self.exact = True
            joined = [self.text(ids).decode("utf-8", "replace") for ids in samples]
            # SentencePiece puts a space in front of a text and takes it off again.
            self.exact = all(text in (raw, raw.removeprefix(" ")) for raw, text in zip(joined, decoded, strict=True))
            if self.exact:
                break
        else:
            logger.warning("%s: its tokens have to be decoded one by one, which is slow", type(tokenizer).__name__)
            before = len(self.text(self._anchor))
            self.pieces = {number: self.text([*self._anchor, number])[before:] for number in self.pieces}

    def _decode(self, ids: Sequence[int]) -> str:
        text = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(text)

    def text(self, ids: Sequence[int]) -> bytes:
        """Returns the text of ``ids``; ids outside the vocabulary are skipped."""
        if not self.exact:
            return self._decode([number for number in ids if self.pieces.get(number)]).encode("utf-8", "replace")
        try:
            return b"".join(itemgetter(*ids)(self.pieces)) if len(ids) > 1 else self.pieces[ids[0]]
        except (KeyError, IndexError):
            return b"".join([self.pieces.get(number, b"") for number in ids])

    def ends(self, ids: list[int]) -> list[int]:
        """Returns where each of ``ids`` ends in their text, in bytes, ascending."""
        if self.exact:
            return list(accumulate(len(self.pieces.get(number, b"")) for number in ids))
        # Token by token behind an anchor, from the last place on at which no character was cut.
        ends: list[int] = []
        few: list[int] = []
        done = 0
        for number in ids:
            few.append(number)
            text = self.text([*self._anchor, *few])
            ends.append(done + len(text) - len(self.text(self._anchor)))
            if not text.endswith("\ufffd".encode()) or len(few) >= _WINDOW:
                few, done = [], ends[-1]
        # What a tokenizer takes off the beginning; and the last byte of a character takes back what others added.
        off = (ends[-1] if ends else 0) - len(self.text(ids))
        return list(accumulate((max(end - off, 0) for end in reversed(ends)), min))[::-1]

    def shows_text(self, ids: Sequence[int]) -> bool:
        """Returns whether ``ids`` contain more than special tokens and white space."""
        return bool(self.text([number for number in ids if number not in self.special]).strip())


@lru_cache(maxsize=8)
def vocabulary(tokenizer: Any, size: int) -> Vocabulary:
    """The tokenizer's tokens; kept, because it takes a second. ``size`` tells of tokens that were added since."""
    del size
    return Vocabulary(tokenizer)


class Marks(NamedTuple):
    """Markers in a flat batch, in order. K marks."""

    position: IntArray  # (K,) the token each begins in
    stop: IntArray  # (K,) behind the token each ends in
    kind: npt.NDArray[np.uint16]  # (K,) its bits

    def of(self, kind: int) -> Marks:
        """Returns the marks of one kind."""
        which = self.kind & kind != 0
        return Marks(self.position[which], self.stop[which], self.kind[which])


class Markers:
    """Finds markers in token ids.

    Args:
        words: the tokenizer's tokens.
        texts: markers as they are spelled, with the bit of each; however they are cut into tokens.
        images: ids of tokens that stand for an image.
    """

    def __init__(self, words: Vocabulary, texts: Sequence[tuple[bytes, int]], images: Iterable[int]):
        self._words, self._texts = words, texts
        self._longest = max((len(text) for text, _ in texts), default=0)
        self._begins = np.zeros(max(words.pieces, default=0) + 2, np.uint16)  # its last place: no token
        for head in {text[:1] for text, _ in texts}:
            for number in [number for number, piece in words.pieces.items() if head in piece]:
                self._begins[number] |= self._kinds(words.pieces[number], head)
        self._begins[list(images)] |= IMAGE
        self._tails = tuple({text[size:] for text, _ in texts for size in range(1, len(text))})
        self._middles = {tail[:size] for tail in self._tails for size in range(len(tail))}
        self._goes_on: dict[int, bool] = {}

    def _kinds(self, piece: bytes, head: bytes) -> int:
        """Returns the markers that begin with ``head`` and may begin in a token."""
        kinds = 0
        for text, kind in self._texts:
            if text.startswith(head):
                if text in piece:
                    kinds |= kind | _WHOLE
                elif any(piece.endswith(text[:size]) for size in range(1, len(text))):
                    kinds |= kind | _PARTLY
        return kinds

    def _may_follow(self, number: int) -> bool:
        """Returns whether a token may continue a marker that began in the token before it."""
        if number not in self._goes_on:
            piece = self._words.pieces.get(number, b"")
            # Where a tokenizer decodes the bytes of a character one by one, they do not tell.
            cut = not self._words.exact and piece.startswith("\ufffd".encode())
            self._goes_on[number] = piece in self._middles or piece.startswith(self._tails) or cut
        return self._goes_on[number]

    def candidates(self, ids: IntArray) -> tuple[IntArray, npt.NDArray[np.uint16]]:
        """(K,) positions, in order, at which markers may begin, and (K,) the kinds of these."""

        def flagged(start: int, stop: int) -> IntArray:
            kinds = self._begins.take(ids[start:stop], mode="clip")
            return np.flatnonzero(kinds != 0) + start  # several times faster on booleans

        position = np.concatenate([np.zeros(0, np.int64), *in_pieces(flagged, 0, len(ids))])
        position = position[ids[position] >= 0]
        kinds = self._begins.take(ids[position], mode="clip")
        # A placeholder repeated for an image's patches counts once.
        images = np.flatnonzero(kinds & IMAGE)
        kinds[images[1:][np.diff(position[images]) == 1]] &= ~np.uint16(IMAGE)
        return position, kinds

    def marks(self, ids: IntArray, position: IntArray, kinds: npt.NDArray[np.uint16], limit: IntArray) -> Marks:
        """Returns the markers among candidates, (K,). Each must end by the position ``limit``."""
        stop = position + 1
        partly = np.flatnonzero(kinds & _PARTLY)
        # Most tokens that may begin a marker are followed by one that does not go on with it.
        follower = ids[np.minimum(position[partly] + 1, len(ids) - 1)]
        goes_on = np.fromiter(map(self._may_follow, follower.tolist()), bool, len(partly))
        goes_on |= kinds[partly] & _WHOLE != 0
        kinds[partly[~goes_on]] = 0
        for mark in partly[goes_on].tolist():
            kinds[mark], stop[mark] = self._read(ids, int(position[mark]), int(kinds[mark]), int(limit[mark]))
        kinds &= ~np.uint16(_WHOLE)
        kept = kinds != 0
        return Marks(position[kept], stop[kept], kinds[kept])

    def _read(self, ids: IntArray, place: int, kind: int, limit: int) -> tuple[int, int]:
        """Returns which of the possible markers begin in the token at ``place``, and an upper bound
        of where they end."""
        few = ids[place : min(limit, place + self._longest)].tolist()
        sizes = list(accumulate(len(self._words.pieces.get(number, b"")) for number in few))
        # Bytes of a cut character are three each where a tokenizer decodes them one by one.
        few = few[: bisect_left(sizes, sizes[0] + self._longest * (1 if self._words.exact else 3)) + 1]
        text = self._words.text(few)
        found = kind & IMAGE
        for marker, its_kind in self._texts:
            if 0 <= text.find(marker) < sizes[0]:
                found |= its_kind & kind
        return found, place + len(few)


def in_pieces(function: Callable[[int, int], IntArray], start: int, stop: int) -> list[IntArray]:
    """Applies ``function(start, stop)`` to pieces of ``[start, stop)`` that fit the cache, in a few
    threads."""
    starts = range(start, stop, _CHUNK)
    threads = thread_count(len(starts))
    share = -(-len(starts) // threads)

    def work(thread: int) -> list[IntArray]:
        return [function(at, min(at + _CHUNK, stop)) for at in starts[thread * share : (thread + 1) * share]]

    with ThreadPoolExecutor(threads) as pool:
        return [piece for pieces in pool.map(work, range(threads)) for piece in pieces]


def run_bounds(mask: IntArray, bounds: IntArray) -> IntArray:
    """Returns where runs of equal mask begin, row by row, and where the last one ends; rows are
    ``[bounds[r], bounds[r + 1])``."""
    first, last = int(bounds[0]), int(bounds[-1])

    def changes(start: int, stop: int) -> IntArray:
        values = mask[start : min(stop + 1, last)]  # with the first token of the next piece
        return np.flatnonzero(values[1:] != values[:-1]) + (start + 1)

    found = np.concatenate([bounds[:0], *in_pieces(changes, first, last)])
    # There may be other values than 0 and 1.
    found = found[(mask[found] != 0) != (mask[found - 1] != 0)]
    return sorted_unique(np.concatenate([bounds, found]))
