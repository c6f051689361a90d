"""`emendo sites`."""

from __future__ import annotations

from typing import Any

from emendo.cli import _options as opt
from emendo.cli._console import emit, output
from emendo.cli._tables import print_table
from emendo.report.tables import Column, Table

HELP = """Show the weight matrices that can be edited, and the memory that it takes.

\b
Examples:
  emendo sites smollm2-135m
  emendo sites ./my-model --sites all --last 2
  emendo sites ./my-model --sites '*.down_proj' --json
"""


def run(
    model: opt.ModelArgument,
    sites: opt.Sites = None,
    last: opt.Last = None,
    editor: opt.Method = "mend",
    rank: opt.Rank = None,
    settings: opt.Settings = None,
    dtype: opt.Dtype = "float32",
    device: opt.Device = None,
    as_json: opt.AsJson = False,
) -> None:
    """Show a model's sites."""
    from emendo.cli._loading import load_model
    from emendo.cli._memory import estimate
    from emendo.cli._settings import editor_config, site_choice
    from emendo.editors import editor_class
    from emendo.models.sites import find_sites

    pairs = [*(settings or []), *([f"rank={rank}"] if rank is not None else [])]
    config, patterns = editor_config(editor, pairs), site_choice(sites or ["mlp"])
    lm = load_model(model, dtype, device)
    chosen = find_sites(lm.model, patterns, last=last)
    needs = estimate(lm.model, editor_class(editor), config, chosen)
    figures = {
        "model": model,
        "fingerprint": lm.fingerprint,
        "sites": [
            {"name": s.name, "d_in": s.d_in, "d_out": s.d_out, "block": s.block, "attention": s.attention}
            for s in chosen
        ],
        "editor": {"name": editor, "parameters": needs.parameters},
        "memory": needs.as_dict(),
    }
    if as_json:
        emit(figures)
    else:
        _show(figures)


def _show(figures: dict[str, Any]) -> None:
    console, memory = output(), figures["memory"]
    columns = (
        Column("site"),
        *(Column(name, "count") for name in ("inputs", "outputs", "weights")),
        Column("part"),
    )
    rows = [
        (s["name"], s["d_in"], s["d_out"], s["d_in"] * s["d_out"], "attention" if s["attention"] else "mlp")
        for s in figures["sites"]
    ]
    print_table(Table(columns, rows))
    editor = figures["editor"]
    console.print(
        f"\n{len(figures['sites'])} weight matrices; a {editor['name']} editor for them has {editor['parameters']:,} "
        "parameters.\n\nMemory, estimated:"
    )
    for name, heading in (("training", "to train the editor"), ("editing", "to make an edit")):
        parts = ", ".join(
            f"{part} {_megabytes(size)}" for part, size in memory[name].items() if part != "total"
        )
        console.print(f"  {heading:<20} {_megabytes(memory[name]['total'])}   = {parts}", soft_wrap=True)
    console.print(f"\n{memory['how']}")


def _megabytes(size: int) -> str:
    return f"{size / 2**20:,.0f} MB"
