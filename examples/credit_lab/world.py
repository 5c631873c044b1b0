"""A small world for a search agent: its prompts, the tools' answers, and the criterion of success.

A prompt shows where something stands in a picture and names one or more relations (capital of the river of ...). The
agent searches by image, which names the first entity, then by text, once a relation, and answers with the last entity.
Every fact is drawn anew for each prompt, so nothing can be learnt by heart. One turn of the agent is

    thought tool parameters... end        (4, 6 and 4 tokens for image search, text search and answer)

and the tool's answer, two tokens, follows. Of an answer's two entities the first is the right one, the second a
distractor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from verl_tapo import ToolStep

ENTITIES = [
    name + ending
    for name in "norlan sumir kefald ombari vetruz jalqu pyrwen tosgim albrec draxen hulvat cinpor".split()
    for ending in ("da", "do")  # twins: spelt alike, not alike
]
RELATIONS = ["capital", "highest mountain", "founder", "old bridge", "museum", "anthem"]
THOUGHTS = ["look", "read", "know"]
TOOLS = ["image_search", "text_search", "answer"]
REGIONS = 8
DAYS = [7, 8, 9, 10]
"""The possible time spans of a text search; their values do not matter."""
PAD, BEGIN, END, ERROR = range(4)
THOUGHT = 4
TOOL = THOUGHT + len(THOUGHTS)
REGION = TOOL + len(TOOLS)
RELATION = REGION + REGIONS
DAY = RELATION + len(RELATIONS)
ENTITY = DAY + len(DAYS)
ENTITY_COUNT = len(ENTITIES)
VOCABULARY_SIZE = ENTITY + ENTITY_COUNT
LONGEST_TURN = 6
LOOK, READ, KNOW = range(3)


@dataclass(frozen=True)
class World:
    """The dials of a world. Rates are in [0, 1]; those of the warm start describe its
    demonstrations.

    Raises:
        ValueError: naming the dial, for one out of range.
    """

    hops: int = 1
    """Text searches between the first entity and the answer."""
    image: bool = True
    """False: the prompt names the first entity, and there is no image search."""
    flaky: float = 0.0
    """The probability that a right answer is counted as wrong, whatever the agent does:
    misassignment that stays."""
    popular: float = 0.0
    """The probability that the answer is the relation's popular entity, which can be guessed
    without a search."""
    twins: float = 0.5
    """The probability that a distractor is spelt like the right entity."""
    strict: bool = False
    """An answer after fewer calls than the right chain makes is a failure: guessing does not save the calls."""
    group: int = 8
    """Rollouts a prompt, G."""
    skip: float = 0.1
    """Warm start: the probability that the agent answers instead of making the next call."""
    wrong: float = 0.3
    """Warm start: the probability that a parameter of a call is wrong."""
    near: float = 0.3
    """Warm start: the probability that a region is one beside the right one, which works as well."""
    wrong_answer: float = 0.3
    """Warm start: the probability that the answer is the distractor: misassignment that training can remove."""
    guess: float = 0.0
    """Warm start: the probability that the answer is the popular entity, whatever was found."""
    chance: float = 0.0
    """Grounding: the probability that a tool's answer without the right entity is taken to hold it."""
    reworded: float = 0.0
    """Grounding: the probability that a tool's answer with the right entity is not seen to hold it."""

    def __post_init__(self) -> None:
        for name in (
            "flaky",
            "popular",
            "twins",
            "skip",
            "wrong",
            "near",
            "wrong_answer",
            "guess",
            "chance",
            "reworded",
        ):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)!r}")
        if self.hops < 0 or (self.hops == 0 and not self.image) or self.hops > 3:
            raise ValueError(f"hops must be 0 to 3, and not 0 without an image search, got {self.hops!r}")
        if self.group < 2:
            raise ValueError(f"group must be 2 or more, got {self.group!r}")

    @property
    def dials(self) -> str:
        """The dials that are not at their defaults, which identify results."""
        dials = [(each.name, getattr(self, each.name), each.default) for each in fields(self)]
        return ",".join(f"{name}={value:g}" for name, value, default in dials if value != default)

    @property
    def calls(self) -> int:
        """Calls that the right chain makes; the agent gets no more."""
        return self.hops + self.image

    @property
    def prompt_length(self) -> int:
        return 2 + max(self.hops, 1)

    @property
    def response_length(self) -> int:
        """Longest response in tokens, of turns of the right length."""
        return 6 * self.image + 8 * self.hops + 4


