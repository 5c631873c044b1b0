"""Looks at a run before it starts: configuration, data, tools, and whether their back ends answer.

    python -m search_agent.check --config-dir config --config-name multimodal_search policy=qwen3_vl_4b ...

takes what `python -m verl.trainer.main_ppo` would take. `train.sh` calls it. Exit code 1 where the run would fail, or
go wrong unseen.
"""

from __future__ import annotations

import argparse
import asyncio
import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

OUR_REWARD = "pkg://search_agent.rewards"
COLUMNS = ("data_source", "prompt", "images", "reward_model", "extra_info")


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the problems and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-dir", type=Path, required=True)
    parser.add_argument("--config-name", required=True)
    parser.add_argument("overrides", nargs="*")
    arguments, rest = parser.parse_known_args(argv)
    try:
        config = compose(arguments.config_dir, arguments.config_name, [*arguments.overrides, *rest])
        problems = list(find_problems(config))
    except Exception as error:  # Hydra's, veRL's, ours: each says what is wrong
        problems = [str(error).strip() or type(error).__name__]
    for problem in problems:
        print(f"search_agent.check: {problem}", file=sys.stderr)
    if not problems:
        _say("configuration, data, tools and back ends are fine.")
    return 1 if problems else 0


def compose(folder: Path, name: str, overrides: Sequence[str]) -> Any:
    """The configuration as the trainer gets it, checked by veRL.

    Raises:
        Exception: Of many kinds, with a message.
    """
    from hydra import compose, initialize_config_dir
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    kept = [override for override in overrides if not override.startswith("hydra.")]
    with initialize_config_dir(str(folder.resolve()), version_base=None):
        config = compose(name, overrides=[*kept, "hydra.searchpath=[pkg://verl.trainer.config]"])
    validate_config(config, need_reference_policy(config), need_critic(config))
    return config


def find_problems(config: Any) -> Iterator[str]:
    """Yields the problems of TAPO's settings, the data, the tools and the reward."""
    from verl_tapo.trainer.check import check_run

    reported = ""
    try:
        check_run(config)
    except ValueError as error:
        reported = str(error)
        yield reported
    bad_data: list[str] = []
    for key in ("train_files", "val_files"):
        for file in _files(config.data[key]):
            bad_data += _data_problems(f"data.{key}", file)
    yield from bad_data
    tools = _tools(config.actor_rollout_ref.rollout.multi_turn)
    yield from _tool_problems(config, tools)
    if config.algorithm.adv_estimator == "tapo":
        yield from (problem for problem in _credit_problems(config.algorithm, tools) if problem not in reported)
    yield from _template_problems(config.actor_rollout_ref.model, tools)
    if not bad_data:
        _compare_prompts(_files(config.data.train_files)[0], [tool.name for tool in tools])
        yield from _reward_problems(config, _files(config.data.val_files)[0])
    if not config.reward.reward_model.enable:  # veRL's own is not up yet
        yield from asyncio.run(_judge_problems(config.reward.custom_reward_function))
    yield from asyncio.run(_unreachable(tools))


def _files(setting: Any) -> list[Path]:
    return [Path(file) for file in ([setting] if isinstance(setting, str) else setting)]


def _data_problems(key: str, file: Path) -> Iterator[str]:
    import pyarrow.parquet as parquet

    if not file.is_file():
        yield f"{key}: there is no file {file}"
        return
    try:
        names = parquet.read_schema(file).names
    except Exception as error:
        yield f"{key}: {file} is not parquet: {error}"
        return
    missing = [column for column in COLUMNS if column not in names]
    if missing:
        yield f"{key}: {file} has no column {', '.join(missing)}; make it with python -m search_agent.data.prepare"


def _compare_prompts(file: Path, tools: Sequence[str]) -> None:
    """Warns if the first question has its own system prompt and that names other tools than those of the run."""
    import pyarrow.parquet as parquet

    from search_agent import tools as recipe

    batch = next(parquet.ParquetFile(file).iter_batches(batch_size=1, columns=["prompt"]), None)
    messages = [] if batch is None else batch.to_pylist()[0]["prompt"]
    text = "\n".join(str(message["content"]) for message in messages if _is_system(message))
    words = set(re.findall(r"[\w-]+", text))
    known = {getattr(recipe, name).schema["name"] for name in recipe.__all__}
    missing, gone = sorted({*tools} - words), sorted(known & words - {*tools})
    how = "take it out of the data, and search_agent/prompts.py is used"
    if text and missing:
        _say(f"the system prompt in {file} does not speak of {', '.join(missing)}: {how}")
    if gone:
        _say(f"the system prompt in {file} speaks of {', '.join(gone)}, which this run does not have: {how}")


