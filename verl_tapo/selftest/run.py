"""The checks in the installed veRL, in order."""

from __future__ import annotations

from collections.abc import Iterator

from verl_tapo.selftest.check import Check
from verl_tapo.selftest.hook_checks import hook_checks
from verl_tapo.selftest.trainer_checks import V0, V1, trainer_checks


def checks_of_verl() -> Iterator[Check]:
    """The checks of the hooks and of both trainers. Ray is stopped when the last one was taken."""
    yield from hook_checks()
    yield from trainer_checks(V0())
    trainer = V1()
    try:
        yield from trainer_checks(trainer)
    finally:
        trainer.close()
