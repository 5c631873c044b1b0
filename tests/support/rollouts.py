"""What can be told of rollouts: of a prompt whose answer is known, and of how likely their tokens were."""

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


def silent_group(tokenizer):
    """Four trajectories of that prompt without calls, two of them right."""
    rows = [(FakeRollout(tokenizer).answer("Luxembourg" if ok else "Lima"), ok, "u0") for ok in (1, 1, 0, 0)]
    for rollout, _, _ in rows:
        rollout.record.recognisable = True
    return rows


GROUNDING_METRICS = {
    "tapo/grounding/told": 4 / 6,
    "tapo/grounding/grounded_successes": 1 / 2,
    "tapo/grounding/grounded_failures": 1 / 2,
    "tapo/grounding/never_found": 2 / 4,
    "tapo/grounding/tool/text_search/found": 2 / 6,
}
"""Of these."""

_WON, _LOST = 5 / 6 / (1 / 6) ** 0.5, -1 / 6 / (1 / 6) ** 0.5
GROUNDED_ADVANTAGES = [[_WON], [_LOST, 0.0], [_LOST], [_LOST, 0.0], [_LOST, 0.0], [_LOST]]
"""The values on the policy tokens of each of these, with all three switches and ``alpha_min=1``.

The lucky successes, with a call and without, fail, so that of six only the first is rewarded. Nothing is paid for a
search that the first has made, too, nor for the one that found the answer.
"""


def log_probs_of(rollout, whole=False):
    """Log-probs of a rollout's tokens: -0.25 of calls and the end of their turn, -0.5 of thoughts, -2 of answers, and
    -100 of what was not sampled.

    ``whole``: whether all of it comes before the last call, which is in another output of the rollout.
    """
    steps = rollout.record.steps
    last = len(rollout.ids) if whole else max((step.turn[1] for step in steps), default=0)
    found = [-0.5 if place < last else -2.0 for place in range(len(rollout.ids))]
    for step in steps:
        found[step.call[0] : step.turn[1]] = [-0.25] * (step.turn[1] - step.call[0])  # in which calls follow each other
    return [value if bit else -100.0 for value, bit in zip(found, rollout.mask, strict=True)]


NLL_METRICS = {"tapo/nll/calls": 0.25, "tapo/nll/thoughts": 0.5, "tapo/nll/answers": 2.0}
"""Of rollouts with these."""


def token_shares(rows):
    """Shares of policy tokens with these log-probs."""
    values = [value for log_probs in rows for value in log_probs if value != -100]
    kinds = {"calls": -0.25, "thoughts": -0.5, "answers": -2.0}
    return {f"tapo/tokens/{kind}": values.count(value) / len(values) for kind, value in kinds.items()}
