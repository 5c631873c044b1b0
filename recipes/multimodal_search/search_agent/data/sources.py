"""The public data sets: which columns hold what.

No data set was at hand when this was written. ``seen`` names the place where the columns were read,
and ``--map`` overrides them. A file with none of the columns is refused with a list of those it
has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from verl_tapo.answers.accepted import Range, accepted_answers

_MAPPED = ("question", "answer", "image", "id", "category")


@dataclass(frozen=True)
class Source:
    """Columns, in the order in which they are looked for; ``a.b`` is a key of a column."""

    question: tuple[str, ...]
    """The first that is there. A list of messages is the last of the user's."""
    answer: tuple[str, ...]
    """All that are there: accepted answers; the first of the first is the canonical one."""
    image: tuple[str, ...]
    """The first that is there: bytes, ``{"bytes": ..., "path": ...}``, a path, base64, or a list of these."""
    id: tuple[str, ...] = ("data_id", "id")
    category: tuple[str, ...] = ("category",)
    hub: str = ""
    """The data set's name on the Hugging Face hub."""
    seen: str = ""
    """The place where the columns were read."""

    def mapped(self, changes: Mapping[str, str]) -> Source:
        """Returns the source with other columns.

        Raises:
            ValueError: A name is not known.
        """
        unknown = set(changes) - set(_MAPPED)
        if unknown:
            raise ValueError(f"--map: {sorted(unknown)[0]!r} is none of {', '.join(_MAPPED)}")
        columns: dict[str, Any] = {name: (column,) for name, column in changes.items()}
        return replace(self, **columns)


SOURCES: dict[str, Source] = {
    "fvqa_train": Source(
        ("prompt",),
        ("reward_model.ground_truth", "reward_model.candidate_answers"),
        ("images",),
        hub="lmms-lab/FVQA:train",
        seen="MMSearch-R1's training code and loaders of others; `category` in the training file only",
    ),
    "infoseek": Source(
        ("question",),
        ("answer", "answer_eval"),
        ("image", "image_id", "image_path"),
        category=("data_split",),
        seen="the authors' evaluation code; images are OVEN's, files named by image_id: say --images FOLDER",
    ),
    "simplevqa": Source(
        ("question",),
        ("answer",),
        ("image",),
        category=("vqa_category", "original_category"),
        hub="m-a-p/SimpleVQA:test",
        seen="loaders of others; the image is base64",
    ),
    "livevqa": Source(
        ("query", "question"),
        ("gt_answer", "Ground_Truth_List", "answer"),
        ("img_path", "image", "image_path"),
        id=("sample_id", "id"),
        category=("topic", "category"),
        seen="loaders of others, for LiveVQA-new and the research preview's qa.json",
    ),
    "mmsearch": Source(
        ("query",),
        ("gt_answer", "alternative_gt_answers"),
        ("query_image",),
        id=("sample_id",),
        category=("area",),
        hub="CaraJ/MMSearch:end2end",
        seen="loaders of others, of the split end2end; questions without an image are left out",
    ),
    "hr_mmsearch": Source(
        ("question", "query", "prompt"),
        ("answer", "gt_answer", "reward_model.ground_truth"),
        ("image", "images", "image_path"),
        hub="sensenova/HR-MMSearch:test",
        seen="nowhere: guessed",
    ),
    "mat_search": Source(
        ("question",),
        ("answer",),
        ("image_path",),
        id=("id",),
        seen="Visual-ARFT's evaluation code, of MAT-Search.json; say --images FOLDER",
    ),
    "custom": Source(("question",), ("answer", "answers"), ("image", "images"), seen="yours"),
}
SOURCES["fvqa_test"] = replace(SOURCES["fvqa_train"], hub="lmms-lab/FVQA:test")


def source_of(name: str) -> Source:
    """The source of a name; ``custom_...`` are custom ones.

    Raises:
        ValueError: No such source.
    """
    key = "custom" if name.startswith("custom_") else name
    if key not in SOURCES:
        raise ValueError(f"{name!r} is none of {', '.join(sorted(SOURCES))}, or custom_NAME")
    return SOURCES[key]


def find(row: Mapping[str, Any], columns: Iterable[str]) -> Any:
    """Returns the first value that is not empty among ``columns`` of the row, or None."""
    for column in columns:
        value: Any = row
        for key in column.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None and not (isinstance(value, str | list) and not value):
            return value
    return None


def question_of(row: Mapping[str, Any], source: Source) -> str | None:
    """Returns the question's text without changes."""
    value = find(row, source.question)
    if isinstance(value, list):  # messages
        texts = [message.get("content") for message in value if isinstance(message, Mapping)]
        roles = [message.get("role") for message in value if isinstance(message, Mapping)]
        users = [text for text, role in zip(texts, roles, strict=True) if role in ("user", None)]
        value = users[-1] if users else None
    if isinstance(value, list):  # blocks
        value = " ".join(block["text"] for block in value if isinstance(block, Mapping) and block.get("text"))
    return value.strip() if isinstance(value, str) and value.strip() else None


def answers_of(row: Mapping[str, Any], source: Source) -> list[str]:
    """Accepted answers as `accepted_answers` reads them again, the canonical one first, none twice.

    Raises:
        ValueError: The answer is missing, or is not an answer.
    """
    found = [find(row, [column]) for column in source.answer]
    return [answer.to_json() if isinstance(answer, Range) else answer for answer in accepted_answers(found)]
