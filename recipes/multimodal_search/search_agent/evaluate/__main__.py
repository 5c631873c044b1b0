"""Evaluates a model on the benchmarks, with the tools it was trained with, and makes a table of it.

    python -m search_agent.evaluate --data DIR/*.parquet --tools config/tools_eval.yaml --out OUT \
        --base-url http://host:8000/v1 --model NAME
    python -m search_agent.evaluate --data DIR/*.parquet --tools config/tools_eval.yaml --out OUT \
        --checkpoint merged --vllm-args '--max-model-len 40960'

The same command resumes an interrupted evaluation. Keys come from the environment: OPENAI_API_KEY
for the model server. Exit codes: 0, all questions are done; 1, some are not, because a server or
back end failed; 2, the command cannot run like this.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import json
import os
import platform
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from search_agent.evaluate.conversation import Agent, Limits, Score, Task
from search_agent.evaluate.report import markdown, results
from search_agent.prompts import system_prompt
from search_agent.rewards.settings import read_settings
from search_backends.chat.model import ChatModel, Refused
from search_backends.chat.vllm import ServerFailed, fingerprint, serve
from search_backends.errors import InfrastructureError
from search_backends.evaluation.loop import Outage, Watch, run
from search_backends.evaluation.questions import Question, read_questions
from search_backends.evaluation.store import Store, file_hash
from search_backends.http import ApiKey
from search_backends.toolbox import Toolbox
from verl_tapo.calls.limits import with_own_limits

RECIPE = Path(__file__).resolve().parents[2]
KEY = "OPENAI_API_KEY"
PACKAGES = ("verl", "verl-tapo", "vllm", "transformers")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the arguments, with all checks that need no disk."""
    parser = argparse.ArgumentParser(
        "python -m search_agent.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--data", type=Path, nargs="+", required=True, metavar="FILE", help="parquet files of search_agent.data.prepare"
    )
    add("--tools", type=Path, required=True, metavar="YAML", help="as for training, e.g. config/tools_eval.yaml")
    add("--out", type=Path, required=True, metavar="FOLDER", help="results, transcripts, and what to continue from")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--base-url", metavar="URL", help="an OpenAI-compatible server, up to /v1")
    which.add_argument("--checkpoint", type=Path, metavar="FOLDER", help="Hugging Face folder; vLLM is started for it")
    add("--model", metavar="NAME", help="the model's name at --base-url")
    add("--vllm-args", default="", metavar="'...'", help="further arguments of vllm serve, as one word")
    add("--label", help="the model's name in tables (default: --model, or the folder's name)")
    add("--limit", type=int, metavar="N", help="only the first N questions of each benchmark")
    add("--concurrency", type=int, default=64, metavar="N", help="questions at a time (default: 64)")
    add("--temperature", type=float, default=0.0, help="default: 0")
    add("--max-tokens", type=int, default=4096, metavar="N", help="of a turn (default: 4096)")
    add("--request", type=json.loads, default={}, metavar="JSON", help="further keys of each request; null removes one")
    add("--timeout", type=float, default=1200.0, metavar="S", help="of a request with its retries (default: 1200)")
    add("--policy", metavar="NAME", help="training's, or its file: what it tells the tools (data.tool_settings)")
    add("--max-turns", type=int, default=10, metavar="N", help="of the model (default: 10)")
    add("--calls-per-turn", type=int, default=1, metavar="N", help="tool calls (default: 1)")
    add(
        "--agent-loop",
        type=Path,
        default=RECIPE / "config" / "agent_loop.yaml",
        metavar="YAML",
        help="training's: limits of calls and malformed turns, the tools' timeout (default: this recipe's)",
    )
    add(
        "--tool-calls",
        choices=["native", "template", "hermes"],
        help="native: the server tells the model of the tools and reads its calls (default with --base-url); template: "
        "its chat template tells the model, as in training, and calls are read here, in Qwen's format (default with "
        "--checkpoint; vLLM can do it); hermes: both happen here",
    )
    match = ",".join(read_settings({}).match)
    add("--match", default=match, metavar="A,B", help=f"how answers are compared, as in the reward (default: {match})")
    add("--judge", type=json.loads, metavar="JSON", help='of --match judge: {"model": ..., "base_url": ...}')
    add("--max-failures", type=int, default=20, metavar="N", help="questions in a row; then it stops (default: 20)")
    args = parser.parse_args(argv)
    if (args.model is None) == (args.base_url is not None):
        parser.error("--model belongs to --base-url, which needs it")
    if args.vllm_args and args.base_url:
        parser.error("--vllm-args belongs to --checkpoint")
    for name in ("request", "judge"):
        if getattr(args, name) is not None and not isinstance(getattr(args, name), dict):
            parser.error(f"--{name} must be a JSON object")
    if ("judge" in args.match.split(",")) != (args.judge is not None):
        parser.error("--judge belongs to --match judge, which needs it")
    for name in ("concurrency", "max_tokens", "timeout", "limit"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            parser.error(f"--{name.replace('_', '-')} must be positive")
    return args


def tool_settings(policy: str | None) -> dict[str, Any]:
    """Returns the tools' values in a policy's file.

    Raises:
        ValueError: There is no such file, or it cannot be read.
    """
    if policy is None:
        return {}
    file = Path(policy) if policy.endswith((".yaml", ".yml")) else RECIPE / "config" / "policy" / f"{policy}.yaml"
    try:
        return dict((yaml.safe_load(file.read_text(encoding="utf-8")).get("data") or {}).get("tool_settings") or {})
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"--policy {policy}: {' '.join(str(error).split())}") from None


