"""`emendo stats`."""

from __future__ import annotations

from typing import Annotated

import typer

from emendo.cli import _options as opt
from emendo.cli._console import emit, output
from emendo.cli._tables import print_table
from emendo.report.tables import Column, Table

HELP = """Take the second moments of a model's matrices over plain text, and keep them.

The editors crisp, memit and alphaedit write where these moments are small, so that running text keeps its answers. They
take them over text that the model writes itself when they are first used; this command takes them ahead, or over your
own text, which the editors then read with --set text=FILE. The moments are kept in the cache folder, by the model's
fingerprint, the matrix and the text.

\b
Examples:
  emendo stats smollm2-135m
  emendo stats smollm2-135m --text my-text.txt --sites '*.2[0-4].mlp.down_proj'
"""

Text = Annotated[
    str | None,
    typer.Option(
        "--text",
        metavar="FILE",
        help="Plain text, a paragraph a line.  [default: text that the model writes itself]",
    ),
]
Sites = Annotated[
    list[str] | None,
    typer.Option(
        "--sites",
        metavar="WHICH",
        help="Which weight matrices: mlp, attention, all, or a pattern over their names (may be repeated).  "
        "[default: those that crisp, memit and alphaedit edit]",
    ),
]


def run(
    model: opt.ModelArgument,
    text: Text = None,
    sites: Sites = None,
    dtype: opt.Dtype = "float32",
    device: opt.Device = None,
    as_json: opt.AsJson = False,
) -> None:
    """Take the moments."""
    from emendo._storage import cache_folder
    from emendo.cli._loading import load_model, passages
    from emendo.cli._settings import site_choice
    from emendo.editors import editor_class
    from emendo.models.moments import kept_moments, spread
    from emendo.models.sites import find_sites

    running = passages(text)
    lm = load_model(model, dtype, device)
    if sites:
        chosen = find_sites(lm.model, site_choice(sites))
    else:
        defaults = [editor_class(name).default_sites(lm.model) for name in ("memit", "crisp")]
        chosen = tuple(dict.fromkeys(site for found in defaults for site in found))
    found = kept_moments(lm, chosen, running, cache_folder() / "moments")
    rows = [(name, own.tokens, spread(own.inputs), spread(own.outputs)) for name, own in found.items()]
    if as_json:
        names = ("site", "tokens", "input_directions", "gradient_directions")
        emit(
            {
                "model": model,
                "fingerprint": lm.fingerprint,
                "sites": [dict(zip(names, row, strict=True)) for row in rows],
            }
        )
        return
    columns = (
        Column("site"),
        Column("tokens", "count"),
        Column("input directions", "number"),
        Column("gradient directions", "number"),
    )
    print_table(Table(columns, rows))
    output().print(
        "\nDirections: the square of the sum of the moment's eigenvalues over the sum of their squares, which is how "
        f"many carry most of it. Kept in {cache_folder() / 'moments'}.",
        soft_wrap=True,
    )
