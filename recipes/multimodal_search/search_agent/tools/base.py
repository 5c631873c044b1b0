"""What all tools share: checked settings, a limit on concurrent calls, a timeout, and whose fault a failure is.

A tool's answer depends on its arguments and the images at hand alone (TAPO's premise); the cache keeps it so within a
run. A call never raises: what went wrong is told to the model, in words it can act on where it was the model's fault,
and returned as the metric ``fault`` (`verl_tapo.records.fault_of` reads it).
"""

from __future__ import annotations

import asyncio
import logging
import unicodedata
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar
from uuid import uuid4

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from verl.tools.base_tool import BaseTool
from verl.tools.schemas import OpenAIFunctionToolSchema, ToolResponse

from search_backends.clean import clean_text
from search_backends.errors import InfrastructureError, ModelError

logger = logging.getLogger(__name__)

T = TypeVar("T")


class ToolSettings(BaseModel):
    """A tool's ``config`` in the tools YAML; a tool adds its own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: str = "native"
    """VeRL's."""
    timeout_s: float = Field(60.0, gt=0)
    """Of a call, retries included; keep it below the agent loop's ``tool_timeout_s``, which cannot tell whose fault it
    is."""
    concurrency: int = Field(32, ge=1)
    """Calls at a time, in one agent loop worker; others wait, and their time runs."""
    limit_chars: int = Field(4000, ge=100)
    """Of an answer's text. Keep ``multi_turn.max_tool_response_length`` above, which cuts blindly."""


@dataclass(frozen=True)
class Call:
    """What a tool is asked."""

    arguments: Mapping[str, Any]
    """As the model wrote them: any JSON."""
    images: Sequence[Image.Image] = ()
    """Of the conversation so far; the model counts them from 1."""
    created: Mapping[str, Any] = field(default_factory=dict)
    """The question's ``tools_kwargs`` for this tool."""
    alone: bool = True
    """Whether it is the turn's only call: then its first image has the next number."""

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
            raise ModelError(f"{name} must be a text that is not empty")
        if len(value) > longest:
            raise ModelError(f"{name} must not be longer than {longest} characters, it has {len(value)}")
        try:
            # Both halves of a pair, escaped one by one, are a character; one alone is none, and cannot be sent.
            value = value.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
        except UnicodeDecodeError:
            raise ModelError(f"{name} must be a text: it holds half of a surrogate pair") from None
        if any(unicodedata.category(character) == "Cc" and not character.isspace() for character in value):
            raise ModelError(f"{name} must be a text: it holds control characters")
        return value.strip()

    def image(self, name: str = "image") -> int:
        """The position in ``images`` of the one that the argument ``name`` counts from 1; where it is missing, of the
        only one.

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
            raise ModelError("there is no image in this conversation")
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= count:
            raise ModelError(f"{name} must be the number of an image, from 1 to {count}")
        return value - 1

    @property
    def next_image(self) -> int | None:
        """The number that a new image gets; None where another call of the turn may return one first."""
        return len(self.images) + 1 if self.alone else None


@dataclass
class Answer:
    """What a tool found."""

    text: str
    images: list[Image.Image] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)


class SearchTool(BaseTool):  # type: ignore[misc]
    """One of the recipe's tools. A subclass names its schema and its settings, and says in `answer` what it does.

    Args:
        config: see ``Settings``.
        tool_schema: in place of the class's own: another description for the model, say.

    Raises:
        ValueError: for a setting that is unknown or out of range.
    """

    Settings: ClassVar[type[ToolSettings]] = ToolSettings
    schema: ClassVar[dict[str, Any]]
    """Name, description and parameters, in OpenAI's format."""
    kernels: ClassVar[dict[str, str]]
    """How TAPO compares two calls, by parameter: what belongs under ``algorithm.tapo.tools``."""

    def __init__(self, config: Mapping[str, Any], tool_schema: OpenAIFunctionToolSchema | None = None):
        schema = tool_schema or OpenAIFunctionToolSchema.model_validate({"type": "function", "function": self.schema})
        with redirect_stdout(None):  # veRL's prints the schema, in every worker
            super().__init__(dict(config), schema)
        try:
            self.settings: Any = self.Settings(**config)
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}, got {problem['input']!r}"
                for problem in error.errors()
            )
            raise ValueError(f"the tool {self.name}: {problems}") from None
        self._places = asyncio.Semaphore(self.settings.concurrency)
        self._created: dict[str, dict[str, Any]] = {}

    @abstractmethod
    async def answer(self, call: Call) -> Answer:
        """Executes a call.

        Raises:
            ModelError, InfrastructureError
        """

    async def create(self, instance_id: str | None = None, **kwargs: Any) -> tuple[str, ToolResponse]:
        instance_id = instance_id or str(uuid4())
        self._created[instance_id] = dict(kwargs.get("create_kwargs") or {})
        return instance_id, ToolResponse()

    async def release(self, instance_id: str, **kwargs: Any) -> None:
        self._created.pop(instance_id, None)

    async def execute(
        self, instance_id: str, parameters: Any, **kwargs: Any
    ) -> tuple[ToolResponse, float | None, dict[str, Any]]:
        agent = kwargs.get("agent_data")
        data = getattr(agent, "image_data", None)
        images = [] if data is None else list(data) if isinstance(data, list | tuple) else [data]
        alone = len(getattr(agent, "tool_calls", None) or ()) < 2
        try:
            if not isinstance(parameters, Mapping):
                raise ModelError("the arguments must be a JSON object")
            call = Call(parameters, images, self._created.get(instance_id, {}), alone)
            answer = await asyncio.wait_for(self._in_turn(call), self.settings.timeout_s)
        except ModelError as error:
            return self._failure(str(error), "model")
        except (InfrastructureError, asyncio.TimeoutError, OSError) as error:
            logger.warning("%s: %s", self.name, str(error) or f"no answer within {self.settings.timeout_s:g} s")
            return self._failure("it is not available at the moment", "infrastructure")
        except Exception:  # a defect of the tool's: not the model's fault
            logger.exception("%s failed on %s", self.name, shown(parameters))
            return self._failure("it is not available at the moment", "infrastructure")
        found = {"image": answer.images} if answer.images else {}
        return ToolResponse(text=answer.text, **found), None, {**answer.metrics, "chars": len(answer.text)}

    async def _in_turn(self, call: Call) -> Answer:
        async with self._places:
            return await without_exit(self.answer(call))

    def _failure(self, text: str, fault: str) -> tuple[ToolResponse, None, dict[str, Any]]:
        # Begins as veRL's own tool errors do: that is how TAPO knows, in rollouts without a record too.
        # What a back end says of a query is text from outside, too.
        return ToolResponse(text=f"Error executing tool '{self.name}': {clean_text(text)}"), None, {"fault": fault}


async def without_exit(call: Awaitable[T]) -> T:
    """What ``call`` returns. Where code in it calls ``exit``, that is an error like any other: asyncio would end the
    worker with all its rollouts.
    """
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
