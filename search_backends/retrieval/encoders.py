"""Encoders of texts and images: perceptual hashes, or models that sentence-transformers loads."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import imagehash
import numpy as np
import numpy.typing as npt
from PIL import Image

from search_backends.retrieval.manifest import IndexProblem

PHASH = "phash"
BATCH = 128
"""Items that a model encodes at a time."""

Vectors = npt.NDArray[Any]
"""(n, dimension) float32 of length 1, or (n, bits / 8) uint8 of hashes."""


class Encoder(Protocol):
    """``settings`` hold whatever changes the vectors, weights included. ``binary`` vectors are compared bit by bit."""

    settings: dict[str, Any]
    binary: bool

    def encode(self, items: Sequence[Any]) -> Vectors: ...


class PerceptualHash:
    """Finds the same picture resized, recompressed or slightly cropped. It knows nothing of the
    content.

    Shapes are hashed with imagehash's DCT and gradient hashes. Colours are a grid of 4 x 4 cells,
    whose three channels are marks on a scale of 16 each, so that the number of differing bits grows
    with the difference in colour. This tells flags of one pattern and different colours apart.
    """

    GRID, STEPS = 4, 16

    def __init__(self) -> None:
        self.binary = True
        self.settings = {"encoder": PHASH, "hashes": ["phash 8", "dhash 8", f"colours {self.GRID} x {self.STEPS}"]}

    def encode(self, items: Sequence[Image.Image]) -> Vectors:
        return np.stack([self._hash(image) for image in items])

    def _hash(self, image: Image.Image) -> npt.NDArray[np.uint8]:
        shapes = [imagehash.phash(image).hash.ravel(), imagehash.dhash(image).hash.ravel()]
        cells = np.asarray(image.resize((self.GRID, self.GRID), Image.Resampling.BOX), dtype=np.int64)
        marks = (np.arange(self.STEPS) + 0.5) * 256 / self.STEPS
        colours = cells.reshape(-1, 1) > marks
        return np.packbits(np.concatenate([*shapes, colours.ravel()]))


class SentenceTransformerEncoder:
    """A model of sentence-transformers; for images one that embeds images, such as CLIP.

    Args:
        model: a folder or a name.
        prompt: the text before each input, as E5 models need it; None for the model's own for ``role``.
        role: whether texts are queries or passages; images have none.

    Raises:
        IndexProblem: sentence-transformers is not installed, or the model cannot be loaded.
    """

    def __init__(self, model: str, prompt: str | None = None, role: Literal["query", "document"] | None = None):
        self.binary = False
        self._model = load_model(model)
        self._encoding = threading.Lock()  # fast tokenizers refuse two threads
        self.prompt = self._prompt(prompt, role)
        self.settings = {
            "encoder": model,
            "weights": _weights(self._model),
            "longest": self._model.get_max_seq_length() if role else None,
        }

    def _prompt(self, prompt: str | None, role: str | None) -> str:
        if prompt is not None or role is None:
            return prompt or ""
        own: dict[str, str] = self._model.prompts or {}
        return own.get(role, own.get("passage", "") if role == "document" else "") or ""

    def encode(self, items: Sequence[Any]) -> Vectors:
        options: dict[str, Any] = {"prompt": self.prompt} if self.prompt else {}
        with self._encoding:
            vectors = self._model.encode(
                list(items), batch_size=BATCH, normalize_embeddings=True, show_progress_bar=False, **options
            )
        return np.ascontiguousarray(vectors, dtype=np.float32)


def image_encoder(name: str) -> Encoder:
    """`phash`, or a model.

    Raises:
        IndexProblem: sentence-transformers is not installed, or the model cannot be loaded, or knows texts only.
    """
    if name == PHASH:
        return PerceptualHash()
    encoder = SentenceTransformerEncoder(name)
    try:
        encoder.encode([Image.new("RGB", (64, 64))])
    except Exception as error:  # of many kinds, by model and version
        raise IndexProblem(f"the encoder {name} cannot encode images: {' '.join(str(error).split())}") from error
    return encoder


_loaded: dict[str, Any] = {}


def load_model(name: str) -> Any:
    """A model, once: text and image searches may share it.

    Raises:
        IndexProblem: sentence-transformers is not installed, or the model cannot be loaded.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise IndexProblem(
            f"the encoder {name} needs sentence-transformers (extra `search-dense`), which cannot be imported: {error}"
        ) from error
    if name not in _loaded:
        try:
            _loaded[name] = SentenceTransformer(name)
        except Exception as error:  # of many kinds: no such folder, no network, damaged weights
            raise IndexProblem(f"the encoder {name} cannot be loaded: {' '.join(str(error).split())}") from error
    return _loaded[name]


def _weights(model: Any) -> str:
    """A hash of the weights: the same name or folder may hold others tomorrow."""
    import torch

    whole = hashlib.blake2b(digest_size=16)
    for name, values in sorted(model.state_dict().items()):
        whole.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        whole.update(values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return whole.hexdigest()
