"""Text from outside, made fit for a prompt: no control tokens, fenced, cut at a stated length.

Whatever a page says, it cannot end the tool's turn, add an image, or pass for the user's words. A
literal image token would break training; a literal end of turn would hand the conversation to the
page's author.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from search_backends.results import ImageHit, Page, Passage

MIN_LIMIT_CHARS = 64
"""Room for a fence, a number and a few words."""

# Without a tokenizer: what the chat templates of Qwen, Llama, Mistral, GLM, InternVL, Gemma and DeepSeek are made of,
# the marks of calls and answers, and veRL's placeholders of images.
_TAGS = (
    "[a-z]{0,16}:?tool_call tool_response tools think answer image video audio img quad ref box IMG_CONTEXT "
    "image_soft_token audio_soft_token (?:start|end)_of_(?:turn|image|audio) arg_key arg_value s bos eos pad unk mask "
    "sop eop eot SYS"
).split()
_BRACKETS = (
    "INST AVAILABLE_TOOLS TOOL_CALLS TOOL_RESULTS TOOL_CONTENT SYSTEM_PROMPT THINK ARGS CALL_ID IMG IMG_BREAK IMG_END "
    "MODEL_SETTINGS gMASK sMASK MASK CLS SEP PAD UNK BOS EOS"
).split()
_MARKERS = rf"<[|｜][^\s<>|｜\ufffd]{{1,64}}[|｜]>|<<?/?(?:{'|'.join(_TAGS)})>>?|\[/?(?:{'|'.join(_BRACKETS)})\]"

_LINE_ENDS = re.compile("\r\n|[\r\v\f\x1c-\x1e\x85\u2028\u2029]")
# Controls, marks of direction, and what is invisible and so can hide instructions; not the joiners that scripts need.
_UNSEEN = re.compile(
    "[\x00-\x08\x0e-\x1b\x1f\x7f-\x84\x86-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\ufffe\uffff\U000e0000-\U000e0fff]"
)
_SURROGATES = re.compile("[\ud800-\udfff]")
_SPACES = re.compile(r"[^\S\n]+")
_LINE_STARTS = re.compile(r" ?\n ?")
_EMPTY_LINES = re.compile(r"\n{3,}")
_FENCE = "```"
_LONG_TICKS = re.compile("`{3,}")
_GAP = "\n\n"
_HEAD_CHARS = 300  # of a title and of an address
_MIN_ENTRY_CHARS = 40  # an entry that had to be shorter is left out


@lru_cache(maxsize=4)
def _control_tokens(tokenizer: Any) -> re.Pattern[str]:
    tokens: set[str] = set() if tokenizer is None else {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
    tokens = {token for token in tokens if len(token.strip()) > 2}
    return re.compile("|".join([*map(re.escape, sorted(tokens, key=len, reverse=True)), _MARKERS]))


def clean_text(text: str, *, tokenizer: Any = None) -> str:
    """The text without control tokens, control characters and surplus white space; cleaning twice changes nothing.

    Control tokens and halves of surrogate pairs become U+FFFD. Without a replacement, the text
    around a token could join to another one; with it one pass is enough for any nesting.

    Args:
        text: any.
        tokenizer: its added and special tokens are removed, besides those of the known families.
    """
    text = _SURROGATES.sub("\ufffd", text)
    text = _UNSEEN.sub("", _LINE_ENDS.sub("\n", text))
    text = _EMPTY_LINES.sub("\n\n", _LINE_STARTS.sub("\n", _SPACES.sub(" ", text))).strip()
    return _control_tokens(tokenizer).sub("\ufffd", text)


def cut(text: str, limit_chars: int) -> str:
    """Returns the text's beginning, at most ``limit_chars`` long, with a note of how much is
    missing.

    The cut is at the end of a line or a word, if one ends in the last quarter. The note is left out
    if it does not fit.
    """
    if len(text) <= limit_chars:
        return text
    room = limit_chars - len(_note(len(text)))
    if room <= 0:
        return text[: max(limit_chars, 0)]
    kept = text[:room]
    for end in ("\n", " "):
        position = text.rfind(end, room * 3 // 4, room + 1)
        if position >= 0:
            kept = text[:position]
            break
    kept = kept.rstrip()
    return kept + _note(len(text) - len(kept))


def _note(count: int) -> str:
    return f" [{count:,} more characters cut]"


def fence(text: str, label: str) -> str:
    """The text as a Markdown code block named ``label``. Text cannot close it: runs of backticks are shortened."""
    return f"{_FENCE}{label}\n{_harmless(text)}\n{_FENCE}"


def _harmless(text: str) -> str:
    return _LONG_TICKS.sub("``", text)


def format_passages(passages: Sequence[Passage], *, limit_chars: int) -> str:
    """The passages, numbered from 1, each with title and address. Where they are too long, the longest are cut.

    Raises:
        ValueError: ``limit_chars`` is less than `MIN_LIMIT_CHARS`.
    """
    entries = [
        f"[{number}] {_entry(passage.title, passage.url, passage.text)}" for number, passage in enumerate(passages, 1)
    ]
    return _fit(entries, "results", limit_chars)


def format_image_hits(
    hits: Sequence[ImageHit], *, first_image_number: int | None, limit_chars: int
) -> tuple[str, list[bytes]]:
    """Returns the text about the hits, numbered from 1, and all their images to return with it, in
    order.

    Args:
        hits: captions and images.
        first_image_number: in the conversation, of the first of these images. None where it is not known: then they
            are called the answer's first, second and so on.
        limit_chars: the maximal length of the text.

    Raises:
        ValueError: ``limit_chars`` is less than `MIN_LIMIT_CHARS`.
    """
    images: list[bytes] = []
    entries = []
    for number, hit in enumerate(hits, 1):
        shown = ""
        if hit.image is not None:
            position = len(images)
            images.append(hit.image)
            if first_image_number is None:
                shown = f"(image {position + 1} of this result) "
            else:
                shown = f"(image {first_image_number + position}) "
        entries.append(f"[{number}] {shown}{_entry(hit.title, hit.url, hit.text)}".rstrip())
    return _fit(entries, "results", limit_chars), images


def format_page(page: Page, *, limit_chars: int) -> str:
    """The page's title, address and the beginning of its text.

    Raises:
        ValueError: ``limit_chars`` is less than `MIN_LIMIT_CHARS`.
    """
    return _fit([_entry(page.title, page.url, page.text)], "page", limit_chars)


def _entry(title: str, url: str, text: str) -> str:
    title, url = (cut(clean_text(part).replace("\n", " "), _HEAD_CHARS) for part in (title, url))
    head = f"{title} ({url})" if title and url else title or url
    return f"{head}\n{clean_text(text)}".strip()


def _fit(entries: Sequence[str], label: str, limit_chars: int) -> str:
    """Returns the entries in a fence, at most ``limit_chars`` long together. If there are too many,
    the last are left out."""
    if limit_chars < MIN_LIMIT_CHARS:
        raise ValueError(f"limit_chars must be at least {MIN_LIMIT_CHARS}, got {limit_chars}")
    room = limit_chars - len(fence("", label))
    kept = [_harmless(entry) for entry in entries[: max(1, room // _MIN_ENTRY_CHARS)]]
    room -= len(_GAP) * (len(kept) - 1)
    shares = [0] * len(kept)
    for done, position in enumerate(sorted(range(len(kept)), key=lambda position: len(kept[position]))):
        # Long entries get the room that short ones leave.
        shares[position] = min(len(kept[position]), room // (len(kept) - done))
        room -= shares[position]
    return fence(_GAP.join(cut(entry, share) for entry, share in zip(kept, shares, strict=True)), label)
