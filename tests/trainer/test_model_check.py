"""``doctor --model``: what it finds of models' tokenizers, chat templates and formats, good ones and broken ones."""

import io
import json
import logging
import re
import socket
import subprocess
import sys
from itertools import pairwise

import pytest
from omegaconf import OmegaConf

pytest.importorskip("verl.experimental.agent_loop")

from agent_loops import schema
from conftest import CHAT_TEMPLATE
from real_tokenizers import FAMILIES, folder
from tiny_models import tiny_tokenizer
from verl.experimental.agent_loop import tool_parser

from verl_tapo.calls.formats import NATIVE_FORMATS
from verl_tapo.cli import main
from verl_tapo.cpu.processor import save_processor
from verl_tapo.model_check import conversation, loading, tool_format
from verl_tapo.model_check.examine import examine
from verl_tapo.model_check.tool_format import Found

SCHEMAS = [schema("search", query="string", n="integer"), schema("zoom", image="integer", bbox="array", fine="boolean")]


def config(fmt="hermes", loop="tapo_tool_agent", parallel=3, prompt_length=4000, template=None, **data):
    rollout = {
        "multi_turn": {"format": fmt, "max_parallel_calls": parallel},
        "agent": {"default_agent_loop": loop},
        "prompt_length": prompt_length,
    }
    model = {"custom_chat_template": template}
    return OmegaConf.create(
        {"actor_rollout_ref": {"model": model, "rollout": rollout}, "data": data, "algorithm": {"tapo": {}}}
    )


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Quiet, and without a network: a folder is examined without a look at it."""

    def refuse(*_):
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def model(tmp_path):
    """Saves a tokenizer as a model's folder."""

    def save(tokenizer, template=CHAT_TEMPLATE, model_type="qwen3"):
        tokenizer.save_pretrained(tmp_path)
        if template is None:
            (tmp_path / "chat_template.jinja").unlink()
        else:
            (tmp_path / "chat_template.jinja").write_text(template)
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        return str(tmp_path)

    return save


def section(report, title):
    (rows,) = (rows for name, rows in report.sections if name.startswith(title))
    return dict(rows)


def only(messages):
    (message,) = messages
    return message


def test_a_model_that_fits(model, qwen_like_tokenizer):
    report = examine(model(qwen_like_tokenizer), config(), SCHEMAS)
    assert report.problems == report.warnings == []
    assert section(report, "Model")["model_type"] == "qwen3: veRL builds the tokens of answers by " + (
        "QwenContinuousTokenBuilder"
    )
    assert section(report, "Chat template")["tools in the prompt"] == "search, zoom, with their parameters"
    found = section(report, "Found")
    # a turn for each tool, and one with both
    assert found["calls"] == "4 of 4, 4 as they were written; veRL executed 4"
    assert found["answers"].startswith("4 of 4 calls have theirs")


def test_spans_are_exact_and_cover_the_response(model, qwen_like_tokenizer):
    report = examine(model(qwen_like_tokenizer), config(), SCHEMAS)
    rows = section(report, "A conversation in veRL's own loop, calls as the template writes them")
    spans = [tuple(map(int, span.split("-"))) for span in rows]
    assert spans[0][0] == 0
    assert all(last[1] == following[0] for last, following in pairwise(spans))
    calls = [text for text in rows.values() if text.startswith("call ")]
    assert [re.split(r"\s{2,}", text)[0] for text in calls] == [
        "call 1: search",
        "call 2: zoom",
        "call 3: search",
        "call 4: zoom",
    ]
    for text in calls:
        written = re.split(r"\s{2,}", text, maxsplit=1)[1]
        assert re.fullmatch(r"<tool_call>\\n{.*}\\n</tool_call>", written)
    assert any(text.startswith("answer, mask 0") and "<tool_response>" in text for text in rows.values())


@pytest.mark.parametrize("fmt", [name for name in NATIVE_FORMATS if name != "hermes"])
def test_a_wrong_format_is_named_and_the_right_one(model, qwen_like_tokenizer, fmt):
    report = examine(model(qwen_like_tokenizer), config(fmt), SCHEMAS)
    problem = next(problem for problem in report.problems if "does not find the calls" in problem)
    assert problem.startswith(f"actor_rollout_ref.rollout.multi_turn.format={fmt} does not find the calls that the ")
    assert problem.endswith("; hermes would: actor_rollout_ref.rollout.multi_turn.format=hermes")


