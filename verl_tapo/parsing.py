"""Tool-use steps out of a rollout's tokens, for rollouts that did not record them.

What a call looks like is `verl_tapo.formats`' business; every call comes with its exact span in tokens, those that
cannot be used as `MALFORMED` ones.

Speed: a table over the vocabulary flags the few token ids in which a marker may begin, so that one ``take`` over the
flat batch finds every place worth looking at; only the tokens between markers are ever turned into text, by joining
the bytes of their tokens.
"""

from __future__ import annotations

import hashlib
import logging
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from operator import itemgetter
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from verl_tapo.formats import FALLBACK, FORMATS, MALFORMED, NATIVE_FORMATS, Call, Format, decode, read_call, read_text
from verl_tapo.images import resolve_images
from verl_tapo.steps import IntArray, ToolStep, canonical
from verl_tapo.turns import PlainTurns, in_pieces, plain_turns, run_bounds

logger = logging.getLogger(__name__)

STOCK_ERRORS = ("Unknown function '", "Invalid JSON in arguments for '", "Error executing tool '")
"""How the answers of veRL's stock loop begin where a call failed (``tool_agent_loop.py``, ``_call_tool``)."""
NOT_EXECUTED_PREFIX = "[tool call not executed]"
"""How the answers of `tapo_tool_agent` begin where a call was not executed."""

IMAGE_STARTS = (
    "<|vision_start|>",
    "<start_of_image>",
    "<|begin_of_image|>",
    "<|media_begin|>",
    "<|image_start|>",
    "<img>",
    "[IMG_END]",
)
"""Tokens that stand once for each image."""
IMAGE_PLACEHOLDERS = ("[IMG]", "<image>", "<|image|>")
"""Tokens that are repeated for an image's patches; looked at where the vocabulary has none of `IMAGE_STARTS`."""

BoolArray: TypeAlias = npt.NDArray[np.bool_]
Fallback: TypeAlias = Callable[[Sequence[int]], list[tuple[str, str]]]

# Kinds of places, as bits. Two response markers at most: bits 8 and 16.
_OPEN, _CLOSE, _IMAGE, _RESPONSE, _INEXACT = 1, 2, 4, 8, 128
_BLANK = ord(" ")
_ANSWER_TOKENS, _HEAD = 8, 3  # a first look at an answer; widened where these characters may begin an error
_SAMPLES = (
    'Let me look: {"name": "zoom", "arguments": {"image": 0, "bbox": [1, 2.5, -3]}}\n\n',
    "def f(x):\n\treturn  x <= 3 and x != 'a'   # two  spaces\r\n",
    "北京 is Größe naïve 😀 кот — “x” ﷽\n",
)


class FoundCall(NamedTuple):
    """One tool call of an assistant turn."""

    tool: str
    """Name of the called tool, `MALFORMED` where the call could not be parsed."""
    arguments: Mapping[str, Any]
    """Parsed arguments, empty where malformed."""
    span: tuple[int, int]
    """Half-open token span, from the first token of the opening marker to the last one of the closing marker."""
    error: str | None
    """Why the call is malformed, short; None where it is fine."""


# --- Tokens ---------------------------------------------------------------------------------------------------------


def _byte_characters() -> dict[str, int]:
    """The printable character that byte-level BPE (GPT-2's) writes for each byte."""
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    shifted = (byte for byte in range(256) if byte not in plain)
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(shifted)}


_BYTES = _byte_characters()
_TO_LATIN = {ord(character): byte for character, byte in _BYTES.items()}
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_level_piece(token: str) -> bytes:
    return token.translate(_TO_LATIN).encode("latin-1") if _BYTES.keys() >= set(token) else token.encode()


def _metaspace_piece(token: str) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode("utf-8", "replace")


class _PrefixLengths(Sequence[int]):
    """Length in bytes of the text of the first 1, 2, ... tokens, each computed when asked for."""

    def __init__(self, vocabulary: _Vocabulary, ids: list[int]):
        self._vocabulary, self._ids = vocabulary, ids

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: Any) -> Any:
        return len(self._vocabulary.text(self._ids[: index + 1]))