def versions() -> dict[str, str]:
    """Returns the installed versions of the packages that may matter."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _toolbox(file: Path) -> Toolbox:
    """The tools.

    Raises:
        ValueError, OSError: They cannot be made; the message says why.
    """
    from search_agent.tools.toolbox import load_toolbox  # veRL, which takes seconds

    try:
        return load_toolbox(file)
    except (ValueError, OSError):
        raise
    except Exception as error:  # of veRL, Hydra, YAML, and of tools' own modules
        raise ValueError(f"--tools {file}: {type(error).__name__}: {error}") from error


async def _evaluate(
    args: argparse.Namespace,
    base_url: str,
    questions: Iterator[Question],
    store: Store,
    limits: Limits,
    score: Score,
    toolbox: Toolbox,
    watch: Watch,
) -> None:
    request = {"temperature": args.temperature, "max_tokens": args.max_tokens, **args.request}
    key = ApiKey.from_environment(KEY) if args.base_url and os.environ.get(KEY) else None
    model = ChatModel(
        base_url,
        args.model,
        tool_calls=args.tool_calls,
        request=request,
        timeout_s=args.timeout,
        concurrency=args.concurrency,
        key=key,
    )
    try:
        await model.check()
        limits = replace(limits, max_calls=with_own_limits(limits.max_calls, toolbox.tools))
        prompt = system_prompt(toolbox.tools.values(), args.tool_settings)
        task = Task(Agent(model, toolbox, limits, prompt, args.tool_settings), score)
        with watch:
            await run(questions, task, store, concurrency=args.concurrency, max_failures=args.max_failures, done=watch)
    finally:
        await toolbox.close()
        await model.close()


def _settings(args: argparse.Namespace, limits: Limits) -> dict[str, Any]:
    """Returns the settings that make results comparable, and must not change when an evaluation is
    resumed."""
    names = [file.name for file in args.data]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"--data names two files {twice[0]}: rename one")
    if not args.tools.is_file():
        raise ValueError(f"--tools: there is no file {args.tools}")
    return {
        "model": args.model if args.base_url else f"checkpoint {fingerprint(args.checkpoint)[:16]}",
        "temperature": args.temperature,
        "max_tokens": args.max_tokens,
        "request": args.request,
        "tools": f"{args.tools.name} {file_hash(args.tools)[:16]}",
        "tool_settings": args.tool_settings,
        "tool_calls": args.tool_calls,
        "limits": asdict(limits),
        "match": args.match.split(","),
        "judge": args.judge and {key: args.judge[key] for key in ("model", "request") if key in args.judge},
        "data": {file.name: file_hash(file) for file in args.data},
    }


def _interrupt(*_: object) -> None:
    """Treats termination as an interruption: running work is stopped, and finished work is in the
    results."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a script
        raise KeyboardInterrupt
    signal.raise_signal(signal.SIGINT)  # asyncio waits for it, where it can


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = parse(argv)
    console = Console(stderr=True)
    signal.signal(signal.SIGTERM, _interrupt)
    args.label = args.label or args.model or args.checkpoint.resolve().name
    args.model = args.model or args.label
    args.tool_calls = args.tool_calls or ("native" if args.base_url else "template")
    try:
        args.tool_settings = tool_settings(args.policy)
        return _main(args, console)
    except (ValueError, OSError, ServerFailed) as error:
        console.print(f"search_agent.evaluate: {error}", style="red", markup=False, soft_wrap=True)
        return 2


