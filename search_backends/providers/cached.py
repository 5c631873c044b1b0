"""Providers behind the shared cache: they say of each answer whether it was there already."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

from search_backends.cache import Cache, cache_key
from search_backends.errors import InfrastructureError
from search_backends.results import ImageHit, ImageProvider, Page, PageProvider, Passage, TextProvider, read_list

T = TypeVar("T")


class _Provider(Protocol):
    identity: str

    async def close(self) -> None: ...


async def current_identity(provider: _Provider) -> str:
    """Returns the provider's identity; some must be asked for it (``identify``).

    Raises:
        InfrastructureError
    """
    identify: Callable[[], Awaitable[str]] | None = getattr(provider, "identify", None)
    return provider.identity if identify is None else await identify()


class _Cached:
    def __init__(self, provider: _Provider, cache: Cache, tool: str) -> None:
        self._asked, self._cache, self._tool = provider, cache, tool

    async def close(self) -> None:
        """Closes the provider; the cache is others' too."""
        await self._asked.close()

    async def _answer(
        self,
        ask: Callable[[], Awaitable[Any]],
        read: Callable[[Any], T],
        arguments: Mapping[str, Any],
        images: Sequence[bytes] = (),
    ) -> tuple[T, bool]:
        identity = await current_identity(self._asked)

        async def compute() -> Any:
            answer = await ask()
            if await current_identity(self._asked) != identity:  # a service came back with another index
                raise InfrastructureError(f"{identity} became {self._asked.identity} during the call")
            return answer

        label = " ".join([self._tool, *(f"{name}={value}" for name, value in arguments.items() if value is not None)])
        return await self._cache.get_or_compute(
            cache_key(self._tool, identity, arguments, images), compute, label=label, read=read
        )


class CachedText(_Cached):
    """A text search with a memory; ``tool`` separates the answers of tools that share a cache."""

    def __init__(self, provider: TextProvider, cache: Cache, tool: str = "text_search") -> None:
        super().__init__(provider, cache, tool)
        self._provider = provider

    async def search(self, query: str, topk: int) -> tuple[list[Passage], bool]:
        """See `TextProvider.search`; and whether the cache had it."""

        async def ask() -> list[dict[str, Any]]:
            return [passage.to_json() for passage in await self._provider.search(query, topk)]

        return await self._answer(ask, partial(read_list, Passage), {"query": query, "topk": topk})


class CachedImages(_Cached):
    """A search by image with a memory."""

    def __init__(self, provider: ImageProvider, cache: Cache, tool: str = "image_search") -> None:
        super().__init__(provider, cache, tool)
        self._provider = provider

    async def search(self, image: bytes, topk: int, key: str | None = None) -> tuple[list[ImageHit], bool]:
        """See `ImageProvider.search`; and whether the cache had it."""

        async def ask() -> list[dict[str, Any]]:
            return [found.to_json() for found in await self._provider.search(image, topk, key)]

        return await self._answer(ask, partial(read_list, ImageHit), {"topk": topk, "key": key}, [image])


class CachedPages(_Cached):
    """A reader of pages with a memory."""

    def __init__(self, provider: PageProvider, cache: Cache, tool: str = "visit") -> None:
        super().__init__(provider, cache, tool)
        self._provider = provider

    async def read(self, url: str) -> tuple[Page, bool]:
        """See `PageProvider.read`; and whether the cache had it."""

        async def ask() -> dict[str, Any]:
            return (await self._provider.read(url)).to_json()

        return await self._answer(ask, Page.from_json, {"url": url})
