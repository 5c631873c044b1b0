"""The common base of search tools: settings, a cached provider, limits, and whose fault a failure
is.

A tool's answer depends only on its arguments and the images at hand (TAPO's premise); the cache
keeps it so within a run. A call never raises. The model is told what went wrong, in words it can
act on if it was the model's fault, and the metric ``fault`` says whose it was.
"""

from __future__ import annotations

import asyncio
import logging
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from search_backends.cache import Cache
from search_backends.clean import clean_text
from search_backends.errors import InfrastructureError, ModelError, without_secrets
from search_backends.pictures import fit
from search_backends.providers.cached import current_identity
from verl_tapo.calls.limits import failed

logger = logging.getLogger(__name__)

T = TypeVar("T")

SMALLEST = 28 * 28  # pixels: one token of Qwen2.5-VL


class ToolSettings(BaseModel):
    """A tool's ``config`` in the tools YAML; a tool adds its own, and may have other defaults."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: str = "native"
    """VeRL's."""
    timeout_s: float = Field(60.0, gt=0)
    """Seconds for a call, including retries. Keep it below the agent loop's ``tool_timeout_s``,
    which cannot tell whose fault a timeout is."""
    concurrency: int = Field(32, ge=1)
    """Concurrent calls, in one agent loop worker. Waiting counts against ``timeout_s``."""
    limit_chars: int = Field(4000, ge=100)
    """The maximal length of an answer's text. Keep it below
    ``multi_turn.max_tool_response_length``, which cuts anywhere."""
    max_calls: int | None = Field(None, ge=0)
    """Calls of the tool in a conversation; further ones are answered with a message. None: no limit."""


class ProviderSettings(ToolSettings):
    """Settings of a tool that asks a provider."""

    timeout_s: float = Field(120.0, gt=0)
    provider: dict[str, Any] = Field(default_factory=lambda: {"provider": "service"})
    """The provider: its name under ``provider``, and its own settings
    (`search_backends.providers`)."""
    cache: str | None = None
    """A file that all processes of a machine share, or a server (``redis://HOST:6379/0``) for those of
    many: equal calls get equal answers. None: each call is asked."""
    cache_max_age_s: float | None = Field(None, gt=0)
    """Answers older than that are asked for again."""


class ImageSettings(ToolSettings):
    """Settings of tools that return images. Images cost tokens: one covers 28 x 28 pixels in
    Qwen2.5-VL, and 32 x 32 in Qwen3-VL."""

    max_pixels: int = Field(512 * 512, ge=SMALLEST)
    """The maximal size of a returned image; a larger one is shrunk."""
    max_images: int = Field(12, ge=1)
    """The maximal number of images in a conversation, including the question's; no more are
    returned then."""
    total_pixels: int = Field(4 * 1024 * 1024, ge=SMALLEST)
    """The maximal size of all images of a conversation together; the last ones are shrunk to fit.
    """

    def room(self, images: Sequence[Image.Image]) -> int:
        """Pixels that another image may have.

        Raises:
            ModelError: No room is left.
        """
        rest: int = self.total_pixels - sum(image.width * image.height for image in images)
        if len(images) >= self.max_images or rest < SMALLEST:
            raise ModelError("no more images can be shown in this conversation; answer from what you have seen")
        return min(rest, self.max_pixels)

    def fit(self, image: Image.Image, limit: int) -> Image.Image:
        """The image, shrunk to ``limit`` pixels, its sides large enough for the model."""
        return fit(image, max_pixels=limit, min_side=28)


@dataclass(frozen=True)
class Call:
    """One call of a tool."""

    arguments: Mapping[str, Any]
    """The arguments as the model wrote them: any JSON."""
    images: Sequence[Image.Image] = ()
    """The images of the conversation so far; the model counts them from 1."""
    created: Mapping[str, Any] = field(default_factory=dict)
    """Values from the question and the run for this tool: ``image_keys``, and those in the run's
    settings."""
    alone: bool = True
    """True if it is the turn's only call; then its first image gets the next number."""

    def text(self, name: str, longest: int) -> str:
        """The argument ``name``, which must be a text of at most ``longest`` characters, or a list of one: something
        that any back end can be sent.

        Raises:
            ModelError
        """
        value = self.arguments.get(name)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if not isinstance(value, str) or not value.strip():
            raise ModelError(f"{name} must be a non-empty string")
        if len(value) > longest:
            raise ModelError(f"{name} has {len(value)} characters; at most {longest} are allowed")
        try:
            # Both halves of a surrogate pair, escaped one by one, are a character. One alone cannot be sent.
            value = value.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
        except UnicodeDecodeError:
            raise ModelError(f"{name} contains an unpaired surrogate, which is not valid text") from None
        if any(unicodedata.category(character) == "Cc" and not character.isspace() for character in value):
            raise ModelError(f"{name} contains control characters, which are not allowed")
        return value.strip()

    def image(self, name: str = "image") -> int:
        """Returns the position in ``images`` of the image that the argument ``name`` counts from 1.
        Without the argument it is the only image.

        Raises:
            ModelError
        """
        count = len(self.images)
        value = self.arguments.get(name, 1 if count == 1 else None)
        if isinstance(value, str) and len(value) < 10 and value.strip().isdecimal():
            value = int(value)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not count:
            raise ModelError("this conversation has no images")
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= count:
            raise ModelError(f"{name} must be an image number from 1 to {count}")
        return value - 1

    @property
    def next_image(self) -> int | None:
        """The number of the next new image; None if another call of the turn may return one first."""
        return len(self.images) + 1 if self.alone else None


