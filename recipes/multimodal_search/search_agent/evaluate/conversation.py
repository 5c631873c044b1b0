"""One question, from its prompt to the model's last word, under the limits of training."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from search_agent.evaluate.questions import PLACEHOLDER, Question
from search_backends.chat.messages import (
    Message,
    Pictures,
    RequestedCall,
    answers,
    is_broken,
    text_part,
    without_control,
)
from search_backends.chat.model import ChatModel
from search_backends.errors import InfrastructureError, ModelError
from verl_tapo.records import CallRecord, CallStatus, TrajectoryRecord, fault_of
from verl_tapo.rule.values import content_hash

if TYPE_CHECKING:  # it imports veRL, which takes seconds
    from search_agent.tools.toolbox import Toolbox

Ending = Literal["answered", "turns", "malformed", "context", "length"]


@dataclass(frozen=True)
class Limits:
    """Of a conversation, as the agent loop of training has them."""

    max_turns: int = 10
    """Of the model; calls in the last are not executed."""
    calls_per_turn: int = 1
    """Further ones are answered with a message."""
    max_malformed_turns: int = 3
    """Turns of nothing but malformed calls that are answered."""
    tool_timeout_s: float = 150.0
    max_calls: Mapping[str, int] = field(default_factory=dict)
    """Of a tool, by its name, or of all under the name ``all``."""

    def __post_init__(self) -> None:
        if not isinstance(self.max_calls, Mapping):
            raise ValueError(f"max_calls must map tools to numbers, got {self.max_calls!r}")
        numbers = {f"max_calls.{tool}": number for tool, number in self.max_calls.items()}
        for name, number, least in (
            ("max_turns", self.max_turns, 1),
            ("calls_per_turn", self.calls_per_turn, 1),
            *((name, number, 0) for name, number in numbers.items()),
            ("max_malformed_turns", self.max_malformed_turns, 0),
        ):
            if isinstance(number, bool) or not isinstance(number, int) or number < least:
                raise ValueError(f"{name} must be a whole number >= {least}, got {number!r}")
        timeout = self.tool_timeout_s
        if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout < math.inf:
            raise ValueError(f"tool_timeout_s must be a positive number, got {self.tool_timeout_s!r}")

    @classmethod
    def from_agent_loop(cls, file: Path, **others: Any) -> Limits:
        """Those that the agent loop's YAML sets, and others.

        Raises:
            ValueError: for a file that is no such YAML.
        """
        try:
            loops = yaml.safe_load(file.read_text(encoding="utf-8"))
            (loop,) = [loop for loop in loops if loop["name"] == "tapo_tool_agent"]
        except (OSError, yaml.YAMLError, TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{file} is no agent loop configuration with one tapo_tool_agent: {error}") from None
        names = ("max_malformed_turns", "tool_timeout_s", "max_calls")
        return cls(**{name: loop[name] for name in names if loop.get(name) is not None}, **others)


@dataclass
class Conversation:
    """What happened."""

    messages: list[Message]
    pictures: Pictures
    record: TrajectoryRecord = field(default_factory=TrajectoryRecord)
    """Turns are counted in turns here, not in tokens."""
    ending: Ending = "answered"
    turns: int = 0
    prompt_tokens: int = 0
    """Of all requests together."""
    completion_tokens: int = 0
    answer: str = ""
    """The model's last message."""


class _Limited:
    """Counts calls against the limits, as `tapo_tool_agent` does."""

    def __init__(self, limits: Limits):
        self._limits = limits
        self._made: Counter[str] = Counter()

    def refusal(self, tool: str, number: int) -> str | None:
        """Why a call may not be made; ``number`` counts the turn's well-formed calls before it."""
        if number >= self._limits.calls_per_turn:
            return f"A turn may make {self._limits.calls_per_turn} call(s). Make this one in the next turn."
        for name, made, what in ((tool, self._made[tool], tool), ("all", self._made.total(), "tool")):
            limit = self._limits.max_calls.get(name)
            if limit is not None and made >= limit:
                return f"No more than {limit} {what} call(s) may be made. Go on without."
        self._made[tool] += 1
        return None


class Undone(InfrastructureError):
    """A conversation that a failure of the server's or of a back end's ended."""

    def __init__(self, message: str, record: TrajectoryRecord):
        super().__init__(message)
        self.record = record
        """The calls until then, the one that failed included."""


def opening(question: Question, pictures: Pictures) -> list[Message]:
    """The question's messages; its images are added to ``pictures``."""
    rest = iter(question.images)
    messages = []
    for role, text in question.prompt:
        parts = []
        for number, piece in enumerate(text.split(PLACEHOLDER)):
            if number:
                parts.append(pictures.add_file(next(rest)))
            if piece:
                parts.append(text_part(piece))
        messages.append({"role": role, "content": parts})
    return messages