class _Columns(NamedTuple):
    """A vocabulary's tokens by their number, (V + 1,) each; the last entry stands for all other numbers."""

    piece: npt.NDArray[np.object_]
    """The bytes."""
    first: npt.NDArray[np.uint8]
    """The first byte after white space, `_BLANK` where there is none."""

    @classmethod
    def of(cls, pieces: Mapping[int, bytes]) -> _Columns:
        size = max(pieces, default=0) + 2
        columns = cls(np.full(size, b"", object), np.full(size, _BLANK, np.uint8))
        numbers = list(pieces)
        columns.piece[numbers] = list(pieces.values())
        columns.first[numbers] = [(piece.lstrip() or b" ")[0] for piece in pieces.values()]
        return columns

    def find(self, ids: IntArray) -> IntArray:
        """Where the columns tell about each of ``ids``."""
        unsigned = ids.astype(np.int64, copy=False).view(np.uint64)  # negative ones become huge
        index: IntArray = np.minimum(unsigned, np.uint64(len(self.piece) - 1)).view(np.int64)
        return index


class _Vocabulary:
    """A tokenizer's tokens as bytes.

    ``exact``: joining the bytes gives what the tokenizer decodes; checked on samples. Otherwise the bytes are those of
    each token on its own, good enough to find markers, and texts are decoded by the tokenizer.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.tokens: dict[str, int] = dict(tokenizer.get_vocab())
        self.special = frozenset(tokenizer.all_special_ids)
        self._tables: dict[Any, npt.NDArray[np.uint8]] = {}
        samples = [tokenizer.encode(sample, add_special_tokens=False) for sample in _SAMPLES]
        # Added tokens (markers, most of all) between other text.
        samples.append([*samples[0], *sorted(tokenizer.get_added_vocab().values())[:512], *samples[0]])
        decoded = [self._decode(ids) for ids in samples]
        for piece in (_byte_level_piece, _metaspace_piece):
            self.pieces = {number: piece(token) for token, number in self.tokens.items()}
            joined = [self._join(ids).decode("utf-8", "replace") for ids in samples]
            # SentencePiece puts a space in front of a text and takes it off again.
            self.exact = all(text in (raw, raw.removeprefix(" ")) for raw, text in zip(joined, decoded, strict=True))
            if self.exact:
                self.columns = _Columns.of(self.pieces)
                return
        logger.warning("%s: its tokens have to be decoded one by one, which is slow", type(tokenizer).__name__)
        anchor = samples[0][-1:]
        before = len(self.text(anchor))
        self.pieces = {number: self.text([*anchor, number])[before:] for number in self.pieces}

    def _decode(self, ids: Sequence[int]) -> str:
        text = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(text)

    def _join(self, ids: Sequence[int]) -> bytes:
        try:
            return b"".join(itemgetter(*ids)(self.pieces)) if len(ids) > 1 else self.pieces[ids[0]]
        except (KeyError, IndexError):
            return b"".join([self.pieces.get(number, b"") for number in ids])

    def text(self, ids: Sequence[int]) -> bytes:
        """The text of ``ids``; those outside the vocabulary are nothing."""
        if self.exact:
            return self._join(ids)
        return self._decode([number for number in ids if number in self.pieces]).encode("utf-8", "replace")

    def ends(self, ids: list[int]) -> Sequence[int]:
        """Where each of ``ids`` ends in their text, in bytes."""
        if self.exact:
            return list(accumulate(len(self.pieces.get(number, b"")) for number in ids))
        return _PrefixLengths(self, ids)

    def table(self, markers: tuple[tuple[bytes, int], ...], images: tuple[int, ...]) -> npt.NDArray[np.uint8]:
        """(V + 1,) kinds of the markers that may begin in each token; 0 in the last place."""
        if (markers, images) in self._tables:
            return self._tables[markers, images]
        table = np.zeros(max(self.pieces, default=0) + 2, np.uint8)
        firsts = {marker[:1] for marker, _ in markers}
        for number, piece in self.pieces.items():
            if not any(first in piece for first in firsts):
                continue
            for marker, kind in markers:
                if piece == marker:
                    table[number] |= kind
                elif marker in piece or any(piece.endswith(marker[:size]) for size in range(1, len(marker))):
                    table[number] |= kind | _INEXACT
        table[list(images)] |= _IMAGE
        self._tables[markers, images] = table
        return table


@lru_cache(maxsize=8)
def _vocabulary(tokenizer: Any, size: int) -> _Vocabulary:
    """Kept, because veRL builds an agent loop, and its parser, for every trajectory; ``size`` tells of added tokens."""
    del size
    return _Vocabulary(tokenizer)


class _Answers(NamedTuple):
    """What an observation holds: where each answer begins, and with which marker; where images begin."""

    marker: bytes
    blocks: list[int]
    images: list[int]


class _Errors:
    """Texts a failing tool's answer begins with."""

    def __init__(self, markers: Iterable[str]):
        self.texts = (*STOCK_ERRORS, NOT_EXECUTED_PREFIX, *markers)
        self.heads = tuple({text[:_HEAD] for text in self.texts})
        self.longest = max(len(text.encode()) for text in self.texts)


