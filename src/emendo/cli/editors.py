"""`emendo editors`."""

from __future__ import annotations

from emendo.cli import _options as opt
from emendo.cli._console import emit, note

HELP = """List the trained editors that are at hand by name, with their figures.

Some ship with emendo; others are in the cache of the hub, once they have been fetched with --editor user/name. The
figures are those that their makers measured, each edit made by itself from the clean model.

\b
Examples:
  emendo editors
  emendo edit --editor mend-smollm2-135m "The capital of Australia is" "Canberra"
"""


FIGURES = {
    "edit success": "edit_success",
    "generalisation": "generalisation",
    "locality": "locality",
}
"""Column -> the key in a row of ``info["figures"]``."""


def run(as_json: opt.AsJson = False) -> None:
    """List the editors."""
    from emendo.cli._tables import print_table
    from emendo.editors import library
    from emendo.report.tables import Column, Table

    entries = [*library.shipped(), *library.cached()]
    if as_json:
        emit(
            [
                {
                    "name": entry.name,
                    "ships": entry.ships,
                    "folder": str(entry.folder),
                    "editor": entry.head["editor"],
                    "fingerprint": entry.head.get("fingerprint"),
                    "bytes": entry.size,
                    "info": entry.info,
                }
                for entry in entries
            ]
        )
        return
    if not entries:
        note("There are no editors yet. Train one: emendo train --out runs/mine")
        return
    columns = [Column(""), *(Column(name, "share") for name in FIGURES)]
    for entry in entries:
        where = "ships with emendo" if entry.ships else "from the hub"
        model = entry.info.get("model_name", "unknown")
        title = f"{entry.name}: {entry.head['editor']} for {model}, {entry.size / 1e6:.1f} MB, {where}"
        rows = [
            (facts, *(_number(found.get(name)) for name in FIGURES.values()))
            for facts, found in _figures(entry.info.get("figures")).items()
        ]
        print_table(Table(columns if rows else [], rows, title))


def _figures(figures: object) -> dict[str, dict[str, object]]:
    """The rows of figures of an editor; empty where its maker gave none in this form."""
    if not isinstance(figures, dict):
        return {}
    return {str(name): row for name, row in figures.items() if isinstance(row, dict)}


def _number(value: object) -> object:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