def _is_system(message: Any) -> bool:
    return isinstance(message, dict) and message.get("role") == "system" and "content" in message


def _reward_problems(config: Any, file: Path) -> Iterator[str]:
    """Checks that the reward function takes its settings and the data, and scores a right answer as
    right."""
    import pyarrow.parquet as parquet
    from verl.trainer.ppo.reward import get_custom_reward_fn
    from verl.utils.import_utils import load_extern_object

    from verl_tapo.answers.accepted import accepted_answers

    function = config.reward.custom_reward_function
    settings = function.get("reward_kwargs", {})
    if not function.path:
        return
    if settings is None:
        yield "reward.custom_reward_function.reward_kwargs is null: veRL wants a mapping, say reward_kwargs={}"
        return
    batch = next(
        parquet.ParquetFile(file).iter_batches(batch_size=1, columns=["data_source", "reward_model", "extra_info"]),
        None,
    )
    if batch is None:
        yield f"{file} has no rows"
        return
    row = batch.to_pylist()[0]
    ours, name = function.path == OUR_REWARD, f"the reward function {function.name} of {function.path}"
    truth = (row["reward_model"] or {}).get("ground_truth")
    try:
        answer = str(accepted_answers(truth)[0])
    except ValueError as error:
        if ours:
            yield f"{file}, row 0: {error}"
            return
        answer = str(truth)
    given = {
        "data_source": row["data_source"],
        "solution_str": f"<answer>{answer}</answer>",
        "ground_truth": truth,
        "extra_info": dict(row["extra_info"] or {}),
    }
    try:
        inspect.signature(load_extern_object(function.path, function.name)).bind(**given, **settings)
    except TypeError as error:
        passed = ", ".join(given)
        if settings:
            passed += f" and, of reward_kwargs, {', '.join(settings)}"
            error = TypeError(f"{error}; take that out of reward_kwargs, or let the function take it")
        yield f"{name} is called with {passed}: {error}"
        return
    except Exception as error:
        yield f"{name} cannot be loaded: {error.__cause__ or error}"
        return
    try:
        result = get_custom_reward_fn(config)(**given)
        if inspect.isawaitable(result):
            result = asyncio.run(_awaited(result))
        values: dict[str, Any] = result if isinstance(result, dict) else {"score": result}
        score, success = float(values["score"]), float(values.get("acc", values["score"]))
    except Exception as error:
        if ours:  # its messages name the setting
            raise
        yield (
            f"{name}, on the first question: {type(error).__name__}: {error}; it must return a number, or a dict with "
            "score, for a response such as <answer>...</answer>"
        )
        return
    if success > 0:
        return
    doubt = f"{name} gives the accepted answer {answer!r} of the first question, in answer tags, no success: {score:g}"
    if ours:
        yield doubt
    else:
        print(f"search_agent.check: {doubt}. Does it want another form?")


async def _awaited(result: Any) -> Any:
    return await result


async def _judge_problems(function: Any) -> list[str]:
    """Checks that the judge answers, if this recipe's reward has one."""
    from search_agent.rewards import Reward, read_settings
    from search_backends.errors import InfrastructureError

    if function.path != OUR_REWARD:
        return []
    reward = Reward(read_settings(dict(OmegaConf.to_container(function, resolve=True).get("reward_kwargs") or {})))
    try:
        judge = await reward.check_judge()
    except InfrastructureError as error:
        return [f"the judge: {error}"]
    finally:
        await reward.close()
    if judge is not None:
        _say(f"answers are judged by {judge}")
    return []


def _tools(multi_turn: Any) -> list[Any]:
    from verl.tools.function_tool import load_function_tools_from_path

    from search_agent.tools.toolbox import load_tools

    tools: list[Any] = []
    for key, load in (("tool_config_path", load_tools), ("function_tool_path", load_function_tools_from_path)):
        file = multi_turn.get(key)
        if file and not Path(file).is_file():
            raise FileNotFoundError(f"actor_rollout_ref.rollout.multi_turn.{key}: there is no file {file}")
        tools += load(file) if file else []
    return tools