class _Places(NamedTuple):
    """Where markers may begin in a flat batch: positions in order, with their kinds. K places."""

    position: list[int]
    kind: list[int]


class ToolCallParser:
    """Finds the tool calls in the tokens of assistant turns.

    Args:
        tool_format: name of veRL's tool parser, ``actor_rollout_ref.rollout.multi_turn.format``.
        tokenizer: a transformers tokenizer, fast or slow.
        fallback: for a format not in `NATIVE_FORMATS`, veRL's own parser: token ids of a turn to its calls, each a
            name and arguments as JSON text. The span of such a call is the whole turn.
        image_markers: tokens that stand once for each image; None takes those of `IMAGE_STARTS` (or else
            `IMAGE_PLACEHOLDERS`) that the vocabulary has.

    Raises:
        ValueError: for a format that is neither native nor has a fallback.
    """

    def __init__(
        self,
        tool_format: str,
        tokenizer: Any,
        fallback: Fallback | None = None,
        image_markers: Iterable[str] | None = None,
    ):
        self.tool_format = tool_format
        self._format = FORMATS.get(tool_format)
        self._fallback = fallback
        self.native = self._format is not None
        if self._format is None and fallback is None:
            known = ", ".join(NATIVE_FORMATS)
            raise ValueError(f"tool_format {tool_format!r} is not known here (known: {known}) and has no fallback")
        self._vocabulary = _vocabulary(tokenizer, len(tokenizer))
        tokens = self._vocabulary.tokens
        candidates = (IMAGE_STARTS, IMAGE_PLACEHOLDERS) if image_markers is None else (tuple(image_markers),)
        found = (tuple(tokens[name] for name in names if name in tokens) for names in candidates)
        responses = (self._format or FALLBACK).responses
        self._responses = tuple((marker, _RESPONSE << number) for number, marker in enumerate(responses))
        self._response_known = any(marker.decode() in tokens for marker in responses)
        self._markers = self._responses
        if self._format:
            fmt = self._format
            self._markers += ((fmt.opening, _OPEN), (fmt.closing, _CLOSE))
            self._markers += ((fmt.section, _OPEN),) if fmt.section else ()
        self._longest = max(len(marker) for marker, _ in self._markers)
        self._table = self._vocabulary.table(self._markers, next(filter(None, found), ()))

    @property
    def bulk(self) -> bool:
        """Whether plain turns can be read in bulk: every marker says what it says, wherever it stands."""
        return self.native and self.format.plain and self._vocabulary.exact and self._response_known

    @property
    def format(self) -> Format:
        """The format, or that of a fallback's calls."""
        return self._format or FALLBACK

    def piece(self, number: int) -> bytes:
        """The text of one token."""
        return self._vocabulary.pieces.get(number, b"")

    @property
    def columns(self) -> _Columns:
        """The vocabulary as columns; of a parser that reads in `bulk`."""
        return self._vocabulary.columns

    def calls(self, token_ids: Sequence[int]) -> list[FoundCall]:
        """The calls of one assistant turn, in order; spans are relative to ``token_ids``. No token makes it raise."""
        ids = _flat("token_ids", token_ids)
        places = _Places(*(column.tolist() for column in self.places(ids)))
        found, _ = self.turn_calls(ids, 0, len(ids), places, 0, len(places.position))
        return [FoundCall(call.tool, call.arguments, (call.start, call.end), call.error) for call in found]

    def count_images(self, ids: Sequence[int]) -> int:
        """How many images begin in ``ids``."""
        return int(np.count_nonzero(self.places(_flat("ids", ids))[1] & _IMAGE))

    def places(self, ids: IntArray) -> tuple[IntArray, npt.NDArray[np.uint8]]:
        """Positions (K,), in order, and kinds (K,)."""

        def marked(start: int, stop: int) -> IntArray:
            kinds = self._table.take(ids[start:stop], mode="clip")
            return np.flatnonzero(kinds != 0) + start  # several times faster on booleans

        position = np.concatenate([np.zeros(0, np.int64), *in_pieces(marked, 0, len(ids))])
        kinds = self._table.take(ids[position], mode="clip")
        # A placeholder repeated for an image's patches counts once.
        images = np.flatnonzero(kinds & _IMAGE)
        kinds[images[1:][np.diff(position[images]) == 1]] &= 255 - _IMAGE
        return position, kinds

    def begins(self, ids: IntArray, place: int, kind: int, limit: int) -> tuple[int, int]:
        """Which of the markers that may begin in the token at ``place`` do, and where they have ended at the latest."""
        pieces = self._vocabulary.pieces
        text = pieces.get(int(ids[place]), b"")
        first = len(text)
        stop = place + 1
        for number in ids[stop : min(limit, stop + self._longest)].tolist():
            if len(text) >= first + self._longest:
                break
            text += pieces.get(number, b"")
            stop += 1
        found = kind & _IMAGE
        for marker, marker_kind in self._markers:
            if 0 <= text.find(marker) < first:
                found |= marker_kind
        return found, stop

    def turn_calls(
        self, ids: IntArray, start: int, end: int, places: _Places, low: int, high: int
    ) -> tuple[list[Call], int]:
        """The calls of the turn ``[start, end)``, whose places are ``low`` to ``high``; spans count from ``start``.

        Also 1 where the turn ends in an opening marker that begins no call, else 0.
        """
        if self._format is None:
            return self._fallback_calls(ids[start:end].tolist()), 0
        first = stop = -1
        for number in range(low, high):
            place, kind = places.position[number], places.kind[number]
            until = place + 1
            if kind & _INEXACT:
                kind, until = self.begins(ids, place, kind, end)
            if kind & _OPEN and first < 0:
                first = place
            if first >= 0 and kind & (_OPEN | _CLOSE):
                # What is not closed may run to the end of the turn.
                stop = until if kind & _CLOSE or not self._format.unclosed else end
        if first < 0:
            return [], 0
        tokens = ids[first:stop].tolist()
        text = self._vocabulary.text(tokens)
        calls, unclosed = read_text(self._format, text)
        if not calls:
            return calls, unclosed
        base = first - start
        tool, arguments, begins, stops, error, dropped = calls[0]
        if begins == 0 and stops == len(text) and len(calls) == 1:
            return [Call(tool, arguments, base, base + len(tokens), error, dropped)], unclosed
        ends = self._vocabulary.ends(tokens)
        return [
            call._replace(start=base + bisect_right(ends, call.start), end=base + bisect_left(ends, call.end) + 1)
            for call in calls
        ], unclosed

    def answers(self, ids: IntArray, start: int, end: int, places: _Places, low: int, high: int) -> _Answers:
        """What the observation ``[start, end)`` holds, whose places are ``low`` to ``high``."""
        blocks: dict[bytes, list[int]] = {marker: [] for marker, _ in self._responses}
        images = []
        for number in range(low, high):
            place, kind = places.position[number], places.kind[number]
            if kind & _INEXACT:
                kind, _ = self.begins(ids, place, kind, end)
            if kind & _IMAGE:
                images.append(place)
            for marker, bit in self._responses:
                if kind & bit:
                    blocks[marker].append(place)
        for marker, found in blocks.items():
            if found:
                return _Answers(marker, found, images)
        if start < end and not self._response_known and self._shows_text(ids[start : min(end, start + 64)].tolist()):
            return _Answers(b"", [start], images)
        return _Answers(b"", [], images)

    def _shows_text(self, ids: list[int]) -> bool:
        special = self._vocabulary.special
        return bool(self._vocabulary.text([number for number in ids if number not in special]).strip())

    def answer_failed(self, ids: IntArray, start: int, end: int, marker: bytes, errors: _Errors) -> bool:
        """Whether the answer whose ``marker`` begins at ``start`` is an error, see `answer_is_error`.

        Where the marker is not known (b""), an error text anywhere near the start counts: headers come before it.
        """
        if not marker:
            text = decode(self._vocabulary.text(ids[start : min(end, start + 64)].tolist()))
            return any(error in text for error in errors.texts)
        for width in (_ANSWER_TOKENS, len(marker) + errors.longest + 64):
            text = decode(self._vocabulary.text(ids[start : min(end, start + width)].tolist()).partition(marker)[2])
            if marker.startswith(b"#"):  # a heading, with the call's id
                text = text.partition("\n")[2]
            text = text.lstrip()
            if len(text) >= _HEAD and not text.startswith(errors.heads):
                return False
        return text.startswith(errors.texts)

    def _fallback_calls(self, ids: list[int]) -> list[Call]:
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


