"""Tool-use steps out of a rollout's tokens, for rollouts that did not record them.

`verl_tapo.calls.formats` knows the written form of calls, and `verl_tapo.calls.tokens` finds
markers in tokens. Here calls get their spans in tokens, and their answers.
"""

from __future__ import annotations

import hashlib
import logging
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby, pairwise, product
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from verl_tapo.answers.evidence import Evidence
from verl_tapo.calls.call import MALFORMED, Call
from verl_tapo.calls.formats import FALLBACK, NATIVE_FORMATS, Tools, decode, format_for, read_call, read_text
from verl_tapo.calls.images import Images, resolve_images
from verl_tapo.calls.limits import NOT_EXECUTED_PREFIX, STOCK_ERRORS
from verl_tapo.calls.tokens import ANSWER, ANSWERS, CLOSE, IMAGE, OPEN, Markers, Marks, run_bounds, vocabulary
from verl_tapo.rule.arrays import IntArray
from verl_tapo.rule.steps import ToolStep
from verl_tapo.rule.values import canonical

logger = logging.getLogger(__name__)

IMAGE_STARTS = (
    "<|vision_start|>",
    "<start_of_image>",
    "<|begin_of_image|>",
    "<|media_begin|>",
    "<|image_start|>",
    "<img>",
    "[IMG_END]",
)
"""Tokens that occur once for each image."""
IMAGE_PLACEHOLDERS = ("[IMG]", "<image>", "<|image|>")
"""Tokens that are repeated for an image's patches. They count if the vocabulary has none of `IMAGE_STARTS`."""

Fallback: TypeAlias = Callable[[Sequence[int]], list[tuple[str, str]]]

CUT = "(truncated)"
"""The text that veRL's loops and ours insert where they cut an answer."""
_HEAD = 3  # characters of an error text that tell it from nearly every other answer
_LOOK = 8  # tokens of an answer in which these are looked for first
_HEADING = 64  # tokens at most of what may stand before an answer's text


class AnswerMarks(NamedTuple):
    """The beginning of a tool's answer in the text of an observation."""

    marker: bytes
    heading: bytes = b""
    """The end of the heading between marker and text, if there is a heading."""
    ending: bytes = b""
    """The end of an answer that another one follows."""


KNOWN_ANSWERS = (
    AnswerMarks(b"<tool_response>", ending=b"</tool_response>"),
    AnswerMarks(b"<|tool_response>", b'{value:<|"|>', b"<tool_response|>"),
    AnswerMarks(b"<tool_result>", ending=b"</tool_result>"),
    AnswerMarks(b"<|start|>functions.", b'<|message|>"', b"<|end|>"),
)
"""The markers that veRL's builders and most templates write; the formats name others."""
ANSWER_HEADINGS = {b"## Return of": b"\n"}


def template_answer(tokenizer: Any) -> AnswerMarks | None:
    """Returns what the chat template writes before each of several answers; None if it does not show."""
    names, said = ("one", "two"), ("the first answer", "the second answer")
    for arguments, in_parts, system in product(({}, "{}"), (False, True), (True, False)):
        calls = [
            {"id": f"call_{name}", "type": "function", "function": {"name": f"tool_{name}", "arguments": arguments}}
            for name in names
        ]
        messages: list[dict[str, Any]] = [{"role": "system", "content": "rules"}] * system
        messages += [
            {"role": "user", "content": "question"},
            {"role": "assistant", "content": "", "reasoning_content": "thought", "tool_calls": calls},
        ]
        contents = [[{"type": "text", "text": words}] if in_parts else words for words in said]
        answers = [
            {"role": "tool", "name": f"tool_{name}", "tool_call_id": f"call_{name}", "content": content}
            for name, content in zip(names, contents, strict=True)
        ]
        try:
            asked = tokenizer.apply_chat_template(messages, tokenize=False)
            text = tokenizer.apply_chat_template([*messages, *answers], tokenize=False, add_generation_prompt=True)
            head, _, rest = text.removeprefix(asked).partition(said[0])
            between, second, _ = rest.partition(said[1])
        except Exception:
            continue
        size = 0
        while size < min(len(head), len(between)) and head[-1 - size] == between[-1 - size]:
            size += 1
        marker = head[len(head) - size :].strip()
        ending = between[: len(between) - size].strip()
        if second and marker:
            # A heading that names the call differs from one answer to the next.
            return AnswerMarks(marker.encode(), ending=b"" if names[1] in ending else ending.encode())
    return None


