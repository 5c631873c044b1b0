"""The retrieval service of this package (`search_backends.retrieval`), or any server with Search-R1's ``/retrieve``."""

from __future__ import annotations

import base64
import binascii
import logging
import time
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from search_backends.errors import InfrastructureError
from search_backends.http import BackendError
from search_backends.providers.base import Address, Answer, HttpSettings, answer_of, settings_of
from search_backends.results import ImageHit, Passage

logger = logging.getLogger(__name__)

_RECHECK_S = 5.0  # after which an answer has its service's index asked for again


class ServiceSettings(HttpSettings):
    """Settings of ``provider: service``."""

    url: Address = "http://127.0.0.1:8080"


class ImageServiceSettings(ServiceSettings):
    """Settings of ``provider: service`` for images."""

    return_images: bool = True
    """If true, hits come with their thumbnails."""


class _Document(Answer):
    contents: str
    title: str | None = None
    url: str | None = None
    image: str | None = None

    def passage(self, score: float | None) -> Passage:
        title, text = self.title, self.contents
        if title is None:  # Search-R1's corpora: the title in quotes on the first line
            first, _, rest = text.partition("\n")
            quoted = first.strip()
            if len(quoted) > 1 and quoted[0] == quoted[-1] == '"':
                title, text = quoted.strip('"'), rest
        return Passage(text, title or "", self.url or "", score)

    def thumbnail(self) -> bytes | None:
        return None if self.image is None else base64.b64decode(self.image, validate=True)


class _Found(Answer):
    document: _Document
    score: float | None = None


class _Results(Answer):
    result: list[list[_Found]] = Field(min_length=1, max_length=1)


class _Health(Answer):
    identity: str = Field(min_length=1)


class _Service:
    def __init__(self, settings: ServiceSettings, query_fault: str, suffix: str = "") -> None:
        self._client = settings.client(settings.url, query_fault=query_fault)
        self._name = f"service {self._client.name}"
        self._suffix = suffix
        self._asked_at = float("-inf")
        self._losses = 0
        self.identity = self._name
        """The identity of the index; it is complete after `identify` was called."""

    async def identify(self) -> str:
        """The identity of the index that is served, as it was last seen.

        Raises:
            InfrastructureError: It is not known yet, and the service does not answer.
        """
        if self._asked_at == float("-inf"):
            await self._ask_identity()
        return self.identity

    async def close(self) -> None:
        await self._client.close()

    async def _ask_identity(self) -> None:
        losses = self._client.losses
        try:
            health = answer_of(_Health, self._name, await self._client.get("/health"))
            identity = f"service {health.identity}"
        except BackendError as error:
            if error.status != 404:
                raise
            if self._asked_at == float("-inf"):
                logger.warning("%s does not say which index it serves: use a new cache for a new one", self._name)
            identity = self._name
        self.identity, self._losses, self._asked_at = identity + self._suffix, losses, time.monotonic()

    async def _find(self, path: str, body: Mapping[str, Any], topk: int) -> list[_Found]:
        await self.identify()
        answer = await self._client.post(path, {**body, "topk": topk, "return_scores": True})
        found = answer_of(_Results, self._name, answer).result[0][:topk]
        if self._client.losses != self._losses or time.monotonic() > self._asked_at + _RECHECK_S:
            await self._ask_identity()  # it was away, or may have been
        return found


class ServiceText(_Service):
    """Passages of the service's index."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(settings_of(ServiceSettings, "service", config), r"\bquer(y|ies)\b")

    async def search(self, query: str, topk: int) -> list[Passage]:
        found = await self._find("/retrieve", {"queries": [query]}, topk)
        return [each.document.passage(each.score) for each in found]


class ServiceImages(_Service):
    """Images of the service's index that look like a given one."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        settings = settings_of(ImageServiceSettings, "service", config)
        super().__init__(settings, r"\bimages?\b", "" if settings.return_images else " without thumbnails")
        self._return_images = settings.return_images

    async def search(self, image: bytes, topk: int, key: str | None = None) -> list[ImageHit]:
        body = {"images": [base64.b64encode(image).decode()], "return_images": self._return_images}
        hits = []
        for each in await self._find("/retrieve_images", body, topk):
            passage = each.document.passage(each.score)
            try:
                thumbnail = each.document.thumbnail()
            except (binascii.Error, ValueError):
                raise InfrastructureError(f"{self._name}: an image that is not base64") from None
            hits.append(ImageHit(passage.title, passage.text, passage.url, thumbnail, passage.score))
        return hits
