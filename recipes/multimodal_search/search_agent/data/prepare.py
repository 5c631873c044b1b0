"""Makes veRL's parquet files out of the public data sets.

    python -m search_agent.data.prepare fvqa_train=FVQA/fvqa_train.parquet fvqa_test=FVQA/fvqa_test.parquet --out data
    python -m search_agent.data.prepare infoseek=infoseek_val.jsonl --images oven_images --out data
    python -m search_agent.data.prepare mmsearch --out data                  # from the Hugging Face hub
    python -m search_agent.data.prepare custom_mine=mine.csv --map question=q,answer=a,image=file --out data

Names: fvqa_train, fvqa_test, infoseek, simplevqa, livevqa, mmsearch, hr_mmsearch, mat_search,
custom_NAME. Names that end in _train are for training: their questions are left out if they occur
in any other source, here or in --dedupe-against. Writes NAME.parquet, summary.json and, for what
was left out, dropped.jsonl.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pyarrow.parquet as parquet
from PIL import Image
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from search_agent.data.sources import Source, answers_of, find, question_of, source_of
from search_backends.clean import clean_text
from search_backends.datasets.files import read_rows
from search_backends.datasets.images import MAX_READ_PIXELS, Dropped, Images, encoded, image_keys, read_picture
from search_backends.datasets.twins import Mark, Seen, mark_of
from search_backends.errors import ModelError
from search_backends.pictures import load_picture

ROWS_IN_GROUP = 64


SCHEMA = arrow.schema(
    {
        "data_source": arrow.string(),
        "prompt": arrow.list_(arrow.struct({"role": arrow.string(), "content": arrow.string()})),
        "images": arrow.list_(arrow.struct({"bytes": arrow.binary()})),
        "ability": arrow.string(),
        "reward_model": arrow.struct({"style": arrow.string(), "ground_truth": arrow.list_(arrow.string())}),
        "extra_info": arrow.struct(
            {
                "index": arrow.int64(),
                "split": arrow.string(),
                "data_id": arrow.string(),
                "question": arrow.string(),
                "category": arrow.string(),
                "image_keys": arrow.list_(arrow.string()),
            }
        ),
    }
)
"""The same for every source: files of several can be trained on together."""


@dataclass(frozen=True)
class Options:
    """Options that apply to all sources."""

    images: Path | None = None
    """The folder of images that rows name."""
    max_pixels: int = 1003520
    limit: int | None = None
    mapping: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Summary:
    """The outcome of a source."""

    name: str
    rows_in: int = 0
    rows_out: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    pixels: list[int] = field(default_factory=list)

    @property
    def unusable(self) -> int:
        """Rows that could not be used, which is not the same as rows that were there already."""
        return sum(count for reason, count in self.dropped.items() if not reason.startswith("twin"))

    def to_json(self) -> dict[str, Any]:
        sizes = sorted(self.pixels) or [0]
        return {
            "name": self.name,
            "rows_in": self.rows_in,
            "rows_out": self.rows_out,
            "dropped": dict(sorted(self.dropped.items())),
            "pixels": {"least": sizes[0], "median": sizes[len(sizes) // 2], "most": sizes[-1]},
        }


def prepare(
    name: str, source: Source, place: str, options: Options
) -> Iterator[tuple[str, dict[str, Any], Mark] | str]:
    """Yields rows as veRL reads them, with their place and their mark; for a row that is left out,
    the reason.

    Raises:
        ValueError: The source cannot be read, or has other columns.
    """
    source = source.mapped(options.mapping)
    images = Images(options.images)
    for number, (where, row, beside) in enumerate(read_rows(place)):
        if number == 0:
            _check_columns(row, source, place)
        if options.limit is not None and number >= options.limit:
            return
        try:
            yield where, *_convert(name, source, number, row, images, beside, options)
        except Dropped as reason:
            yield str(reason)


def _check_columns(row: Mapping[str, Any], source: Source, place: str) -> None:
    for what, columns in (("question", source.question), ("answer", source.answer), ("image", source.image)):
        if not any(column.split(".")[0] in row for column in columns):
            raise ValueError(
                f"{place}: none of the columns {', '.join(columns)} is there for the {what}; there are "
                f"{', '.join(map(str, row))}. Say which with --map {what}=COLUMN"
            )


def _convert(
    name: str,
    source: Source,
    number: int,
    row: Mapping[str, Any],
    images: Images,
    beside: Path | None,
    options: Options,
) -> tuple[dict[str, Any], Mark]:
    question = clean_text((question_of(row, source) or "").replace("<image>", " "))
    if not question:
        raise Dropped("no question")
    try:
        answers = answers_of(row, source)
    except ValueError as error:
        raise Dropped(f"no answer: {error}") from error
    originals = images.read(find(row, source.image), beside)
    if not originals:
        raise Dropped("no image")
    pictures = [read_picture(data) for data in originals]
    keys = [hashlib.sha256(data).hexdigest() for data in originals]
    identity = find(row, source.id)
    category = find(row, source.category)
    data_id = str(number if identity is None else identity)
    category = "" if category is None else str(category)
    try:
        "".join([*answers, data_id, category]).encode()
    except UnicodeEncodeError:
        raise Dropped("text that is not Unicode: half a surrogate pair") from None
    entry = {
        "data_source": name,
        "prompt": [{"role": "user", "content": "<image>" * len(originals) + question}],
        "images": [
            {"bytes": encoded(data, picture, options.max_pixels)}
            for data, picture in zip(originals, pictures, strict=True)
        ],
        "ability": "search",
        "reward_model": {"style": "rule", "ground_truth": answers},
        "extra_info": {
            "index": number,
            "split": "train" if name.endswith("_train") else "test",
            "data_id": data_id,
            "question": question,
            "category": category,
            "image_keys": keys,
        },
    }
    return entry, mark_of(question, answers[0], keys[0], pictures[0])


def marks_of(file: Path) -> Iterator[tuple[str, Mark]]:
    """Yields the marks by which the questions of an earlier file are recognised.

    Raises:
        ValueError: `prepare` did not write the file.
    """
    for where, row, _ in read_rows(str(file)):
        try:
            info = row["extra_info"]
            key = image_keys(info)[0]
            picture = load_picture(row["images"][0]["bytes"], max_pixels=MAX_READ_PIXELS, error=ModelError)
            yield where, mark_of(info["question"], row["reward_model"]["ground_truth"][0], key, picture)
        except (KeyError, IndexError, TypeError, ModelError) as error:
            raise ValueError(f"--dedupe-against {where}: not made by search_agent.data.prepare ({error!r})") from None


def write(
    name: str, place: str, options: Options, out: Path, evaluated: Seen, dropped: Any, progress: Progress
) -> Summary:
    """Writes ``NAME.parquet``.

    Args:
        name, place, options: the source's name, its location and its options.
        out: the folder.
        evaluated: questions of evaluation; those of this source are added, or left out where it is for training.
        dropped: a text file that gets a line for each row that is left out.
        progress: gets a task.

    Raises:
        ValueError: See `prepare`.
    """
    summary, own, training = Summary(name), Seen(), name.endswith("_train")
    task = progress.add_task(name, total=None)
    with _written_whole(out / f"{name}.parquet") as partial, parquet.ParquetWriter(partial, SCHEMA) as writer:
        group: list[dict[str, Any]] = []
        for found in prepare(name, source_of(name), place, options):
            summary.rows_in += 1
            progress.update(task, completed=summary.rows_in)
            if isinstance(found, str):
                summary.dropped[found.partition(":")[0]] += 1
                _note(dropped, name, f"row {summary.rows_in}", found)
                continue
            where, entry, mark = found
            twin = own.same(mark)
            reason = "twin within the set"
            if twin is None and training:
                twin = evaluated.same(mark) or evaluated.near(mark)
                reason = "twin in evaluation"
            if twin is not None:
                summary.dropped[reason] += 1
                _note(dropped, name, where, f"{reason}: {twin}")
                continue
            own.add(mark, f"{name}, {where}")
            if not training:
                evaluated.add(mark, f"{name}, {where}")
            summary.rows_out += 1
            with Image.open(io.BytesIO(entry["images"][0]["bytes"])) as image:
                summary.pixels.append(image.width * image.height)
            group.append(entry)
            if len(group) == ROWS_IN_GROUP:
                writer.write_table(arrow.Table.from_pylist(group, SCHEMA))
                group = []
        if group:
            writer.write_table(arrow.Table.from_pylist(group, SCHEMA))
    return summary


@contextmanager
def _written_whole(file: Path) -> Iterator[Path]:
    """Yields a path to write to. The file gets its name if all goes well, and is removed if not."""
    partial = file.with_name(f"{file.name}.part")
    try:
        yield partial
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    partial.replace(file)


def _note(file: Any, name: str, where: str, reason: str) -> None:
    file.write(json.dumps({"source": name, "row": where, "reason": reason}, ensure_ascii=False) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = _parse(argv)
    console = Console(stderr=True)
    try:
        summaries = _run(args, console)
    except (ValueError, OSError) as error:
        console.print(f"search_agent.data.prepare: {error}", style="red", markup=False, soft_wrap=True)
        return 2
    return _report(summaries, args, console)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("sources", nargs="+", metavar="NAME[=SOURCE]", help="SOURCE: file, folder or hub id; without, from the hub")
    add("--out", type=Path, required=True, help="folder")
    add("--images", type=Path, help="folder of the images that rows name")
    add("--max-pixels", type=int, default=1003520, help="larger images are shrunk (default: 1003520)")
    add("--limit", type=int, help="rows of each source")
    add("--map", default="", help="columns, as question=q,answer=a,image=file,id=key,category=kind")
    add("--dedupe-against", type=Path, nargs="*", default=[], help="files made earlier that must not be trained on")
    add("--max-dropped", type=float, default=0.05, help="share of unusable rows that is accepted (default: 0.05)")
    args = parser.parse_args(argv)
    pairs = [pair.partition("=") for pair in args.map.split(",") if pair]
    args.map = {key: column for key, _, column in pairs}
    if args.max_pixels < 28 * 28:
        parser.error("--max-pixels must be at least 784")
    if not 0 <= args.max_dropped <= 1:
        parser.error("--max-dropped must be from 0 to 1")
    if args.images is not None and not args.images.is_dir():
        parser.error(f"--images: there is no folder {args.images}")
    return args


def _run(args: argparse.Namespace, console: Console) -> list[Summary]:
    places = {}
    for item in args.sources:
        name, _, place = item.partition("=")
        place = place or source_of(name).hub
        if not place:
            raise ValueError(f"{name}: say which file, {name}=FILE; it is on no hub that is known here")
        if name in places:
            raise ValueError(f"{name} is named twice")
        source_of(name).mapped(args.map)
        places[name] = place
    options = Options(args.images, args.max_pixels, args.limit, args.map)
    evaluated = Seen()
    for file in args.dedupe_against:
        for where, mark in marks_of(file):
            evaluated.add(mark, f"{file}, {where}")
    args.out.mkdir(parents=True, exist_ok=True)
    # Evaluation first: training leaves out what occurs there.
    order = sorted(places, key=lambda name: (name.endswith("_train"), list(places).index(name)))
    columns = (SpinnerColumn(), TextColumn("{task.description}: {task.completed} rows"), TimeElapsedColumn())
    with (
        (args.out / "dropped.jsonl").open("w", encoding="utf-8", errors="replace") as dropped,
        Progress(*columns, console=console) as bar,
    ):
        return [write(name, places[name], options, args.out, evaluated, dropped, bar) for name in order]


def _report(summaries: Sequence[Summary], args: argparse.Namespace, console: Console) -> int:
    table = Table("source", "rows in", "out", "left out", "pixels (least, median, most)")
    for summary in summaries:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(summary.dropped.items()))
        sizes = summary.to_json()["pixels"]
        table.add_row(
            summary.name, str(summary.rows_in), str(summary.rows_out), reasons, ", ".join(map(str, sizes.values()))
        )
    Console().print(table)
    print(f"columns: {', '.join(SCHEMA.names)}")
    content = {"columns": SCHEMA.names, "sources": [summary.to_json() for summary in summaries]}
    (args.out / "summary.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    bad = [summary for summary in summaries if summary.unusable > args.max_dropped * max(summary.rows_in, 1)]
    for summary in bad:
        console.print(
            f"search_agent.data.prepare: {summary.unusable} of {summary.rows_in} rows of {summary.name} cannot be "
            f"used; {args.out / 'dropped.jsonl'} says why. --max-dropped accepts more.",
            style="red",
            markup=False,
            soft_wrap=True,
        )
    empty = [summary.name for summary in summaries if not summary.rows_out]
    if empty:
        console.print(f"search_agent.data.prepare: nothing is left of {', '.join(empty)}", style="red", markup=False)
    return 1 if bad or empty else 0


if __name__ == "__main__":
    sys.exit(main())
