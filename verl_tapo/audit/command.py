"""The command ``verl-tapo audit``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from verl_tapo.audit import terminal, writing
from verl_tapo.audit.advice import LEVELS
from verl_tapo.audit.analysis import StepAnalysis
from verl_tapo.audit.batches import BASE_ESTIMATORS, ReadOptions
from verl_tapo.audit.result import Audit
from verl_tapo.audit.run import ALPHA_MINS, BETAS, BROWSE, THETAS, audit
from verl_tapo.audit.sources import FIELDS
from verl_tapo.audit.tables import TableWriter
from verl_tapo.calls.formats import NATIVE_FORMATS

DESCRIPTION = """\
Where does a run punish tool calls that its successful siblings made too, and what would TAPO change? Reads the rollouts
that veRL dumps (trainer.rollout_data_dir), of any group-based run, and the records of this plug-in
(algorithm.tapo.record_dir), which are exact."""
EPILOG = """\
exit codes: 0 audited; 1 a finding of --fail-on's level or graver; 2 nothing could be audited, or bad arguments.
examples:
  verl-tapo audit out/rollouts
  verl-tapo audit out --html report.html --theta 0.8 0.7 0.9
  verl-tapo audit out --json - --fail-on warning > audit.json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Fills in the sub-command's parser."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", nargs="+", metavar="RUN", help="a folder or file with rollouts")
    out = parser.add_argument_group("output")
    out.add_argument("--html", metavar="FILE", help="a report to read in a browser, one file without network")
    out.add_argument("--json", metavar="FILE", help="everything as JSON; - is standard output, without the tables")
    out.add_argument("--csv", metavar="FOLDER", help="steps, tools, sweeps, warnings and calls as CSV files")
    out.add_argument("--parquet", metavar="FOLDER", help="the same as Parquet files")
    out.add_argument(
        "--browse", type=int, metavar="N", help=f"prompt groups with texts in --html ({BROWSE}) and --json (0)"
    )
    out.add_argument("--title", help="of the report; default: the last parts of the paths")
    out.add_argument("--quiet", action="store_true", help="no tables, no progress bar")
    out.add_argument("--fail-on", choices=(*LEVELS, "never"), default="error", help="see exit codes; default: error")
    rule = parser.add_argument_group("the rule", "The first value is used for all figures, the others are swept over.")
    for name, default in (("beta", BETAS), ("theta", THETAS), ("alpha-min", ALPHA_MINS)):
        swept = " ".join(f"{value:g}" for value in default)
        rule.add_argument(f"--{name}", type=float, nargs="+", metavar="X", help=f"default: as trained; swept: {swept}")
    rule.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="another entry of algorithm.tapo, its value as JSON or plain text: success_threshold=0.9, "
        'tools=\'{"search": {"query": "text"}}\'',
    )
    dump = parser.add_argument_group("reading rollout dumps", "Records need none of these.")
    dump.add_argument("--format", choices=NATIVE_FORMATS, default="hermes", help="of tool calls; default: hermes")
    dump.add_argument("--base-estimator", choices=BASE_ESTIMATORS, default="grpo", help="default: grpo")
    dump.add_argument(
        "--field",
        action="append",
        default=[],
        metavar="NAME=OWN",
        help=f"a field that is called otherwise in this dump: output=response. Names: {', '.join(FIELDS)}",
    )


def run(arguments: argparse.Namespace) -> int:
    """Carries the sub-command out; returns the exit code."""
    console = Console(stderr=not {"-", "/dev/stdout"}.isdisjoint((arguments.json, arguments.html)))
    try:
        return _run(arguments, console)
    except (ValueError, OSError) as error:
        print(f"verl-tapo audit: {terminal.plain(str(error))}", file=sys.stderr)
        return 2


def _run(arguments: argparse.Namespace, console: Console) -> int:
    for path in (arguments.html, arguments.json):
        if path and path != "-":
            writing.check(path)
    with ExitStack() as opened:
        writers = []
        if arguments.csv:
            writers.append(opened.enter_context(TableWriter(arguments.csv, "csv")))
        if arguments.parquet:
            writers.append(opened.enter_context(TableWriter(arguments.parquet, "parquet")))
        found = _audit(arguments, writers)
        for writer in writers:
            writer.finish(found)
    if arguments.html:
        found.write_html(arguments.html)
    if arguments.json:
        _write_json(found if arguments.browse else Audit({**found.result, "groups": []}, None), arguments.json)
    if not arguments.quiet:
        _show(arguments, found, console)
    levels = [LEVELS.index(warned["level"]) for warned in found.result["warnings"]]
    limit = len(LEVELS) if arguments.fail_on == "never" else LEVELS.index(arguments.fail_on)
    return int(max(levels, default=-1) >= limit)


def _audit(arguments: argparse.Namespace, writers: Sequence[TableWriter]) -> Audit:
    settings, sweeps = _settings(arguments)
    options = ReadOptions(arguments.base_estimator, arguments.format, _fields(arguments.field))
    if arguments.browse is not None and arguments.browse < 0:
        raise ValueError(f"--browse must be at least 0, got {arguments.browse}")

    def write(analysis: StepAnalysis) -> None:
        for writer in writers:
            writer.add(analysis)

    browse = arguments.browse if arguments.browse is not None else BROWSE if arguments.html else 0
    bar = Progress(
        TextColumn("reading"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=arguments.quiet or not sys.stderr.isatty(),
    )
    with bar:
        task = bar.add_task("", total=None)
        return audit(
            *arguments.run,
            settings=settings,
            options=options,
            **sweeps,
            browse=browse,
            title=arguments.title,
            keep_calls=False,
            on_step=write,
            on_start=lambda size: bar.update(task, total=size),
            advance=lambda size: bar.advance(task, size),
        )


def _show(arguments: argparse.Namespace, found: Audit, console: Console) -> None:
    try:
        if arguments.json != "-":
            terminal.show(found.result, console)
        if arguments.html:
            terminal.tell_written(arguments.html, console)
    except (BrokenPipeError, SystemExit):  # rich's answer to a reader that has gone, as `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), console.file.fileno())


def _write_json(found: Audit, path: str) -> None:
    if path == "-":
        sys.stdout.buffer.write(found.to_json())
        sys.stdout.buffer.flush()
    else:
        with writing.replacing(path) as file:
            file.write(found.to_json())


def _settings(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Sequence[float]]]:
    """What differs from the run's settings, and what to sweep over."""
    settings: dict[str, Any] = {}
    sweeps: dict[str, Sequence[float]] = {}
    for name in ("beta", "theta", "alpha_min"):
        values = getattr(arguments, name)
        if values:
            settings[name] = values[0]
            if len(values) > 1:
                sweeps[f"{name}s"] = values
    for entry in arguments.set:
        key, separator, text = entry.partition("=")
        if not separator:
            raise ValueError(f"--set {entry}: write KEY=VALUE")
        try:
            settings[key] = json.loads(text)
        except ValueError:
            settings[key] = text
    return settings, sweeps


def _fields(entries: Sequence[str]) -> dict[str, str]:
    fields = {}
    for entry in entries:
        name, separator, own = entry.partition("=")
        if not separator or name not in FIELDS or not own:
            raise ValueError(f"--field {entry}: write NAME=OWN, with a name of {', '.join(FIELDS)}")
        fields[name] = own
    return fields