def test_calls_that_no_format_reads(model, qwen_like_tokenizer):
    template = CHAT_TEMPLATE.replace("<tool_call>", "<call>").replace("</tool_call>", "</call>")
    # The tokens are there: a template may show calls otherwise than the model writes them.
    report = examine(model(qwen_like_tokenizer, template), config(), SCHEMAS)
    assert report.problems == []
    assert "does not find the calls that the chat template writes, <call>" in only(report.warnings)
    report = examine(model(qwen_like_tokenizer, template), config("seed"), SCHEMAS)
    assert "nor does any format of veRL. Register a parser for them with veRL" in only(report.problems)


LLAMA = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ tools | tojson if loop.first }}"
    "{% if message.tool_calls %}{% set call = message.tool_calls[0].function %}"
    '{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}'
    "{% else %}{{ message.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class LlamaParser(tool_parser.ToolParser):
    """As a user may register one with veRL."""

    async def extract_tool_calls(self, responses_ids, tools=None):
        text = self.tokenizer.decode(responses_ids, skip_special_tokens=True)
        found = re.search(r'\{"name": "(.*?)", "parameters": (.*)\}', text)
        return text, [tool_parser.FunctionCall(name=found[1], arguments=found[2])] if found else []


def test_a_parser_that_is_registered_with_verl(model, qwen_like_tokenizer, monkeypatch):
    path = model(qwen_like_tokenizer, LLAMA)
    assert "nor does any format of veRL" in only(examine(path, config(), SCHEMAS).warnings)
    monkeypatch.setitem(tool_parser.ToolParser._registry, "own", LlamaParser)
    report = examine(path, config(), SCHEMAS)
    assert only(report.problems).endswith("; own would: actor_rollout_ref.rollout.multi_turn.format=own")
    report = examine(path, config("own", parallel=1), SCHEMAS)
    assert report.problems == report.warnings == []
    assert section(report, "Tool format own")["the template's calls"].startswith("are found: ")
    assert section(report, "Found")["calls"] == "2 of 2, 2 as they were written; veRL executed 2"


def test_a_parser_that_does_not_read_what_the_template_writes(model, qwen_like_tokenizer, monkeypatch):
    monkeypatch.setitem(tool_parser.ToolParser._registry, "own", LlamaParser)
    report = examine(model(qwen_like_tokenizer), config("own"), SCHEMAS)
    assert only(report.problems).endswith("; hermes would: actor_rollout_ref.rollout.multi_turn.format=hermes")
    report = examine(model(qwen_like_tokenizer, SILENT), config("own"), SCHEMAS)
    assert report.warnings[1].endswith("it must have learned the form of own, or be shown it in prompts")


SILENT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_that_is_silent_about_tools(model, qwen_like_tokenizer):
    report = examine(model(qwen_like_tokenizer, SILENT), config(), SCHEMAS)
    assert report.problems == []
    prompts, calls = report.warnings
    assert prompts.startswith("the chat template is silent about tools: no prompt tells the model of them.")
    assert calls.startswith("the chat template does not show how the model writes calls")
    assert '<tool_call>\\n{"name": "search", "arguments": {"query": "query of 北京 < Größe", "n": 3}}' in calls
    # Calls as the format has them are found all the same.
    assert section(report, "Found")["calls"].startswith("4 of 4, 4 as they were written")


def test_a_template_that_tells_of_some_tools(model, qwen_like_tokenizer):
    template = CHAT_TEMPLATE.replace("{%- for tool in tools %}", "{%- for tool in tools[:1] %}")
    report = examine(model(qwen_like_tokenizer, template), config(), SCHEMAS)
    assert only(report.warnings).endswith("not, or not with all of their parameters: zoom")


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{% for message in messages %}", "cannot render a prompt with tools: TemplateSyntaxError: Unexpected end"),
        ("{{ nothing.at.all }}", "cannot render a prompt with tools: UndefinedError: 'nothing' is undefined"),
        ("{{ raise_exception('no tools here') }}", "cannot render a prompt with tools: TemplateError: no tools here"),
        (
            "{% if messages[-1].role == 'tool' %}{{ raise_exception('which role?') }}{% endif %}" + SILENT,
            "veRL cannot go on after a tool's answer, with this model's chat template and model_type: "
            "TemplateError: which role?",
        ),
        (None, "the model has no chat template, neither as chat_template.jinja nor in tokenizer_config.json"),
    ],
)
def test_templates_that_fail(model, qwen_like_tokenizer, template, problem):
    report = examine(model(qwen_like_tokenizer, template), config(), SCHEMAS)
    assert problem in only(report.problems)
    assert "\n" not in only(report.problems)


