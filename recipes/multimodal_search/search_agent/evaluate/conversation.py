"""One question, from its prompt to the model's last word, under the limits of training's agent loop."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import yaml

from search_agent.prompts import create_kwargs, with_system
from search_backends.chat.messages import Message, Pictures, RequestedCall, answers, is_broken, text_part
from search_backends.chat.model import ChatModel
from search_backends.errors import InfrastructureError, ModelError
from search_backends.evaluation.loop import Undone
from search_backends.evaluation.questions import PLACEHOLDER, Question
from search_backends.toolbox import Toolbox
from verl_tapo.answers.evidence import evidence_of
from verl_tapo.calls.call import CallStatus, fault_of
from verl_tapo.calls.limits import CallCount, CallLimits, failed, refused, strip_control, unreadable
from verl_tapo.records import CallRecord, TrajectoryRecord
from verl_tapo.rule.values import content_hash

Score = Callable[[str, str, Any, dict[str, Any]], Awaitable[dict[str, Any]]]
"""``(data_source, answer, ground_truth, extra_info)`` to a dict with ``acc``, 0 to 1."""
Ending = Literal["answered", "turns", "malformed", "context", "length"]
BROKEN = "the arguments contain an unpaired surrogate (such as \\ud83d alone), which is not valid text"


@dataclass(frozen=True)
class Limits(CallLimits):
    """Limits of a conversation, as in training's agent loop."""

    tool_timeout_s: float = 150.0
    max_turns: int = 10
    """The maximal number of the model's turns; calls in the last turn are not executed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_turns < 1:
            raise ValueError(f"max_turns must be a whole number >= 1, got {self.max_turns!r}")

    @classmethod
    def from_agent_loop(cls, file: Path, **others: Any) -> Limits:
        """Returns the limits that the agent loop's YAML sets, and others.

        Raises:
            ValueError: The file is not such a YAML, or a limit is invalid.
        """
        try:
            loops = yaml.safe_load(file.read_text(encoding="utf-8"))
            (loop,) = [loop for loop in loops if loop["name"] == "tapo_tool_agent"]
        except (OSError, yaml.YAMLError, TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{file} is no agent loop configuration with one tapo_tool_agent: {error}") from None
        names = ("max_malformed_turns", "tool_timeout_s", "max_calls")
        return cls(**{name: loop[name] for name in names if loop.get(name) is not None}, **others)


@dataclass(frozen=True)
class Agent:
    """The model to ask, its tools, limits and prompt."""

    model: ChatModel
    toolbox: Toolbox
    limits: Limits
    prompt: str
    """The system prompt of questions that have none."""
    tool_settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """The values for each tool, as in training's ``data.tool_settings``."""


@dataclass
class Conversation:
    """The course of one question."""

    messages: list[Message]
    pictures: Pictures
    record: TrajectoryRecord = field(default_factory=TrajectoryRecord)
    """Turns are counted in turns here, not in tokens."""
    ending: Ending = "answered"
    turns: int = 0
    prompt_tokens: int = 0
    """The prompt tokens of all requests together."""
    completion_tokens: int = 0
    answer: str = ""
    """The model's last message."""


def opening(question: Question, prompt: str, pictures: Pictures) -> list[Message]:
    """The question's messages; its images are added to ``pictures``."""
    rest = iter(question.images)
    messages = []
    for message in with_system(question.prompt, prompt):
        parts = []
        for number, piece in enumerate(message["content"].split(PLACEHOLDER)):
            if number:
                parts.append(pictures.add_file(next(rest)))
            if piece:
                parts.append(text_part(piece))
        messages.append({"role": message["role"], "content": parts})
    return messages


async def converse(question: Question, agent: Agent) -> Conversation:
    """Asks the model and runs the tools it calls, until it calls none or a limit is reached.

    Raises:
        Undone: The server or a tool's back end failed: this says nothing of the model.
        Refused: See `ChatModel`.
        ValueError: An image of the question cannot be read.
    """
    pictures = Pictures()
    try:
        messages = await asyncio.to_thread(opening, question, agent.prompt, pictures)
    except OSError as error:
        raise ValueError(f"{question.id}: an image cannot be read: {error}") from None
    conversation = Conversation(messages, pictures)
    made = CallCount(agent.limits)
    try:
        while (calls := await _turn(conversation, agent)) is not None:
            if made.ends([call.problem for call in calls]):
                conversation.ending = "malformed"
                break
            contents, number = [], 0
            for call, record in zip(calls, conversation.record.steps[-len(calls) :], strict=True):
                if call.problem:
                    contents.append(_said(unreadable(call.problem)))
                    continue
                if refusal := made.count_or_refuse(call.tool, number):
                    if record.status != "unknown_tool":
                        record.status = "over_limit"
                    contents.append(_said(refused(refusal)))
                else:
                    contents.append(await _run(call, record, question, pictures, agent))
                number += 1
            messages += answers(calls, contents)
    except InfrastructureError as error:
        raise Undone(str(error), conversation.record.to_dict()["steps"]) from error
    for record in conversation.record.steps:
        if record.status != "ok":
            record.seen = evidence_of(question.ground_truth).no_sight
    conversation.record.images = await asyncio.to_thread(lambda: [content_hash(image) for image in pictures.images])
    return conversation


