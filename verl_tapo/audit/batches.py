"""A training step's trajectories, out of a dump's lines or out of step records."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch

from verl_tapo.answers.evidence import Evidence, evidence_of
from verl_tapo.audit.model import Call, StepBatch, Trajectory
from verl_tapo.audit.sources import Problems, Row
from verl_tapo.audit.text import find_calls
from verl_tapo.calls.formats import NATIVE_FORMATS
from verl_tapo.calls.images import image_index
from verl_tapo.calls.parsing import CUT, IMAGE_PLACEHOLDERS, IMAGE_STARTS
from verl_tapo.rule.arrays import FloatArray, numbered
from verl_tapo.rule.grounding import earned, found_nothing
from verl_tapo.rule.steps import SIGHTS
from verl_tapo.rule.values import canonical, success_number
from verl_tapo.settings import TapoSettings
from verl_tapo.step_records import json_value

BaseEstimator: TypeAlias = Literal["grpo", "dr_grpo", "rloo"]
BASE_ESTIMATORS: tuple[BaseEstimator, ...] = ("grpo", "dr_grpo", "rloo")
"""Those whose advantages are rebuilt from scores; ``dr_grpo`` is GRPO with ``norm_adv_by_std_in_grpo=False``."""
NO_TEXT = "(records hold no texts; trainer.rollout_data_dir keeps them, to be audited along)"
_EPSILON = 1e-6  # veRL's
_CAPTION = 200  # characters of a text beside an image
_LONGEST_GROUND_TRUTH = 100_000  # characters; a longer one is no list of answers
_VERL_KEY = re.compile(r"(.*)_([0-9]{1,9})_([0-9]{1,9})", re.DOTALL)  # {uid}_{session}_{output}
_PADDING = re.compile(r"pad[0-9a-f]{32}_\d+_\d+")  # the keys of rows that fill up a batch (veRL's padding_utils.py)


@dataclass(frozen=True)
class ReadOptions:
    """How rollout dumps are read. Step records need none of it.

    Raises:
        ValueError: naming the option, for an unknown estimator or format.
    """

    base_estimator: BaseEstimator = "grpo"
    """Whose advantages the training used."""
    tool_format: str = "hermes"
    """How tool calls are written: ``actor_rollout_ref.rollout.multi_turn.format``."""
    fields: Mapping[str, str] = field(default_factory=dict)
    """Names of veRL's fields (`verl_tapo.audit.sources.FIELDS`) in dumps that name them otherwise."""

    def __post_init__(self) -> None:
        if self.base_estimator not in BASE_ESTIMATORS:
            raise ValueError(f"base_estimator must be one of {', '.join(BASE_ESTIMATORS)}, got {self.base_estimator!r}")
        if self.tool_format not in NATIVE_FORMATS:
            raise ValueError(f"tool_format must be one of {', '.join(NATIVE_FORMATS)}, got {self.tool_format!r}")


def batch_from_dump(
    step: int, rows: Sequence[Row], settings: TapoSettings, options: ReadOptions, problems: Problems | None = None
) -> StepBatch:
    """The trajectories of a dump's lines; those with several outputs (veRL's ``{uid}_{session}_{output}``) are joined.

    Prompt groups are told by ``uid``, else by equal prompt and ground truth. Rows with which veRL fills up a batch are
    left out, as are copies of a step that stands there twice. What is read in another way than it is written goes to
    ``problems``.
    """
    problems = Problems() if problems is None else problems
    rows = [row for row in rows if row.value["output"] or not _PADDING.fullmatch(str(row.value.get("uid")))]
    rows = _without_copies(rows, problems)
    sessions: dict[str, list[tuple[_Key, Row]]] = defaultdict(list)
    for key, row in zip(_keys(rows, problems), rows, strict=True):
        sessions[key.session].append((key, row))
    trajectories = []
    sights = _Sights(settings)
    for outputs in sessions.values():
        outputs.sort(key=lambda output: output[0].output)
        key, of = outputs[0][0], [row for _, row in outputs]
        trajectories.append(_trajectory(key.name, key.group, of, settings, options, sights))
        _check_success(of[-1], settings, problems)
    scores = np.array([trajectory.score for trajectory in trajectories])
    if settings.rule.grounding.luck:
        scores = _earned(trajectories, scores)
    _rebuild_advantages(trajectories, scores, options.base_estimator)
    _tell_images_apart(trajectories, frozenset(settings.image_parameters))
    return StepBatch(step, trajectories)


