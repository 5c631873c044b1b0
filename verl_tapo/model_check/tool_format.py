"""Whether a tool format finds the calls that a chat template writes, and which one does."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from verl.experimental.agent_loop.tool_parser import ToolParser

from verl_tapo.calls.formats import FORMATS, NATIVE_FORMATS
from verl_tapo.calls.writing import written
from verl_tapo.model_check.run import FORMAT_SETTING, TEMPLATE_SETTING, Report, Rows, shown
from verl_tapo.model_check.template import THOUGHT, Template, Wanted, made_up_call
from verl_tapo.trainer.verl_parser import verl_fallback

_CALL = 240  # characters of a call that are shown in a message


class Found(NamedTuple):
    """The calls in a turn's tokens."""

    ours: list[Wanted]
    verls: list[Wanted]
    """By veRL's own parser."""


def find_calls(template: Template, tool_format: str, text: str) -> Found:
    """The calls that two readers find in the tokens of an assistant's turn."""
    ids = template.tokens(text)
    calls = template.parser(tool_format).calls(ids)
    try:
        read = verl_fallback(tool_format, template.model.tokenizer)(ids)
        verls = [(name, json.loads(arguments)) for name, arguments in read]
    except Exception:  # veRL's loop would end there
        verls = []
    return Found([(call.tool, call.arguments) for call in calls if call.error is None], verls)


def same_calls(one: Sequence[Wanted], other: Sequence[Wanted]) -> bool:
    """Returns whether two lists of calls are equal, up to what formats do not say: which values are texts."""
    return [(tool, _untyped(given)) for tool, given in one] == [(tool, _untyped(given)) for tool, given in other]


def _untyped(arguments: Any) -> Any:
    if not isinstance(arguments, Mapping):
        return arguments
    plain = {}
    for name, value in arguments.items():
        text = value.strip() if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        try:
            plain[name] = json.loads(text)
        except ValueError:
            plain[name] = text
    return plain


def fitting_formats(template: Template, call: Wanted, forms: Sequence[str]) -> dict[str, str]:
    """The formats that find a call in the forms in which the template writes it, and the form in which they do."""
    fitting: dict[str, str] = {}
    for tool_format in dict.fromkeys([*NATIVE_FORMATS, *ToolParser._registry]):
        for form in forms:
            if all(same_calls(calls, [call]) for calls in find_calls(template, tool_format, form)):
                fitting.setdefault(tool_format, form)
    return fitting


def examine_format(template: Template, report: Report) -> bool | None:
    """Examines the run's format.

    Returns:
        Whether it finds the calls that the template writes. None if there is no way to write a call that it finds.
    """
    given, call = template.run.tool_format, made_up_call(template.run.tools[0])
    forms = template.forms([call])
    fitting = fitting_formats(template, call, forms)
    own = written(given, *call) if given in FORMATS else ""
    rows = list(_marker_rows(template)) if own else []
    spelled = [marker for marker, ids in _markers(template) if len(ids) > 1]
    if given in fitting:
        rows.append(("the template's calls", f"are found: {shown(fitting[given])}"))
    elif forms:
        rows.append(("the template's calls", f"are not found: {shown(forms[0])}"))
        _judge_unread(template, forms[0], own, fitting, report)
    else:
        rows.append(("the template's calls", "none: it does not show how the model writes them"))
        unknown = f". {' and '.join(spelled)} are no single tokens of its tokenizer" if spelled else ""
        report.warnings.append(
            f"the chat template does not show how the model writes calls: it must have learned the form of {given}, or "
            f"be shown it in prompts{': ' if own else ''}{shown(own, _CALL)}{unknown}"
        )
    if spelled and forms:
        report.warnings.append(
            f"{' and '.join(spelled)} are no single tokens of this tokenizer. Calls are found all the same, but is "
            f"{given} the format of this model?"
        )
    if fitting.get(given) or own:
        rows += _thought_rows(template, fitting.get(given) or own, report)
    report.sections.append((f"Tool format {given}", rows))
    return given in fitting if given in fitting or own else None


def _judge_unread(template: Template, form: str, own: str, fitting: Mapping[str, str], report: Report) -> None:
    """Says what follows if the template writes calls that the given format does not find."""
    given = template.run.tool_format
    writes = f"{FORMAT_SETTING}={given} does not find the calls that the chat template writes, {shown(form, _CALL)}"
    if fitting:
        report.problems.append(f"{writes}; {' and '.join(fitting)} would: {FORMAT_SETTING}={next(iter(fitting))}")
    elif own and len(_markers(template)[-1][1]) == 1:
        # A model may write calls in another form than the one in which its template shows those of a history.
        report.warnings.append(
            f"{writes}, nor does any format of veRL. The model's calls must read {shown(own, _CALL)}: do they?"
        )
    else:
        report.problems.append(
            f"{writes}, nor does any format of veRL. Register a parser for them with veRL, or teach the model the form "
            f"of {given}, with a template that writes it: {TEMPLATE_SETTING}"
        )


def _markers(template: Template) -> list[tuple[str, list[int]]]:
    """The format's markers, and the tokens of each."""
    fmt = FORMATS.get(template.run.tool_format)
    parts = (fmt.section, fmt.opening, fmt.closing) if fmt else ()
    return [(marker, template.tokens(marker)) for marker in dict.fromkeys(part.decode() for part in parts if part)]


def _marker_rows(template: Template) -> Iterator[tuple[str, str]]:
    for marker, ids in _markers(template):
        special = ids[0] in template.model.tokenizer.all_special_ids
        note = ", special: dumps leave it out, and rewards do not see it" if len(ids) == 1 and special else ""
        yield marker, f"{len(ids)} token{'s' if len(ids) > 1 else ''}, {' '.join(map(str, ids))}{note}"


def _thought_rows(template: Template, call: str, report: Report) -> Rows:
    """Whether a call that stands in a thought is found, and by whom."""
    given, thought = template.run.tool_format, template.thought()
    if given != "gpt-oss" and "</think>" not in thought:
        return []
    found = find_calls(template, given, thought.replace(THOUGHT, call))
    name = "a call in a thought"
    if bool(found.ours) != bool(found.verls):
        who = "this reader, not by veRL" if found.ours else "veRL, not by this reader"
        report.warnings.append(f"{name} is found by {who}: please report it")
        return [(name, f"is found by {who}")]
    if not found.ours:
        return [(name, "is not found, and not executed")]
    report.warnings.append(
        f"{name} is executed, and is a tool-use step: veRL's parser of {given} does not know thoughts. A model that "
        f"drafts a call while it thinks has made it"
    )
    return [(name, "is found: veRL executes it")]