WORLDS = {
    # nothing to correct: one call, and its answer only has to be repeated
    "plain": World(hops=1, image=False, skip=0.2, wrong=0.4, wrong_answer=0.0),
    "one_hop": World(hops=1),
    "two_hops": World(hops=2, skip=0.05, wrong=0.2, wrong_answer=0.3),
    # right calls often end in a failure, and go on doing so
    "flaky": World(hops=1, flaky=0.4),
    # right calls are rare, and many successes are guesses after the wrong ones: the hazard
    "lucky": World(strict=True, popular=0.15, skip=0.02, wrong=0.45, guess=0.4),
    # the same, but guesses need no calls: a way out that leads away from tools
    "memory": World(popular=0.15, skip=0.02, wrong=0.45, guess=0.4),
}
_TYPES: dict[str, Any] = {"hops": int, "group": int, **dict.fromkeys(("image", "strict"), lambda text: bool(int(text)))}


def world_of(spec: str) -> World:
    """A world by its name, with dials changed: ``one_hop,flaky=0.4,group=16``.

    Raises:
        ValueError: for an unknown world or dial, or a value out of range.
    """
    name, *changes = spec.split(",")
    if name not in WORLDS:
        raise ValueError(f"unknown world {name!r}; known: {', '.join(WORLDS)}")
    dials = dict(change.partition("=")[::2] for change in changes)
    if unknown := dials.keys() - {each.name for each in fields(World)}:
        raise ValueError(f"unknown dial {min(unknown)!r} in {spec!r}")
    return replace(WORLDS[name], **{dial: _TYPES.get(dial, float)(value) for dial, value in dials.items()})


@dataclass(frozen=True)
class Prompt:
    """One question, with all that its tools know."""

    number: int
    region: int
    relations: tuple[int, ...]
    chain: tuple[int, ...]
    """The entities on the way, the last is the answer."""
    distractors: tuple[int, ...]

    def tokens(self, world: World) -> list[int]:
        start = REGION + self.region if world.image else ENTITY + self.chain[0]
        return [BEGIN, start, *(RELATION + relation for relation in self.relations)]

    @property
    def popular(self) -> int:
        return self.relations[-1]


def draw_prompts(world: World, count: int, rng: np.random.Generator) -> list[Prompt]:
    """``count`` questions with facts of their own."""
    return [_draw(world, int(number), rng) for number in rng.integers(1 << 40, size=count)]


def _draw(world: World, number: int, rng: np.random.Generator) -> Prompt:
    relations = tuple(rng.integers(len(RELATIONS), size=max(world.hops, 1)).tolist())
    chain = rng.choice(len(ENTITIES), size=world.hops + 1, replace=False).tolist()
    if rng.random() < world.popular:
        popular = relations[-1]
        chain = [*(entity if entity != popular else ENTITY_COUNT - 1 for entity in chain[:-1]), popular]
    distractors = [
        entity ^ 1 if rng.random() < world.twins else _other(entity, int(rng.integers(ENTITY_COUNT)))
        for entity in chain
    ]
    return Prompt(number, int(rng.integers(REGIONS)), relations, tuple(chain), tuple(distractors))


def _other(entity: int, draw: int) -> int:
    return draw if draw != entity else (draw + 2) % ENTITY_COUNT


@dataclass(frozen=True)
class Turn:
    """One turn of an agent, including its answer: its span of response tokens, and what the agent saw before."""

    span: tuple[int, int]
    seen: tuple[int, ...]


