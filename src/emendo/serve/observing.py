"""What operators see: a line of JSON for each request, with its id, and figures for Prometheus."""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from emendo.serve.backend import Backend, InForce
from emendo.serve.routing import Router

log = logging.getLogger("emendo.serve")
request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
"""The id of the request that is being answered."""

_GIVEN = re.compile(r"[\w.:-]{1,128}")
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class JsonLines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """A record with the request's id and the fields that were given with it."""
        values = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            "request_id": request_id.get(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            values["traceback"] = self.formatException(record.exc_info)
        return json.dumps({name: value for name, value in values.items() if value is not None})


class Metrics:
    """The counters of one service.

    Args:
        backend: whose gauges are read when somebody looks.
        router: the same.
    """

    def __init__(self, backend: Backend, router: Router) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("emendo_requests", "Requests.", ("route", "status"), registry=self.registry)
        self.seconds = Histogram(
            "emendo_request_seconds",
            "Time until the end of the answer.",
            ("route",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.answers = Counter(
            "emendo_answers", "Answers, by an edit or by the base model.", ("by",), registry=self.registry
        )
        self.tokens = Counter(
            "emendo_tokens", "Tokens of prompts and of answers.", ("kind",), registry=self.registry
        )
        self.steps = Counter(
            "emendo_steps", "Steps of the ledger by this server.", ("kind",), registry=self.registry
        )
        self.registry.register(_Gauges(backend, router))

    def answered(
        self, forces: Sequence[InForce], prompt_tokens: int, completion_tokens: int, **_: int
    ) -> None:
        """Count answers, each by the edits in force, and the tokens of all of them."""
        self.tokens.labels("prompt").inc(prompt_tokens)
        self.tokens.labels("generated").inc(completion_tokens)
        for force in forces:
            self.answers.labels("edit" if force.parts else "base").inc()


class _Gauges(Collector):
    def __init__(self, backend: Backend, router: Router) -> None:
        self.backend, self.router = backend, router

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """The state of the engine and of the ledger, now."""
        for name, value in self.backend.figures().items():
            yield GaugeMetricFamily(f"emendo_engine_{name}", f"Of the engine: {name}.", value)
        if (head := self.router.head) is not None:
            yield GaugeMetricFamily("emendo_active_edits", "Active edits.", head.active_count)
            yield GaugeMetricFamily("emendo_operation", "Latest operation of the ledger.", head.id)


class Observed:
    """Gives each request an id, counts it, and writes a line about it when it is over.

    ``scope["emendo"]`` is a dict to which a route adds fields of that line.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        own = given if _GIVEN.fullmatch(given) else uuid.uuid4().hex
        token, start, status = request_id.set(own), time.perf_counter(), 500
        fields: dict[str, Any] = {}
        scope["emendo"] = fields

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = own
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        finally:
            seconds = time.perf_counter() - start
            route = getattr(scope.get("route"), "path", "none")
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.seconds.labels(route).observe(seconds)
            client = scope.get("client")
            log.info(
                "request",
                extra={
                    "fields": {
                        "method": scope["method"],
                        "path": scope["path"],
                        "status": status,
                        "ms": round(1000 * seconds, 1),
                        "client": client[0] if client else None,
                        **fields,
                    }
                },
            )
            request_id.reset(token)
