"""Whose fault it is when a tool gives no answer. Everything a tool raises on purpose is one of these two."""

from __future__ import annotations

import re


class ModelError(ValueError):
    """The call is invalid. The message is for the model and says what was expected. May cost
    reward."""


class InfrastructureError(RuntimeError):
    """A back end did not answer, or not as it should. Counted, never cached, never costs reward."""


def without_secrets(text: str) -> str:
    """Returns a text whose Redis addresses have lost user, password and options."""
    return re.sub(r"(rediss?://)(?:\S*@)?([^\s?'\"]*)(?:\?[^\s'\"]*)?", r"\1\2", text)
