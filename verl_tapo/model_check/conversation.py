"""A conversation with calls of a run's tools in veRL's own agent loop, and what is found in its tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from verl.experimental.agent_loop.tool_agent_loop import ToolAgentLoop
from verl.tools.base_tool import BaseTool
from verl.tools.schemas import ToolResponse

from verl_tapo.calls.parsing import parse_steps
from verl_tapo.calls.writing import written
from verl_tapo.model_check.loading import named
from verl_tapo.model_check.run import TEMPLATE_SETTING, Report, Rows, Run, shown
from verl_tapo.model_check.template import QUESTION, Template, Wanted, made_up_call
from verl_tapo.model_check.tool_format import find_calls, same_calls
from verl_tapo.rollout.scripted import run_scripted
from verl_tapo.rule.steps import ToolStep
from verl_tapo.trainer.monitor import RECORDING_LOOP

_NO_LIMIT = 10**6  # tokens
_FAILING = 1  # the call, counted from 0, whose tool fails


class _StandIn(BaseTool):  # type: ignore[misc]
    """Has the schema of one of the run's tools; of all their calls one fails, and the first gets an image if there are
    any."""

    def __init__(self, schema: Any, executed: list[Wanted], image: Any) -> None:
        super().__init__({}, schema)
        self._executed, self._image = executed, image

    async def execute(self, instance_id: str, parameters: dict[str, Any], **_: Any) -> Any:
        """Notes the call, and answers it."""
        number = len(self._executed)
        self._executed.append((self.name, parameters))
        if number == _FAILING:
            raise RuntimeError("made up by the doctor")
        images = {"image": [self._image]} if self._image is not None and number == 0 else {}
        return ToolResponse(text="An answer of the doctor's.", **images), 0.0, {}


class _NoImages:
    """Stands for the data set's class, which reads the images of a prompt."""

    @classmethod
    async def process_multi_modal_info(cls, messages: Any, **_: Any) -> tuple[None, None, None]:
        """The images, videos and sounds of a prompt."""
        del messages
        return None, None, None


class _Conversation(NamedTuple):
    """A rollout, and what happened in it."""

    ids: list[int]
    mask: list[int]
    wanted: list[Wanted]
    executed: list[Wanted]
    """By veRL's loop."""
    steps: list[ToolStep]
    """As our reader finds them."""
    images: tuple[int, int]
    """That answers hold: given by tools, and found in the tokens."""


def converse(template: Template, as_template: bool, report: Report) -> None:
    """Rolls out a conversation, and compares what is found in its tokens with what happened.

    Args:
        template: the model's.
        as_template: whether calls are written as the template writes them, or as the format has them.
        report: gets what is found.
    """
    try:
        talk = _roll_out(template, as_template)
    except Exception as error:  # a builder's, or whatever a template raises
        report.problems.append(
            f"veRL cannot go on after a tool's answer, with this model's chat template and model_type: {named(error)}. "
            f"A template that takes messages of the role `tool`: {TEMPLATE_SETTING}"
        )
        return
    form = "the template writes them" if as_template else f"{template.run.tool_format} has them"
    title = f"A conversation in veRL's own loop, calls as {form}; by tokens of the response"
    report.sections.append((title, list(_span_rows(template, talk))))
    report.sections.append(("Found", _verdicts(template.run, talk, report)))


