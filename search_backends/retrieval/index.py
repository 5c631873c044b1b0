"""An index, opened for searching."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from search_backends.retrieval import bm25
from search_backends.retrieval.bm25 import Hits
from search_backends.retrieval.documents import Records
from search_backends.retrieval.encoders import Encoder, SentenceTransformerEncoder, image_encoder
from search_backends.retrieval.manifest import IndexProblem, read_manifest
from search_backends.retrieval.vectors import VectorSearch, check_file, fuse

TextSearch = Literal["bm25", "dense", "hybrid"]

FUSED = 100
"""Passages of each search that hybrid search joins."""


def choose_text_search(folder: Path, wanted: TextSearch | None) -> TextSearch | None:
    """Returns the text search to load: the requested one, else BM25 if the index has it, else
    dense. None without texts.

    Raises:
        IndexProblem: There is no such index, or it has no such search.
    """
    settings = read_manifest(folder)["settings"]
    has: list[TextSearch] = [name for name in ("bm25", "dense") if name in settings]
    if wanted is None:
        return has[0] if has else None
    missing = set(("bm25", "dense") if wanted == "hybrid" else (wanted,)) - set(has)
    if missing:
        raise IndexProblem(f"--text {wanted}: {folder} was built without {' and '.join(sorted(missing))}")
    return wanted


class Index:
    """Documents and the searches over them. Any number of threads may search.

    Args:
        folder: the folder of a finished index.
        text: None for what `choose_text_search` chooses.

    Attributes:
        identity: names whatever may change an answer, the choice of search included.
        passages, images: the documents by position, as JSON; None where the index has none.

    Raises:
        IndexProblem: There is no index, it is damaged, or an encoder is missing or not the one it was built with.
    """

    def __init__(self, folder: Path, text: TextSearch | None = None):
        self.manifest = read_manifest(folder)
        self.text = choose_text_search(folder, text)
        self.identity = "-".join(filter(None, [self.manifest["identity"], self.text]))
        settings, counts = self.manifest["settings"], self.manifest["counts"]
        self.passages = self.images = self._thumbnails = None
        if self.text is not None:
            self.passages = _records(folder / "passages", counts["passages"])
        if "image" in settings:
            self.images = _records(folder / "images", counts["images"])
            self._thumbnails = _records(folder / "thumbnails", counts["images"])
        searches: list[Callable[[Sequence[str], int], list[Hits]]] = []
        if self.text in ("bm25", "hybrid"):
            if settings["bm25"] != bm25.SETTINGS:
                raise IndexProblem(
                    f"{folder} was built by another version of this program, which took other words out of a text "
                    f"({settings['bm25']}): rebuild the index"
                )
            searches.append(bm25.Bm25(folder / "bm25", counts["passages"]).search)
        if self.text in ("dense", "hybrid"):
            dense = settings["dense"]
            encoder = SentenceTransformerEncoder(dense["encoder"], dense["query_prompt"], "query")
            _check(encoder, dense)
            searches.append(self._vectors(folder / "dense.faiss", encoder, counts["passages"]).search)
        self._searches = searches
        if "image" in settings:
            looking = image_encoder(settings["image"]["encoder"])
            _check(looking, settings["image"])
            self._looked = self._vectors(folder / "image.faiss", looking, counts["images"])

    def _vectors(self, file: Path, encoder: Encoder, count: int) -> VectorSearch:
        seals = self.manifest.get("seals")
        check_file(file, seals.get(file.name) if isinstance(seals, dict) else None, binary=encoder.binary)
        return VectorSearch(file, encoder, count)

    @property
    def loaded(self) -> list[str]:
        """The searches there are."""
        return [*([self.text] if self.text else []), *(["image"] if self.images is not None else [])]

    def search_texts(self, queries: Sequence[str], topk: int) -> list[Hits]:
        """Returns for each query the positions and scores of the best passages."""
        if len(self._searches) == 1:
            return self._searches[0](queries, topk)
        rankings = [search(queries, max(topk, FUSED)) for search in self._searches]
        return [fuse(hits, topk) for hits in zip(*rankings, strict=True)]

    def search_images(self, images: Sequence[Image.Image], topk: int) -> list[Hits]:
        """Returns for each thumbnail the positions and scores of the most similar images."""
        return self._looked.search(images, topk)

    def thumbnail(self, position: int) -> bytes:
        """PNG, JPEG or WebP."""
        assert self._thumbnails is not None
        return self._thumbnails[position]


def _records(path: Path, count: int) -> Records:
    records = Records(path)
    if len(records) != count:
        raise IndexProblem(f"the index is damaged: {path} holds {len(records)} records instead of {count}")
    return records


def _check(encoder: Encoder, built: dict[str, Any]) -> None:
    """Raises IndexProblem: The index was built with another encoder."""
    for name, value in encoder.settings.items():
        if built[name] != value:
            raise IndexProblem(
                f"the encoder {built['encoder']} is not the one the index was built with ({name} was {built[name]}, "
                f"is {value}): rebuild the index, or restore the encoder"
            )
