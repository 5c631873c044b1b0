"""Questions that are the same: between training and evaluation, and within a set."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from typing import NamedTuple

import imagehash
from PIL import Image

NEAR = 4
"""Bits of 64 in which the perceptual hashes of two versions of a picture may differ."""


class Mark(NamedTuple):
    """The features that identify a question."""

    question: str
    """The question without case, accents and punctuation."""
    image: str
    """The sha256 of the first image's original bytes."""
    perceptual: int
    """A perceptual hash of the first image, 64 bits."""
    answer: str
    """The canonical one, like the question."""


def mark_of(question: str, answer: str, key: str, image: Image.Image) -> Mark:
    """Returns the mark of a question.

    Args:
        question, answer: texts.
        key, image: the sha256 of the first image's original bytes, and the image.
    """
    bits = imagehash.phash(image).hash.flatten()
    perceptual = int("".join("1" if bit else "0" for bit in bits), 2)
    return Mark(plain(question), key, perceptual, plain(answer))


def plain(text: str) -> str:
    """Letters and digits, in one case and without accents."""
    letters = unicodedata.normalize("NFKD", text.casefold())
    kept = "".join(letter if letter.isalnum() else " " for letter in letters if not unicodedata.combining(letter))
    return " ".join(kept.split())


class Seen:
    """Questions that were seen. Holds hashes, no images."""

    def __init__(self) -> None:
        self._exact: dict[tuple[str, str], str] = {}
        self._near: defaultdict[str, list[tuple[int, str]]] = defaultdict(list)

    def add(self, mark: Mark, name: str) -> None:
        self._exact.setdefault((mark.question, mark.image), name)
        self._near[mark.answer].append((mark.perceptual, name))

    def same(self, mark: Mark) -> str | None:
        """The name of a question with the same text and the same image."""
        return self._exact.get((mark.question, mark.image))

    def near(self, mark: Mark) -> str | None:
        """The name of a question with the same answer and nearly the same image."""
        for perceptual, name in self._near.get(mark.answer, ()):
            if (perceptual ^ mark.perceptual).bit_count() <= NEAR:
                return name
        return None