# What may stand before an answer's text where nothing is known of it.
_ROLE = re.compile(r"\A[^\w\s]*(?:tool|user|function|ipython|observation|environment)\w*[^\w\s]*\s+")


class _Turns(NamedTuple):
    """Assistant turns that may hold calls, in order, and the observations that follow them. T turns."""

    row: list[int]
    start: list[int]
    end: list[int]
    stop: list[int]
    """The end of the observation."""
    first: list[int]
    """The token in which the first marker begins."""
    last: list[int]
    """Behind the token in which the last call ends."""
    low: list[int]
    """The first of the observation's marks in ``answers``."""
    high: list[int]
    """The last of the observation's marks in ``answers``, plus 1."""


class ToolCallParser:
    """Finds the tool calls in the tokens of assistant turns, and their answers.

    Args:
        tool_format: name of veRL's tool parser, ``actor_rollout_ref.rollout.multi_turn.format``.
        tokenizer: a transformers tokenizer, fast or slow. Its chat template tells what answers begin with.
        fallback: for a format not in `NATIVE_FORMATS`, veRL's own parser: token ids of a turn to its calls, each a
            name and arguments as JSON text. The span of such a call is the whole turn.
        image_markers: tokens that stand once for each image; None takes those of `IMAGE_STARTS` (or else
            `IMAGE_PLACEHOLDERS`) that the vocabulary has.
        tools: names of the tools, and the parameters that each requires. Kimi's calls may name a tool inexactly, and
            veRL then looks for the one that is meant among these.

    Raises:
        ValueError: for a format that is neither native nor has a fallback.
    """

    def __init__(
        self,
        tool_format: str,
        tokenizer: Any,
        fallback: Fallback | None = None,
        image_markers: Iterable[str] | None = None,
        tools: Tools | None = None,
    ):
        self.tool_format = tool_format
        fmt = format_for(tool_format, tools)
        self.native = fmt is not None
        if fmt is None and fallback is None:
            known = ", ".join(NATIVE_FORMATS)
            raise ValueError(f"tool_format {tool_format!r} is not known here (known: {known}) and has no fallback")
        self._format, self._fallback = fmt or FALLBACK, fallback
        self._silent = {getattr(tokenizer, name, None) for name in self._format.silent}
        self._words = vocabulary(tokenizer, len(tokenizer))
        tokens = self._words.tokens
        candidates = (IMAGE_STARTS, IMAGE_PLACEHOLDERS) if image_markers is None else (tuple(image_markers),)
        images = (tuple(tokens[name] for name in names if name in tokens) for names in candidates)
        expected = {marker: AnswerMarks(marker, ANSWER_HEADINGS.get(marker, b"")) for marker in self._format.responses}
        if learned := template_answer(tokenizer):
            own = {learned.marker: learned}
            expected = own | expected if learned.ending else expected | own
        self._answers = [
            (answer, ANSWER << number)
            for number, answer in enumerate((expected | {answer.marker: answer for answer in KNOWN_ANSWERS}).values())
        ]
        # An observation is not an answer if answers begin with a token of their own, and it has no such token.
        added = tuple(tokenizer.get_added_vocab())
        self._always_marked = any(marker.decode().startswith(added) for marker in expected)
        markers = [(answer.marker, bit) for answer, bit in self._answers]
        for text, kind in ((self._format.opening, OPEN), (self._format.section, OPEN), (self._format.closing, CLOSE)):
            markers += [(text, kind)] if text else []
        self._markers = Markers(self._words, markers, next(filter(None, images), ()))

    def calls(self, token_ids: Sequence[int]) -> list[Call]:
        """The calls of one assistant turn, in order; spans are relative to ``token_ids``. No token makes it raise."""
        ids = _flat("token_ids", token_ids)
        turns, _ = self.turns(ids, np.ones(len(ids), np.int64), np.array([0, len(ids)]))
        return [
            call._replace(start=first + call.start, end=first + call.end)
            for first, last in zip(turns.first, turns.last, strict=True)
            for call in self.read(ids[first:last].tolist())[0]
        ]

    def count_images(self, ids: Sequence[int]) -> int:
        """Returns how many images begin in ``ids``."""
        return int(np.count_nonzero(self._markers.candidates(_flat("ids", ids))[1] & IMAGE))

    def turns(self, ids: IntArray, mask: IntArray, bounds: IntArray) -> tuple[_Turns, Marks]:
        """The turns that may hold calls, in rows ``[bounds[r], bounds[r + 1])``, and the marks in observations."""
        runs = run_bounds(mask, bounds)
        position, kinds = self._markers.candidates(ids)
        inside = (position >= bounds[0]) & (position < bounds[-1])
        position, kinds = position[inside], kinds[inside]
        run = np.searchsorted(runs, position, side="right") - 1
        acting = mask[position] != 0
        kinds &= ~np.where(acting, np.uint16(IMAGE | ANSWERS), np.uint16(OPEN | CLOSE))
        # Turns in which no call can begin are passed over, and so are the answers that do not follow one.
        may_call = np.zeros(len(runs) + 1, bool)
        may_call[run[kinds & OPEN != 0] if self.native else np.flatnonzero(mask[runs[:-1]])] = True
        looked_at = may_call[run - ~acting] & (kinds & (OPEN | CLOSE | ANSWERS) != 0) | (kinds & IMAGE != 0)
        marks = self._markers.marks(ids, position[looked_at], kinds[looked_at], runs[run[looked_at] + 1])

        opening, closing = marks.of(OPEN), marks.of(CLOSE)
        if self.native:
            run = np.searchsorted(runs, opening.position, side="right") - 1
            new = np.append(True, run[1:] != run[:-1])[: len(run)]
            turn, first = run[new], opening.position[new]
        else:
            turn = np.flatnonzero(mask[runs[:-1]])
            first = runs[turn]
        row, end = np.searchsorted(bounds, first, side="right") - 1, runs[turn + 1]
        last = end
        if len(closing.position) and not self._format.unclosed:
            close = np.searchsorted(closing.position, end) - 1
            last = np.where((close >= 0) & (closing.position[close] >= first), closing.stop[close], end)
        # The observation is the next run, unless the row ends there.
        stop = np.where(end < bounds[row + 1], runs[np.minimum(turn + 2, len(runs) - 1)], end)
        seen = marks.of(ANSWERS | IMAGE)
        low, high = np.searchsorted(seen.position, end), np.searchsorted(seen.position, stop)
        columns = (row, runs[turn], end, stop, first, last, low, high)
        return _Turns(*(column.tolist() for column in columns)), seen

    def read(self, ids: list[int]) -> tuple[list[Call], int]:
        """Returns the calls in the tokens from a turn's first marker on, and 1 if a last one begins no call, else 0."""
        if self._fallback and not self.native:
            return self._read_by_fallback(ids), 0
        places: Sequence[int] = range(len(ids))
        if self._silent and not self._silent.isdisjoint(ids):
            places = [place for place in places if ids[place] not in self._silent]
            ids = [ids[place] for place in places]
        text = self._words.text(ids)
        calls, unclosed = read_text(self._format, text)
        if len(calls) == 1 and calls[0].start == 0 and calls[0].end == len(text):
            tool, arguments, _, _, error, dropped = calls[0]
            return [Call(tool, arguments, places[0], places[-1] + 1, error, dropped)], unclosed
        ends = self._words.ends(ids) if calls else []
        return [
            call._replace(start=places[bisect_right(ends, call.start)], end=places[bisect_left(ends, call.end)] + 1)
            for call in calls
        ], unclosed

    def _read_by_fallback(self, ids: list[int]) -> list[Call]:
        calls = []
        try:
            pairs = self._fallback(ids) if self._fallback and ids else []
        except Exception as error:
            logger.warning("the parser of tool format %r failed on a turn", self.tool_format, exc_info=True)
            return [Call(MALFORMED, {}, 0, len(ids), f"the turn could not be parsed: {str(error)[:200]}", True)]
        for name, raw in pairs:
            call = read_call(FALLBACK, raw, 0, len(ids))
            calls.append(call if call.error else call._replace(tool=name))
        return calls

    def answers(
        self, ids: IntArray, start: int, stop: int, marks: Sequence[tuple[int, int]]
    ) -> tuple[AnswerMarks | None, list[int]]:
        """Returns the kind and positions of the answers in the observation ``[start, stop)``, whose
        marks are ``marks``.

        The kind is None if it is unknown; the observation is one answer then.
        """
        for answer, bit in self._answers:
            if found := [place for place, kind in marks if kind & bit]:
                return answer, self._apart(ids, found, answer) if len(found) > 1 else found
        if start < stop and not self._always_marked:
            return None, [start] if self._words.shows_text(ids[start : min(stop, start + _HEADING)].tolist()) else []
        return None, []

    def _apart(self, ids: IntArray, found: list[int], answer: AnswerMarks) -> list[int]:
        """Returns the positions at which an answer begins after another has ended; the other ones
        are quotes within an answer."""
        apart, ended = found[:1], False
        for last, place in pairwise(found):
            ended = ended or answer.ending in self._words.text(ids[last : place + 1].tolist())
            if ended:
                apart.append(place)
                ended = False
        return apart

    def text(self, ids: Iterable[int]) -> str:
        """Returns the text of tokens, in which each special token is a line end."""
        runs = groupby(ids, self._words.special.__contains__)
        return decode(b"\n".join(self._words.text(list(run)) for special, run in runs if not special))

    def failed(self, ids: IntArray, start: int, stop: int, answer: AnswerMarks | None, errors: _Errors) -> bool:
        """Returns whether the answer in ``[start, stop)`` is an error, see `answer_is_error`."""
        if answer is None:
            few = ids[start : min(stop, start + _HEADING + errors.longest)].tolist()
            text = decode(self._words.text([number for number in few if number not in self._words.special])).lstrip()
            return text.startswith(errors.texts) or _ROLE.sub("", text, count=1).startswith(errors.texts)
        for width in (_LOOK, _HEADING + len(answer.marker) + errors.longest):
            raw = self._words.text(ids[start : min(stop, start + width)].tolist()).partition(answer.marker)[2]
            if answer.heading and answer.heading in raw:
                raw = raw.partition(answer.heading)[2]
            elif answer.heading and width == _LOOK:
                continue
            text = decode(raw).lstrip()
            if len(text) >= _HEAD and not text.startswith(errors.heads):
                return False
        return text.startswith(errors.texts)