class _Key(NamedTuple):
    """Which rollout a row is of."""

    group: str
    session: str
    output: int
    name: str
    """As it is shown."""


def _uid(row: Row) -> str | None:
    uid = row.value.get("uid")
    uid = str(uid) if isinstance(uid, int) else uid
    return uid if isinstance(uid, str) and uid else None


def _without_copies(rows: Sequence[Row], problems: Problems) -> Sequence[Row]:
    """The rows less those of a dump that was appended to itself: every key that repeats does so with equal lines."""
    first: dict[str, Row] = {}
    copies: list[Row] = []
    for row in rows:
        uid = _uid(row)
        if uid is not None and (known := first.setdefault(uid, row)) is not row:
            if _digest(known.value) != _digest(row.value):
                return rows
            copies.append(row)
    if not copies:
        return rows
    problems.notes["copy"].add(copies[0].file, copies[0].line, "equal to a line before", len(copies))
    left_out = set(map(id, copies))
    return [row for row in rows if id(row) not in left_out]


def _keys(rows: Sequence[Row], problems: Problems) -> list[_Key]:
    """Which rollout each row is of.

    Where keys repeat, or the rows of a group have several ground truths, they are a user's own and not veRL's. Each
    row is a rollout then; with several ground truths in a group, groups are told by prompt and ground truth instead.
    """
    keys = [_key(row) for row in rows]
    named = [number for number, row in enumerate(rows) if _uid(row) is not None]
    repeats = len({(keys[number].session, keys[number].output) for number in named}) < len(named)
    first_of: dict[tuple[str, str], str] = {}
    mixed = False
    for number in named:
        key, value = keys[number], rows[number].value
        shared = ["gts"]
        if key.output == 0 and (repeats or value.get("gts") is None):  # later outputs have longer prompts
            shared.append("input")
        for name in shared:
            digest = _digest(value.get(name))
            mixed |= first_of.setdefault((key.group, name), digest) != digest
    if not (repeats or mixed):
        return keys
    first = rows[named[0]]
    problems.notes["uid"].add(first.file, first.line, f"{_uid(first)!r:.60}", len(named))
    for number in named:
        row, own = rows[number], _uid(rows[number]) if repeats else None
        group = _prompt_group(row, own) if mixed else keys[number].group
        keys[number] = _Key(group, f"{row.file}:{row.line}", 0, f"{_uid(row)} line {row.line}")
    return keys


def _key(row: Row) -> _Key:
    uid = _uid(row)
    if uid is None:
        return _Key(_prompt_group(row, str(row.file)), f"{row.file}:{row.line}", 0, f"line {row.line}")
    if found := _VERL_KEY.fullmatch(uid):
        session = f"{found[1]}_{found[2]}"
        return _Key(found[1], session, int(found[3]), session)
    return _Key(uid, f"{row.file}:{row.line}", 0, f"{uid} line {row.line}")


def _prompt_group(row: Row, besides: str | None) -> str:
    return f"prompt {_digest([row.value.get('input'), row.value.get('gts'), besides])}"


def _digest(value: Any) -> str:
    text = json.dumps(json_value(value)).encode("utf-8", "replace")
    return hashlib.blake2b(text, digest_size=6).hexdigest()


def _check_success(row: Row, settings: TapoSettings, problems: Problems) -> None:
    """Notes a success value that says nothing: the score decides there."""
    value = row.value.get(settings.success_key)
    if value is not None and math.isnan(success_number(value)):
        shown = f"a {type(value).__name__}" if isinstance(value, dict | list) else repr(str(value)[:40])
        problems.notes["success"].add(row.file, row.line, shown)


class _Sights:
    """Whether answers in texts held an accepted answer, as `verl_tapo.parsing.parse_steps` finds it in tokens."""

    def __init__(self, settings: TapoSettings) -> None:
        self._image_parameters = frozenset(settings.image_parameters)
        # Rollouts of a prompt often get the same answers.
        self._known: dict[tuple[Evidence, str, bool], bool | None] = {}

    def look(self, calls: Iterable[Call], ground_truth: Any) -> None:
        """Fills in `Call.seen`."""
        evidence = evidence_for(ground_truth)
        for call in calls:
            call.seen = self._seen(call, evidence) if call.ok else evidence.no_sight

    def _seen(self, call: Call, evidence: Evidence) -> bool | None:
        text = call.result or ""
        # What was cut may have held it.
        key = evidence, text, self._may_hold_images(call, text) or CUT in text
        if key not in self._known:
            self._known[key] = evidence.sight({}, text, images=key[2])
        seen = self._known[key]
        return None if seen and evidence.asked_for(call.arguments) else seen

    def _may_hold_images(self, call: Call, text: str) -> bool:
        """Whether an answer may have held images, which a text does not show [ours]: one that is empty, and a short one
        about an image."""
        if not text or any(mark in text for mark in (*IMAGE_STARTS, *IMAGE_PLACEHOLDERS)):
            return True
        return len(text) <= _CAPTION and not self._image_parameters.isdisjoint(call.arguments)


