"""Many questions at a time, each until it is done; what fails through no fault of the model is left for another run."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

from search_agent.evaluate.conversation import Agent, Conversation, Undone, converse
from search_agent.evaluate.questions import Question
from search_backends.errors import InfrastructureError
from search_backends.evaluation.store import Store

Score = Callable[[str, str, Any, dict[str, Any]], Awaitable[dict[str, Any]]]
"""``(data_source, answer, ground_truth, extra_info)`` to a dict with ``acc``, 0 to 1."""


class Outage(Exception):
    """Too many questions in a row could not be done: going on would only waste requests."""


@dataclass(frozen=True)
class Task:
    """What is done with every question."""

    agent: Agent
    score: Score

    async def do(self, question: Question) -> tuple[dict[str, Any], dict[str, bytes]]:
        """The transcript's entry and its images.

        Raises:
            Undone: Server, tools or judge failed.
            Refused, ValueError: See `converse`.
        """
        start = time.perf_counter()
        talk = await converse(question, self.agent)
        record = talk.record.to_dict()
        extra = {**question.extra_info, "tapo_steps": record}
        try:
            score = await self.score(question.data_source, talk.answer, question.ground_truth, extra)
        except InfrastructureError as error:
            raise Undone(f"scoring: {error}", talk.record) from error
        return _entry(question, talk, record, score, time.perf_counter() - start), talk.pictures.files


def _entry(
    question: Question, talk: Conversation, record: dict[str, Any], score: dict[str, Any], seconds: float
) -> dict[str, Any]:
    entry = {
        "id": question.id,
        "data_source": question.data_source,
        "category": question.extra_info.get("category"),
        "question": question.extra_info.get("question"),
        "ground_truth": question.ground_truth,
        "answer": talk.answer,
        "acc": float(score["acc"]),
        "score": score,
        "ending": talk.ending,
        "turns": talk.turns,
        "prompt_tokens": talk.prompt_tokens,
        "completion_tokens": talk.completion_tokens,
        "seconds": round(seconds, 3),
        "tapo_steps": record,
        "images": talk.pictures.names,
        "messages": talk.messages,
    }
    plain: dict[str, Any] = json.loads(json.dumps(entry, default=_plain))
    return plain


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else str(value)


async def run(
    questions: Iterator[Question],
    task: Task,
    store: Store,
    *,
    concurrency: int,
    max_failures: int,
    done: Callable[[dict[str, Any] | None], None] = lambda entry: None,
) -> None:
    """Does all questions; those that cannot be done now are noted as failures.

    Args:
        questions: those to do; read as they are needed.
        task: what to do with each.
        store: keeps what is done.
        concurrency: questions at a time.
        max_failures: so many may fail one after the other.
        done: is told of each that is finished, and None of each that failed.

    Raises:
        Outage: More than ``max_failures`` failed one after the other.
        Refused, ValueError: See `converse`.
    """
    reading = asyncio.Lock()
    in_a_row, stopped = 0, False

    async def work() -> None:
        nonlocal in_a_row, stopped
        while not stopped:
            async with reading:
                question = await asyncio.to_thread(next, questions, None)
            if question is None:
                return
            try:
                entry, images = await task.do(question)
            except Undone as error:
                calls = error.record.to_dict()["steps"]
                store.fail({"id": question.id, "time": time.time(), "why": str(error), "steps": calls})
                in_a_row += 1
                done(None)
                if in_a_row > max_failures and not stopped:
                    stopped = True  # for the others at once, so that one of them tells of it
                    raise Outage(f"{in_a_row} questions in a row could not be done, the last because {error}") from None
            else:
                await asyncio.to_thread(store.finish, entry, images)
                in_a_row = 0
                done(entry)

    workers = [asyncio.ensure_future(work()) for _ in range(concurrency)]
    try:
        ended, _ = await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
        for worker in ended:
            worker.result()
    finally:
        stopped = True  # `wait_for` before Python 3.12 loses a cancellation that comes as its task ends
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