class _Errors:
    """Texts a failing tool's answer begins with."""

    def __init__(self, markers: Iterable[str]):
        self.texts = (*STOCK_ERRORS, NOT_EXECUTED_PREFIX, *markers)
        self.heads = tuple({text[:_HEAD] for text in self.texts})
        self.longest = max(len(text.encode()) for text in self.texts)


def answer_is_error(text: str, markers: Iterable[str] = ()) -> bool:
    """Returns whether a tool's answer reports a failed call: it begins with a stock error text or
    one of ``markers``."""
    return text.lstrip().startswith((*STOCK_ERRORS, NOT_EXECUTED_PREFIX, *markers))


def _flat(name: str, values: Any) -> IntArray:
    """Returns ``values`` as a 1-D integer array, without a copy if it is one."""
    array = np.asarray(values.detach().cpu().numpy() if hasattr(values, "detach") else values)
    if array.ndim != 1 or (array.dtype.kind not in "iub" and array.size):
        raise ValueError(f"{name} must be 1-D integers, got shape {array.shape} of {array.dtype}")
    return array if array.dtype.kind in "iub" and array.dtype != np.uint64 else array.astype(np.int64)


# --- Steps ----------------------------------------------------------------------------------------------------------


class ParsedBatch(NamedTuple):
    """Tool-use steps of a batch, and the numbers of calls that went wrong."""

    steps: list[ToolStep]
    """The steps found so far, ordered by the given rows, then by token; malformed calls included."""
    malformed: int
    """Could not be parsed."""
    unanswered: int
    """Parsed, but no answer follows: never executed."""
    unclosed: int
    """Turns that break off within a call: no call, no step."""
    failed: int
    """Answered with an error."""


