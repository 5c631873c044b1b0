"""VeRL's data set, which adds the system prompt and the tools' values as rows are loaded."""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf
from verl.utils.dataset.rl_dataset import RLHFDataset

from search_agent.prompts import create_kwargs, system_prompt, with_system
from search_agent.tools.toolbox import load_tools


class SearchDataset(RLHFDataset):  # type: ignore[misc]
    """A data set for ``data.custom_cls``. It reads ``data.tool_config_path`` and
    ``data.tool_settings``, ``{tool: {name: value}}``.

    Raises:
        ValueError, FileNotFoundError: The tools cannot be loaded, or a setting is wrong.
    """

    def __init__(self, data_files: Any, tokenizer: Any, config: Any, processor: Any = None, max_samples: int = -1):
        tools = load_tools(config.tool_config_path) if config.get("tool_config_path") else []
        # The tools themselves are not kept, because filtering processes get a copy of this.
        self._tools = [tool.name for tool in tools]
        settings: Any = config.get("tool_settings") or {}
        self._settings = OmegaConf.to_container(settings, resolve=True) if OmegaConf.is_config(settings) else settings
        self._prompt = system_prompt(tools, self._settings)
        super().__init__(data_files, tokenizer, config, processor, max_samples)

    def _build_messages(self, example: dict[str, Any], key: str) -> Any:
        return super()._build_messages({**example, key: with_system(example[key], self._prompt)}, key)

    def __getitem__(self, item: int) -> dict[str, Any]:
        row: dict[str, Any] = super().__getitem__(item)
        values = {
            tool: {"create_kwargs": create_kwargs(row["extra_info"], tool, self._settings)} for tool in self._tools
        }
        row["tools_kwargs"] = {**(row["tools_kwargs"] or {}), **values}
        return row
