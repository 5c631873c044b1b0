"""Makes a file for ``provider: precomputed`` out of FVQA's cached image-search results, which come as pickles.

    python -m search_backends.datasets.convert_image_results fvqa_train_image_search_results_cache.pkl \\
        --questions data/fvqa_train.parquet --out image_results.sqlite

A pickle is a program. This runs once, outside of training, and takes nothing from it but plain
values and Pillow images; anything else is refused by name. The questions, made by
search_agent.data.prepare, say which image a result belongs to. (The format is inferred from code
that reads such files: ``{data_id: {"tool_returned_web_title_list": [...],
"tool_returned_images_urls": [...]}}``, with an address or an image for each title.)
"""

from __future__ import annotations

import argparse
import pickle
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from search_backends.datasets.files import read_rows
from search_backends.datasets.images import image_keys
from search_backends.pictures import encode, fit
from search_backends.providers.precomputed import write
from search_backends.results import ImageHit

THUMBNAIL_PIXELS = 320 * 320
_TITLES = ("tool_returned_web_title_list", "tool_returned_web_title")
_PICTURES = ("tool_returned_images_urls", "tool_returned_images")
_ALLOWED = {
    ("PIL.Image", "Image"),
    ("PIL.PngImagePlugin", "PngImageFile"),
    ("PIL.JpegImagePlugin", "JpegImageFile"),
    ("PIL.WebPImagePlugin", "WebPImageFile"),
    ("PIL.GifImagePlugin", "GifImageFile"),
}


class _Careful(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it wants {module}.{name}, which is neither a plain value nor an image")
        return super().find_class(module, name)


def read_results(file: Path) -> Mapping[str, Mapping[str, Any]]:
    """Reads the results in a pickle, by the question's id.

    Raises:
        ValueError: It is not a pickle, or holds something else.
    """
    try:
        with file.open("rb") as stream:
            content = _Careful(stream).load()
    except Exception as error:  # whatever a broken or hostile pickle raises
        raise ValueError(f"{file} is refused: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(value, dict) for value in content.values()):
        raise ValueError(f"{file}: expected {{data_id: {{...}}}}, found {type(content).__name__}")
    return content


def hits_of(result: Mapping[str, Any]) -> list[ImageHit]:
    """Returns the hits of one question, best first. Hits without a title are left out."""
    titles: list[Any] = next((result[key] for key in _TITLES if result.get(key)), [])
    pictures: list[Any] = next((result[key] for key in _PICTURES if result.get(key)), [])
    pictures = [*pictures, *[None] * (len(titles) - len(pictures))]
    hits = []
    for title, picture in zip(titles, pictures, strict=False):
        if not isinstance(title, str) or not title.strip():
            continue
        image = None
        if isinstance(picture, Image.Image):
            image = encode(fit(picture.convert("RGB"), max_pixels=THUMBNAIL_PIXELS, min_side=28))
        hits.append(ImageHit(title.strip(), url=picture if isinstance(picture, str) else "", image=image))
    return hits


def keyed(results: Mapping[str, Mapping[str, Any]], questions: Sequence[Path]) -> Iterator[tuple[str, list[ImageHit]]]:
    """Yields keys of images and their hits. An image of several questions gets the hits of the
    first.

    Raises:
        ValueError: `search_agent.data.prepare` did not write a file of questions.
    """
    done = set()
    for file in questions:
        for where, row, _ in read_rows(str(file)):
            try:
                info = row["extra_info"]
                key = image_keys(info)[0]
                result = results.get(info["data_id"])
            except (KeyError, TypeError, IndexError):
                raise ValueError(f"--questions {where}: not made by search_agent.data.prepare") from None
            if result is not None and key not in done:
                done.add(key)
                yield key, hits_of(result)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pickles", nargs="+", type=Path)
    parser.add_argument("--questions", nargs="+", type=Path, required=True, help="parquet of search_agent.data.prepare")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    try:
        results: dict[str, Mapping[str, Any]] = {}
        for file in args.pickles:
            results.update(read_results(file))
        count = write(args.out, keyed(results, args.questions))
    except (ValueError, OSError) as error:
        print(f"search_backends.datasets.convert_image_results: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: results for {count} images, of {len(results)} in the pickles")
    if not count:
        print(
            "search_backends.datasets.convert_image_results: no question has a result: are these its pickles?",
            file=sys.stderr,
        )
    return 0 if count else 1


if __name__ == "__main__":
    sys.exit(main())