class _Images:
    """Identities of the images that a row's calls have at hand, as its turns are gone through in order."""

    def __init__(self, places: list[int], prompt_images: Callable[[int], Sequence[str]] | None):
        self._places, self._prompt_images = places, prompt_images
        self._at = 0

    def enter(self, number: int, origin: int) -> None:
        """Begins a row; its tokens start at ``origin``."""
        self._number, self._origin = number, origin
        self._at = bisect_left(self._places, origin, self._at)
        self._seen: list[str] = []
        self._all: Images | None = None

    def at_hand(self) -> Images:
        """Returns the identities of the prompt's images and of those seen so far."""
        if self._all is None:
            prompt = self._prompt_images(self._number) if self._prompt_images else ()
            self._all = Images([*prompt, *self._seen])
        return self._all

    def see(self, until: int, blocks: Sequence[int] = (), answered: Sequence[ToolStep] = ()) -> None:
        """Takes note of the images up to the token ``until``; those of an answer are known by the call it answers."""
        block, ordinal = -1, 0
        while self._at < len(self._places) and (image := self._places[self._at]) < until:
            self._at += 1
            own = max(bisect_right(blocks, image) - 1, 0)
            block, ordinal = own, ordinal + 1 if own == block else 0
            # Images that came in where no call was made have no known origin.
            known = own < len(answered)
            identity = _made_by(answered[own], ordinal) if known else f"unknown {self._number} {image - self._origin}"
            (self._seen if self._all is None else self._all).append(identity)


