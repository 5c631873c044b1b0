"""Agent loops that write down what they did, for the tests to look at, and that seed their draws."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

from verl.experimental.agent_loop.tool_agent_loop import ToolAgentLoop

from verl_tapo.rollout.tool_agent import TapoToolAgentLoop

FILE_VARIABLE = "WITNESSED_TRAJECTORIES"


class _WitnessedTool:
    """A tool, and a note of each execution."""

    def __init__(self, tool: Any, executed: list[tuple[str, Any]]) -> None:
        self._tool, self._executed = tool, executed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tool, name)

    async def execute(self, instance_id: str, parameters: Any, **kwargs: Any) -> Any:
        self._executed.append((self._tool.name, parameters))
        return await self._tool.execute(instance_id, parameters, **kwargs)


class _WitnessedServer:
    """VeRL's client of the rollout servers, and a note of how much of each prompt came from the prefix cache."""

    def __init__(self, client: Any, cached: list[int]) -> None:
        self._client, self._cached = client, cached

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    async def generate(self, **kwargs: Any) -> Any:
        output = await self._client.generate(**kwargs)
        self._cached.append(output.extra_fields.get("num_cached_tokens", 0))  # of vLLM
        return output


class _Witness:
    """Before an agent loop of veRL's; one instance runs one trajectory."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cached: list[int] = []
        self.server_manager: Any = _WitnessedServer(self.server_manager, self.cached)
        self.executed: list[tuple[str, Any]] = []
        self.tools: dict[str, Any] = {name: _WitnessedTool(tool, self.executed) for name, tool in self.tools.items()}

    async def run(self, sampling_params: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        rollout = f"{kwargs['index']}/{kwargs['session_id']}"
        seed = zlib.crc32(rollout.encode())
        Path(os.environ[FILE_VARIABLE]).touch()  # generation has begun
        output = await super().run({**sampling_params, "seed": seed}, *args, **kwargs)  # type: ignore[misc]
        trajectory = {
            "rollout": rollout,
            "step": output.extra_fields["global_steps"],
            "prompt": list(output.prompt_ids),
            "response": list(output.response_ids),
            "mask": list(output.response_mask),
            "cached": self.cached,
            "executed": self.executed,
            "record": output.extra_fields.get("tapo_steps"),
        }
        with open(os.environ[FILE_VARIABLE], "a") as file:  # one process runs all agent loops
            file.write(json.dumps(trajectory) + "\n")
        return output


class WitnessedTapoToolAgentLoop(_Witness, TapoToolAgentLoop):  # type: ignore[misc]
    """As ``tapo_tool_agent``."""


class WitnessedToolAgentLoop(_Witness, ToolAgentLoop):  # type: ignore[misc]
    """As ``tool_agent``."""
