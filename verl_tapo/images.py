"""What an image argument refers to: the content of an image, not its index.

``image: 2`` is the second or third image *of one trajectory*. Where that image came out of a tool, two trajectories'
``image: 2`` are the same action only if the images are the same. Both step sources therefore keep, for every image a
trajectory has at hand, an identity (recorded: a hash of the content; parsed: what produced it), and calls are compared
with the identities in place of the indices.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def content_hash(image: Any) -> str:
    """An identity of an image's content: equal pixels of equal size and mode give equal identities.

    Accepts what veRL's loops carry as images: PIL images, bytes, mappings with ``bytes``, arrays and tensors; anything
    else is identified by its text.
    """
    digest = hashlib.blake2b(digest_size=12)
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("image") or sorted((str(k), str(v)) for k, v in image.items())
    if isinstance(image, bytes):
        digest.update(image)
    elif hasattr(image, "tobytes") and hasattr(image, "size"):
        digest.update(f"{getattr(image, 'mode', getattr(image, 'dtype', ''))} {image.size}".encode())
        digest.update(image.tobytes())
    elif hasattr(image, "numpy"):
        array = image.detach().cpu().contiguous().numpy()
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    else:
        digest.update(str(image).encode())
    return digest.hexdigest()


def _identity(index: int, images: Sequence[str], base: int) -> str | None:
    position = index - base if index >= 0 else len(images) + index
    return images[position] if 0 <= position < len(images) else None


def resolve_index(index: int, images: Sequence[str], base: int | None) -> str:
    """The identity of the image that ``index`` refers to.

    Args:
        index: an image index as the model wrote it; negative ones count from the end.
        images: identities of the images at hand when the call was made, in order.
        base: 0 or 1, what indices count from; None where not known: the one reading that exists, or both together.
    """
    readings = [_identity(index, images, b) for b in ((0, 1) if base is None else (base,))]
    found = sorted({reading for reading in readings if reading is not None})
    return " or ".join(found) if found else f"no image {index}"


def resolve_images(
    arguments: Mapping[str, Any], parameters: Iterable[str], images: Sequence[str], base: int | None
) -> Mapping[str, Any]:
    """Call arguments with identities in place of image indices; the given mapping where there is nothing to resolve.

    Args:
        arguments: parsed call arguments.
        parameters: names of the parameters that hold image indices, see ``TapoSettings.image_parameters``.
        images, base: see `resolve_index`.
    """
    if not images:
        return arguments
    resolved: dict[str, Any] = {}
    for name in parameters:
        value = arguments.get(name)
        if isinstance(value, str) and value.strip().lstrip("-").isdecimal() and len(value) < 10:
            value = int(value)
        if isinstance(value, int) and not isinstance(value, bool):
            resolved[name] = resolve_index(value, images, base)
        elif isinstance(value, list) and value and all(isinstance(v, int) and not isinstance(v, bool) for v in value):
            resolved[name] = [resolve_index(v, images, base) for v in value]
    return {**arguments, **resolved} if resolved else arguments
