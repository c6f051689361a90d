"""The application: its routes around the parts of the service."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from fastapi import Depends, FastAPI, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.middleware.trustedhost import TrustedHostMiddleware

from emendo._version import __version__
from emendo.editors import Editor
from emendo.errors import StorageError
from emendo.ledger.workspace import Workspace
from emendo.serve import edit_routes, openai_routes
from emendo.serve._worker import Worker
from emendo.serve.backend import Backend
from emendo.serve.editing import EditingDesk
from emendo.serve.engine import Bounds, Engine
from emendo.serve.errors import add_handlers
from emendo.serve.observing import Observed
from emendo.serve.page import add_page
from emendo.serve.routing import Router
from emendo.serve.schemas import ErrorBody
from emendo.serve.security import LOCAL_HOSTS, RateLimit, asking
from emendo.serve.service import Service, Settings


def create_app(
    work: Workspace,
    editor: Editor,
    *,
    backend: Backend | None = None,
    bounds: Bounds | None = None,
    settings: Settings | None = None,
    name: str | None = None,
) -> FastAPI:
    """The service of a model with its ledger.

    Args:
        work: the model with its ledger and guard. The edits are made with it; requests are routed and answered with a
            twin over the same weights.
        editor: makes the edits that clients ask for.
        backend: answers the requests; None answers them with the model itself.
        bounds: of the model's own engine.
        settings: of the service.
        name: the name by which clients know the model; by default the last part of its own.

    Raises:
        ModelError: the model is no decoder, and there is no other engine.
        RequestError: the editor's edits change no weights.
    """
    settings = settings or Settings()
    lm, worker = work.lm.twin(), Worker("emendo-model")
    found = Service(
        ledger=work.ledger,
        router=Router(lm, work.ledger, worker, name),
        backend=backend or Engine(lm, worker, bounds),
        desk=EditingDesk(work, editor),
        settings=settings,
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        found.desk.prepare()
        yield
        await found.close()

    app = FastAPI(
        title="emendo",
        version=__version__,
        description="A language model with its corrections, live.",
        lifespan=lifespan,
        docs_url=None,  # their pages load scripts from elsewhere
        redoc_url=None,
        max_body_size=settings.body,
        responses={status: {"model": ErrorBody} for status in (400, 404, 429, 503)},
    )
    app.state.service = found
    app.state.access, app.state.rate = settings.access, RateLimit(settings.edits_per_minute)
    add_handlers(app)
    if settings.access.open:  # access is by place, so a web page must not reach it by a name of its own
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=LOCAL_HOSTS, www_redirect=False)
    app.add_middleware(Observed, metrics=found.metrics)
    app.include_router(openai_routes.router, dependencies=[Depends(asking)])
    app.include_router(edit_routes.router, dependencies=[Depends(asking)])
    add_page(app)

    @app.get("/health", tags=["Operation"])
    async def health() -> dict[str, str]:
        """Tell that the process answers."""
        return {"status": "ok"}

    @app.get("/ready", tags=["Operation"], responses={503: {}})
    async def ready(response: Response) -> dict[str, bool]:
        """Tell whether requests are answered now."""
        now = await found.ready()
        response.status_code = 200 if now else 503
        return {"ready": now}

    @app.get("/metrics", tags=["Operation"], dependencies=[Depends(asking)], response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Give the figures for Prometheus."""
        with suppress(StorageError):
            await worker.run(found.router.latest)
        return Response(generate_latest(found.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app
