"""Audits in the shape that `verl_tapo.audit.html.write_report` takes, made up from a seed."""

from __future__ import annotations

import json
import random
from collections import Counter
from typing import Any

THETA, ALPHA_MIN, BETA = 0.8, 0.2, 0.8
PLACES = "Oman Jersey Madagascar Taiwan Chile Latvia Bhutan Gabon Peru Niger Malta Fiji".split()


def audit_result(
    groups: int = 12, rollouts: int = 8, steps: int = 6, filler: int = 0, seed: int = 0, **changes: Any
) -> dict[str, Any]:
    """``groups`` prompt groups of ``rollouts`` trajectories spread over ``steps`` training steps.

    ``filler`` characters of reasoning are added to every trajectory; ``changes`` replace keys of the result.
    """
    chance = random.Random(seed)
    made = [_group(k, k % steps + 1, rollouts, filler, chance) for k in range(groups)]
    made.sort(key=lambda group: -group["interest"])
    by_step = {step: [g for g in made if g["step"] == step] for step in sorted({g["step"] for g in made})}
    calls = [c for g in made for t in g["trajectories"] for c in t["calls"]]
    failing = [c for c in calls if c["role"] == "failing" and c["similarity"] is not None]
    edges = [k / 20 for k in range(21)]
    return {
        "version": 1,
        "title": "flags-and-facts, GRPO",
        "created": "2026-11-23T05:00:00+00:00",
        "sources": ["out/vanilla/rollouts"],
        "settings": {
            "beta": BETA,
            "theta": THETA,
            "alpha_min": ALPHA_MIN,
            "token_scope": "step",
            "scope": "group",
            "use_support": True,
            "clip": True,
            "tools": None,
            "base_estimator": "grpo",
        },
        "steps": [{"step": step, **_figures(of)} for step, of in by_step.items()],
        "totals": _figures(made),
        "tools": {tool: _figures(made, tool) for tool in sorted({c["tool"] for c in calls})},
        "similarity_histogram": {
            "edges": edges,
            **{
                gate: [
                    sum(c["gate"] == gate and min(19, int(c["similarity"] * 20)) == k for c in failing)
                    for k in range(20)
                ]
                for gate in ("corrected", "below_alpha", "below_theta")
            },
        },
        "support_alpha": [[c["support"], c["similarity"], c["gate"]] for c in failing if c["gate"] != "below_theta"][
            :3000
        ],
        "sweeps": [
            {
                "beta": beta,
                "theta": theta,
                "alpha_min": ALPHA_MIN,
                "token_share": 0.1 * beta,
                "corrected_steps": sum(c["similarity"] >= theta for c in failing),
                "mean_lifted_advantage": -0.9 + 0.6 * beta,
            }
            for beta in (0.2, 0.5, 0.8, 1.0)
            for theta in (0.6, 0.7, 0.8, 0.9, 0.95)
        ],
        "warnings": [
            {
                "code": "dead_tool",
                "level": "info",
                "text": "zoom is never a witness.",
                "advice": "Its calls succeed nowhere: look at its results in the trajectories below.",
            },
            {
                "code": "lucky_witnesses",
                "level": "warning",
                "text": "In 2 of 6 steps rollouts that hold a witness succeed no more often than their prompt group.",
                "advice": "TAPO can lift wrong calls there. Reward the use of evidence, or compare with beta = 0.",
            },
        ],
        "problems": [{"file": "rollouts/4.jsonl", "line": 17, "reason": "not JSON: the line is cut short"}],
        "skipped": 1,
        "groups": made,
        **changes,
    }


def _group(number: int, step: int, rollouts: int, filler: int, chance: random.Random) -> dict[str, Any]:
    place = PLACES[number % len(PLACES)]
    question = f"What is the internet domain of the country with this flag? (photo {number})"
    right = [chance.random() < 0.25 + 0.05 * step for _ in range(rollouts)]
    share = sum(right) / rollouts
    spread = (share * (1 - share)) ** 0.5 or 1.0
    trajectories = [
        _trajectory(f"{number}_{t}", ok, (ok - share) / spread, place, filler, chance) for t, ok in enumerate(right)
    ]
    winners = [t for t, trajectory in enumerate(trajectories) if trajectory["advantage"] > 0]
    for trajectory in trajectories:
        for call in trajectory["calls"]:
            _judge(call, trajectory, trajectories, winners)
    corrected = sum(c["gate"] == "corrected" for t in trajectories for c in t["calls"])
    return {
        "step": step,
        "uid": f"6b264acc-{number:04d}",
        "prompt": f"system\nAnswer the question about the image.\nuser\n{question}\nassistant\n",
        "ground_truth": [f".{place[:2].lower()}"],
        "interest": float(corrected),
        "trajectories": trajectories,
    }


