"""`emendo data`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import chain, islice, zip_longest
from typing import Annotated, Any

import typer

from emendo.cli import _options as opt
from emendo.cli._console import emit, output
from emendo.cli._tables import print_table
from emendo.report.tables import Column, Table

HELP = """Show how a file of records is understood, before anything is trained on it.

Prints the layout of the file, how many records and prompts it has, which of its fields are not read, what is wrong with
it by file and line, and its first records as they are read. Nothing is written.

\b
Examples:
  emendo data facts.jsonl
  emendo data counterfact.json --limit 100
  zcat facts.jsonl.gz | emendo data - --json
"""

File = Annotated[
    str,
    typer.Argument(
        metavar="FILE", help="A file of records, - for standard input, or atlas for the built-in facts."
    ),
]
Limit = Annotated[
    int | None, typer.Option("--limit", metavar="N", help="Read the first N records.  [default: all]")
]

_RECORDS = 3
_PROBLEMS = 10
_FIELDS = 12
_LETTERS = 90


def run(file: File, limit: Limit = None, as_json: opt.AsJson = False) -> None:
    """Show the contents of a file."""
    figures = _figures(file, limit)
    if as_json:
        emit(figures)
    else:
        _show(figures)


def _figures(source: str, limit: int | None) -> dict[str, Any]:
    """The figures of a source, for ``--json``."""
    from emendo.data import stream_records
    from emendo.data.schema import CONSEQUENCES, count_reasons

    stream = stream_records(source, limit=limit, skip_bad=True)
    first = list(islice(stream, _RECORDS))
    count: Counter[str] = Counter()
    kinds: Counter[str] = Counter(dict.fromkeys(CONSEQUENCES, 0))
    for record in chain(first, stream):
        count["records"] += 1
        count["without a paraphrase"] += not record.paraphrases
        count["paraphrases"] += len(record.paraphrases)
        count["neighbours"] += len(record.neighbours)
        count["unrelated"] += len(record.unrelated)
        kinds.update(one.kind for one in record.consequences)
    lines = list(stream.lines[:_RECORDS])
    return {
        "source": source,
        "layout": stream.layout_name,
        "records": count["records"],
        "paraphrases": count["paraphrases"],
        "without_paraphrase": count["without a paraphrase"],
        "neighbours": count["neighbours"],
        "unrelated": count["unrelated"],
        "consequences": dict(kinds),
        "unused": dict(stream.unused.most_common()),
        "warnings": list(stream.warnings),
        "problems": len(stream.skipped),
        "left_out": count_reasons(stream.skipped),
        "first_problems": [str(problem) for problem in stream.skipped[:_PROBLEMS]],
        "first_records": [{"line": line, **record.as_dict()} for record, line in zip_longest(first, lines)],
    }


def _show(figures: dict[str, Any]) -> None:
    console = output()
    records = _plural(figures["records"], "record")
    console.print(f"{figures['source']}: {records} in the layout of {figures['layout']}.\n", soft_wrap=True)
    print_table(_counts(figures))
    for line in (*_doubts(figures), *_first_records(figures)):
        console.print(line, soft_wrap=True)


def _counts(figures: dict[str, Any]) -> Table:
    rows = [
        ("paraphrases", figures["paraphrases"]),
        ("records without a paraphrase", figures["without_paraphrase"]),
        ("locality, same relation", figures["neighbours"]),
        ("locality, unrelated", figures["unrelated"]),
        *((f"portability, {kind.replace('_', ' ')}", n) for kind, n in figures["consequences"].items()),
    ]
    return Table((Column(""), Column("", "count")), rows)


def _doubts(figures: dict[str, Any]) -> Iterator[str]:
    """Fields that are not read, warnings and problems, in lines."""
    if unused := unused_fields(figures["unused"]):
        yield f"\nNot read: {unused}."
    for warning in figures["warnings"]:
        yield f"\nWarning: {warning}."
    if figures["problems"]:
        reasons = ", ".join(f"{count} {reason}" for reason, count in figures["left_out"].items())
        count = _plural(sum(figures["left_out"].values()), "record")
        yield f"\nWrong: {count} ({reasons}). Commands refuse the file, or leave these out with --skip-bad:"
        yield from (f"  {problem}" for problem in figures["first_problems"])
        if figures["problems"] > _PROBLEMS:
            yield f"  and {figures['problems'] - _PROBLEMS} more"


def _first_records(figures: dict[str, Any]) -> Iterator[str]:
    for number, record in enumerate(figures["first_records"], start=1):
        line = record.pop("line")
        yield f"\nRecord {number}" + (f", line {line}" if line else "")
        for name, value in record.items():
            yield from (f"  {name:<13}{text}" for text in _texts(value))


def _texts(value: Any) -> list[str]:
    """A field of a record, one text a line; of a list the first two."""
    if value is None:
        return []
    if isinstance(value, str):
        return [repr(value[:_LETTERS]) + "..." * (len(value) > _LETTERS)]
    shown = [_texts(item)[0] if isinstance(item, str) else _pair(item) for item in value[:2]]
    return [*shown, *([f"and {len(value) - 2} more"] if len(value) > 2 else [])]


def _pair(item: dict[str, str]) -> str:
    kind = f"{item['kind'].replace('_', ' ')}: " if "kind" in item else ""
    return f"{kind}{_texts(item['prompt'])[0]} -> {_texts(item['answer'])[0]}"


def unused_fields(unused: Mapping[str, int]) -> str:
    """Fields that are not read, as a list with the number of records that have each."""
    shown = [f"{name} ({count:,})" for name, count in list(unused.items())[:_FIELDS]]
    return ", ".join(shown) + f" and {len(unused) - _FIELDS} more fields" * (len(unused) > _FIELDS)


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"