def _main(args: argparse.Namespace, console: Console) -> int:
    from search_agent.rewards import compute_score

    limits = Limits.from_agent_loop(args.agent_loop, max_turns=args.max_turns, max_parallel_calls=args.calls_per_turn)
    settings = _settings(args, limits)
    if args.checkpoint and not args.policy:
        console.print("without --policy the tools lack training's settings (data.tool_settings)")
    rewards = {"match": settings["match"], "judge": args.judge}
    try:
        read_settings(rewards)
    except ValueError as error:
        raise ValueError(str(error).replace("reward_kwargs.", "--")) from None
    selected = [question.id for question in read_questions(args.data, args.limit)]
    if not selected:
        raise ValueError("--data has no questions")
    trouble = ""
    with ExitStack() as stack:
        store = Store(args.out, settings)
        stack.callback(store.close)
        rest = [identity for identity in selected if identity not in store.done]
        console.print(f"{len(selected)} questions, {len(selected) - len(rest)} of them done already")
        try:
            if rest:
                _answer(args, console, store, set(rest), len(selected), limits, partial(compute_score, **rewards))
        except (InfrastructureError, Outage, Refused) as error:
            trouble = f"Stopped: {error}."
            if args.checkpoint:
                trouble += f" What vLLM says is in {args.out / 'server.log'}."
        except (KeyboardInterrupt, asyncio.CancelledError):
            trouble = "Interrupted."
        entries = [store.done[identity] for identity in selected if identity in store.done]
        undone = len(selected) - len(entries)
        failures = [failure for failure in store.failures() if failure["id"] in set(selected)]
        shown = {**settings, "vllm_args": args.vllm_args} if args.checkpoint else settings
        about = {"label": args.label, "settings": shown, "versions": versions()}
        found = results(entries, failures, undone, about)
        store.write("results.json", json.dumps(found, indent=2, ensure_ascii=False) + "\n")
        store.write("results.md", markdown(found))
    if trouble or undone:
        again = f"{undone} of {len(selected)} questions are not done; the same command goes on with them."
        console.print(f"{trouble} {again}".strip(), style="red", markup=False, soft_wrap=True)
    if not entries:
        return 1
    for name, summary in found["benchmarks"].items():
        console.print(f"{name}: {100 * summary['accuracy']:.2f} % of {summary['n']}", markup=False)
    console.print(f"average {100 * found['average']:.2f} %; see {args.out / 'results.md'}", markup=False)
    return 1 if undone else 0


def _answer(
    args: argparse.Namespace, console: Console, store: Store, rest: set[str], total: int, limits: Limits, score: Score
) -> None:
    """Does the questions in ``rest``."""
    questions = (question for question in read_questions(args.data, args.limit) if question.id in rest)
    watch = Watch(console, total, total - len(rest))
    toolbox = _toolbox(args.tools)
    with ExitStack() as stack:
        base_url = args.base_url
        if args.checkpoint:
            console.print(f"starting vLLM; what it says goes to {args.out / 'server.log'}", markup=False)
            status = stack.enter_context(console.status("vLLM is starting"))
            served = serve(
                args.checkpoint,
                args.model,
                args.out / "server.log",
                arguments=_serve_arguments(args),
                waiting=lambda line: status.update(f"vLLM is starting: {line[:100]}"),
            )
            base_url = stack.enter_context(served)
            status.stop()
        asyncio.run(_evaluate(args, base_url, questions, store, limits, score, toolbox, watch))


def _serve_arguments(args: argparse.Namespace) -> list[str]:
    native = ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"] if args.tool_calls == "native" else []
    return [*native, *shlex.split(args.vllm_args)]


if __name__ == "__main__":
    sys.exit(main())
