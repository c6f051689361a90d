"""`emendo serve`."""

from __future__ import annotations

from typing import Annotated

import typer

from emendo.cli import _ledger as keep
from emendo.cli import _options as opt
from emendo.cli._console import note

HELP = """Serve MODEL with the edits of its ledger: an OpenAI-compatible endpoint, and the edits over HTTP.

Each request is answered under the edit in whose scope its prompt is, or by the base model. POST /v1/edits makes an edit
that the next request is answered with; DELETE /v1/edits/3 takes edit 3 off. The ledger is the only state.

\b
Examples:
  emendo serve smollm2-135m
  emendo serve ./my-model --port 8000 --ledger ./ledger
"""

Port = Annotated[
    int, typer.Option("--port", metavar="N", min=0, max=65535, help="The port; 0 takes a free one.")
]
Served = Annotated[
    str | None,
    typer.Option(
        "--name", metavar="NAME", help="The model's name for clients.  [default: the last part of MODEL]"
    ),
]


def run(
    model: opt.ModelArgument,
    port: Port = 8000,
    editor: opt.BestEditor = None,
    ledger: keep.Where = None,
    name: Served = None,
    probes: keep.Probes = None,
    passage: keep.Passage = None,
    limit: keep.Limit = None,
    dtype: opt.Dtype = "float32",
    device: opt.Device = None,
) -> None:
    """Serve a model."""
    from emendo.errors import RequestError

    try:
        import uvicorn

        from emendo.serve import create_app
    except ImportError as error:
        raise RequestError(
            f"emendo serve needs packages that are not installed ({error.name}): pip install 'emendo[serve]'"
        ) from error
    from emendo.cli._loading import load_editor

    lm, maker = load_editor(editor, model, dtype, device, chat=False)
    work = keep.open_workspace(lm, ledger, create=True, probes=probes, passage=passage, limits=limit)
    app = create_app(work, maker, name=name)
    note(f"Serving {lm.name} at http://127.0.0.1:{port}/v1 with the ledger {work.ledger.where}")
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")
