"""Runs a tool's call: within its timeout, in its own thread if it needs one, and always with an
answer.

What cannot be helped: a tool that does not give the event loop back (``time.sleep`` in an ``async def``) stops every
rollout of its worker, its own timeout included. Such a tool is named in the log, while it does so.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import signal
import threading
import time
import types
from collections.abc import Callable, Coroutine, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any
from weakref import WeakSet

from verl_tapo.calls.call import CallStatus

logger = logging.getLogger(__name__)

_STALL_S = 1.0
"""Seconds beyond its timeout after which a tool is reported to block the event loop, and the interval of checks."""
_INTERRUPTS = (KeyboardInterrupt, SystemExit)

_told: set[tuple[str, str]] = set()


def tell_once(what: str, tool: str, message: str) -> None:
    """Warns of a tool; once per process, subject and tool."""
    if (what, tool) not in _told:
        _told.add((what, tool))
        logger.warning("tapo_tool_agent: the tool %r %s (Said once.)", tool, message)


def cut(text: str, limit: int, side: str) -> str:
    """An answer's text as the stock loop cuts it: ``max_tool_response_length``, ``tool_response_truncate_side``."""
    if len(text) <= limit:
        return text
    if side == "left":
        return f"(truncated)...{text[-limit:]}"
    if side == "right":
        return f"{text[:limit]}...(truncated)"
    return f"{text[: limit // 2]}...(truncated)...{text[-(limit // 2) :]}"


class ToolFailed(Exception):
    """A call without a usable answer."""

    status: CallStatus = "error"


class NoAnswer(ToolFailed):
    """A call without an answer in time."""

    status: CallStatus = "timeout"


def words(error: BaseException) -> str:
    """Returns an error's text, or its type if the text is empty."""
    try:
        return str(error) or type(error).__name__
    except Exception:  # an error whose text fails
        return type(error).__name__


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {words(error)}"


class _Signals:
    """Tells an interrupt of the process from one that a tool raises itself.

    Python raises a signal's exception wherever the main thread happens to be, even in a tool's
    code. So while tools run in the main thread, its handlers also note that a signal came.
    """

    def __init__(self) -> None:
        self._tools = 0
        self._handlers: dict[int, tuple[Any, Any]] = {}
        self._came = False

    @property
    def came(self) -> bool:
        """True if a signal came while tools ran in this thread; always False outside the
        main thread."""
        return self._came and threading.current_thread() is threading.main_thread()

    def enter(self) -> None:
        """Must be called before a tool runs."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._tools += 1
        if self._tools > 1:
            return
        self._came = False
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            if callable(handler):
                noting = partial(self._note, handler)
                signal.signal(number, noting)
                self._handlers[number] = noting, handler

    def leave(self, *_: Any) -> None:
        """Must be called after a tool has run."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._tools -= 1
        if self._tools:
            return
        for number, (noting, handler) in self._handlers.items():
            if signal.getsignal(number) is noting:
                signal.signal(number, handler)
        self._handlers.clear()

    def _note(self, handler: Callable[..., Any], number: int, frame: Any) -> Any:
        self._came = True
        return handler(number, frame)


_SIGNALS = _Signals()


class _LoopWatch:
    """Names tools that block the event loop. It watches from a thread, as the loop itself is
    blocked then."""

    def __init__(self) -> None:
        self._running: dict[int, tuple[Execution, float]] = {}
        self._thread: threading.Thread | None = None

    def enter(self, execution: Execution) -> None:
        """Notes that a part of the call begins to run; the loop is blocked until the call awaits
        something."""
        self._running[id(execution)] = execution, time.monotonic()
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="tapo-loop-watch", daemon=True)
            self._thread.start()

    def leave(self, execution: Execution) -> None:
        """Notes that the call awaits something or is done."""
        _, since = self._running.pop(id(execution))
        self._look(execution, since)

    def _watch(self) -> None:
        while True:
            time.sleep(_STALL_S)
            for execution, since in list(self._running.values()):
                self._look(execution, since)

    def _look(self, execution: Execution, since: float) -> None:
        held = time.monotonic() - since
        if held > execution.timeout_s + _STALL_S:
            tell_once(
                "holds the event loop",
                execution.tool,
                f"has held the event loop for {held:.1f} s, with its timeout of {execution.timeout_s:g} s: no timeout "
                f"can end it, and every rollout of this worker stands still. It must await what takes long, or run it "
                f"in a thread (asyncio.to_thread).",
            )


_LOOP_WATCH = _LoopWatch()
_CURRENT: contextvars.ContextVar[Execution | None] = contextvars.ContextVar("tapo_execution", default=None)