# --- Steps ----------------------------------------------------------------------------------------------------------


class ParsedBatch(NamedTuple):
    """Tool-use steps of a batch, and how many calls went wrong, and how."""

    steps: list[ToolStep]
    """In the order of the rows given, then of the tokens; malformed calls included."""
    malformed: int
    """Could not be parsed."""
    unanswered: int
    """Parsed, but no answer follows: never executed."""
    unclosed: int
    """Turns that break off within a call: no call, no step."""
    failed: int
    """Answered with an error."""


def answer_is_error(text: str, markers: Iterable[str] = ()) -> bool:
    """Whether a tool's answer says that the call failed: it begins with a stock error text or one of ``markers``."""
    return text.lstrip().startswith((*STOCK_ERRORS, NOT_EXECUTED_PREFIX, *markers))


def _flat(name: str, values: Any) -> IntArray:
    """``values`` as a 1-D integer array, without a copy where it is one."""
    array = np.asarray(values.detach().cpu().numpy() if hasattr(values, "detach") else values)
    if array.ndim != 1 or (array.dtype.kind not in "iub" and array.size):
        raise ValueError(f"{name} must be 1-D integers, got shape {array.shape} of {array.dtype}")
    return array if array.dtype.kind in "iub" and array.dtype != np.uint64 else array.astype(np.int64)