@dataclass
class Answer:
    """The answer of a tool."""

    text: str
    images: list[Image.Image] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)


class Tool(ABC):
    """A tool. A subclass names its schema, settings and kernels, and implements `answer`.

    One that asks a provider says how to make it (``make_provider``) and how to put the cache before it
    (``remembered``), both of `search_backends.providers`, and asks by `ask`.

    Args:
        config: see ``Settings``.
        name: replaces the schema's name.

    Raises:
        ValueError: for a setting that is unknown or out of range, the provider's and the cache's file included.
    """

    Settings: ClassVar[type[ToolSettings]] = ToolSettings
    schema: ClassVar[dict[str, Any]]
    """Name, description and parameters, in OpenAI's format."""
    kernels: ClassVar[dict[str, Any] | None]
    """The kernels by which TAPO compares two calls, by parameter, as in ``algorithm.tapo.tools``.
    None: the tool takes no part."""
    sentence: ClassVar[str] = ""
    """The sentence about the tool in the system prompt."""
    make_provider: ClassVar[Any]
    remembered: ClassVar[Any]
    method: ClassVar[str] = "search"
    """The provider's."""

    def __init__(self, config: Mapping[str, Any], name: str | None = None):
        self.name = name or str(self.schema["name"])
        try:
            self.settings: Any = self.Settings(**config)
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}, got {problem['input']!r}"
                for problem in error.errors()
            )
            raise ValueError(without_secrets(f"the tool {self.name}: {problems}")) from None
        self.max_calls: int | None = self.settings.max_calls
        self._places = asyncio.Semaphore(self.settings.concurrency)
        self._provider: Any = None
        self._cache: Cache | None = None
        self._remembered: Any = None
        if hasattr(type(self), "make_provider"):
            self._connect()

    def _connect(self) -> None:
        try:
            self._provider = type(self).make_provider(self.settings.provider)
            if self.settings.cache:
                self._cache = Cache(self.settings.cache, max_age_s=self.settings.cache_max_age_s)
        except ValueError as error:
            raise ValueError(f"the tool {self.name}: {error}") from None
        if self._cache is not None:
            self._remembered = type(self).remembered(self._provider, self._cache, self.name)

    @abstractmethod
    async def answer(self, call: Call) -> Answer:
        """Executes a call.

        Raises:
            ModelError, InfrastructureError
        """

    def prompt(self, created: Mapping[str, Any]) -> str:
        """Returns the sentence about the tool in the system prompt, for a run with the values
        ``created``; empty for none."""
        return self.sentence

    async def ask(self, *arguments: Any) -> tuple[Any, dict[str, Any]]:
        """Returns the provider's answer, and metrics.

        Raises:
            ModelError, InfrastructureError
        """
        if self._remembered is None:
            return await getattr(self._provider, self.method)(*arguments), {}
        found, hit = await getattr(self._remembered, self.method)(*arguments)
        return found, {"cache_hit": hit}

    async def check(self) -> str | None:
        """Returns the provider's identity, or None without a provider; a service is asked for it.

        Raises:
            InfrastructureError: It does not answer.
        """
        return None if self._provider is None else await current_identity(self._provider)

    async def close(self) -> None:
        """Closes connections and cache."""
        if self._provider is not None:
            await self._provider.close()
        if self._cache is not None:
            await self._cache.close()

    async def run(
        self, arguments: Any, images: Sequence[Image.Image], created: Mapping[str, Any], alone: bool
    ) -> Answer:
        """Answers a call and never raises. The metrics of a failed call hold ``fault``: ``model``
        or ``infrastructure``."""
        try:
            if not isinstance(arguments, Mapping):
                raise ModelError("the arguments must be a JSON object")
            call = Call(arguments, images, created, alone)
            answer = await asyncio.wait_for(self._in_turn(call), self.settings.timeout_s)
        except ModelError as error:
            return self._failure(str(error), "model")
        except (InfrastructureError, asyncio.TimeoutError, OSError) as error:
            logger.warning("%s: %s", self.name, str(error) or f"no answer within {self.settings.timeout_s:g} s")
            return self._failure("the tool is temporarily unavailable", "infrastructure")
        except Exception:  # a defect of the tool's: not the model's fault
            logger.exception("%s failed on %s", self.name, shown(arguments))
            return self._failure("the tool is temporarily unavailable", "infrastructure")
        return Answer(answer.text, answer.images, {**answer.metrics, "chars": len(answer.text)})

    async def _in_turn(self, call: Call) -> Answer:
        async with self._places:
            return await without_exit(self.answer(call))

    def _failure(self, text: str, fault: str) -> Answer:
        # Begins as veRL's own tool errors do: that is how TAPO knows, in rollouts without a record too.
        # What a back end says of a query is text from outside, too.
        return Answer(failed(self.name, clean_text(text)), metrics={"fault": fault})


async def without_exit(call: Awaitable[T]) -> T:
    """Awaits ``call`` and turns SystemExit into an ordinary error; asyncio would end the worker
    with all its rollouts."""
    try:
        return await call
    except SystemExit as error:
        raise RuntimeError("the tool called exit") from error


def shown(value: Any, how: Callable[[Any], str] = repr) -> str:
    """The beginning of a value's text; some have none: lists that are too deep, numbers of thousands of digits."""
    try:
        return how(value)[:500]
    except Exception as error:
        return f"{type(value).__name__} ({type(error).__name__})"
