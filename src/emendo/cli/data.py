"""`emendo data`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from itertools import chain, islice, zip_longest
from typing import Annotated, Any

import typer
from rich.table import Table

from emendo.cli import _options as opt
from emendo.cli._console import emit, output

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
    """Show what a file holds."""
    figures = _figures(file, limit)
    if as_json:
        emit(figures)
    else:
        _show(figures)


def _figures(source: str, limit: int | None) -> dict[str, Any]:
    """What is known about a source, for ``--json``."""
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
        "first_records": [{"line": line, **asdict(record)} for record, line in zip_longest(first, lines)],
    }


def _show(figures: dict[str, Any]) -> None:
    console = output()

    def say(text: str) -> None:
        console.print(text, soft_wrap=True)

    say(
        f"{figures['source']}: {_plural(figures['records'], 'record')} in the layout of {figures['layout']}.\n"
    )
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column(justify="left")
    table.add_column(justify="right")
    rows = {
        "paraphrases": figures["paraphrases"],
        "records without a paraphrase": figures["without_paraphrase"],
        "locality, same relation": figures["neighbours"],
        "locality, unrelated": figures["unrelated"],
        **{
            f"portability, {kind.replace('_', ' ')}": count for kind, count in figures["consequences"].items()
        },
    }
    for name, value in rows.items():
        table.add_row(name, f"{value:,}")
    console.print(table)
    if unused := unused_fields(figures["unused"]):
        say(f"\nNot read: {unused}.")
    for warning in figures["warnings"]:
        say(f"\nWarning: {warning}.")
    if figures["problems"]:
        reasons = ", ".join(f"{count} {reason}" for reason, count in figures["left_out"].items())
        say(
            f"\n{_plural(sum(figures['left_out'].values()), 'record')} left out ({reasons}); train and evaluate"
        )
        say("refuse the file, or leave them out with --skip-bad:")
        for problem in figures["first_problems"]:
            say(f"  {problem}")
        if figures["problems"] > _PROBLEMS:
            say(f"  and {figures['problems'] - _PROBLEMS} more")
    for number, record in enumerate(figures["first_records"], start=1):
        line = record.pop("line")
        say(f"\nRecord {number}" + (f", line {line}" if line else ""))
        for name, value in record.items():
            for text in _texts(value):
                say(f"  {name:<13}{text}")


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