def _find(mask: bytes, value: int, start: int) -> int:
    """The first position of ``value`` from ``start`` on, else the mask's length."""
    found = mask.find(value, start)
    return len(mask) if found < 0 else found


class _Turn(NamedTuple):
    """An assistant turn that may hold calls, and the observation that follows it, as positions in the flat batch."""

    row: int  # which of the rows given
    start: int
    end: int
    stop: int  # where the observation ends
    low: int  # of the turn's places, the first
    high: int  # and the last + 1


def _turns(mask: IntArray, bounds: list[int], position: list[int] | None) -> Iterator[_Turn]:
    """The turns with places at ``position`` (in order), or all turns where that is None."""
    row = origin = -1
    policy = b""
    if position is None:
        for row, (origin, end) in enumerate(pairwise(bounds)):
            policy = (mask[origin:end] != 0).tobytes()
            stop = _find(policy, 1, 0)
            while stop < len(policy):
                start, at = stop, _find(policy, 0, stop)
                stop = _find(policy, 1, at)
                yield _Turn(row, origin + start, origin + at, origin + stop, 0, 0)
        return
    low = 0
    while low < len(position):
        place = position[low]
        if place >= origin + len(policy):
            row = bisect_right(bounds, place) - 1
            origin = bounds[row]
            policy = (mask[origin : bounds[row + 1]] != 0).tobytes()
        at = _find(policy, 0, place - origin)
        high = bisect_left(position, origin + at, low)
        start = policy.rfind(0, 0, place - origin) + 1
        yield _Turn(row, origin + start, origin + at, origin + _find(policy, 1, at), low, high)
        low = high


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
) -> ParsedBatch:
    """The tool-use steps of a batch of rollouts, out of their tokens.

    A maximal run of policy tokens is an assistant turn; what the mask leaves out between it and the next turn is the
    observation. The k-th call of a turn has the k-th answer of its observation. Stock loops answer only the calls
    that veRL's parser returns, `tapo_tool_agent` all of them: where there are as many answers as calls, they belong
    together one by one, else the calls that veRL drops are left out. A step is ``ok`` where its call could be parsed,
    has an answer, and the answer is no error.

    Args:
        parser: for the rollouts' tool format and tokenizer.
        responses: (N,) response tokens, flat; an array or a CPU tensor.
        response_mask: (N,) nonzero on tokens the policy generated.
        offsets: (R + 1,) row r holds the tokens ``[offsets[r], offsets[r + 1])``; padding has mask 0.
        rows: (R,) the number each row has in its batch: `ToolStep.row`.
        error_markers: see `answer_is_error`.
        image_parameters, image_index_base: see `verl_tapo.images.resolve_images`.
        prompt_images: gives the identities of the images in a row's prompt, by the row's number; asked only for rows
            with a call that has one of ``image_parameters``. Images of an observation are identified by the call that
            they answer.

    Raises:
        ValueError: for arrays that disagree. No token makes it raise.
    """
    ids = _flat("responses", responses)
    mask = _flat("response_mask", response_mask)
    bounds: list[int] = _flat("offsets", offsets).tolist()
    numbers: list[int] = _flat("rows", rows).tolist()
    if ids.shape != mask.shape:
        raise ValueError(f"responses and response_mask must agree, got {len(ids)} and {len(mask)} tokens")
    if not bounds or sorted(bounds) != bounds or bounds[0] < 0 or bounds[-1] > len(ids):
        raise ValueError(f"offsets must rise within [0, {len(ids)}], got {str(bounds)[:200]}")
    if len(numbers) != len(bounds) - 1:
        raise ValueError(f"rows must hold one number for each of {len(bounds) - 1} rows, got {len(numbers)}")

    position, kinds = parser.places(ids)
    keep = (position >= bounds[0]) & (position < bounds[-1])
    position, kinds = position[keep], kinds[keep]
    policy = mask[position] != 0
    acting = policy & (kinds & (_OPEN | _CLOSE) != 0)
    observed = ~policy & (kinds & ~np.uint8(_OPEN | _CLOSE | _INEXACT) != 0)
    errors = _Errors(error_markers)
    image_parameters = frozenset(image_parameters)
    bulk = _Bulk(parser, ids, mask, np.asarray(bounds, dtype=np.int64), errors)
    if parser.bulk:
        close_by = bulk.take(position, kinds, acting, observed)
        acting, observed = acting & close_by, observed & close_by
    calls_at = _Places(position[acting].tolist(), kinds[acting].tolist())
    seen_at = _Places(position[observed].tolist(), kinds[observed].tolist())

    steps: list[ToolStep] = []
    malformed, unanswered, unclosed, failed = bulk.malformed, bulk.unanswered, 0, bulk.failed
    current = -1
    for row, start, end, stop, low, high in _turns(mask, bounds, calls_at.position if parser.native else None):
        calls, open_ended = parser.turn_calls(ids, start, end, calls_at, low, high)
        unclosed += open_ended
        if not calls:
            continue
        origin, number = bounds[row], numbers[row]
        if row != current:
            current, at = row, bisect_left(seen_at.position, origin)
            history: list[str] = []
            prompt: Sequence[str] | None = None
        # Images that came in where no call was made have no known origin.
        for low in range(at, at := bisect_left(seen_at.position, start, at)):
            if seen_at.kind[low] & _IMAGE:
                history.append(f"unknown {number} {seen_at.position[low] - origin}")
        low, at = at, bisect_left(seen_at.position, stop, at)
        answers = parser.answers(ids, end, stop, seen_at, low, at)
        blocks = answers.blocks
        all_answered = len(blocks) == len(calls)
        answered: list[ToolStep] = []  # the step of each answer
        start -= origin
        turn = (start, end - origin)
        for call in calls:
            arguments: Mapping[str, Any] = call.arguments
            if not image_parameters.isdisjoint(arguments):
                if prompt is None:
                    prompt = prompt_images(number) if prompt_images else ()
                arguments = resolve_images(arguments, image_parameters, [*prompt, *history], image_index_base)
            block = len(answered)
            has_answer = block < len(blocks) and (all_answered or not call.dropped)
            ok = False
            if call.error is not None:
                malformed += 1
            elif not has_answer:
                unanswered += 1
            else:
                after = blocks[block + 1] if block + 1 < len(blocks) else stop
                ok = not parser.answer_failed(ids, blocks[block], after, answers.marker, errors)
                failed += not ok
            step = ToolStep(number, call.tool, arguments, turn, (start + call.start, start + call.end), ok)
            steps.append(step)
            if has_answer:
                answered.append(step)
        for ordinal, image in enumerate(answers.images):
            block = max(bisect_right(blocks, image) - 1, 0)
            if block < len(answered):
                earlier = bisect_left(answers.images, blocks[block]) if block else 0
                history.append(_made_by(answered[block], ordinal - earlier))
            else:
                history.append(f"unknown {number} {image - origin}")
    if bulk.steps:
        if not steps and numbers == list(range(len(numbers))) and image_parameters.isdisjoint(bulk.parameters()):
            return ParsedBatch(bulk.steps, malformed, unanswered, unclosed, failed)
        current = -1
        for step in bulk.steps:
            if not image_parameters.isdisjoint(step.arguments):
                if step.row != current:
                    current = step.row
                    at_hand = prompt_images(numbers[current]) if prompt_images else ()
                resolved = resolve_images(step.arguments, image_parameters, at_hand, image_index_base)
                step = step._replace(arguments=resolved)
            steps.append(step._replace(row=numbers[step.row]))
        place = {number: position for position, number in enumerate(numbers)}
        steps.sort(key=lambda step: (place[step.row], step.turn[0]))  # stable: calls of a turn stay in order
    return ParsedBatch(steps, malformed, unanswered, unclosed, failed)


