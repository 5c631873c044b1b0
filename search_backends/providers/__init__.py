"""The providers behind the tools: a local service, live search, and precomputed results.

``provider: NAME`` and the provider's own settings make one; each module's ``Settings`` lists its
settings. API keys come from the environment: SERPER_API_KEY, TAVILY_API_KEY, SERPAPI_API_KEY,
JINA_API_KEY.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from search_backends.providers.cached import CachedImages, CachedPages, CachedText
from search_backends.results import ImageProvider, PageProvider, TextProvider

__all__ = [
    "CachedImages",
    "CachedPages",
    "CachedText",
    "make_image_provider",
    "make_page_provider",
    "make_text_provider",
]

_TEXT = {
    "service": "search_backends.providers.service:ServiceText",
    "serper": "search_backends.providers.serper:SerperText",
    "tavily": "search_backends.providers.tavily:TavilyText",
}
_IMAGES = {
    "service": "search_backends.providers.service:ServiceImages",
    "precomputed": "search_backends.providers.precomputed:PrecomputedImages",
    "serper": "search_backends.providers.serper:SerperImages",
    "serpapi": "search_backends.providers.serpapi:SerpApiImages",
}
_PAGES = {
    "direct": "search_backends.fetch:DirectReader",
    "jina": "search_backends.providers.jina:JinaPages",
}


def make_text_provider(config: Mapping[str, Any]) -> TextProvider:
    """The text search that ``config`` describes.

    Raises:
        ValueError: ``provider`` or another key is unknown or out of range, or its API key is not set.
    """
    provider: TextProvider = _make("texts", _TEXT, config)
    return provider


def make_image_provider(config: Mapping[str, Any]) -> ImageProvider:
    """The search by image that ``config`` describes; raises as `make_text_provider` does."""
    provider: ImageProvider = _make("images", _IMAGES, config)
    return provider


def make_page_provider(config: Mapping[str, Any]) -> PageProvider:
    """The reader of pages that ``config`` describes; raises as `make_text_provider` does."""
    provider: PageProvider = _make("pages", _PAGES, config)
    return provider


def _make(what: str, homes: Mapping[str, str], config: Mapping[str, Any]) -> Any:
    settings = dict(config)
    name = settings.pop("provider", None)
    if not isinstance(name, str) or name not in homes:
        raise ValueError(f"provider: of {what} there are {', '.join(sorted(homes))}; got {name!r}")
    module, _, attribute = homes[name].partition(":")
    return getattr(importlib.import_module(module), attribute)(settings)
