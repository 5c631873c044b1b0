"""The three tools as functions of an index: equal parameters give equal answers; there is no state
and no veRL."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from flags_and_facts.world import Split, World, load_world
from search_backends.retrieval.bm25s_alone import bm25s

RESULTS = 3
# The root mean square over the channels, 0 to 255. An image farther than this is not a flag.
MAX_DISTANCE = 60.0
ZOOM_SIZE = (84, 63)
MIN_ZOOM = 8  # pixels

_building = Lock()


def _embedding(image: Image.Image) -> npt.NDArray[np.float32]:
    small = image.convert("RGB").resize((21, 16), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32).reshape(-1)


class Index:
    """Searches the flags and the passages of a world."""

    def __init__(self, world: World):
        self._codes = list(world.countries)
        self._names = [country.name for country in world.countries.values()]
        self._flags = np.stack([_embedding(world.flags[code]) for code in self._codes])
        self._texts = world.passages
        self._bm25 = bm25s.BM25()
        self._bm25.index(_words(self._texts), show_progress=False)

    def image_search(self, image: Image.Image) -> str:
        """Returns the country whose flag is most like the image."""
        distances = np.sqrt(((self._flags - _embedding(image)) ** 2).mean(axis=1))
        best = int(distances.argmin())
        if distances[best] > MAX_DISTANCE:
            return "No single flag found in this image."
        return f"This is the flag of {self._names[best]}."

    def text_search(self, query: str) -> str:
        """The best passages, numbered."""
        words = _words([query])
        if not words[0]:
            return "Nothing found."
        found, scores = self._bm25.retrieve(words, k=RESULTS, show_progress=False)
        chosen = [self._texts[position] for position, score in zip(found[0], scores[0], strict=True) if score > 0]
        return "\n".join(f"[{number}] {text}" for number, text in enumerate(chosen, 1)) or "Nothing found."

    def run(
        self, tool: str, arguments: dict[str, Any], images: Sequence[Image.Image]
    ) -> tuple[str, Image.Image | None]:
        """Returns a tool's text and image. ``images`` are those of the conversation, counted from
        1.

        Raises:
            ValueError: Arguments that make no sense; the message is for the model.
        """
        if tool == "text_search":
            query = arguments.get("query")
            if not isinstance(query, str):
                raise ValueError("text_search needs a query")
            return self.text_search(query), None
        number = arguments.get("image")
        if not isinstance(number, int) or not 1 <= number <= len(images):
            raise ValueError(f"image must be the number of an image, 1 to {len(images)}")
        image = images[number - 1]
        if tool == "image_search":
            return self.image_search(image), None
        if tool == "zoom":
            bbox = arguments.get("bbox")
            return f"Image {len(images) + 1}:", zoom(image, bbox if isinstance(bbox, list) else [])
        raise ValueError(f"there is no tool {tool!r}")


def load_index(split: Split | None = None) -> Index:
    """The index of a split's countries, or of all. Built once, also where many rollouts ask at the same time."""
    with _building:
        return _index(split)


@cache
def _index(split: Split | None) -> Index:
    return Index(load_world(split))


def _words(texts: list[str]) -> list[list[str]]:
    return bm25s.tokenize(texts, stopwords="en", return_ids=False, show_progress=False, token_pattern=r"[^\W_]+")


def zoom(image: Image.Image, bbox: Sequence[float]) -> Image.Image:
    """The region ``bbox`` = (left, top, right, bottom), in thousandths of the image, enlarged.

    Raises:
        ValueError: Not four numbers, or less than 8 pixels wide or high.
    """
    if len(bbox) != 4 or not all(isinstance(value, (int, float)) and np.isfinite(value) for value in bbox):
        raise ValueError("bbox must be four numbers: left, top, right, bottom, from 0 to 1000")
    left, top, right, bottom = (min(max(value, 0), 1000) / 1000 for value in bbox)
    box = (left * image.width, top * image.height, right * image.width, bottom * image.height)
    if box[2] - box[0] < MIN_ZOOM or box[3] - box[1] < MIN_ZOOM:
        raise ValueError(f"bbox must be at least {MIN_ZOOM} pixels wide and high")
    return image.resize(ZOOM_SIZE, Image.Resampling.BICUBIC, box=box)
