"""The parts of a running service, as its routes see them."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated

from fastapi import Depends, Request

from emendo.errors import StorageError
from emendo.ledger import Ledger
from emendo.serve.backend import Backend
from emendo.serve.editing import EditingDesk
from emendo.serve.observing import Metrics
from emendo.serve.routing import Router
from emendo.serve.security import Access


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of the service.

    Attributes:
        timeout: seconds after which an answer that is not complete is given up.
        body: the largest size of a request's body, in bytes.
        edits_per_minute: the largest number of steps of the ledger that a caller takes in a minute.
        access: the tokens for asking and for editing.
    """

    timeout: float = 300.0
    body: int = 1_000_000
    edits_per_minute: int = 60
    access: Access = field(default_factory=Access)


@dataclass(frozen=True)
class Service:
    """The parts of a running service.

    Attributes:
        ledger: the only state.
        router: finds the edits in force for a request.
        backend: answers it under these edits.
        desk: makes edits and takes them off.
        settings: of the service.
        started: time, in seconds since 1970.
    """

    ledger: Ledger
    router: Router
    backend: Backend
    desk: EditingDesk
    settings: Settings
    started: int = field(default_factory=lambda: int(time.time()))

    @cached_property
    def metrics(self) -> Metrics:
        """The figures for Prometheus."""
        return Metrics(self.backend, self.router)

    async def ready(self) -> bool:
        """Whether requests are answered now: the engine takes them, and the ledger can be read."""
        try:
            await self.router.worker.run(self.router.latest)
        except StorageError:
            return False
        return await self.backend.ready()

    async def models(self) -> list[str]:
        """The names of the models that can be asked."""
        return await self.router.worker.run(self.router.models)

    async def close(self) -> None:
        """End all work."""
        await self.backend.close()
        self.desk.close()
        self.router.worker.close()


def service(request: Request) -> Service:
    """The service that a request came to."""
    found: Service = request.app.state.service
    return found


Found = Annotated[Service, Depends(service)]
"""The service as an argument of a route."""
