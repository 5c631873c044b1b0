"""Tools that ask a provider, through the run's shared cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from search_agent.tools.base import SearchTool, ToolSettings
from search_backends.cache import Cache
from search_backends.providers.cached import current_identity


class BackedSettings(ToolSettings):
    """Of a tool with a provider."""

    provider: dict[str, Any] = Field(default_factory=lambda: {"provider": "service"})
    """Who answers: ``provider`` and the provider's own settings (`search_backends.providers`)."""
    cache: str | None = None
    """A file that all processes of a machine share: equal calls get equal answers. None: each call is asked."""
    cache_max_age_s: float | None = Field(None, gt=0)
    """Answers older than that are asked for again."""


class BackedTool(SearchTool):
    """A tool whose answers come from a provider.

    Raises:
        ValueError: As `SearchTool`, for the provider's settings and the cache's file too.
    """

    make_provider: ClassVar[Any]
    """Makes the provider out of ``settings.provider``: one of `search_backends.providers`."""
    remembered: ClassVar[Any]
    """Puts the cache in front of it: one of `search_backends.providers`."""
    method: ClassVar[str] = "search"
    """The provider's."""

    def __init__(self, config: Mapping[str, Any], tool_schema: Any = None):
        super().__init__(config, tool_schema)
        try:
            self._provider = type(self).make_provider(self.settings.provider)
            age = self.settings.cache_max_age_s
            self._cache = Cache(self.settings.cache, max_age_s=age) if self.settings.cache else None
        except ValueError as error:
            raise ValueError(f"the tool {self.name}: {error}") from None
        self._remembered = None
        if self._cache is not None:
            self._remembered = type(self).remembered(self._provider, self._cache, self.name)

    async def ask(self, *arguments: Any) -> tuple[Any, dict[str, Any]]:
        """What the provider says, and metrics.

        Raises:
            ModelError, InfrastructureError
        """
        if self._remembered is None:
            return await getattr(self._provider, self.method)(*arguments), {}
        found, hit = await getattr(self._remembered, self.method)(*arguments)
        return found, {"cache_hit": hit}

    async def check(self) -> str:
        """The provider's identity; a service is asked for it.

        Raises:
            InfrastructureError: It does not answer.
        """
        return await current_identity(self._provider)

    async def close(self) -> None:
        await self._provider.close()
        if self._cache is not None:
            await self._cache.close()
