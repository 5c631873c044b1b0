"""Rollouts of a prompt whose answer is known, and what can be told of their tools' answers."""

from verl_tapo.selftest.rollouts import OTHER, SEARCH, FakeRollout

LUXEMBOURG = {"style": "rule", "ground_truth": ["Luxembourg"]}


def grounded_group(tokenizer):
    """Six trajectories of a prompt whose answer is Luxembourg, with what can be told of each call's answer."""
    page, other = "Luxembourg is a country.", "Nothing of it."
    asks = ("text_search", {"query": "is it Luxembourg"})

    def row(ok, *turns):
        rollout = FakeRollout(tokenizer)
        for call, answer in turns:
            rollout.turn("Look.", [call], [answer])
        return rollout.answer("Luxembourg" if ok else "Lima"), ok, "u0"

    rows = [
        row(True, (SEARCH, other), (OTHER, page)),
        row(True, (SEARCH, other)),
        row(True),
        row(False, (SEARCH, page), (OTHER, other)),
        row(False, (SEARCH, other)),
        row(False, (asks, page)),
    ]
    sights = [[False, True], [False], [], [True, False], [False], [None]]
    for (rollout, _, _), seen in zip(rows, sights, strict=True):
        for step, sight in zip(rollout.record.steps, seen, strict=True):
            step.seen = sight
    return rows


GROUNDING_METRICS = {
    "tapo/grounding/told": 4 / 6,
    "tapo/grounding/grounded_successes": 1 / 2,
    "tapo/grounding/grounded_failures": 1 / 2,
    "tapo/grounding/never_found": 2 / 4,
    "tapo/grounding/tool/text_search/found": 2 / 6,
}
"""Of these."""