def _trajectory(name: str, right: bool, advantage: float, place: str, filler: int, chance: random.Random) -> Any:
    text, calls = "", []
    wrong_place = chance.choice(PLACES)
    query = {True: f"internet domain of {place}", False: f"{wrong_place} language"}[right or chance.random() < 0.6]
    plan: list[tuple[str, dict[str, Any], str]] = [("image_search", {"image": 1}, f"This is the flag of {place}.")]
    if chance.random() < 0.3:
        plan.append(("zoom", {"image": 1, "bbox": [10, 20, 110, chance.choice([120, 190])]}, "<image>"))
    result = "\n".join(f"[{k}] The internet domain of {where} is .xx." for k, where in enumerate(PLACES[:5], start=1))
    plan.append(("text_search", {"query": query + chance.choice(["", "", " please"])}, result))
    for tool, arguments, answer in plan:
        start = len(text)
        text += f"I should use {tool} to find out more. 🔎 " + "Let me think. " * (filler // 14 // len(plan))
        call_start = len(text)
        text += f"<tool_call>\n{json.dumps({'name': tool, 'arguments': arguments})}\n</tool_call>"
        span = [start, len(text)]
        ok = chance.random() > 0.06
        answer = answer if ok else "Error: the service did not answer in 10 s"
        text += f"\nuser\n<tool_response>\n{answer}\n</tool_response>\nassistant\n"
        calls.append(
            {
                "tool": tool,
                "arguments": arguments,
                "result": answer,
                "ok": ok,
                "status": "ok" if ok else "timeout",
                "span": span,
                "call_span": [call_start, span[1]],
            }
        )
    text += f"The internet domain is <answer> {'.' + place[:2].lower() if right else 'English'} </answer>"
    return {"name": name, "score": float(right), "success": right, "advantage": advantage, "text": text, "calls": calls}


def _judge(call: dict[str, Any], holder: Any, siblings: list[Any], winners: list[int]) -> None:
    """Fills in what the rule says of a call; similarity is 1, 0.9 or 0.5, by the words of the query."""
    advantage = holder["advantage"]
    call.update(
        role="none",
        gate="",
        matched=False,
        similarity=None,
        support=None,
        alpha=None,
        reference_advantage=None,
        transfer=0.0,
        before=advantage,
        after=advantage,
        witness=None,
    )
    if not call["ok"] or advantage == 0:
        return
    call["role"] = "witness" if advantage > 0 else "failing"
    if advantage > 0:
        return
    found = [
        (_similarity(call, other), t, c)
        for t in winners
        for c, other in enumerate(siblings[t]["calls"])
        if other["tool"] == call["tool"] and other["ok"]
    ]
    if not found:
        call["gate"] = "no_witness"
        return
    similarity, t, c = max(found, key=lambda item: item[0])
    holders = {t for s, t, _ in found if s == similarity}
    support, reference = len(holders) / len(winners), sum(siblings[t]["advantage"] for t in holders) / len(holders)
    call.update(
        similarity=similarity, support=support, reference_advantage=reference, witness={"trajectory": t, "call": c}
    )
    if similarity < THETA:
        call.update(gate="below_theta", support=None, reference_advantage=None)  # its witness is the nearest call
        return
    call["alpha"] = similarity * support
    call["gate"] = "corrected" if call["alpha"] >= ALPHA_MIN else "below_alpha"
    call["matched"] = True
    if call["gate"] == "corrected":
        call["transfer"] = BETA * call["alpha"] * reference
        call["after"] = min(0.0, advantage + call["transfer"])


def _similarity(call: dict[str, Any], other: dict[str, Any]) -> float:
    if call["arguments"] == other["arguments"]:
        return 1.0
    if call["tool"] != "text_search":
        return 0.6
    words, others = (set(c["arguments"]["query"].split()) - {"please"} for c in (call, other))
    return 0.9 if words == others else round(0.4 + 0.5 * len(words & others) / len(words | others), 2)


def _figures(groups: list[Any], tool: str | None = None) -> dict[str, Any]:
    trajectories = [t for g in groups for t in g["trajectories"]]
    calls = [c for t in trajectories for c in t["calls"] if tool in (None, c["tool"])]
    roles, gates = Counter(c["role"] for c in calls), Counter(c["gate"] for c in calls)
    matched = [c for c in calls if c["gate"] in ("corrected", "below_alpha")]

    def mean(key: str) -> float | None:
        return sum(c[key] for c in matched) / len(matched) if matched else None

    return {
        "prompts": len(groups),
        "trajectories": len(trajectories),
        "failing_trajectories": sum(t["advantage"] < 0 for t in trajectories),
        "correctable_trajectories": sum(any(c["gate"] == "corrected" for c in t["calls"]) for t in trajectories),
        "calls": len(calls),
        "failing_steps": roles["failing"],
        "misassigned_steps": len(matched),
        "corrected_steps": gates["corrected"],
        "token_share": 0.3 * gates["corrected"] / len(calls),
        "success_rate": sum(t["success"] for t in trajectories) / len(trajectories),
        "lift": 0.4 - gates["corrected"] / len(calls),
        "failed_calls": sum(not c["ok"] for c in calls),
        "malformed_calls": 0,
        **{key: mean(key) for key in ("similarity", "support", "alpha", "transfer")},
    }