def test_what_a_stranger_s_template_says_steers_no_terminal(model, qwen_like_tokenizer):
    template = "{{ raise_exception('\\x1b[2J\\x1b]0;title\\x07 gone') }}"
    problem = only(examine(model(qwen_like_tokenizer, template), config(), SCHEMAS).problems)
    assert "TemplateError: \\x1b[2J\\x1b]0;title\\x07 gone" in problem
    assert problem.isprintable()


def test_a_template_of_the_configuration_replaces_the_model_s(model, qwen_like_tokenizer):
    path = model(qwen_like_tokenizer, SILENT)
    assert examine(path, config(template=CHAT_TEMPLATE), SCHEMAS).warnings == []


def test_options_of_the_template_are_those_of_the_data(model, qwen_like_tokenizer):
    path = model(qwen_like_tokenizer, CHAT_TEMPLATE.replace("{%- if tools %}", "{%- if tools and not quiet %}"))
    assert examine(path, config(), SCHEMAS).warnings == []
    report = examine(path, config(apply_chat_template_kwargs={"quiet": True}), SCHEMAS)
    assert "silent about tools" in only(report.warnings)


def test_markers_of_several_tokens(model, spelled_tokenizer):
    report = examine(model(spelled_tokenizer), config(), SCHEMAS)
    assert report.problems == []
    assert only(report.warnings).startswith("<tool_call> and </tool_call> are no single tokens of this tokenizer.")
    assert section(report, "Tool format hermes")["<tool_call>"].split(",")[0].endswith("tokens")
    assert section(report, "Found")["calls"].startswith("4 of 4, 4 as they were written")


def test_calls_in_thoughts(model, qwen_like_tokenizer, monkeypatch):
    path = model(qwen_like_tokenizer, CHAT_TEMPLATE + "{# <think> #}")
    report = examine(path, config(), SCHEMAS)
    assert only(report.warnings).startswith("a call in a thought is executed, and is a tool-use step: veRL's parser of")
    real = tool_format.find_calls

    def missed(template, fmt, text):
        found = real(template, fmt, text)
        return Found([], found.verls) if "<think>" in text else found

    monkeypatch.setattr(tool_format, "find_calls", missed)
    report = examine(path, config(), SCHEMAS)
    assert only(report.warnings) == "a call in a thought is found by veRL, not by this reader: please report it"


def test_calls_in_thoughts_of_a_format_that_knows_thoughts(model, qwen_like_tokenizer):
    report = examine(model(qwen_like_tokenizer, SILENT), config("gpt-oss"), SCHEMAS)
    assert section(report, "Tool format gpt-oss")["a call in a thought"] == "is not found, and not executed"
    assert section(report, "Found")["calls"].startswith("4 of 4, 4 as they were written")


def test_control_tokens_in_tools_texts(model, qwen_like_tokenizer):
    path = model(qwen_like_tokenizer)
    rows = section(examine(path, config(), SCHEMAS), "Control tokens")
    assert rows["in a tool's text"].startswith("10 kinds would be control tokens: <|im_end|>, <|endoftext|>, ")
    assert rows["with tapo_tool_agent"] == "all are taken out"
    warning = only(examine(path, config(loop="tool_agent"), SCHEMAS).warnings)
    assert "a tool's text that holds <|im_end|>, <|endoftext|> and 8 more can end its own answer" in warning


def test_control_tokens_that_would_remain(model):
    from conftest import _byte_level
    from tokenizers import AddedToken, normalizers

    tokenizer = _byte_level([])
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    tokenizer.add_tokens([AddedToken("<|hidden|>", special=False, normalized=True)])
    warning = only(examine(model(tokenizer), config(), SCHEMAS).warnings[1:])
    assert warning.startswith("tapo_tool_agent leaves <|hidden|> in tools' texts, of which the tokenizer makes control")


