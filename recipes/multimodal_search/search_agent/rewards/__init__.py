"""The reward, as veRL calls it.

    reward:
      custom_reward_function:
        path: pkg://search_agent.rewards
        name: compute_score
        reward_kwargs:
          preset: mmsearch_r1            # outcome (default), mmsearch_r1, sensenova_mars, deepeyes
          match: [exact, judge]          # exact, substring (default: these two), f1, judge, which is asked last
          judge: {model: NAME, base_url: "http://HOST:8000/v1", cache: /local/disk/judge.sqlite}

`settings` has all keys. The score is::

    accuracy * acc * penalty + format * format + tool_bonus * (right, and a tool was used)

with the weights of that name. What tools failed to do through no fault of the model never lowers it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from search_agent.rewards.score import Reward
from search_agent.rewards.settings import PRESETS, RewardSettings, read_settings
from search_backends.answers.judge import JudgeOutage, NoVerdict

__all__ = ["PRESETS", "JudgeOutage", "NoVerdict", "Reward", "RewardSettings", "compute_score", "read_settings"]


async def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: Mapping[str, Any] | None = None,
    *,
    reward_router_address: str | None = None,
    reward_model_tokenizer: Any = None,
    **settings: Any,
) -> dict[str, float]:
    """The reward of a trajectory and its parts: finite numbers, always the same keys.

    ``score``; ``acc``, 0 or 1, which TAPO reads as success; ``format``, ``answered``,
    ``judge_used`` and ``judge_failed``, 0 or 1; ``f1``, the best over accepted answers, whichever
    rules match; ``penalty``, the factor applied; and the trajectory's numbers of ``tool_calls``,
    ``model_faults`` and ``infrastructure_faults``.

    Args:
        data_source: not used.
        solution_str: the response, all turns, decoded without special tokens.
        ground_truth: see `answers.accepted_answers`.
        extra_info: ``tapo_steps`` is the record of calls; ``question`` is for the judge.
        reward_router_address: veRL's, of its own reward model: the judge, where none has a ``base_url``.
        reward_model_tokenizer: veRL's; not used.
        settings: ``reward_kwargs``.

    Raises:
        ValueError: A setting is wrong, or the row has no accepted answer, or no question for the judge.
        JudgeOutage
    """
    reward = _reward(json.dumps(settings, sort_keys=True, default=_plain), reward_router_address)
    return await reward.score(solution_str, ground_truth, extra_info if isinstance(extra_info, Mapping) else {})


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else list(value)  # OmegaConf's


@lru_cache(maxsize=8)
def _reward(settings: str, router_address: str | None) -> Reward:
    """Returns the reward of this process. Its trajectories share connections, cache and the state
    of the judge."""
    return Reward(read_settings(json.loads(settings)), router_address)
