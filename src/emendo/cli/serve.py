"""`emendo serve`."""

from __future__ import annotations

import logging
import os
import socket
from contextlib import suppress
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


Host = Annotated[
    str,
    typer.Option(
        "--host", metavar="ADDRESS", help="Where to listen; other machines are served with tokens only."
    ),
]
AskToken = Annotated[
    list[str] | None,
    typer.Option(
        "--ask-token",
        metavar="[NAME=]TOKEN",
        help="Requests need this token, or that for editing (may be repeated).  [default: EMENDO_ASK_TOKEN]",
    ),
]
EditToken = Annotated[
    list[str] | None,
    typer.Option(
        "--edit-token",
        metavar="[NAME=]TOKEN",
        help="Edits need this token; the ledger records its name (may be repeated).  [default: EMENDO_EDIT_TOKEN]",
    ),
]
_BOUNDS = "Bounds"
Rows = Annotated[
    int,
    typer.Option("--rows", metavar="N", min=1, help="Requests answered at once.", rich_help_panel=_BOUNDS),
]
Tokens = Annotated[
    int,
    typer.Option(
        "--tokens", metavar="N", min=1, help="Tokens of all of these together.", rich_help_panel=_BOUNDS
    ),
]
Waiting = Annotated[
    int,
    typer.Option(
        "--waiting", metavar="N", min=1, help="Requests that may wait; 429 beyond.", rich_help_panel=_BOUNDS
    ),
]
Timeout = Annotated[
    float,
    typer.Option(
        "--timeout",
        metavar="SECONDS",
        min=0.1,
        help="Give an answer up that takes longer.",
        rich_help_panel=_BOUNDS,
    ),
]
EditRate = Annotated[
    int,
    typer.Option(
        "--edits-per-minute", metavar="N", min=1, help="Edits of one caller.", rich_help_panel=_BOUNDS
    ),
]


def run(
    model: opt.ModelArgument,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    editor: opt.BestEditor = None,
    ledger: keep.Where = None,
    name: Served = None,
    upstream: Upstream = None,
    engine: EngineName = "vllm",
    adapters: Adapters = None,
    adapters_seen_as: SeenAs = None,
    max_rank: MaxRank = None,
    ask_token: AskToken = None,
    edit_token: EditToken = None,
    rows: Rows = 32,
    tokens: Tokens = 32_768,
    waiting: Waiting = 256,
    timeout: Timeout = 300.0,
    edits_per_minute: EditRate = 60,
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

        from emendo.serve import Access, Bounds, Settings, create_app
    except ImportError as error:
        raise RequestError(
            f"emendo serve needs packages that are not installed ({error.name}): pip install 'emendo[serve]'"
        ) from error
    from emendo.cli._loading import load_editor

    access = Access.of(_tokens(ask_token, "EMENDO_ASK_TOKEN"), _tokens(edit_token, "EMENDO_EDIT_TOKEN"))
    access.check_host(host)
    _check_upstream(upstream, engine, adapters, adapters_seen_as, max_rank)
    with _listening(host, port) as listener:
        lm, maker = load_editor(editor, model, dtype, device, chat=False)
        work = keep.open_workspace(lm, ledger, create=True, probes=probes, passage=passage, limits=limit)
        backend = None
        if upstream is not None:
            backend = _upstream(lm, upstream, engine, adapters, adapters_seen_as, max_rank, timeout)
        app = create_app(
            work,
            maker,
            backend=backend,
            bounds=Bounds(rows, tokens, waiting),
            settings=Settings(timeout=timeout, edits_per_minute=edits_per_minute, access=access),
            name=name,
        )
        _log_as_json()
        shown = f"[{host}]" if ":" in host else host
        note(
            f"Serving {lm.name} at http://{shown}:{listener.getsockname()[1]}/v1 with the ledger {work.ledger.where}"
        )
        config = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=5)
        with suppress(KeyboardInterrupt):  # raised again by uvicorn, which has ended all work
            uvicorn.Server(config).run(sockets=[listener])


def _check_upstream(url: str | None, engine: str, *own: object) -> None:
    """Make sure that there is an address where it is needed, and that both it and the engine's kind are known.

    Raises:
        RequestError: they are not.
    """
    from emendo.errors import RequestError
    from emendo.serve.upstream import address
    from emendo.serve.upstream_engines import ENGINES

    if engine not in ENGINES:
        raise RequestError(f"--engine {engine!r} is not one of {', '.join(ENGINES)}.")
    if url is not None:
        address(url)
    elif any(value is not None for value in own):
        raise RequestError("--adapters, --adapters-seen-as and --max-rank belong to --upstream URL.")


def _upstream(
    lm: LM,
    url: str,
    engine: str,
    adapters: Path | None,
    seen_as: Path | None,
    max_rank: int | None,
    timeout: float,
) -> Backend:
    """The engine at an address."""
    from emendo._storage import cache_folder
    from emendo.serve.adapters import AdapterFolder
    from emendo.serve.upstream import Upstream
    from emendo.serve.upstream_engines import ENGINES

    kind = ENGINES[engine]()
    folder = adapters or cache_folder() / "adapters" / lm.fingerprint
    files = AdapterFolder(folder.absolute(), kind.form, max_rank, seen_as)
    key = os.environ.get("EMENDO_UPSTREAM_KEY")
    return Upstream(url, kind, files, lm.twin(), key=key, timeout=timeout)


def _tokens(given: list[str] | None, variable: str) -> list[str]:
    return given or [text for text in os.environ.get(variable, "").split(",") if text.strip()]


def _listening(host: str, port: int) -> socket.socket:
    """A socket at an address, so that one in use is told before the model is loaded.

    It names its protocol, TCP: only then asyncio sends every part of an answer at once (TCP_NODELAY).
    """
    from emendo.errors import RequestError

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        found = socket.create_server((host, port), family=family)
    except OSError as error:
        why = error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)
        raise RequestError(f"Port {port} of {host} cannot be used: {why}.") from error
    return socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP, fileno=found.detach())


def _log_as_json() -> None:
    """Write the service's log as JSON lines on standard error."""
    from emendo.serve.observing import JsonLines

    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    for name in ("emendo.serve", "uvicorn"):
        log = logging.getLogger(name)
        log.addHandler(handler)
        log.propagate = False
    logging.getLogger("emendo.serve").setLevel(logging.INFO)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