async def _turn(conversation: Conversation, agent: Agent) -> tuple[RequestedCall, ...] | None:
    """Returns the calls of the model's next turn; None if it was the last."""
    try:
        reply = await agent.model.reply(conversation.messages, conversation.pictures, agent.toolbox.schemas)
    except ModelError:
        conversation.ending = "context"
        return None
    turn = (conversation.turns, conversation.turns + 1)
    conversation.turns += 1
    conversation.prompt_tokens += reply.prompt_tokens
    conversation.completion_tokens += reply.completion_tokens
    conversation.answer = reply.text
    conversation.messages.append(reply.message)
    known = {schema["function"]["name"] for schema in agent.toolbox.schemas}
    for call in reply.calls:
        status: CallStatus = "not_executed" if call.tool in known else "unknown_tool"
        if call.problem:
            status = "malformed"
        at_hand = len(conversation.pictures.images)
        conversation.record.steps.append(
            CallRecord(call.tool, call.arguments, turn, turn, status, images_at_hand=at_hand)
        )
    if not reply.calls:
        conversation.ending = "length" if reply.finish == "length" else "answered"
        return None
    if conversation.turns >= agent.limits.max_turns:
        conversation.ending = "turns"
        return None
    return reply.calls


def _said(text: str) -> list[dict[str, str]]:
    return [text_part(strip_control(text))]


async def _run(
    call: RequestedCall, record: CallRecord, question: Question, pictures: Pictures, agent: Agent
) -> list[dict[str, str]]:
    """The tool's answer, as parts of a message; its images join the conversation's."""
    record.images_at_hand = len(pictures.images)
    # No back end can be sent this, so none is to blame.
    if is_broken(call.arguments):
        record.status, record.metrics = "error", {"fault": "model"}
        return _said(failed(call.tool, BROKEN))
    values = create_kwargs(question.extra_info, call.tool, agent.tool_settings)
    start = time.perf_counter()
    try:
        answering = agent.toolbox.call(call.tool, call.arguments, list(pictures.images), values)
        answer = await asyncio.wait_for(answering, agent.limits.tool_timeout_s)
    except asyncio.TimeoutError:
        record.status = "timeout"
        raise InfrastructureError(f"{call.tool}: no answer within {agent.limits.tool_timeout_s:g} s") from None
    finally:
        record.latency_s = time.perf_counter() - start
    record.status, record.metrics = answer.status, dict(answer.metrics)
    if fault_of({"status": record.status, "metrics": record.metrics}) == "infrastructure":
        raise InfrastructureError(f"{call.tool}: {answer.text[:300]}")
    looking = partial(evidence_of(question.ground_truth).sight, images=bool(answer.images))
    record.seen = await asyncio.to_thread(looking, call.arguments, answer.text)
    content = []
    for image in answer.images:
        record.produced.append(len(pictures.images))
        content.append(await asyncio.to_thread(pictures.add, image.convert("RGB")))
    return [*content, *_said(answer.text)]


@dataclass(frozen=True)
class Task:
    """The work to do for every question."""

    agent: Agent
    score: Score

    async def do(self, question: Question) -> tuple[dict[str, Any], dict[str, bytes]]:
        """The transcript's entry and its images.

        Raises:
            Undone: Server, tools or judge failed.
            Refused, ValueError: See `converse`.
        """
        start = time.perf_counter()
        conversation = await converse(question, self.agent)
        record = conversation.record.to_dict()
        extra = {**question.extra_info, "tapo_steps": record}
        try:
            score = await self.score(question.data_source, conversation.answer, question.ground_truth, extra)
        except InfrastructureError as error:
            raise Undone(f"scoring: {error}", record["steps"]) from error
        return _entry(question, conversation, record, score, time.perf_counter() - start), conversation.pictures.files


def _entry(
    question: Question, conversation: Conversation, record: dict[str, Any], score: dict[str, Any], seconds: float
) -> dict[str, Any]:
    entry = {
        "id": question.id,
        "data_source": question.data_source,
        "category": question.extra_info.get("category"),
        "question": question.extra_info.get("question"),
        "ground_truth": question.ground_truth,
        "answer": conversation.answer,
        "acc": float(score["acc"]),
        "score": score,
        "ending": conversation.ending,
        "turns": conversation.turns,
        "prompt_tokens": conversation.prompt_tokens,
        "completion_tokens": conversation.completion_tokens,
        "seconds": round(seconds, 3),
        "tapo_steps": record,
        "images": conversation.pictures.names,
        "messages": conversation.messages,
    }
    plain: dict[str, Any] = json.loads(json.dumps(entry, default=_plain))
    return plain


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else str(value)