class _Sights:
    """Decides whether answers hold an accepted answer of their row."""

    def __init__(
        self,
        parser: ToolCallParser,
        ids: IntArray,
        image_places: list[int],
        evidence: Callable[[int], Evidence] | None,
    ) -> None:
        self._parser, self._ids, self._image_places, self._evidence = parser, ids, image_places, evidence
        self._of_row: Evidence | None = None
        # Rollouts of a prompt often get the same answers.
        self._known: dict[tuple[int, bytes], bool | None] = {}

    def enter(self, number: int) -> None:
        """Begins the row of that number."""
        self._of_row = self._evidence(number) if self._evidence else None

    @property
    def none(self) -> bool | None:
        """What a call without an answer shows."""
        return self._of_row.no_sight if self._of_row else None

    def of(self, arguments: Mapping[str, Any], start: int, stop: int) -> bool | None:
        """Returns what a call shows that is answered in ``[start, stop)``."""
        evidence = self._of_row
        if evidence is None or not evidence.tells:
            return None
        key = id(evidence), self._ids[start:stop].tobytes()
        if key not in self._known:
            text = self._parser.text(self._ids[start:stop].tolist())
            images = bisect_left(self._image_places, start) < bisect_left(self._image_places, stop)
            # What the stock loop has cut may have held it.
            self._known[key] = evidence.sight({}, text, images=images or CUT in text)
        seen = self._known[key]
        return None if seen and evidence.asked_for(arguments) else seen