def _roll_out(template: Template, as_template: bool) -> _Conversation:
    model, run = template.model, template.run
    turns = _turns(run)
    executed: list[Wanted] = []
    image = _small_image() if getattr(model.processor, "image_processor", None) else None
    output, _ = run_scripted(
        ToolAgentLoop,
        model.tokenizer,
        [_StandIn(schema, executed, image) for schema in run.schemas],
        [*(_turn_text(template, turn, as_template) for turn in turns), "That is all."],
        model_type=model.model_type,
        ending=template.ending(),
        processor=model.processor,
        dataset=_NoImages,
        data={"apply_chat_template_kwargs": dict(run.template_options)},
        columns={"raw_prompt": [dict(QUESTION)]},
        format=run.tool_format,
        max_parallel_calls=run.parallel,
        prompt_length=_NO_LIMIT,
        response_length=_NO_LIMIT,
    )
    ids, mask = output.response_ids, output.response_mask
    parser = template.parser(run.tool_format)
    steps = parse_steps(parser, np.array(ids), np.array(mask), np.array([0, len(ids)]), [0]).steps
    answers = [number for number, bit in zip(ids, mask, strict=True) if not bit]
    images = (int(image is not None and bool(executed)), parser.count_images(answers))
    return _Conversation(ids, mask, [call for turn in turns for call in turn], executed, steps, images)


def _turns(run: Run) -> list[list[Wanted]]:
    """A turn with a call of each tool, two at least, and, where the run allows it, a turn with two calls."""
    calls = [made_up_call(tool) for tool in run.tools]
    turns = [[call] for call in (calls if len(calls) > 1 else calls * 2)]
    return [*turns, [calls[0], calls[-1]]] if run.parallel > 1 else turns


def _turn_text(template: Template, calls: Sequence[Wanted], as_template: bool) -> str:
    """An assistant's turn without its ending."""
    given = template.run.tool_format
    for form in template.forms(calls) if as_template else ():
        if same_calls(find_calls(template, given, form).ours, calls):
            return template.thought() + form
    return template.thought() + "\n".join(written(given, *call) for call in calls)


def _small_image() -> Any:
    from PIL import Image

    return Image.new("RGB", (64, 64))


def _span_rows(template: Template, talk: _Conversation) -> Iterator[tuple[str, str]]:
    """The conversation, span by span: what the model writes, its calls, and what veRL puts in."""
    calls = {step.call: f"call {number}: {step.tool}" for number, step in enumerate(talk.steps, 1)}
    edges = {0, len(talk.ids), *(place for span in calls for place in span)}
    edges |= {place for place in range(1, len(talk.mask)) if talk.mask[place] != talk.mask[place - 1]}
    width = max([len("answer, mask 0"), *map(len, calls.values())])
    for start, end in pairwise(sorted(edges)):
        inside = [name for span, name in calls.items() if span[0] <= start and end <= span[1]]
        who = inside[0] if inside else "model" if talk.mask[start] else "answer, mask 0"
        text = template.model.tokenizer.decode(talk.ids[start:end], skip_special_tokens=False)
        yield f"{start}-{end}", f"{who:{width}}  {shown(text)}"


def _verdicts(run: Run, talk: _Conversation, report: Report) -> Rows:
    found = [(step.tool, step.arguments) for step in talk.steps]
    total = len(talk.wanted)
    exact = sum(same_calls([one], [other]) for one, other in zip(found, talk.wanted, strict=False))
    if not same_calls(found, talk.wanted) or not same_calls(talk.executed, talk.wanted):
        report.problems.append(
            f"{run.tool_format}: of {total} calls that were written, {len(found)} were found here ({exact} as they "
            f"were written), and {len(talk.executed)} executed by veRL"
        )
    rows = [("calls", f"{len(found)} of {total}, {exact} as they were written; veRL executed {len(talk.executed)}")]
    paired = sum(step.ok == (number != _FAILING) for number, step in enumerate(talk.steps))
    rows.append(("answers", f"{paired} of {total} calls have theirs, the one that failed as an error"))
    if paired < len(found):
        report.warnings.append(
            f"{len(found) - paired} of {total} calls are not paired with their answers, so failed calls may pass for "
            f"executed ones, or the other way round. {RECORDING_LOOP} records which is which"
        )
    given, seen = talk.images
    if given:
        rows.append(("images", f"{seen} of {given} in tools' answers"))
    if seen != given:
        report.warnings.append(f"tools' answers held {given} images, and {seen} are found in the tokens")
    return rows