class _Bulk:
    """The steps of rows with none but plain turns (see `verl_tapo.turns`), for a whole batch at once."""

    def __init__(self, parser: ToolCallParser, ids: IntArray, mask: IntArray, bounds: IntArray, errors: _Errors):
        self.parser, self.ids, self.mask, self.bounds, self.errors = parser, ids, mask, bounds, errors
        self.steps: list[ToolStep] = []  # with rows counted from 0
        self.malformed = self.unanswered = self.failed = 0

    def take(
        self, position: IntArray, kinds: npt.NDArray[np.uint8], acting: BoolArray, observed: BoolArray
    ) -> BoolArray:
        """Reads all plain rows; returns which of the places (K,) are of other rows."""
        runs = run_bounds(self.mask, self.bounds)
        odd = (acting | observed) & (kinds & (_INEXACT | _IMAGE) != 0)
        # Most tokens that may begin a marker begin none.
        inexact = np.flatnonzero((acting | observed) & (kinds & _INEXACT != 0))
        limits = runs[np.searchsorted(runs, position[inexact], side="right")]
        for place, limit in zip(inexact.tolist(), limits.tolist(), strict=True):
            found, _ = self.parser.begins(self.ids, int(position[place]), int(kinds[place]), limit)
            odd[place] = found != 0
        exact = kinds & _INEXACT == 0
        turns, plain = plain_turns(
            self.bounds,
            runs,
            position,
            acting & exact & (kinds & _OPEN != 0),
            acting & exact & (kinds & _CLOSE != 0),
            observed & exact & (kinds & ~np.uint8(_OPEN | _CLOSE | _INEXACT | _IMAGE) != 0),
            odd,
        )
        self._read(turns)
        mine: BoolArray = plain[np.searchsorted(self.bounds, position, side="right") - 1]
        return ~mine

    def _read(self, turns: PlainTurns) -> None:
        origin = self.bounds[turns.row]
        calls = self._calls(turns.opening + 1, turns.closing)
        readable = np.array([call.error is None for call in calls], dtype=bool)
        answered = turns.answer >= 0
        ok = readable & answered
        for number in np.flatnonzero(ok & self._doubtful(turns)).tolist():
            answer, stop = int(turns.answer[number]), int(turns.stop[number])
            marker = self.parser.piece(int(self.ids[answer]))
            ok[number] = not self.parser.answer_failed(self.ids, answer, stop, marker, self.errors)
        self.malformed += int((~readable).sum())
        self.unanswered += int((readable & ~answered).sum())
        self.failed += int((readable & answered & ~ok).sum())
        make = tuple.__new__  # half the time of the named tuple's own constructor
        self.steps = [
            make(ToolStep, (row, call.tool, call.arguments, (start, end), (opening, closing), good))
            for row, call, start, end, opening, closing, good in zip(
                turns.row.tolist(),
                calls,
                (turns.start - origin).tolist(),
                (turns.end - origin).tolist(),
                (turns.opening - origin).tolist(),
                (turns.closing - origin + 1).tolist(),
                ok.tolist(),
                strict=True,
            )
        ]

    def parameters(self) -> set[str]:
        """Names of all parameters that occur."""
        return {name for step in self.steps for name in step.arguments}

    def _calls(self, start: IntArray, end: IntArray) -> list[Call]:
        """The call in each of the spans ``[start[k], end[k])``; rollouts of a prompt often make the same one."""
        ids, columns = self.ids.data, self.parser.columns
        spans = [ids[first:last].tobytes() for first, last in zip(start.tolist(), end.tolist(), strict=True)]
        calls: dict[bytes, Any] = dict.fromkeys(spans)
        tokens = np.frombuffer(b"".join(calls), self.ids.dtype)
        pieces = columns.piece[columns.find(tokens)].tolist()
        at = 0
        for span in calls:
            stop = at + len(span) // tokens.itemsize
            calls[span] = read_call(self.parser.format, decode(b"".join(pieces[at:stop])), 0, 0)
            at = stop
        return [calls[span] for span in spans]

    def _doubtful(self, turns: PlainTurns) -> BoolArray:
        """Which answers may begin like an error as far as their first tokens tell; the others are none."""
        risky = np.ones(256, dtype=bool)
        risky[0x21:0x7F] = False  # beyond it there is more white space
        for text in self.errors.texts:
            risky[list(text.encode()[:1])] = True
        columns = self.parser.columns
        first = np.full(len(turns.answer), _BLANK, np.uint8)
        for ahead in range(1, _ANSWER_TOKENS):
            at = turns.answer + ahead
            blank = np.flatnonzero((first == _BLANK) & (at < turns.stop))
            first[blank] = columns.first[columns.find(self.ids[at[blank]])]
        return risky[first]


def _made_by(step: ToolStep, ordinal: int) -> str:
    """The identity of an image that a call returned: equal calls return equal images."""
    # Hashed: an identity holds those of the images it was made from, and would grow with every step.
    call = f"{step.tool}#{canonical(step.arguments)}".encode("utf-8", "replace")
    return f"{hashlib.blake2b(call, digest_size=12).hexdigest()}#{ordinal}"
