"""The quickstart's world as a corpus for the recipe's retrieval service: passages and images, in files."""

import io
import json
from pathlib import Path

import pandas as pd
from flags_and_facts.world import load_world


def write_corpus(folder: Path) -> tuple[Path, Path]:
    """Writes ``passages.jsonl`` and ``images.parquet``; returns their paths."""
    world = load_world()
    folder.mkdir(parents=True, exist_ok=True)
    passages = folder / "passages.jsonl"
    with passages.open("w", encoding="utf-8") as file:
        for number, text in enumerate(world.passages):
            file.write(json.dumps({"id": f"p{number}", "title": "", "contents": text}) + "\n")
    rows = []
    for code, flag in world.flags.items():
        png = io.BytesIO()
        flag.save(png, format="PNG")
        name = world.countries[code].name
        rows.append(
            {"id": code, "title": f"This is the flag of {name}.", "text": "", "url": "", "image": png.getvalue()}
        )
    images = folder / "images.parquet"
    pd.DataFrame(rows).to_parquet(images)
    return passages, images
