"""What every provider returns: passages, images and pages, as plain data that a cache can hold."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar


@dataclass(frozen=True)
class Passage:
    """One text result."""

    text: str
    title: str = ""
    url: str = ""
    score: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {"text": self.text, "title": self.title, "url": self.url, "score": self.score}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Passage:
        return cls(_text(value, "text"), _text(value, "title"), _text(value, "url"), _score(value))


@dataclass(frozen=True)
class ImageHit:
    """One image result: the text of a page that shows such an image."""

    title: str
    text: str = ""
    url: str = ""
    image: bytes | None = None
    """The thumbnail, as PNG, JPEG or WebP; None if the provider has none."""
    score: float | None = None

    def to_json(self) -> dict[str, Any]:
        image = None if self.image is None else base64.b64encode(self.image).decode()
        return {"title": self.title, "text": self.text, "url": self.url, "image": image, "score": self.score}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ImageHit:
        image = None if value["image"] is None else base64.b64decode(_text(value, "image"), validate=True)
        return cls(_text(value, "title"), _text(value, "text"), _text(value, "url"), image, _score(value))


@dataclass(frozen=True)
class Page:
    """A web page's readable text."""

    url: str
    text: str
    title: str = ""

    def to_json(self) -> dict[str, Any]:
        return {"url": self.url, "text": self.text, "title": self.title}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Page:
        return cls(_text(value, "url"), _text(value, "text"), _text(value, "title"))


def read_list(kind: type[HitT], value: Any) -> list[HitT]:
    """Reads a list that `to_json` wrote.

    Raises:
        TypeError, ValueError, KeyError: It is something else.
    """
    if not isinstance(value, list):
        raise TypeError(f"a list was expected, got {type(value).__name__}")
    return [kind.from_json(item) for item in value]


def _text(value: Mapping[str, Any], name: str) -> str:
    found = value[name]
    if not isinstance(found, str):
        raise TypeError(f"{name} must be a text, got {type(found).__name__}")
    return found


def _score(value: Mapping[str, Any]) -> float | None:
    found = value["score"]
    if found is not None and (isinstance(found, bool) or not isinstance(found, int | float)):
        raise TypeError(f"score must be a number, got {type(found).__name__}")
    return found


HitT = TypeVar("HitT", Passage, ImageHit)


class TextProvider(Protocol):
    """Searches texts. ``identity`` names everything that may change its answers: provider, index version, settings."""

    identity: str

    async def search(self, query: str, topk: int) -> list[Passage]:
        """Returns at most ``topk`` passages, best first. An empty list means that nothing was
        found.

        Raises:
            ModelError, InfrastructureError
        """
        ...

    async def close(self) -> None: ...


class ImageProvider(Protocol):
    """Searches by image."""

    identity: str

    async def search(self, image: bytes, topk: int, key: str | None = None) -> list[ImageHit]:
        """Returns at most ``topk`` hits, best first. ``image`` is a PNG or JPEG. ``key`` names an
        image of the prompt, whose results may have been precomputed under it.

        Raises:
            ModelError, InfrastructureError
        """
        ...

    async def close(self) -> None: ...


class PageProvider(Protocol):
    """Reads pages."""

    identity: str

    async def read(self, url: str) -> Page:
        """The page's readable text.

        Raises:
            ModelError: An address that must not or cannot be read: the model should choose another.
            InfrastructureError
        """
        ...

    async def close(self) -> None: ...
