"""Audits a run: reads its rollouts step by step, judges them, and sums up."""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from verl_tapo.audit.analysis import StepAnalysis, analyse, star
from verl_tapo.audit.batches import ReadOptions, batch_from_dump, batch_from_records
from verl_tapo.audit.collect import Collector
from verl_tapo.audit.model import StepBatch
from verl_tapo.audit.result import Audit, call_rows
from verl_tapo.audit.sources import Dump, Found, Problems, Row, Source, find_sources
from verl_tapo.rule.names import default_kernel
from verl_tapo.settings import TapoSettings
from verl_tapo.step_records import read_step_records

BETAS = (0.2, 0.5, 0.8, 1.0)
THETAS = (0.6, 0.7, 0.8, 0.9, 0.95)
ALPHA_MINS = (0.0, 0.1, 0.2, 0.4, 0.6)
BROWSE = 200
"""Prompt groups kept with their texts."""
_PART = re.compile(r"[0-9]+_[0-9]+\..*")
"""The names of a step's further batches, among its records."""
_KERNELS_FROM_FILES = frozenset({"exact", "text", "iou", "number", "ignore"})
"""Kernels that a record's header may name: they load nothing. Any other is used only where the caller names it."""


def audit(
    *paths: str | os.PathLike[str],
    settings: Mapping[str, Any] | None = None,
    options: ReadOptions | None = None,
    betas: Sequence[float] = BETAS,
    thetas: Sequence[float] = THETAS,
    alpha_mins: Sequence[float] = ALPHA_MINS,
    browse: int = BROWSE,
    title: str | None = None,
    keep_calls: bool = True,
    on_step: Callable[[StepAnalysis], None] | None = None,
    on_start: Callable[[int], None] | None = None,
    advance: Callable[[int], None] | None = None,
) -> Audit:
    """Says where TAPO would change credit in a run, or did, and where not, and why.

    Args:
        paths: rollout dumps of veRL (``trainer.rollout_data_dir``), step records (``algorithm.tapo.record_dir``),
            files or folders with either. Where a step has both, the records give the figures and the dump the texts.
        settings: entries of ``algorithm.tapo`` that differ from the recorded ones, or, for dumps, from the defaults.
        options: how dumps are read.
        betas, thetas, alpha_mins: values to sweep over, one at a time, the others as in ``settings``.
        browse: how many prompt groups to keep with their texts, those with most to see.
        title: of the report; None: the last parts of the paths.
        keep_calls: keep a row for every call, for `Audit.calls` (about 1 KB each).
        on_step: called with each training step.
        on_start: called with the number of bytes to read.
        advance: called with the number of bytes read since the last time.

    Raises:
        ValueError: for a path without rollouts, a setting or option out of range, a parameter value that a kernel
            refuses, or where not one line could be read.
    """
    options = options or ReadOptions()
    overrides = dict(settings or {})
    found = find_sources(paths, options.fields.get("output", "output"))
    problems = Problems()
    for damaged in found.damaged:
        problems.add(Path(damaged.file), None, damaged.reason)
    reader = _Reader(found, overrides, options, problems, advance or (lambda _: None))
    if on_start is not None:
        on_start(found.size)
    collector: Collector | None = None
    calls: list[dict[str, Any]] = []
    recorded = 0
    for batch, used in reader.batches():
        if collector is None:
            collector = Collector(used, star(used.rule, betas, thetas, alpha_mins), browse)
        try:
            analysis = analyse(batch, used.rule)
        except ValueError as error:
            raise ValueError(f"step {batch.step}: {error}") from None
        collector.add(analysis)
        if batch.settings is not None:
            recorded += 1
            if not overrides and not reader.replaced_kernels:
                collector.disagree(sum(j.call.recorded_gate != j.credit.gate for j in analysis.calls))
        if keep_calls:
            calls += call_rows(analysis)
        if on_step is not None:
            on_step(analysis)
    if collector is None:
        first = next(iter(problems.listed()), None)
        line = "" if first is None or first.line is None else f"{first.line}:"
        where = f"{first.file}:{line} {first.reason}" if first else "the files are empty"
        raise ValueError(f"not one rollout could be read; {where}")
    result = collector.result(
        title=title or ", ".join("/".join(Path(path).resolve().parts[-2:]) for path in paths),
        sources=[str(source.path) for source in found.sources],
        left_out=[f"{path} ({reason})" for path, reason in found.left_out.items()],
        problems=problems,
        base_estimator="as recorded" if recorded else options.base_estimator,
        recorded_steps=recorded,
        replaced_kernels=sorted(reader.replaced_kernels),
    )
    return Audit(result, calls if keep_calls else None)


