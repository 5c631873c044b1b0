"""``tapo_tool_agent``: veRL's tool agent loop, with a record of every tool call, and no call left unanswered.

It differs from the stock loop in five points. Malformed calls and calls beyond
``max_parallel_calls`` are answered with a message; the stock loop drops them silently. Every tool
has a timeout, and plain functions have their own thread (see `verl_tapo.rollout.execution`).
Whatever a tool raises or returns becomes an answer, never a crash. Control tokens in a tool's text
do not reach the prompt. Each call's exact token spans, parsed arguments, status, latency and images
are written to ``extra_fields["tapo_steps"]`` (see `verl_tapo.records`).

A tool is given a copy of ``agent_data``. As in the stock loop, its next call in the trajectory sees
what it stored in ``extra_fields`` or as an attribute of its own. It cannot change the trajectory's
tokens, messages and calls.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
import zlib
from collections.abc import Iterable, Mapping
from functools import lru_cache, partial
from numbers import Real
from typing import Any, NamedTuple

from ray import cloudpickle
from verl.experimental.agent_loop.agent_loop import register
from verl.experimental.agent_loop.tool_agent_loop import AgentState, ToolAgentLoop
from verl.experimental.agent_loop.tool_parser import FunctionCall
from verl.tools.schemas import ToolResponse

from verl_tapo.answers.evidence import evidence_of, ground_truth_of
from verl_tapo.calls.call import Call, CallStatus
from verl_tapo.calls.limits import (
    STOCK_ERRORS,
    CallCount,
    CallLimits,
    control_pattern,
    failed,
    refused,
    strip_control,
    unreadable,
    with_own_limits,
)
from verl_tapo.calls.parsing import answer_is_error
from verl_tapo.records import RECORD_KEY, CallRecord, TrajectoryRecord
from verl_tapo.rollout.execution import (
    Execution,
    ToolFailed,
    cut,
    give_tools_threads,
    leave_behind,
    tell_once,
    words,
)
from verl_tapo.rule.values import MAX_DEPTH, content_hash, deeper_than, finite_number, shown
from verl_tapo.settings import load_settings
from verl_tapo.trainer.verl_parser import cached_parser

logger = logging.getLogger(__name__)

_REPRODUCIBLE_ENGINE = "transformers"  # of verl_tapo.cpu
_LONG_TEXT = 20_000
# The number of an error's characters that are kept, whatever the limit for answers: it must still
# read as an error.
_ERROR_CHARS = 256
# The least number of an answer's characters that are cleaned; a higher limit for answers raises
# it.
_ANSWER_CHARS = 4096


class RecordedCall(FunctionCall):  # type: ignore[misc]
    """A call in the stock loop's form, with the position of its record."""

    position: int
    """The index of the call's record in the trajectory's record."""
    problem: str | None = None
    """Why the call cannot be read, or None."""
    refusal: str | None = None
    """The limit that keeps a readable call from being executed, or None."""


@lru_cache(maxsize=4)
def _control_tokens(tokenizer: Any) -> re.Pattern[str]:
    return control_pattern([*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens])


def strip_control_tokens(text: str, tokenizer: Any) -> str:
    """Text without anything the tokenizer would turn into a control token, see `verl_tapo.calls.limits`."""
    return strip_control(text, _control_tokens(tokenizer))


def _status(text: str, markers: Iterable[str]) -> CallStatus:
    if not answer_is_error(text, markers):
        return "ok"
    unknown, invalid, _ = STOCK_ERRORS
    return "unknown_tool" if text.startswith(unknown) else "malformed" if text.startswith(invalid) else "error"


def _count(images: Any) -> int:
    return 0 if images is None else len(images) if isinstance(images, list | tuple) else 1