def evidence_for(ground_truth: Any) -> Evidence:
    """The evidence to look for, by what a file has as its ground truth: one without end would take minutes to read."""
    size = len(json.dumps(json_value(ground_truth)))
    return evidence_of(ground_truth if size <= _LONGEST_GROUND_TRUTH else None)


def _trajectory(
    name: str,
    group: str,
    outputs: Sequence[Row],
    settings: TapoSettings,
    options: ReadOptions,
    sights: _Sights | None = None,
) -> Trajectory:
    first, last = outputs[0].value, outputs[-1].value
    texts: list[str] = []
    calls: list[Call] = []
    size = turns = begin = 0
    unclear = False
    for row in outputs:
        text = row.value["output"]
        found = find_calls(text, options.tool_format, settings.error_markers)
        if sights is not None:
            sights.look(found.calls, row.value.get("gts"))
        calls += [_moved(call, turns, begin) for call in found.calls] if begin else found.calls
        size += found.size
        unclear |= found.unclear
        turns += 1 + max((call.turn for call in found.calls), default=0)
        begin += len(text) + 1
        texts.append(text)
    value = success_number(last.get(settings.success_key))
    value = last["score"] if math.isnan(value) else value
    prompt = first.get("input")
    return Trajectory(
        name=name,
        group=group,
        score=last["score"],
        success=value >= settings.success_threshold,
        advantage=0.0,
        size=size,
        calls=calls,
        text="\n".join(texts),
        prompt=prompt if isinstance(prompt, str) else "" if prompt is None else json.dumps(json_value(prompt)),
        ground_truth=json_value(first.get("gts")),
        recognisable=evidence_for(first.get("gts")).tells,
        judged=value,
        unclear=unclear,
    )


def _moved(call: Call, turns: int, begin: int) -> Call:
    spans = [None if span is None else (span[0] + begin, span[1] + begin) for span in (call.span, call.call_span)]
    return replace(call, turn=call.turn + turns, span=spans[0], call_span=spans[1])


def _earned(trajectories: Sequence[Trajectory], scores: FloatArray) -> FloatArray:
    """What ``grounding.luck`` leaves of the scores."""
    group = numbered([trajectory.group for trajectory in trajectories])[1]
    calls = [(number, call) for number, trajectory in enumerate(trajectories) for call in trajectory.calls]
    holder = np.array([number for number, _ in calls], dtype=np.int64)
    seen = np.array([SIGHTS[call.seen] for _, call in calls], dtype=np.int64)
    success = np.array([trajectory.success for trajectory in trajectories], dtype=bool)
    recognisable = np.array([trajectory.recognisable for trajectory in trajectories], dtype=bool)
    return earned(scores, group, success, found_nothing(holder, seen, group, recognisable))


def _rebuild_advantages(trajectories: Sequence[Trajectory], scores: FloatArray, estimator: BaseEstimator) -> None:
    """As veRL computes them, in its precision: rounding decides the sign where all scores of a group are equal."""
    groups: dict[str, list[int]] = defaultdict(list)
    for number, trajectory in enumerate(trajectories):
        groups[trajectory.group].append(number)
    for members in groups.values():
        values = torch.tensor(scores[members], dtype=torch.float32)
        count = len(members)
        if estimator == "rloo":
            if count > 1:
                values = values * count / (count - 1) - values.mean() * count / (count - 1)
        elif count > 1 and estimator == "grpo":
            values = (values - values.mean()) / (values.std() + _EPSILON)
        elif count > 1:
            values = values - values.mean()
        elif estimator == "grpo":
            values = values / (1 + _EPSILON)
        for number, advantage in zip(members, values.tolist(), strict=True):
            trajectories[number].advantage = advantage


