"""Which control tokens a tool's text could bring into a prompt."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from verl_tapo.model_check.run import Report, Rows, listed
from verl_tapo.model_check.template import Template
from verl_tapo.rollout.tool_agent import strip_control_tokens
from verl_tapo.trainer.monitor import RECORDING_LOOP

_WIDE = {code: code + 0xFEE0 for code in range(0x21, 0x7F)}
_NUMBERS = re.compile(r"\d+")
_SPARE = re.compile("reserved|unused|extra")


def control_token_rows(template: Template, report: Report) -> Rows:
    """Which control tokens a tool's text would become, and whether the recording loop takes them all out."""
    tokenizer = template.model.tokenizer
    tokens = _kinds(tokenizer, template.ending())
    control = {*tokenizer.all_special_ids, *tokenizer.convert_tokens_to_ids(tokens)}

    def becomes_one(text: str) -> bool:
        return not control.isdisjoint(tokenizer.encode(text, add_special_tokens=False))

    smuggled = [token for token in tokens if becomes_one(f"a {token} b")]
    left = [
        token for token in tokens if any(becomes_one(strip_control_tokens(text, tokenizer)) for text in _texts(token))
    ]
    if left:
        report.warnings.append(
            f"{RECORDING_LOOP} leaves {listed(left)} in tools' texts, of which the tokenizer makes control tokens: "
            f"please report it"
        )
    if smuggled and not template.run.records:
        report.warnings.append(
            f"with an agent loop other than {RECORDING_LOOP}, a tool's text that holds {listed(smuggled, 2)} can end "
            f"its own answer and go on as anybody. actor_rollout_ref.rollout.agent.default_agent_loop={RECORDING_LOOP} "
            f"takes them out"
        )
    return [
        ("in a tool's text", f"{len(smuggled)} kinds would be control tokens: {listed(smuggled, 5)}"),
        (f"with {RECORDING_LOOP}", f"{listed(left)} remain" if left else "all are taken out"),
    ]


def _kinds(tokenizer: Any, ending: str) -> list[str]:
    """The control tokens: the one that ends a turn, special ones, others. Of those that differ in a number alone, such
    as <unused7>, there is one."""
    special = set(tokenizer.all_special_tokens)
    tokens = {*tokenizer.get_added_vocab(), *special}
    # Gemma has runs of white space among them.
    tokens = {token for token in tokens if len(token.replace("▁", "").strip()) > 2}
    kinds = {_NUMBERS.sub("", token): token for token in sorted(tokens, reverse=True)}
    spare = re.compile("reserved|unused|extra")
    return sorted(
        kinds.values(), key=lambda token: (token != ending, bool(spare.search(token)), token not in special, token)
    )


def _texts(token: str) -> Iterator[str]:
    """A token in texts of a tool: as it is, round another one, and in wide letters, which some tokenizers narrow."""
    half = len(token) // 2
    yield f"a {token} b"
    yield f"a {token[:half]}{token}{token[half:]} b"
    yield f"a {token.translate(_WIDE)} b"
