"""The card of an edit as Markdown: the requests, the method, and the measured side effects."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCardData

from emendo.edits._provenance import Origin

_LISTED = 50
"""The most requests that a card lists."""

_USE = """\
## Use

```python
import emendo
from emendo.editors import read_edit

lm = emendo.load("BASE MODEL"{chat})
edit = read_edit("THIS FOLDER")
with edit.applied(lm) as edited:
    print(edited.generate("PROMPT"))
```

`emendo export` makes a PEFT adapter or a merged checkpoint from it."""


def card_of(
    origin: Origin, card: Mapping[str, Any], *, library: str = "emendo", notes: Sequence[str] = ()
) -> str:
    """A model card with its metadata. Text from data is escaped, so that it adds no markup.

    Args:
        origin: of the edit.
        card: its figures.
        library: the library that loads it.
        notes: further paragraphs.
    """
    tags = ["model-editing", "emendo", *(["lora"] if library == "peft" else [])]
    data = ModelCardData(library_name=library, base_model=plain(origin.model), tags=tags)
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# An edit of {markdown(origin.model)}",
        _requests(origin),
        _made(origin),
        _figures(card),
        _answers(card),
        *notes,
        _USE.format(chat=", chat=True" if origin.chat else "") if library == "emendo" else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def plain(text: str) -> str:
    """One line of text without control characters, white space as single spaces."""
    return "".join(
        char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in " ".join(text.split())
    )


def markdown(text: Any) -> str:
    """Any value as one line of Markdown that shows it literally: no markup, HTML, images or table cells from data."""
    return re.sub(r"([\\`*_\[\]|!~$])", r"\\\1", html.escape(plain(str(text)), quote=False))


def table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of cells that are Markdown already."""
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _requests(origin: Origin) -> str:
    rows = [(markdown(r.prompt), markdown(r.target)) for r in origin.requests[:_LISTED]]
    if not rows:
        return ""
    listed, more = table(("prompt", "target"), rows), len(origin.requests) - len(rows)
    return f"{listed}\n\nand {more} more, listed in `edit.json`." if more else listed


def _made(origin: Origin) -> str:
    settings = ", ".join(f"{markdown(key)} = {markdown(value)}" for key, value in origin.settings.items())
    fingerprint = re.sub("[^0-9a-z-]", "", origin.fingerprint)
    own = dict.fromkeys(repr(r.separator) for r in origin.requests if r.separator is not None)
    upon = f", upon {len(origin.upon)} earlier edit(s)" if origin.upon else ""
    return (
        f"Made by the method {markdown(origin.editor)} of emendo {markdown(origin.version)} on "
        f"{markdown(origin.date)}{upon}, for the weights with fingerprint `{fingerprint}`. "
        "It fits no other weights."
        + (f" Settings: {settings}." if settings else "")
        + (" The prompts were put into the model's chat template." if origin.chat else "")
        + (f" Between prompt and target: {', '.join(map(markdown, own))}." if own else "")
    )


def _figures(card: Mapping[str, Any]) -> str:
    """The numbers of the card."""
    rows = [
        (markdown(key.replace("_", " ")), _number(value))
        for key, value in card.items()
        if isinstance(value, bool | int | float)
    ]
    return "## Measured\n\n" + table(("figure", "value"), rows) if rows else "Nothing was measured."


def _answers(card: Mapping[str, Any]) -> str:
    """The model's answers before and after the edit, to edited prompts and others."""
    try:
        rows = [
            (markdown(row["kind"]), markdown(row["prompt"]), _first(row["before"]), _first(row["after"]))
            for row in card.get("rows", ())
        ]
    except (AttributeError, KeyError, TypeError, ValueError):  # a card is free to hold other rows
        return ""
    return "## Answers\n\n" + table(("", "prompt", "before", "after"), rows) if rows else ""


def _first(answers: Sequence[Mapping[str, Any]]) -> str:
    """The most likely answer with its probability."""
    return f"{markdown(answers[0]['text'])} ({answers[0]['probability']:.1%})" if answers else ""


def _number(value: float) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value) if isinstance(value, int) else f"{value:.4g}"