def parse_steps(
    parser: ToolCallParser,
    responses: Any,
    response_mask: Any,
    offsets: Any,
    rows: Any,
    *,
    error_markers: Iterable[str] = (),
    image_parameters: Iterable[str] = (),
    image_index_base: int | None = None,
    prompt_images: Callable[[int], Sequence[str]] | None = None,
    evidence: Callable[[int], Evidence] | None = None,
) -> ParsedBatch:
    """The tool-use steps of a batch of rollouts, out of their tokens.

    A maximal run of policy tokens is an assistant turn, and the masked tokens up to the next turn
    are the observation. The k-th call of a turn gets the k-th answer of its observation. Stock
    loops answer only the calls that veRL's parser returns; `tapo_tool_agent` answers all of them.
    If there are as many answers as calls, they are paired one by one; otherwise the calls that veRL
    drops are skipped. A step is ``ok`` if its call could be parsed, has an answer, and the answer
    is no error.

    Args:
        parser: for the rollouts' tool format and tokenizer.
        responses: (N,) response tokens, flat; an array or a CPU tensor.
        response_mask: (N,) nonzero on tokens the policy generated.
        offsets: (R + 1,) row r holds the tokens ``[offsets[r], offsets[r + 1])``; padding has mask 0.
        rows: (R,) the number each row has in its batch: `ToolStep.row`.
        error_markers: see `answer_is_error`.
        image_parameters, image_index_base: see `verl_tapo.calls.images.resolve_images`.
        prompt_images: gives the identities of the images in a row's prompt, by the row's number; asked only for rows
            with a call that has one of ``image_parameters``. Images of an observation are identified by the call that
            they answer.
        evidence: gives what to look for in the answers of a row's tools, by the row's number; for `ToolStep.seen`.

    Raises:
        ValueError: for arrays that disagree. No token makes it raise.
    """
    ids = _flat("responses", responses)
    mask = _flat("response_mask", response_mask)
    limits = _flat("offsets", offsets)
    bounds: list[int] = limits.tolist()
    numbers: list[int] = _flat("rows", rows).tolist()
    if ids.shape != mask.shape:
        raise ValueError(f"responses and response_mask must agree, got {len(ids)} and {len(mask)} tokens")
    if not bounds or sorted(bounds) != bounds or bounds[0] < 0 or bounds[-1] > len(ids):
        raise ValueError(f"offsets must rise within [0, {len(ids)}], got {str(bounds)[:200]}")
    if len(numbers) != len(bounds) - 1:
        raise ValueError(f"rows must hold one number for each of {len(bounds) - 1} rows, got {len(numbers)}")

    turns, seen = parser.turns(ids, mask, limits)
    marks = list(zip(seen.position.tolist(), seen.kind.tolist(), strict=True))
    errors = _Errors(error_markers)
    image_parameters = frozenset(image_parameters)
    image_places = seen.of(IMAGE).position.tolist()
    images, sights = _Images(image_places, prompt_images), _Sights(parser, ids, image_places, evidence)
    # Rollouts of a prompt often make the same calls.
    known: dict[bytes, tuple[list[Call], int]] = {}
    steps: list[ToolStep] = []
    malformed = unanswered = unclosed = failed = 0
    current = -1
    for row, start, end, stop, first, last, low, high in zip(*turns, strict=True):
        key = ids[first:last].tobytes()
        if key not in known:
            known[key] = parser.read(ids[first:last].tolist())
        calls, open_ended = known[key]
        unclosed += open_ended
        if not calls:
            continue
        origin, number = bounds[row], numbers[row]
        if row != current:
            current = row
            images.enter(number, origin)
            sights.enter(number)
        images.see(start)
        answer, blocks = parser.answers(ids, end, stop, marks[low:high])
        all_answered = len(blocks) == len(calls)
        answered: list[ToolStep] = []  # the step of each answer
        turn = (start - origin, end - origin)
        for call in calls:
            arguments: Mapping[str, Any] = call.arguments
            if not image_parameters.isdisjoint(arguments):
                arguments = resolve_images(arguments, image_parameters, images.at_hand(), image_index_base)
            block = len(answered)
            has_answer = block < len(blocks) and (all_answered or not call.dropped)
            ok, sight = False, sights.none
            if call.error is not None:
                malformed += 1
            elif not has_answer:
                unanswered += 1
            else:
                after = blocks[block + 1] if block + 1 < len(blocks) else stop
                ok = not parser.failed(ids, blocks[block], after, answer, errors)
                failed += not ok
                sight = sights.of(call.arguments, blocks[block], after) if ok else sight
            span = (first - origin + call.start, first - origin + call.end)
            steps.append(ToolStep(number, call.tool, arguments, turn, span, ok, sight))
            if has_answer:
                answered.append(steps[-1])
        images.see(stop, blocks, answered)
    return ParsedBatch(steps, malformed, unanswered, unclosed, failed)


def _made_by(step: ToolStep, ordinal: int) -> str:
    """The identity of an image that a call returned: equal calls return equal images."""
    # Hashed: an identity holds those of the images it was made from, and would grow with every step.
    call = f"{step.tool}#{canonical(step.arguments)}".encode("utf-8", "replace")
    return f"{hashlib.blake2b(call, digest_size=12).hexdigest()}#{ordinal}"