def _json_object(text: str) -> dict[str, Any] | None:
    """Returns the object in a JSON text. None if there is none, or if another process could not
    read it again."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and not deeper_than(value, MAX_DEPTH) else None


def _plain(metrics: Any) -> tuple[dict[str, Any], list[str]]:
    """Returns a tool's metrics as JSON values, because the record crosses processes, and the names of the rest."""
    if not isinstance(metrics, Mapping):
        return {}, [] if metrics is None else [f"all of them, a {type(metrics).__name__}"]
    kept: dict[str, Any] = {}
    lost = []
    for name, value in metrics.items():
        try:
            text = json.dumps(
                {name: value},
                default=lambda value: value.tolist() if hasattr(value, "tolist") else str(value),
                ensure_ascii=False,
            )
            plain = _json_object(text.encode("utf-8", "replace").decode()) or {}
        except Exception:  # a cycle, or whatever a foreign object's conversion raises
            plain = {}
        plain = {
            key: value
            for key, value in plain.items()
            if not isinstance(value, Real) or finite_number(value) is not None
        }
        kept.update(plain)
        if not plain:
            lost.append(shown(name))
    return kept, lost


def _portable(value: Any) -> bool:
    """Returns whether a value can be sent to another process."""
    try:
        cloudpickle.dumps(value)
    except Exception:  # whatever a foreign object raises
        return False
    return True


def _fresh(name: str, value: Any) -> Any:
    if name == "messages":
        return [dict(message) for message in value]
    return value.copy() if isinstance(value, list | dict) and name != "extra_fields" else value


def _tool_view(agent_data: Any, own: frozenset[str]) -> Any:
    """The trajectory's data as a tool is handed it.

    The loop's ``own`` attributes are copied, so that a tool cannot change the loop's state.
    ``extra_fields``, and attributes that tools add, are the trajectory's own.
    """

    class ToolView(type(agent_data)):  # type: ignore[misc]
        def __init__(self) -> None:
            self.__dict__.update({name: _fresh(name, getattr(agent_data, name)) for name in own})

        def __getattr__(self, name: str) -> Any:
            return _fresh(name, getattr(agent_data, name))

        def __setattr__(self, name: str, value: Any) -> None:
            if name in own:
                self.__dict__[name] = value
            else:
                setattr(agent_data, name, value)

    return ToolView()


class _Answer(NamedTuple):
    """The outcome of a tool's call, ready for the prompt."""

    response: ToolResponse
    reward: float | None = None
    status: CallStatus = "ok"
    metrics: Mapping[str, Any] = {}
    seen: bool | None = None