def _tell_images_apart(trajectories: Iterable[Trajectory], parameters: frozenset[str]) -> None:
    """Puts identities in place of the indices of images that tools made.

    A text shows no images. An index that some rollout of a prompt uses before any tool has answered is one of the
    prompt's images; any other is told by the image calls made before it: equal calls return equal images [ours].
    """
    image_tools = {
        call.tool for t in trajectories for call in t.calls if call.ok and not parameters.isdisjoint(call.arguments)
    }
    from_prompt: dict[str, set[int]] = defaultdict(set)
    for trajectory in trajectories:
        for call in trajectory.calls:
            if call.ok:
                from_prompt[trajectory.group].update(*_indices(call, parameters).values())
            if call.ok and call.tool in image_tools:
                break
    for trajectory in trajectories:
        known, history = from_prompt[trajectory.group], hashlib.blake2b(digest_size=6)
        for call in trajectory.calls:
            after = history.hexdigest()
            named: dict[str, Any] = {}
            for name, indices in _indices(call, parameters).items():
                images = [index if index in known else f"image {index} after {after}" for index in indices]
                named[name] = images if len(images) > 1 else images[0]
            if any(call.arguments[name] != images for name, images in named.items()):
                call.compared = {**call.arguments, **named}
            if call.ok and call.tool in image_tools:
                history.update(f"{call.tool}#{canonical(call.compared)}".encode("utf-8", "replace"))


def _indices(call: Call, parameters: frozenset[str]) -> dict[str, list[int]]:
    """Image indices among a call's arguments, by the parameter's name."""
    found = {}
    for name in parameters & call.arguments.keys():
        value = call.arguments[name]
        items = value if isinstance(value, list) else [value]
        indices = [index for item in items if (index := image_index(item)) is not None]
        if indices and len(indices) == len(items):
            found[name] = indices
    return found


def batch_from_records(
    header: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    texts: Mapping[str, Row],
    settings: TapoSettings,
    options: ReadOptions,
) -> StepBatch:
    """The trajectories of a step's records, with their texts where a dump of the step has them.

    Their base advantages are those of training: another ``grounding.luck`` than there does not change them.

    Args:
        header, rows: see `verl_tapo.step_records`.
        texts: the dump's lines by ``uid``.
    """
    step = int(header["step"])
    joined: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        joined[row["trajectory"]].append(row)
    trajectories = [_recorded(step, number, of, texts, settings, options) for number, of in joined.items()]
    return StepBatch(step, trajectories, header["settings"])


def _recorded(
    step: int,
    number: int,
    rows: Sequence[Mapping[str, Any]],
    texts: Mapping[str, Row],
    settings: TapoSettings,
    options: ReadOptions,
) -> Trajectory:
    last = rows[-1]
    key = last["key"]
    name = key.rsplit("_", 1)[0] if isinstance(key, str) else f"step {step} trajectory {number}"
    calls: list[Call] = []
    turns: dict[tuple[int, int, int], int] = {}
    for output, row in enumerate(rows):
        for call in row["calls"]:
            turn = turns.setdefault((output, *call["turn"]), len(turns))
            status = call["status"] or ("ok" if call["ok"] else "error")
            arguments, sizes = json_value(call["arguments"]), (call["turn_tokens"], call["call_tokens"])
            made = Call(call["tool"], arguments, arguments, turn, call["ok"], status, *sizes, seen=call.get("seen"))
            calls.append(replace(made, recorded_gate=call["gate"]))
    dumped = [texts[row["key"]] for row in rows if row["key"] in texts]
    shown = None
    if len(dumped) == len(rows):
        shown = _trajectory(name, last["uid"], dumped, settings, options)
        # Both are in order; where a text holds other calls than were recorded, it is shown as it is.
        if [call.tool for call in shown.calls] == [call.tool for call in calls]:
            calls = [
                replace(call, arguments=told.arguments, span=told.span, call_span=told.call_span, result=told.result)
                for call, told in zip(calls, shown.calls, strict=True)
            ]
    return Trajectory(
        name=name,
        group=last["uid"],
        score=last["score"],
        success=last["success"],
        advantage=last["advantage"],
        size=sum(row["tokens"] for row in rows),
        calls=calls,
        text=shown.text if shown else "",
        prompt=shown.prompt if shown else NO_TEXT,
        ground_truth=shown.ground_truth if shown else None,
        recognisable=last.get("recognisable", False),
        changed=sum(row["changed_tokens"] for row in rows),
    )
