"""``verl-tapo doctor --model``: do a run's model, chat template, tools and tool format fit each other?

A conversation with calls of the run's own tools goes through veRL's own agent loop, on a script
instead of a model. The calls are looked for in its tokens by our reader and by veRL's parser.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from verl.utils.tokenizer.continuous_token_wiring import create_continuous_token_builder

from verl_tapo.model_check.control_tokens import control_token_rows
from verl_tapo.model_check.conversation import converse
from verl_tapo.model_check.loading import Model, load_model, named, one_line
from verl_tapo.model_check.run import TEMPLATE_SETTING, Report, Rows, printable, run_of
from verl_tapo.model_check.template import Template, prompt_rows
from verl_tapo.model_check.tool_format import examine_format


def examine(name: str, config: Any, schemas: Sequence[Any] | None) -> Report:
    """Examines a model under a run's configuration.

    Args:
        name: a folder, or a name of the Hugging Face hub, see `load_model`.
        config: the trainer's, composed.
        schemas: see `run_of`.

    Returns:
        What was found. Of a stranger's files it holds no control characters, which a terminal would obey.
    """
    report = _examine(name, config, schemas)
    return Report(
        [(title, [(printable(row), printable(text)) for row, text in rows]) for title, rows in report.sections],
        [printable(problem) for problem in report.problems],
        [printable(warning) for warning in report.warnings],
    )


def _examine(name: str, config: Any, schemas: Sequence[Any] | None) -> Report:
    report = Report()
    try:
        model = load_model(name, config.actor_rollout_ref.model.get("custom_chat_template", None))
    except ValueError as error:
        report.problems.append(str(error))
        return report
    report.problems += model.problems
    template = Template(model, run_of(config, schemas))
    builder = _builder(model, report)
    report.sections.append(("Model", _model_rows(model, builder)))
    if template.source:
        _examine_template(template, report, rolls_out=builder is not None)
    else:
        report.problems.append(
            f"the model has no chat template, neither as chat_template.jinja nor in tokenizer_config.json, and veRL "
            f"renders every prompt with one: {TEMPLATE_SETTING}"
        )
    report.sections.append(("Control tokens", control_token_rows(template, report)))
    return report


def _builder(model: Model, report: Report) -> str | None:
    """Returns the class by which veRL builds the tokens of answers. None if there is none for this model."""
    try:
        builder = create_continuous_token_builder(
            model.tokenizer, hf_model_type=model.model_type, processor=model.processor
        )
    except ValueError as error:  # such as a model that sees, without its processor
        report.problems += [] if model.problems else [f"veRL cannot roll this model out: {one_line(error)}"]
        return None
    return type(builder).__name__


def _model_rows(model: Model, builder: str | None) -> Rows:
    tokenizer, kind = model.tokenizer, type(model.processor).__name__
    builds = f"veRL builds the tokens of answers by {builder}" if builder else "veRL cannot build the tokens of answers"
    return [
        ("tokenizer", f"{type(tokenizer).__name__}, {len(tokenizer)} tokens"),
        ("processor", "none" if model.processor is None else kind),
        ("model_type", f"{model.model_type or 'unknown'}: {builds}"),
    ]


def _examine_template(template: Template, report: Report, rolls_out: bool) -> None:
    try:
        prompt = template.prompt()
    except Exception as error:  # Jinja's, or whatever a template raises
        report.problems.append(f"the chat template cannot render a prompt with tools: {named(error)}")
        return
    rows = prompt_rows(template, prompt, report)
    report.sections.append(("Chat template", [*rows, ("ends turns with", _ending(template, report))]))
    as_template = examine_format(template, report)
    if as_template is not None and rolls_out:
        converse(template, as_template, report)


def _ending(template: Template, report: Report) -> str:
    model, ending = template.model, template.ending()
    number = model.tokenizer.convert_tokens_to_ids(ending)
    if number not in model.stops:
        report.warnings.append(
            f"the chat template ends turns with {ending} ({number}), which is neither the tokenizer's eos_token "
            f"({model.tokenizer.eos_token}) nor an eos_token_id of config.json or generation_config.json: the model "
            f"would write on beyond its turn"
        )
    return str(ending)