@register("tapo_tool_agent")
class TapoToolAgentLoop(ToolAgentLoop):  # type: ignore[misc]
    """VeRL's `ToolAgentLoop` with a record; one instance runs one trajectory, as veRL makes them.

    Args:
        args: veRL's.
        tool_timeout_s: seconds after which a tool's call counts as failed, > 0. A call that cannot be stopped (a plain
            function, a coroutine that swallows its cancellation) is left behind; one that does not give the event loop
            back is waited for, with the whole worker, and named in the log.
        max_malformed_turns: turns of nothing but malformed calls that are answered before the trajectory ends, >= 0
            (the stock loop ends it at the first).
        max_calls: how many calls of a tool a trajectory may make, by the tool's name, >= 0; under the name "all",
            how many calls of any tool. Further ones are answered with a message. A tool that is not named here may
            bring its limit, as its attribute ``max_calls``.
        kwargs: veRL's.

    Raises:
        ValueError: for a setting out of range.
    """

    def __init__(
        self,
        *args: Any,
        tool_timeout_s: float = 60.0,
        max_malformed_turns: int = 3,
        max_calls: Mapping[str, int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        try:
            self.limits = CallLimits(
                max_calls=with_own_limits(max_calls, self.tools),
                max_parallel_calls=self.rollout_config.multi_turn.max_parallel_calls,
                max_malformed_turns=max_malformed_turns,
                tool_timeout_s=tool_timeout_s,
            )
        except ValueError as error:
            raise ValueError(f"tapo_tool_agent: {error}") from None
        give_tools_threads(self.loop)
        self.tool_timeout_s, self.max_malformed_turns = float(tool_timeout_s), max_malformed_turns
        # The stock loop cuts the list of calls there, silently; `_call_tool` answers those beyond instead.
        self.max_parallel_calls = sys.maxsize
        # It cuts answers, too; whether they hold an accepted answer is looked for in the whole ones.
        self.answer_limit: int = self.rollout_config.multi_turn.max_tool_response_length
        self.max_tool_response_length = sys.maxsize
        self.error_markers = load_settings(self.config.get("algorithm")).error_markers
        self._reset()

    def _reset(self) -> None:
        self._record = TrajectoryRecord()
        self._evidence = evidence_of(None)
        self._made = CallCount(self.limits)
        self._answers: dict[int, _Answer] = {}  # of tools, by position of the record
        self._late: list[tuple[CallRecord, Execution]] = []  # calls without an answer in time
        self._agent_data: Any = None
        self._attributes: frozenset[str] = frozenset()  # of agent_data, before tools add theirs
        self._extra_fields: frozenset[str] = frozenset()  # those of the generation, likewise

    async def run(self, sampling_params: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Runs the stock loop and puts the record into ``extra_fields["tapo_steps"]`` of the
        output."""
        self._reset()
        if self.rollout_config.get("name") == _REPRODUCIBLE_ENGINE and "session_id" in kwargs:
            # That engine draws reproducibly if it can tell the rollouts of a prompt apart; others mean by it a seed.
            number = zlib.crc32(f"{kwargs.get('index')}/{kwargs['session_id']}".encode())
            sampling_params = {**sampling_params, "seed": number}
        self._evidence = evidence_of(ground_truth_of(kwargs.get("reward_model")))
        output = await super().run(sampling_params, *args, **kwargs)
        self._record.recognisable = self._evidence.tells and bool(self._tools_of(self._agent_data))
        images = getattr(self._agent_data, "image_data", None)
        if self._record.steps and images is not None:
            images = list(images) if isinstance(images, list | tuple) else [images]
            hashes = await self.loop.run_in_executor(None, lambda: [content_hash(image) for image in images])
            self._record.images = hashes
        for record, execution in self._late:
            record.abandoned = leave_behind(execution)
        self._drop_unportable(output.extra_fields)
        output.extra_fields[RECORD_KEY] = self._record.to_dict()
        return output

    def _drop_unportable(self, extra_fields: dict[str, Any]) -> None:
        """Drops what a tool stored and no other process can read, such as a connection. It would
        end the whole batch."""
        for name in [name for name in extra_fields if name not in self._extra_fields]:
            if not _portable(extra_fields[name]):
                del extra_fields[name]
                logger.warning(
                    "tapo_tool_agent: what a tool stored in extra_fields as %.80r cannot be sent to the trainer, and "
                    "is left out",
                    name,
                )

    async def _handle_generating_state(
        self, agent_data: Any, sampling_params: dict[str, Any], ignore_termination: bool = False
    ) -> AgentState:
        if self._agent_data is None:
            self._agent_data, self._attributes = agent_data, frozenset(vars(agent_data))
        agent_data.tool_calls = []
        state = await super()._handle_generating_state(agent_data, sampling_params, ignore_termination)
        if agent_data.assistant_turns == 1:
            self._extra_fields = frozenset(agent_data.extra_fields)
        end = len(agent_data.response_mask)
        start = end
        while start and agent_data.response_mask[start - 1] == 1:
            start -= 1
        turn = agent_data.prompt_ids[len(agent_data.prompt_ids) - (end - start) :]
        parser = cached_parser(self.tool_parser_name, self.tokenizer)
        found = await self.loop.run_in_executor(None, parser.calls, turn)
        calls = self._note(found, start, end, agent_data)
        if self._at_limit(agent_data, ignore_termination):
            return state
        if self._made.ends([call.problem for call in calls]):
            calls = []
        agent_data.tool_calls = calls
        if not calls:
            return AgentState.TERMINATED
        if agent_data.messages and agent_data.messages[-1].get("role") == "assistant":
            content = agent_data.messages[-1]["content"]
            agent_data.messages[-1] = self._build_assistant_message(content, agent_data)
        return AgentState.PROCESSING_TOOLS

    def _at_limit(self, agent_data: Any, ignore_termination: bool) -> bool:
        """The stock loop's conditions for ending a trajectory without looking for calls."""
        if not ignore_termination and len(agent_data.response_mask) >= self.response_length:
            return True
        if self.max_assistant_turns and agent_data.assistant_turns >= self.max_assistant_turns:
            return True
        return bool(self.max_user_turns and agent_data.user_turns >= self.max_user_turns)

    def _tools_of(self, agent_data: Any) -> Any:
        """Returns a trajectory's tools: its row may select some of them."""
        return getattr(agent_data, "_active_tools", self.tools)

    def _note(self, found: list[Call], start: int, end: int, agent_data: Any) -> list[RecordedCall]:
        """Records a turn's calls; returns them as the stock loop takes them, malformed ones included."""
        tools = self._tools_of(agent_data)
        stock = list(agent_data.tool_calls)
        well_formed = [call for call in found if call.error is None]
        if len(stock) != len(well_formed):
            stock = []  # veRL reads this turn differently: ours are executed, as recorded
        calls: list[RecordedCall] = []
        number = 0
        for call in found:
            problem = call.error
            name, arguments, identity = call.tool, dict(call.arguments), None
            if stock and problem is None:
                # veRL converts values by the tool's schema, where the format does not say their types, and may tell
                # which tool is meant by a name that is none.
                parsed = stock[number]
                identity = parsed.tool_call_id
                name = name if name in tools else parsed.name
                arguments = _json_object(parsed.arguments) or arguments
            position = len(self._record.steps)
            span = (start + call.span[0], start + call.span[1])
            self._record.steps.append(
                CallRecord(
                    name,
                    arguments,
                    (start, end),
                    span,
                    status="not_executed" if problem is None else "malformed",
                    images_at_hand=_count(agent_data.image_data),
                    seen=self._evidence.no_sight,
                )
            )
            refusal = self._made.count_or_refuse(name, number) if problem is None else None
            calls.append(
                RecordedCall(
                    name=name,
                    arguments=json.dumps(arguments, ensure_ascii=False),
                    tool_call_id=identity,
                    position=position,
                    problem=problem,
                    refusal=refusal,
                )
            )
            number += problem is None
        return calls

    async def _handle_processing_tools_state(self, agent_data: Any) -> AgentState:
        calls = list(agent_data.tool_calls)
        image = _count(agent_data.image_data)
        tokens = len(agent_data.response_mask)
        messages, rewards = len(agent_data.messages), len(agent_data.tool_rewards)
        generated = {name: agent_data.extra_fields.get(name) for name in self._extra_fields}
        self._answers = {}
        try:
            state = await super()._handle_processing_tools_state(agent_data)
        except Exception as error:
            if not self._withdraw_images(calls, error):
                raise
            del agent_data.messages[messages:], agent_data.tool_rewards[rewards:]
            state = await super()._handle_processing_tools_state(agent_data)
        agent_data.extra_fields.update(generated)
        for name in [name for name in agent_data.extra_fields if not isinstance(name, str)]:
            del agent_data.extra_fields[name]  # veRL takes no others
        tokens = len(agent_data.response_mask) - tokens
        for number, call in enumerate(calls):
            record = self._record.steps[call.position]
            record.answer_tokens = tokens * (number + 1) // len(calls) - tokens * number // len(calls)
            # The answers did not fit, so the model never saw them.
            if state == AgentState.TERMINATED:
                record.status = "malformed" if call.problem else "not_executed"
                record.seen = self._evidence.no_sight
            elif call.position in self._answers:
                produced = _count(self._answers[call.position].response.image)
                record.produced = list(range(image, image + produced))
                image += produced
        return state

    def _withdraw_images(self, calls: list[RecordedCall], error: Exception) -> bool:
        """Turns answers whose images the processor refused (such as a crop one pixel wide) into
        errors."""
        withdrawn = False
        for call in calls:
            answer = self._answers.get(call.position)
            if answer is not None and answer.response.image:
                self._answers[call.position] = self._failed(
                    call, ToolFailed(f"its image cannot be used: {words(error)}")
                )
                withdrawn = True
        return withdrawn

    def _failed(self, call: RecordedCall, error: ToolFailed) -> _Answer:
        """The answer to a call that failed; its status is recorded."""
        record = self._record.steps[call.position]
        record.status, record.seen = error.status, self._evidence.no_sight
        text = self._clean(failed(call.name, words(error)))
        logger.warning(text)
        return _Answer(ToolResponse(text=text[: max(self.answer_limit, _ERROR_CHARS)]))

    def _clean(self, text: str) -> str:
        # veRL cuts what a tool returns, but no error; nested tokens in a long one would take forever to strip.
        return strip_control_tokens(text[: max(self.answer_limit + 64, _ANSWER_CHARS)], self.tokenizer)

    async def _call_tool(self, tool_call: Any, tools_kwargs: dict[str, Any], agent_data: Any) -> Any:
        if tool_call.problem:
            return ToolResponse(text=self._clean(unreadable(tool_call.problem))), None, {}
        record = self._record.steps[tool_call.position]
        if tool_call.refusal:
            record.status = "over_limit"
            return ToolResponse(text=refused(tool_call.refusal)), None, {}
        if tool_call.position not in self._answers:
            view = _tool_view(agent_data, self._attributes)
            start = time.perf_counter()
            self._answers[tool_call.position] = await self._run_tool(tool_call, tools_kwargs, view)
            record.latency_s = time.perf_counter() - start
        answered = self._answers[tool_call.position]
        return answered.response, answered.reward, {}

    async def _run_tool(self, call: RecordedCall, tools_kwargs: dict[str, Any], view: Any) -> _Answer:
        """A tool's answer; status and metrics are recorded."""
        record = self._record.steps[call.position]
        execution = Execution(call.name, self.tool_timeout_s)
        try:
            answered: _Answer = await execution.result(self._execute(call, tools_kwargs, view))
        except ToolFailed as error:  # veRL answers a tool's own errors; this is what slips through there
            if execution.running:
                self._late.append((record, execution))
            return self._failed(call, error)
        record.status, record.metrics, record.seen = answered.status, dict(answered.metrics), answered.seen
        return answered

    async def _execute(self, call: RecordedCall, tools_kwargs: dict[str, Any], view: Any) -> _Answer:
        """A tool's answer, fit for the prompt. Whatever is wrong with it is raised."""
        response, reward, metrics = await super()._call_tool(call, tools_kwargs, view)
        whole = response.text or ""
        images = [image for image in response.image or [] if image is not None]
        if response.video:
            raise ToolFailed("video results are not supported")
        if images:
            if not getattr(self.processor, "image_processor", None):
                raise ToolFailed("it returned an image, but the model takes no images")
            self._assert_mm_supported(True)
        status = _status(whole, self.error_markers)
        if status == "error":
            text = self._clean(whole)[: max(self.answer_limit, _ERROR_CHARS)]
        else:
            text = self._clean(cut(whole, self.answer_limit, self.tool_response_truncate_side))
        seen = await self._sight(json.loads(call.arguments), "" if status == "error" else whole, bool(images))
        kept, lost = _plain(metrics)
        if lost:
            what = ", ".join(lost[:3])
            tell_once("metrics", call.name, f"returned metrics that cannot be recorded and are left out: {what}.")
        number = None if isinstance(reward, bool) else finite_number(reward)
        if number is None and reward is not None:
            tell_once(
                "reward", call.name, f"returned a reward that is no finite number, {shown(reward)}; it is left out."
            )
        response = ToolResponse(text=text, **({"image": images} if images else {}))
        return _Answer(response, number, status, kept, seen)

    async def _sight(self, arguments: Mapping[str, Any], text: str, images: bool) -> bool | None:
        """Returns `Evidence.sight`. Long texts are searched in a thread, because a million characters take a second."""
        looking = partial(self._evidence.sight, arguments, text, images=images)
        if not self._evidence.tells or len(text) < _LONG_TEXT:
            return looking()
        seen: bool | None = await self.loop.run_in_executor(None, looking)
        return seen
