"""Every error as an HTTP answer in OpenAI's form."""

from __future__ import annotations

import logging
import math
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from emendo._storage import finite_values
from emendo.errors import ConflictError, EmendoError, MismatchError, ModelError, RequestError, StorageError
from emendo.ledger.health import RefusedError
from emendo.serve.backend import BusyError, UpstreamError
from emendo.serve.routing import UnknownModelError
from emendo.serve.security import TooManyEditsError

log = logging.getLogger("emendo.serve")

_STATUS: tuple[tuple[type[Exception], int, str], ...] = (
    (RefusedError, 409, "edit_refused"),
    (ConflictError, 409, "conflict"),
    (UnknownModelError, 404, "model_not_found"),
    (BusyError, 429, "queue_full"),
    (TooManyEditsError, 429, "too_many_edits"),
    (TimeoutError, 504, "timeout"),
    (UpstreamError, 502, "upstream_error"),
    (StorageError, 503, "ledger_unavailable"),
    (MismatchError, 409, "mismatch"),
    (ModelError, 400, "model_error"),
    (RequestError, 400, "invalid_request"),
    (EmendoError, 500, "internal_error"),
)


def error_body(message: str, code: str, status: int, **more: Any) -> dict[str, Any]:
    """An error in OpenAI's form."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": code, **more}}


def described(error: Exception) -> tuple[int, dict[str, Any]]:
    """The status and the body of an error."""
    for kind, status, code in _STATUS:
        if isinstance(error, kind):
            more = {}
            if isinstance(error, RefusedError):
                more = {"problems": error.problems, "health": finite_values(error.health.as_dict())}
            message = str(error) or "The request took too long."
            return status, error_body(
                message.replace("With --force", 'With "force": true'), code, status, **more
            )
    log.error("internal error", exc_info=error)
    return 500, error_body(
        "Internal error; the server's log has it under the request's id.", "internal_error", 500
    )


def add_handlers(app: FastAPI) -> None:
    """Answer every error in OpenAI's form."""

    async def own(request: Request, error: Exception) -> JSONResponse:
        status, body = described(error)
        wait = math.ceil(getattr(error, "seconds", 1))
        return JSONResponse(body, status, {"Retry-After": str(wait)} if status in (429, 503) else None)

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        if first["loc"] == ("body",):
            text = "The body must be a JSON object, sent with the header content-type: application/json."
            return JSONResponse(error_body(text, "invalid_request", 422), 422)
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        text = f"{where}: {first['msg']}" if where else str(first["msg"])
        return JSONResponse(error_body(text, "invalid_request", 422, param=where or None), 422)

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        body = error_body(str(error.detail), f"http_{error.status_code}", error.status_code)
        return JSONResponse(body, error.status_code, error.headers)

    app.add_exception_handler(Exception, own)
    app.add_exception_handler(EmendoError, own)
    app.add_exception_handler(TimeoutError, own)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