async def converse(question: Question, model: ChatModel, toolbox: Toolbox, limits: Limits) -> Conversation:
    """Asks the model, runs the tools it calls, and so on until it calls none or a limit is reached.

    Raises:
        Undone: The server or a tool's back end failed: this says nothing of the model.
        Refused: See `ChatModel`.
        ValueError: An image of the question cannot be read.
    """
    pictures = Pictures()
    try:
        messages = await asyncio.to_thread(opening, question, pictures)
    except OSError as error:
        raise ValueError(f"{question.id}: an image cannot be read: {error}") from None
    talk = Conversation(messages, pictures)
    limited = _Limited(limits)
    malformed_turns = 0
    try:
        while (calls := await _turn(talk, model, toolbox, limits)) is not None:
            malformed_turns += all(call.problem for call in calls)
            if malformed_turns > limits.max_malformed_turns:
                talk.ending = "malformed"
                break
            contents, number = [], 0
            for call, record in zip(calls, talk.record.steps[-len(calls) :], strict=True):
                if call.problem:
                    contents.append(_refused(f"The call could not be read: {call.problem}. Write it again, correctly."))
                    continue
                if refusal := limited.refusal(call.tool, number):
                    if record.status != "unknown_tool":
                        record.status = "over_limit"
                    contents.append(_refused(refusal))
                else:
                    contents.append(await _run(call, record, question, pictures, toolbox, limits.tool_timeout_s))
                number += 1
            messages += answers(calls, contents)
    except InfrastructureError as error:
        raise Undone(str(error), talk.record) from error
    talk.record.images = await asyncio.to_thread(lambda: [content_hash(image) for image in pictures.images])
    return talk


async def _turn(
    talk: Conversation, model: ChatModel, toolbox: Toolbox, limits: Limits
) -> tuple[RequestedCall, ...] | None:
    """The calls of the model's next turn; None where it was the last."""
    try:
        reply = await model.reply(talk.messages, talk.pictures, toolbox.schemas)
    except ModelError:
        talk.ending = "context"
        return None
    turn = (talk.turns, talk.turns + 1)
    talk.turns += 1
    talk.prompt_tokens += reply.prompt_tokens
    talk.completion_tokens += reply.completion_tokens
    talk.answer = reply.text
    talk.messages.append(reply.message)
    known = {schema["function"]["name"] for schema in toolbox.schemas}
    for call in reply.calls:
        status: CallStatus = "not_executed" if call.tool in known else "unknown_tool"
        if call.problem:
            status = "malformed"
        at_hand = len(talk.pictures.images)
        talk.record.steps.append(CallRecord(call.tool, call.arguments, turn, turn, status, images_at_hand=at_hand))
    if not reply.calls:
        talk.ending = "length" if reply.finish == "length" else "answered"
        return None
    if talk.turns >= limits.max_turns:
        talk.ending = "turns"
        return None
    return reply.calls


def _refused(why: str) -> list[dict[str, str]]:
    return [text_part(f"[tool call not executed] {without_control(why)}")]  # as `tapo_tool_agent` says it


async def _run(
    call: RequestedCall,
    record: CallRecord,
    question: Question,
    pictures: Pictures,
    toolbox: Toolbox,
    timeout_s: float,
) -> list[dict[str, str]]:
    """The tool's answer, as parts of a message; its images join the conversation's."""
    record.images_at_hand = len(pictures.images)
    if is_broken(call.arguments):  # no back end could be sent it, and none is to blame
        record.status, record.metrics = "error", {"fault": "model"}
        problem = "the arguments hold half a surrogate pair (as \\ud83d alone is), which is no text"
        return [text_part(without_control(f"Error executing tool '{call.tool}': {problem}"))]
    start = time.perf_counter()
    try:
        answer = await asyncio.wait_for(
            toolbox.call(call.tool, call.arguments, list(pictures.images), question.create_kwargs(call.tool)), timeout_s
        )
    except asyncio.TimeoutError:
        record.status = "timeout"
        raise InfrastructureError(f"{call.tool}: no answer within {timeout_s:g} s") from None
    finally:
        record.latency_s = time.perf_counter() - start
    record.status, record.metrics = answer.status, dict(answer.metrics)
    if fault_of({"status": record.status, "metrics": record.metrics}) == "infrastructure":
        raise InfrastructureError(f"{call.tool}: {answer.text[:300]}")
    content = []
    for image in answer.images:
        record.produced.append(len(pictures.images))
        content.append(await asyncio.to_thread(pictures.add, image.convert("RGB")))
    return [*content, text_part(without_control(answer.text))]