@dataclass
class Episode:
    """One rollout as the environment sees it: `token` takes the agent's tokens one by one."""

    world: World
    prompt: Prompt
    row: int
    steps: list[ToolStep] = field(default_factory=list)
    found: list[tuple[int, ...]] = field(default_factory=list)
    """The entities that each step's tool answered."""
    right: list[bool] = field(default_factory=list)
    """For each step, True if it is the next call of the right chain, with the right parameters."""
    turns: list[Turn] = field(default_factory=list)
    answer: int | None = None
    done: bool = False
    position: int = 0
    """Response tokens so far, the tools' included."""
    _turn: list[int] = field(default_factory=list)
    _seen: tuple[int, ...] = ()

    @property
    def right_answer(self) -> bool:
        allowed = not self.world.strict or len(self.steps) == self.world.calls
        return allowed and self.answer == self.prompt.chain[-1]

    @property
    def proficient(self) -> bool:
        """The whole chain of calls is right."""
        return len(self.right) == self.world.calls and all(self.right)

    def token(self, token: int) -> list[int]:
        """Takes the agent's next token, and returns the tool's answer if that token ended a call."""
        self._turn.append(token)
        self.position += 1
        if token != END:
            self.done = len(self._turn) == LONGEST_TURN
            return []
        turn, self._turn = self._turn, []
        span = (self.position - len(turn), self.position)
        self.turns.append(Turn(span, self._seen))
        steps = len(self.steps)
        self._seen = tuple(self._act(turn, span))
        self.position += len(self._seen)
        if len(self.steps) > steps:
            entities = tuple(token - ENTITY for token in self._seen)
            self.found.append(entities)
            self.steps[-1] = self.steps[-1]._replace(seen=self._sight(entities))
        return list(self._seen)

    def _act(self, turn: list[int], span: tuple[int, int]) -> list[int]:
        tool = turn[1] - TOOL if len(turn) > 1 else -1
        if tool == KNOW and len(turn) == 4 and 0 <= turn[2] - ENTITY < ENTITY_COUNT:
            self.answer, self.done = turn[2] - ENTITY, True
            return []
        if len(self.turns) > self.world.calls:
            self.done = True
            return []
        call = (span[0] + 1, span[1])
        if tool == LOOK and self.world.image and len(turn) == 4 and 0 <= turn[2] - REGION < REGIONS:
            region = turn[2] - REGION
            box = [2 * region, 0, 2 * region + 20, 20]
            self.steps.append(ToolStep(self.row, TOOLS[LOOK], {"image": self.prompt.number, "region": box}, span, call))
            works = abs(region - self.prompt.region) <= 1
            self.right.append(works and len(self.steps) == 1)
            return self._found(0) if works else self._noise(region)
        if tool == READ and len(turn) == 6 and _is_search(turn):
            entity, relation = turn[2] - ENTITY, turn[3] - RELATION
            arguments = {"query": f"{RELATIONS[relation]} {ENTITIES[entity]}", "days": DAYS[turn[4] - DAY]}
            self.steps.append(ToolStep(self.row, TOOLS[READ], arguments, span, call))
            asked = (entity, relation)
            chain = list(zip(self.prompt.chain, self.prompt.relations, strict=False))[: self.world.hops]
            self.right.append(
                len(self.steps) > self.world.image and asked == chain[len(self.steps) - 1 - self.world.image]
            )
            return self._found(chain.index(asked) + 1) if asked in chain else self._noise(100 + entity * 10 + relation)
        return [ERROR, ERROR]

    def _sight(self, entities: tuple[int, ...]) -> bool:
        """Returns whether these entities are taken to hold the answer; equal answers of a prompt's
        tool give equal results."""
        held = self.prompt.chain[-1] in entities
        if not self.world.chance and not self.world.reworded:
            return held
        draw = np.random.default_rng([self.prompt.number, 1000, *entities]).random()
        return draw >= self.world.reworded if held else draw < self.world.chance

    def _found(self, hop: int) -> list[int]:
        return [ENTITY + self.prompt.chain[hop], ENTITY + self.prompt.distractors[hop]]

    def _noise(self, key: int) -> list[int]:
        """Returns the results of a wrong call: equal for equal calls of a prompt, and never the
        answer."""
        draws = np.random.default_rng([self.prompt.number, key]).integers(ENTITY_COUNT, size=2).tolist()
        return [ENTITY + _other(self.prompt.chain[-1], entity) for entity in draws]


def _is_search(turn: Sequence[int]) -> bool:
    return (
        0 <= turn[2] - ENTITY < ENTITY_COUNT
        and 0 <= turn[3] - RELATION < len(RELATIONS)
        and 0 <= turn[4] - DAY < len(DAYS)
    )


def demonstrate(world: World, prompt: Prompt, rng: np.random.Generator) -> tuple[list[int], list[bool]]:
    """A middling agent's response, and which of its tokens are the agent's own.

    Wrong parameters are always the same for a prompt (the region opposite, the distractor, the next relation): as with
    a language model, rollouts of a prompt make the same mistakes.
    """
    episode = Episode(world, prompt, 0)
    tokens: list[int] = []
    own: list[bool] = []
    pair = (prompt.chain[0], prompt.distractors[0])

    def turn(*agent: int) -> None:
        nonlocal pair
        for token in agent:
            found = episode.token(token)
        tokens.extend([*agent, *found])
        own.extend([True] * len(agent) + [False] * len(found))
        if found:
            pair = (found[0] - ENTITY, found[1] - ENTITY)

    for step in range(world.calls):
        if rng.random() < world.skip:
            break
        if world.image and step == 0:
            region = prompt.region
            if rng.random() < world.wrong:
                region = (region + REGIONS // 2) % REGIONS
            elif rng.random() < world.near:
                region += int(rng.choice([-1, 1])) if 0 < region < REGIONS - 1 else (1 if region == 0 else -1)
            turn(THOUGHT + LOOK, TOOL + LOOK, REGION + region, END)
            continue
        relation = prompt.relations[step - world.image]
        # The first entity of a world without pictures stands in the prompt: no distractor to take for it.
        entity = pair[int(step > 0 and rng.random() < world.wrong)]
        if rng.random() < world.wrong:
            relation = (relation + 1) % len(RELATIONS)
        turn(THOUGHT + READ, TOOL + READ, ENTITY + entity, RELATION + relation, DAY + int(rng.integers(len(DAYS))), END)
    guesses = not episode.steps or rng.random() < world.guess
    answer = prompt.popular if guesses else pair[int(rng.random() < world.wrong_answer)]
    turn(THOUGHT + KNOW, TOOL + KNOW, ENTITY + answer, END)
    return tokens, own