def test_prompts_that_are_too_long(model, qwen_like_tokenizer):
    warning = only(examine(model(qwen_like_tokenizer), config(prompt_length=100), SCHEMAS).warnings)
    assert re.match(
        r"a prompt has \d+ tokens with the tools and .* data.max_prompt_length is 100: veRL leaves", warning
    )


def test_turns_that_no_engine_would_end(model, qwen_like_tokenizer):
    path = model(qwen_like_tokenizer, CHAT_TEMPLATE.replace("<|im_end|>", "<|vision_end|>"))
    assert "the chat template ends turns with <|vision_end|> (" in only(examine(path, config(), SCHEMAS).warnings)


def test_a_reader_that_misses_calls_is_a_problem(model, qwen_like_tokenizer, monkeypatch):
    """The examination finds its own parts broken."""
    path, real = model(qwen_like_tokenizer), conversation.parse_steps
    monkeypatch.setattr(conversation, "parse_steps", lambda *a: real(*a)._replace(steps=real(*a).steps[1:]))
    assert examine(path, config(), SCHEMAS).problems == [
        "hermes: of 4 calls that were written, 3 were found here (0 as they were written), and 4 executed by veRL"
    ]

    def all_well(*given):
        return real(*given)._replace(steps=[step._replace(ok=True) for step in real(*given).steps])

    monkeypatch.setattr(conversation, "parse_steps", all_well)
    assert only(examine(path, config(), SCHEMAS).warnings).startswith("1 of 4 calls are not paired with their answers")


def test_images_of_tools(tmp_path):
    save_processor(tiny_tokenizer(), tmp_path, "qwen3_vl")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_vl", "vision_config": {}}))
    report = examine(str(tmp_path), config(), SCHEMAS)
    assert report.problems == []
    assert section(report, "Model")["processor"] == "Qwen3VLProcessor"
    assert section(report, "Found")["images"] == "1 of 1 in tools' answers"
    (tmp_path / "processor_config.json").write_text("{")
    report = examine(str(tmp_path), config(), SCHEMAS)
    assert only(report.problems).startswith("veRL cannot load the model's processor, and would go on without images: ")