def _tool_problems(config: Any, tools: Sequence[Any]) -> Iterator[str]:
    from search_backends.tools import Tool

    multi_turn = config.actor_rollout_ref.rollout.multi_turn
    loop = _loop_settings(config.actor_rollout_ref.rollout.agent)
    patience = loop.get("tool_timeout_s", 60.0)
    if strange := sorted(set(config.data.get("tool_settings") or {}) - {tool.name for tool in tools}):
        _say(f"data.tool_settings speaks of {', '.join(strange)}, which this run does not have")
    for tool in tools:
        if not isinstance(tool, Tool):
            continue
        limit, timeout = tool.settings.limit_chars, tool.settings.timeout_s
        if limit > multi_turn.max_tool_response_length:
            yield (
                f"the tool {tool.name} may answer {limit} characters, and multi_turn.max_tool_response_length="
                f"{multi_turn.max_tool_response_length} would cut them in the middle"
            )
        if timeout >= patience:
            yield (
                f"the tool {tool.name} has {timeout:g} s for a call, the agent loop gives it {patience:g} "
                f"(tool_timeout_s): raise that, or a slow back end cannot be told from a defect"
            )


def _credit_problems(algorithm: Any, tools: Sequence[Any]) -> Iterator[str]:
    """Yields names in ``algorithm.tapo.tools`` that do not exist. Prints which tools take part in
    credit transfer."""
    from verl_tapo.settings import load_settings
    from verl_tapo.trainer.tools_check import participation, rule_problems

    rule = load_settings(algorithm).rule
    parameters = {tool.name: list(tool.tool_schema.function.parameters.properties) for tool in tools}
    yield from rule_problems(rule, parameters)
    for name, part in participation(rule, parameters):
        _say(f"credit transfer: {name}: {part}")


def _say(text: str) -> None:
    print(f"search_agent.check: {text}")


def _template_problems(model: Any, tools: Sequence[Any]) -> Iterator[str]:
    """Checks that the chat template tells the model about the tools. Qwen2.5-VL's own does not."""
    from transformers import AutoProcessor, AutoTokenizer

    template = model.custom_chat_template
    holder: Any = None
    # If there is a processor, its template counts.
    for kind in (AutoTokenizer, AutoProcessor):
        try:
            holder = kind.from_pretrained(
                model.tokenizer_path or model.path, trust_remote_code=model.trust_remote_code, local_files_only=True
            )
        except Exception:  # not downloaded yet, or a kind that this model does not have
            continue
        tokenizer = getattr(holder, "tokenizer", holder)
        template = model.custom_chat_template or holder.chat_template or tokenizer.chat_template
    if holder is None:
        _say(f"the chat template of {model.path} was not looked at: the model is not here yet")
        return
    schemas = [tool.tool_schema.model_dump(exclude_unset=True, exclude_none=True) for tool in tools]
    text = tokenizer.apply_chat_template(
        [{"role": "system", "content": "."}, {"role": "user", "content": "?"}],
        tools=schemas,
        chat_template=template,
        tokenize=False,
    )
    missing = [tool.name for tool in tools if tool.name not in text]
    if missing:
        yield (
            f"the chat template of {model.path} does not tell the model of {', '.join(missing)}: set "
            f"actor_rollout_ref.model.custom_chat_template (config/policy/qwen2_5_vl_7b.yaml has one for Qwen2.5-VL)"
        )


def _loop_settings(agent: Any) -> dict[str, Any]:
    """Returns the settings of the default agent loop, from its YAML."""
    if not agent.agent_loop_config_path:
        return {}
    if not Path(agent.agent_loop_config_path).is_file():
        raise FileNotFoundError(
            f"rollout.agent.agent_loop_config_path: there is no file {agent.agent_loop_config_path}"
        )
    loops = OmegaConf.to_container(OmegaConf.load(agent.agent_loop_config_path), resolve=True)
    return next((loop for loop in loops or [] if loop.get("name") == agent.default_agent_loop), {})


async def _unreachable(tools: Sequence[Any]) -> list[str]:
    """Returns the tools whose back ends do not answer."""
    from search_backends.errors import InfrastructureError
    from search_backends.tools import Tool

    problems = []
    for tool in tools:
        if isinstance(tool, Tool):
            try:
                if (identity := await tool.check()) is not None:
                    _say(f"{tool.name} is answered by {identity}")
            except InfrastructureError as error:
                local = tool.settings.provider.get("provider") == "service"
                hint = ": is the retrieval service up, and SEARCH_URL its address?" if local else ""
                problems.append(f"the tool {tool.name}: {error}{hint}")
            finally:
                await tool.close()
    return problems


if __name__ == "__main__":
    sys.exit(main())
