"""The card of an edit: what was changed, why, by what, and with what measured side effects, as Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from emendo.edits.provenance import Origin

_ASKED = 50
"""Requests that a card lists."""


def card_of(
    origin: Origin, card: Mapping[str, Any], *, library: str = "emendo", notes: Sequence[str] = ()
) -> str:
    """A model card with its metadata.

    Args:
        origin: of the edit.
        card: its figures.
        library: what loads it.
        notes: further paragraphs.
    """
    about = {"library_name": library, "base_model": origin.model, "tags": ["model-editing", "emendo"]}
    if library == "peft":
        about["tags"] = [*about["tags"], "lora"]
    parts = [
        "---\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in about.items()) + "---",
        f"# An edit of {origin.model}",
        _asked(origin),
        _made(origin),
        _figures(card),
        _answers(card),
        *notes,
        _use(origin) if library == "emendo" else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _asked(origin: Origin) -> str:
    """What the model shall say."""
    rows = [f"| {_cell(r.prompt)} | {_cell(r.target)} |" for r in origin.requests[:_ASKED]]
    if not rows:
        return ""
    more = len(origin.requests) - len(rows)
    table = "\n".join(["| after | the model shall say |", "| --- | --- |", *rows])
    return f"{table}\n\nand {more} more, listed in `edit.json`." if more else table


def _made(origin: Origin) -> str:
    """By what and for which weights."""
    settings = ", ".join(f"{key} = {value}" for key, value in origin.settings.items())
    upon = f", upon {len(origin.upon)} earlier edit(s)" if origin.upon else ""
    return (
        f"Made by the method `{origin.editor}` of emendo {origin.version} on {origin.date}{upon}, for the weights with "
        f"fingerprint `{origin.fingerprint}`. It belongs to them alone."
        + (f" Settings: {settings}." if settings else "")
        + (" The prompts were put into the model's chat template." if origin.chat else "")
    )


def _figures(card: Mapping[str, Any]) -> str:
    """The card's numbers, whoever put them there."""
    numbers = {
        key: value
        for key, value in card.items()
        if isinstance(value, bool | int | float | str) and not isinstance(value, str)
    }
    if not numbers:
        return "Nothing was measured."
    rows = [f"| {_cell(key.replace('_', ' '))} | {_number(value)} |" for key, value in numbers.items()]
    return "\n".join(["## Measured", "", "| figure | value |", "| --- | --- |", *rows])


def _answers(card: Mapping[str, Any]) -> str:
    """What the model answers before and after, edited prompts and others."""
    rows = [
        f"| {_cell(row['kind'])} | {_cell(row['prompt'])} | {_first(row['before'])} | {_first(row['after'])} |"
        for row in card.get("rows", ())
    ]
    if not rows:
        return ""
    return "\n".join(["## Answers", "", "| | prompt | before | after |", "| --- | --- | --- | --- |", *rows])


def _first(answers: Sequence[Mapping[str, Any]]) -> str:
    """The likeliest answer with its probability."""
    return f"{_cell(str(answers[0]['text']))} ({answers[0]['probability']:.1%})" if answers else ""


def _number(value: float) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _use(origin: Origin) -> str:
    chat = ", chat=True" if origin.chat else ""
    return (
        "## Use\n\n```python\nimport emendo\nfrom emendo.editors import read_edit\n\n"
        f'lm = emendo.load("BASE MODEL"{chat})\nedit = read_edit("THIS FOLDER")\nwith edit.applied(lm) as edited:\n'
        '    print(edited.generate("PROMPT"))\n```\n\n'
        "`emendo export` makes a PEFT adapter or a merged checkpoint of it."
    )