class TestLoading:
    """A line for each way in which a model cannot be had."""

    def problem(self, name):
        problem = only(examine(str(name), config(), SCHEMAS).problems)
        assert "\n" not in problem
        return problem

    @pytest.mark.parametrize("name", ["/no/where", "./nowhere", "no/where/at/all", "~nobody/model", "../x"])
    def test_no_folder(self, name):
        assert self.problem(name) == f"--model {name}: there is no such folder"

    def test_a_file(self, model, qwen_like_tokenizer, tmp_path):
        model(qwen_like_tokenizer)
        path = tmp_path / "tokenizer.json"
        assert self.problem(path) == f"--model {path} is a file: name the folder that it is in"

    def test_no_tokenizer(self, tmp_path):
        (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
        assert self.problem(tmp_path).startswith(f"--model {tmp_path} has no tokenizer: none of tokenizer.json, ")

    @pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json"])
    def test_a_damaged_file(self, model, qwen_like_tokenizer, tmp_path, name):
        model(qwen_like_tokenizer)
        path = tmp_path / name
        path.write_text(path.read_text()[:-20])
        assert self.problem(tmp_path).startswith(f"{path} is damaged (")
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
        assert self.problem(tmp_path) == f"{path} is a pointer of Git LFS and not the file itself: git lfs pull"

    def test_json_that_is_no_tokenizer(self, model, qwen_like_tokenizer, tmp_path):
        model(qwen_like_tokenizer)
        (tmp_path / "tokenizer.json").write_text('{"a": 1}')
        assert self.problem(tmp_path).startswith(f"--model {tmp_path}: its tokenizer cannot be loaded: ")

    def test_no_config(self, model, qwen_like_tokenizer, tmp_path):
        model(qwen_like_tokenizer)
        (tmp_path / "config.json").unlink()
        assert self.problem(tmp_path).startswith(f"{tmp_path} has no config.json, without which veRL does not start")

    def test_a_name_is_looked_up_and_nothing_of_it_run(self, monkeypatch):
        import verl.utils

        asked = []

        def hub(name, **options):
            asked.append((name, options))
            raise OSError("no\nsuch model")

        monkeypatch.setattr(verl.utils, "hf_tokenizer", hub)
        assert self.problem("org/name") == (
            "--model org/name is no folder here, and cannot be had from the Hugging Face hub: no such model"
        )
        assert asked == [("org/name", {"trust_remote_code": False, "local_files_only": False})]

    def test_a_tokenizer_that_loses_text(self, model, qwen_like_tokenizer, monkeypatch):
        monkeypatch.setattr(loading, "_SAMPLE", "one\u0000two")
        path = model(qwen_like_tokenizer)
        monkeypatch.setattr(type(qwen_like_tokenizer), "decode", lambda *a, **k: "onetwo")
        assert "does not give a text back: 'one\\x00two' comes out as 'onetwo'" in self.problem(path)


def test_a_terminal_that_knows_ascii_alone(model, qwen_like_tokenizer, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii", write_through=True))
    assert main(["doctor", "--model", model(qwen_like_tokenizer), "data.max_prompt_length=4000"]) == 0
    assert b"query of \\u5317\\u4eac < Gr\\xf6\\xdfe" in written.getvalue()


def test_the_command(model, qwen_like_tokenizer, capsys):
    path = model(qwen_like_tokenizer)
    given = ["doctor", "--model", path, "actor_rollout_ref.rollout.n=8", "data.max_prompt_length=4000"]
    assert main(given) == 0
    out = capsys.readouterr().out
    assert "tools in the prompt  search, with their parameters (made up: the configuration names no tools)" in out
    assert "calls    2 of 2, 2 as they were written; veRL executed 2" in out
    assert main([*given, "actor_rollout_ref.rollout.multi_turn.format=glm"]) == 1
    out = capsys.readouterr().out
    assert "hermes would: actor_rollout_ref.rollout.multi_turn.format=hermes" in out.split("Problems:")[1]
    assert out.endswith("TAPO would not run.\n")


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize("condition", ["true", "messages | selectattr('role', 'equalto', 'tool') | list"])
def test_a_template_that_never_ends(model, qwen_like_tokenizer, condition):
    path = model(qwen_like_tokenizer, f"{{% if {condition} %}}{ENDLESS}{{% endif %}}{CHAT_TEMPLATE}")
    code = "import sys; from verl_tapo import cli; cli._MODEL_SECONDS = 8.0; sys.exit(cli.main(sys.argv[1:]))"
    given = ["doctor", "--model", path, "data.max_prompt_length=4000"]
    ended = subprocess.run([sys.executable, "-c", code, *given], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 1
    assert ended.stdout.startswith("Versions:")
    assert ended.stderr.endswith(
        f"after 8 s {path} is still being examined: its chat template or tokenizer does not end\n"
    )


TOLD = {
    "qwen3": ([], ["a call in a thought is executed"]),
    "llama3": ([], ["is silent about tools", "does not show how the model writes calls"]),
    "deepseek_v3": (["nor does any format of veRL. Register a parser"], ["is silent about tools", "no single tokens"]),
    "gpt_oss": (["has no chat template"], []),
    "gemma3": (
        ["Conversation roles must alternate"],
        ["is silent about tools", "does not show how the model writes calls"],
    ),
}


@pytest.mark.parametrize(
    "family", [name if name == "qwen3" else pytest.param(name, marks=pytest.mark.long) for name in TOLD]
)
def test_real_tokenizers(tmp_path, monkeypatch, family):
    """With the chat templates that their packages carry."""
    monkeypatch.undo()  # the tokenizer may have to be fetched
    family, (problems, warnings) = FAMILIES[family], TOLD[family]
    for file in folder(family.package).iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family.model_type}))
    report = examine(str(tmp_path), config("gpt-oss" if family.package == "gptoss" else "hermes"), SCHEMAS)
    for told, expected in ((report.problems, problems), (report.warnings, warnings)):
        assert len(told) == len(expected), told
        assert all(part in message for part, message in zip(expected, told, strict=True)), told
    assert section(report, "Control tokens")["with tapo_tool_agent"] == "all are taken out"


@pytest.mark.long
def test_a_real_tokenizer_that_transformers_takes_for_another(tmp_path, monkeypatch):
    monkeypatch.undo()
    for file in folder("deepseek_v3").iterdir():
        (tmp_path / file.name).symlink_to(file)
    problem = only(examine(str(tmp_path), config(), SCHEMAS).problems)
    assert "which transformers loads as LlamaTokenizer, does not give a text back: 'Größe, 北京" in problem
