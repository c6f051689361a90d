"""The card of a trained editor as Markdown: its method, its training and its measured figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCardData

from emendo.edits._card import markdown, plain, table

_USE = """\
## Use

```python
import emendo

lm = emendo.load("{model}"{chat})
editor = emendo.Editor.from_pretrained("THIS FOLDER, OR user/name")
edit = editor.edit(lm, "The capital of Australia is", "Canberra")
with edit.applied(lm) as edited:
    print(edited.generate("The capital of Australia is"))
```

It edits only the weights that it was trained for."""


def card_of(head: Mapping[str, Any]) -> str:
    """A model card with its metadata. Text from data is escaped, so that it adds no markup.

    Args:
        head: the content of ``editor.json``. Its ``info`` holds the settings of the training, and may hold
            ``figures`` (by name, a number or several by column), ``limits`` (sentences) and ``trained_with`` (the
            command).
    """
    info = head["info"]
    model = plain(str(info.get("model_name", "the base model")))
    data = ModelCardData(library_name="emendo", base_model=model, tags=["model-editing", "emendo"])
    sites = ", ".join(f"`{markdown(site['name'])}`" for site in head["sites"])
    made = (
        f"Made by training the method {markdown(head['editor'])} for the weights with fingerprint "
        f"`{markdown(head['fingerprint'])}`. It changes {sites}."
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# An editor of {markdown(model)}",
        made,
        _settings("Settings", head["config"]),
        _settings("Training", {k: v for k, v in info.items() if isinstance(v, bool | int | float | str)}),
        _figures(info.get("figures", {})),
        *(markdown(sentence) for sentence in info.get("limits", ())),
        _USE.format(model=model, chat=", chat=True" if head["chat"] else ""),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _settings(heading: str, values: Mapping[str, Any]) -> str:
    rows = [(markdown(key), markdown(value)) for key, value in values.items()]
    return f"## {heading}\n\n" + table(("setting", "value"), rows) if rows else ""


def _figures(figures: Mapping[str, Any]) -> str:
    """Numbers by name, or tables of them: by row, then by column."""
    plain_rows = [(markdown(k), markdown(v)) for k, v in figures.items() if not isinstance(v, dict)]
    parts = [table(("figure", "value"), plain_rows)] if plain_rows else []
    tables = {k: v for k, v in figures.items() if isinstance(v, dict) and v}
    if tables:
        columns = list(dict.fromkeys(column for row in tables.values() for column in row))
        rows = [[markdown(k), *(markdown(row.get(c, "")) for c in columns)] for k, row in tables.items()]
        parts.append(table(["", *map(markdown, columns)], rows))
    return "## Measured\n\n" + "\n\n".join(parts) if parts else ""
