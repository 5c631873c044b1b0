"""Resolves image arguments to the content of an image, in place of its index.

``image: 2`` is the second or third image *of one trajectory*. If a tool returned it, ``image: 2``
in two trajectories is the same action only if the images are equal. Both step sources therefore
keep an identity of every image that a trajectory has at hand (recorded: a hash of the content;
parsed: the call that produced it), and calls are compared by identities instead of indices.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

# "2", "2.0", "#2", "image 2", "<image_2>"; but no name of a file.
_INDEX = re.compile(
    r"[<\[(]?\s*(?P<word>(?:image|img|picture|photo)[\s_#-]*|#)?(?P<index>-?\d{1,9})(?:\.0*)?\s*[>\])]?", re.IGNORECASE
)
_PLAIN_INDEX = re.compile(r"-?\d+(\.0*)?")


def image_index(value: Any) -> int | None:
    """Reads the index of an image in any form that models write: a whole number of any type, its
    text (also after the word ``image``), or a list of one. None for anything else, including truth
    values."""
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    if isinstance(value, str):
        found = _INDEX.fullmatch(value.strip()) if len(value) < 40 else None
        return int(found["index"]) if found else None
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.integer | np.floating):
        return None
    return int(value) if -1e9 < value < 1e9 and value == int(value) else None


class Images:
    """Identities of one trajectory's images, in order, as it comes by them."""

    def __init__(self, identities: Iterable[str] = ()):
        self._identities = list(identities)
        # What the first so many are called together, as far as it was asked for. Each image is hashed once, however
        # many calls there are.
        self._together: list[str] = []
        self._hash = hashlib.blake2b(digest_size=12)

    def __len__(self) -> int:
        return len(self._identities)

    def __getitem__(self, position: int) -> str:
        return self._identities[position]

    def append(self, identity: str) -> None:
        """Adds the image that comes next."""
        self._identities.append(identity)

    def together(self, count: int) -> str:
        """A hash of the first ``count`` identities, one at least."""
        for position in range(len(self._together), count):
            separator = "\0" if position else ""
            self._hash.update(f"{separator}{self._identities[position]}".encode("utf-8", "backslashreplace"))
            self._together.append(self._hash.hexdigest())
        return self._together[count - 1]


def _identity(index: int, images: Images, count: int, base: int) -> str | None:
    position = index - base if index >= 0 else count + index
    return images[position] if 0 <= position < count else None


def _identity_of(value: Any, images: Images, count: int, base: int | None) -> Any:
    """Returns the identity of the image that ``value`` refers to, or ``value`` itself if it is no
    reference.

    A number that refers to no image is identified by all images at hand: a tool treats it alike
    whenever these are the same.
    """
    index = image_index(value)
    if index is not None:
        readings = [_identity(index, images, count, b) for b in ((0, 1) if base is None else (base,))]
        found = sorted({reading for reading in readings if reading is not None})
        if found:
            return " or ".join(found)
    if isinstance(value, str) and (index is None or not _PLAIN_INDEX.fullmatch(value.strip())):
        return value  # a name; `image_0012` may be one, too
    if not isinstance(value, str | int | float | np.number | np.bool_):
        return value
    shown = hex(value) if isinstance(value, int) and index is None else value
    return f"no image {shown} among {images.together(count)}"


def resolve_images(
    arguments: Mapping[str, Any],
    parameters: Iterable[str],
    images: Images | Sequence[str],
    base: int | None,
    at_hand: int | None = None,
) -> Mapping[str, Any]:
    """Replaces image indices in call arguments by identities; returns the given mapping if it has
    none.

    Where not one image is at hand, numbers stay as they are: they are no indices of the conversation's images.

    Args:
        arguments: parsed call arguments.
        parameters: names of the parameters that hold image indices, see ``TapoSettings.image_parameters``; an index as
            `image_index` reads it, or a list of such. Negative ones count from the end.
        images: identities of the trajectory's images, in order. Where it makes many calls, `Images` spares work.
        base: 0 or 1, what indices count from; None where not known: the one reading that exists, or both together.
        at_hand: the number of images that existed when the call was made; None for all of them.
    """
    count = len(images) if at_hand is None else min(at_hand, len(images))
    if count <= 0:
        return arguments
    if not isinstance(images, Images):
        images = Images(images)
    resolved: dict[str, Any] = {}
    for name in parameters:
        if name not in arguments:
            continue
        value = arguments[name]
        if image_index(value) is None and isinstance(value, list | tuple):
            resolved[name] = [_identity_of(item, images, count, base) for item in value]
        else:
            resolved[name] = _identity_of(value, images, count, base)
    return {**arguments, **resolved} if resolved else arguments