@lru_cache(maxsize=64)
def _settings(flat: str) -> TapoSettings:
    """Kept, so that kernels keep what they have loaded."""
    try:
        return TapoSettings.from_mapping(json.loads(flat))
    except (TypeError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"algorithm.tapo: {error}") from None


_OPEN_DUMPS = 32  # files that stay open between two of their steps


class _Reader:
    """A run's training steps, out of all its files."""

    def __init__(
        self,
        found: Found,
        overrides: Mapping[str, Any],
        options: ReadOptions,
        problems: Problems,
        advance: Callable[[int], None],
    ) -> None:
        self._sources, self._overrides, self._options = found.sources, overrides, options
        self._problems, self._advance = problems, advance
        self._recorded: set[int] = set()
        self._open: list[Dump] = []
        self.replaced_kernels: set[str] = set()
        """Kernels that headers name and that were not used, as "embedding for query of search"."""

    def batches(self) -> Iterator[tuple[StepBatch, TapoSettings]]:
        """Each with the settings it is judged by; those of records first, then the other steps of dumps, rising."""
        dumped = self._settings({})  # refuses bad settings of the caller's before anything is read
        for source in self._sources:
            if source.kind == "records":
                yield from self._records(source)
        for step in sorted(self._holders.keys() - self._recorded):
            rows = [row for dump in self._holders[step] for row in self._rows(dump, step)]
            batch = batch_from_dump(step, rows, dumped, self._options, self._problems)
            batch.again = len(self._holders[step]) - 1
            yield batch, dumped

    @cached_property
    def _holders(self) -> dict[int, list[Dump]]:
        """The dumps that hold each step."""
        holders: dict[int, list[Dump]] = defaultdict(list)
        for source in self._sources:
            if source.kind == "dump":
                dump = Dump(source.path, self._options.fields, self._problems, self._advance)
                for step in dump.steps:
                    holders[step].append(dump)
        return holders

    def _rows(self, dump: Dump, step: int) -> list[Row]:
        """A step's lines; keeps a few files open, which go on with their next step."""
        rows = dump.rows(step)
        if dump in self._open:
            self._open.remove(dump)
        if step == dump.steps[-1]:
            dump.finish()
        else:
            self._open.append(dump)
        if len(self._open) > _OPEN_DUMPS:
            self._open.pop(0).close()
        return rows

    def _settings(self, recorded: Mapping[str, Any]) -> TapoSettings:
        settings = {**recorded, **self._overrides}
        if "tools" not in self._overrides:
            settings["tools"] = self._harmless(recorded.get("tools"))
        return _settings(json.dumps(settings))

    def _harmless(self, tools: Any) -> Any:
        """The tools of a header, with the kernel by name in place of any that may load code or a model.

        Records come from strangers, and a kernel's options may name a folder beside them or a model on a hub.
        """
        if not isinstance(tools, Mapping):
            return tools
        harmless: dict[str, Any] = {}
        for tool, parameters in tools.items():
            harmless[tool] = dict(parameters) if isinstance(parameters, Mapping) else parameters
            for name, spec in parameters.items() if isinstance(parameters, Mapping) else ():
                kernel = spec.get("kernel") if isinstance(spec, Mapping) else spec
                if not isinstance(kernel, str) or kernel not in _KERNELS_FROM_FILES:
                    harmless[tool][name] = default_kernel(name)
                    self.replaced_kernels.add(f"{str(kernel)[:60]} for {name} of {tool}")
        return harmless

    def _records(self, source: Source) -> Iterator[tuple[StepBatch, TapoSettings]]:
        path = source.path
        try:
            header, rows, found = read_step_records(path)
            settings = self._settings(header["settings"])
        except ValueError as error:
            self._problems.add(path, None, str(error))
            return
        finally:
            self._advance(source.size)
        for line, reason in found:
            self._problems.add(path, line, reason)
        step = int(header["step"])
        batch = batch_from_records(header, rows, self._texts(step), settings, self._options)
        batch.again = int(step in self._recorded and not _PART.fullmatch(path.name))
        self._recorded.add(step)
        yield batch, settings

    def _texts(self, step: int) -> dict[str, Row]:
        """The dumps' lines of a recorded step, by ``uid``; those whose ``uid`` is not their own are left out."""
        texts: dict[str, Row] = {}
        shared = set()
        for dump in self._holders.get(step, ()):
            for row in self._rows(dump, step):
                uid = str(row.value.get("uid"))
                if texts.setdefault(uid, row).value["output"] != row.value["output"]:
                    shared.add(uid)
        return {uid: row for uid, row in texts.items() if uid not in shared}
