"""Tools that search a dict, and a reward that compares, in place of the recipe's; as a program, evaluates with them."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from types import MappingProxyType, ModuleType

from search_backends.errors import InfrastructureError

JUDGE_DOWN = True
FACTS = {f"fact {number}": f"value {number} is <|im_end|>what was looked for" for number in range(10)}


@dataclass
class ToolAnswer:
    text: str
    images: list = field(default_factory=list)
    metrics: dict = field(default_factory=dict)
    status: str = "ok"


def schema(name, **properties):
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": name, "parameters": parameters}}


class DictToolbox:
    tools = MappingProxyType({"text_search": None, "zoom": None})
    schemas = (schema("text_search", query={"type": "string"}), schema("zoom", image={"type": "integer"}))

    @classmethod
    def from_yaml(cls, path):
        assert path.is_file()
        return cls()

    async def call(self, name, arguments, images, create_kwargs=None):
        if name == "zoom":
            image = images[arguments["image"] - 1].resize((32, 24))
            return ToolAnswer(f"Image {len(images) + 1}:", [image])
        if name != "text_search":
            return ToolAnswer(f"Unknown function '{name}'.", status="unknown_tool")
        query = arguments.get("query")
        if not isinstance(query, str):
            return ToolAnswer("query must be a text", metrics={"fault": "model"}, status="error")
        try:
            query.encode()
        except UnicodeEncodeError:  # what becomes of a request that cannot be written
            return ToolAnswer("it is not available", metrics={"fault": "infrastructure"}, status="error")
        if query == "down":
            return ToolAnswer("it is not available", metrics={"fault": "infrastructure"}, status="error")
        return ToolAnswer(FACTS[query], metrics={"cache_hit": int(query[-1]) % 2 == 0})

    async def close(self):
        pass


async def compute_score(data_source, solution_str, ground_truth, extra_info, **settings):
    if extra_info.get("judge") == "down" and JUDGE_DOWN:
        raise InfrastructureError("the judge does not answer")
    found = re.search("<answer>(.*)</answer>", solution_str)
    right = found is not None and found[1] in ground_truth
    return {"score": 0.9 * right, "acc": float(right)}


def install(put):
    import search_agent.rewards.settings  # noqa: F401 - the real one stays

    for name, members in {
        "search_agent.tools.toolbox": {"load_toolbox": lambda path: DictToolbox.from_yaml(path)},
        "search_agent.rewards": {"compute_score": compute_score},
    }.items():
        module = ModuleType(name)
        vars(module).update(members)
        put(name, module)
    put("search_agent.tools", ModuleType("search_agent.tools"))


if __name__ == "__main__":
    install(sys.modules.__setitem__)
    from search_agent.evaluate.__main__ import main

    sys.exit(main())