class Execution:
    """One call of a tool while it runs, including what still runs after its timeout.

    Args:
        tool: the tool's name.
        timeout_s: seconds after which it is left behind.
    """

    def __init__(self, tool: str, timeout_s: float) -> None:
        self.tool, self.timeout_s = tool, timeout_s
        self.threads: set[threading.Thread] = set()
        """The threads that run for this call."""
        self._task: asyncio.Future[Any] | None = None

    @property
    def running(self) -> bool:
        """True while it still runs. A thread, or a task that ignores its cancellation, cannot
        be stopped."""
        busy = self._task is not None and not self._task.done()
        return busy or bool(self.threads)

    async def result(self, call: Coroutine[Any, Any, Any]) -> Any:
        """Returns the call's result.

        Raises:
            ToolFailed: for whatever it raised, also SystemExit and KeyboardInterrupt unless a real signal caused them.
            NoAnswer: it did not return in time.
        """
        # In a task of its own, a tool's cancellation is not the trajectory's; and one that does not heed its own is
        # left behind, where `wait_for` would wait for it.
        self._task = task = asyncio.ensure_future(self._guarded(call))
        _SIGNALS.enter()
        task.add_done_callback(_SIGNALS.leave)
        # Reading the exception keeps asyncio from logging it.
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        # This closes a call that was cancelled before it began.
        task.add_done_callback(lambda _: call.close())
        try:
            await asyncio.wait({task}, timeout=self.timeout_s)
        finally:
            task.cancel()
        if not task.done():
            raise NoAnswer(f"no answer within {self.timeout_s:g} s")
        if task.cancelled():
            raise ToolFailed("the tool was cancelled")
        error = task.exception()
        if error is None or isinstance(error, _INTERRUPTS):
            return task.result()
        raise ToolFailed(words(error)) from error

    async def _guarded(self, call: Coroutine[Any, Any, Any]) -> Any:
        _CURRENT.set(self)
        try:
            return await self._in_steps(call)
        except _INTERRUPTS as error:
            # asyncio would end its loop with it, and every rollout of this worker.
            if _SIGNALS.came:
                raise
            raise ToolFailed(_named(error)) from error

    @types.coroutine
    def _in_steps(self, call: Coroutine[Any, Any, Any]) -> Generator[Any, Any, Any]:
        """Awaits the call and measures how long each part blocks the event loop."""
        step: Callable[[], Any] = partial(call.send, None)
        while True:
            _LOOP_WATCH.enter(self)
            try:
                awaited = step()
            except StopIteration as end:
                return end.value
            finally:
                _LOOP_WATCH.leave(self)
            try:
                yield awaited
            except BaseException as error:  # a cancellation: the call's own affair
                step = partial(call.throw, error)
            else:
                step = partial(call.send, None)


_left: dict[str, list[Execution]] = {}


def leave_behind(execution: Execution) -> bool:
    """Returns whether a call still runs after its timeout. If so, a warning names its tool once."""
    if not execution.running:
        return False
    tool = execution.tool
    others = _left[tool] = [*(other for other in _left.get(tool, ()) if other.running), execution]
    tell_once(
        "is left behind",
        tool,
        f"did not stop at its timeout of {execution.timeout_s:g} s and cannot be stopped: {len(others)} such call(s) "
        f"run in this process now. tools/abandoned counts them; give the tool a timeout of its own.",
    )
    return True


class _Executor(ThreadPoolExecutor):
    """An event loop's default executor in which calls of tools have threads of their own.

    Plain functions, and whatever a tool hands to ``asyncio.to_thread``, run in the default executor: a few threads for
    everything in the process, the reading of calls and the merging of tokens too. A handful of calls that hang would
    stop all that, and the process from ending. So each has a daemon thread here.
    """

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Submits a function like `ThreadPoolExecutor.submit`."""
        execution = _CURRENT.get()
        if execution is None:
            return super().submit(function, *args, **kwargs)
        answer: Future[Any] = Future()

        def work() -> None:
            try:
                if answer.set_running_or_notify_cancel():
                    answer.set_result(function(*args, **kwargs))
            except StopIteration as error:  # asyncio could not hand it over, and the call would wait
                answer.set_exception(ToolFailed(_named(error)))
            except BaseException as error:
                answer.set_exception(error)
            finally:
                execution.threads.discard(thread)

        thread = threading.Thread(target=work, name=f"tapo-tool-{execution.tool}", daemon=True)
        execution.threads.add(thread)
        thread.start()
        return answer


_prepared: WeakSet[asyncio.AbstractEventLoop] = WeakSet()


def give_tools_threads(loop: asyncio.AbstractEventLoop) -> None:
    """Makes an event loop run the tools' blocking functions in threads of their own."""
    if loop not in _prepared:
        loop.set_default_executor(_Executor(thread_name_prefix="tapo-agent-loop"))
        _prepared.add(loop)
