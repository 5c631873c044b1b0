"""Runs many questions at a time. Those that fail without the model's fault are left for another run."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from search_backends.errors import InfrastructureError
from search_backends.evaluation.store import Store


class Outage(Exception):
    """Too many questions in a row could not be done: going on would only waste requests."""


class Undone(InfrastructureError):
    """A question that a failure of a server's or of a back end's ended."""

    def __init__(self, message: str, steps: Sequence[Any] = ()):
        super().__init__(message)
        self.steps = list(steps)
        """The calls until then, in their plain form, the one that failed included."""


class Question(Protocol):
    """A question that an evaluation asks."""

    @property
    def id(self) -> str: ...


class Task(Protocol):
    """The work to do for every question."""

    async def do(self, question: Any) -> tuple[dict[str, Any], dict[str, bytes]]:
        """The entry that is kept, and its images by name.

        Raises:
            Undone: This time it cannot be done.
        """
        ...


class Watch:
    """Shows the progress: a bar on a terminal, an occasional line elsewhere."""

    def __init__(self, console: Console, total: int, done: int):
        self._console, self._total, self._done = console, total, done
        self._right, self._finished, self._failed = 0.0, 0, 0
        self._bar = Progress(
            TextColumn("questions"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total, completed=done)

    def __enter__(self) -> Watch:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, entry: dict[str, Any] | None) -> None:
        if entry is None:
            self._failed += 1
        else:
            self._finished += 1
            self._right += entry["acc"]
        accuracy = f"{100 * self._right / self._finished:.1f} % right" if self._finished else ""
        text = ", ".join(filter(None, [accuracy, f"{self._failed} failed" if self._failed else ""]))
        self._bar.update(self._task, advance=entry is not None, description=text)
        tried = self._finished + self._failed
        if self._bar.disable and tried % max(1, (self._total - self._done) // 20) == 0:
            self._console.print(f"{self._done + self._finished} of {self._total} questions done, {text}")


async def run(
    questions: Iterator[Question],
    task: Task,
    store: Store,
    *,
    concurrency: int,
    max_failures: int,
    done: Callable[[dict[str, Any] | None], None] = lambda entry: None,
) -> None:
    """Does all questions. Those that cannot be done now are recorded as failures.

    Args:
        questions: those to do; read as they are needed.
        task: does each, and gives its entry and its images.
        store: keeps what is done.
        concurrency: questions at a time.
        max_failures: so many may fail one after the other.
        done: called with each question that is finished, and with None for each that failed.

    Raises:
        Outage: More than ``max_failures`` failed one after the other.
        Exception: What the task raises and is no `Undone`.
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
                store.fail({"id": question.id, "time": time.time(), "why": str(error), "steps": error.steps})
                in_a_row += 1
                done(None)
                if in_a_row > max_failures and not stopped:
                    # This stops the others at once, so that only one reports it.
                    stopped = True
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
        # Before Python 3.12 `wait_for` loses a cancellation that arrives as its task ends.
        stopped = True
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
