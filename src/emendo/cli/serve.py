"""`emendo serve`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from emendo.cli import _ledger as keep
from emendo.cli import _options as opt
from emendo.cli._console import note

if TYPE_CHECKING:
    from emendo.models.lm import LM
    from emendo.serve.backend import Backend

HELP = """Serve MODEL with the edits of its ledger: an OpenAI-compatible endpoint, and the edits over HTTP.

Each request is answered under the edit in whose scope its prompt is, or by the base model. POST /v1/edits makes an edit
that the next request is answered with; DELETE /v1/edits/3 takes edit 3 off. The ledger is the only state.

With --upstream a larger engine answers, and MODEL only finds and makes edits: each edit becomes an adapter, which the
engine loads. A token for it is read from EMENDO_UPSTREAM_KEY.

\b
Examples:
  emendo serve smollm2-135m
  emendo serve ./my-model --port 8000 --ledger ./ledger
  emendo serve ./my-model --upstream http://127.0.0.1:8001 --engine vllm --max-rank 16
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

Upstream = Annotated[
    str | None, typer.Option("--upstream", metavar="URL", help="The address of an engine that answers.")
]
EngineName = Annotated[
    str, typer.Option("--engine", metavar="NAME", help="Its kind: vllm, sglang or llama.cpp.")
]
Adapters = Annotated[
    Path | None,
    typer.Option(
        "--adapters", metavar="FOLDER", help="The adapters for it.  [default: a folder in emendo's cache]"
    ),
]
SeenAs = Annotated[
    Path | None,
    typer.Option("--adapters-seen-as", metavar="FOLDER", help="The same folder as the engine sees it."),
]
MaxRank = Annotated[
    int | None,
    typer.Option("--max-rank", metavar="N", min=1, help="Cut adapters to this rank, which engines limit."),
]


def run(
    model: opt.ModelArgument,
    port: Port = 8000,
    editor: opt.BestEditor = None,
    ledger: keep.Where = None,
    name: Served = None,
    upstream: Upstream = None,
    engine: EngineName = "vllm",
    adapters: Adapters = None,
    adapters_seen_as: SeenAs = None,
    max_rank: MaxRank = None,
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
    backend = None
    if upstream is not None:
        backend = _upstream(lm, upstream, engine, adapters, adapters_seen_as, max_rank)
    app = create_app(work, maker, name=name, backend=backend)
    note(f"Serving {lm.name} at http://127.0.0.1:{port}/v1 with the ledger {work.ledger.where}")
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


def _upstream(
    lm: LM, url: str, engine: str, adapters: Path | None, seen_as: Path | None, max_rank: int | None
) -> Backend:
    """The engine at an address."""
    from emendo._storage import cache_folder
    from emendo.errors import RequestError
    from emendo.serve.adapters import AdapterFolder
    from emendo.serve.upstream import Upstream
    from emendo.serve.upstream_engines import ENGINES

    if engine not in ENGINES:
        raise RequestError(f"--engine {engine!r} is not one of {', '.join(ENGINES)}.")
    kind = ENGINES[engine]()
    folder = adapters or cache_folder() / "adapters" / lm.fingerprint
    files = AdapterFolder(folder.absolute(), kind.form, max_rank, seen_as)
    return Upstream(url, kind, files, lm.twin(), key=os.environ.get("EMENDO_UPSTREAM_KEY"))
