"""Whose fault it is when a tool gives no answer. Everything a tool raises on purpose is one of these two."""

from __future__ import annotations


class ModelError(ValueError):
    """The call is invalid. The message is for the model and says what was expected. May cost
    reward."""


class InfrastructureError(RuntimeError):
    """A back end did not answer, or not as it should. Counted, never cached, never costs reward."""
