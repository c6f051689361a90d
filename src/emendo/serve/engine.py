"""The local engine: a queue, and a batch that requests join and leave while it runs.

Each step of the batch is one job of the worker's thread, queued behind whatever else waits there, so that requests are
routed between two tokens.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from emendo.errors import ModelError
from emendo.models.lm import LM
from emendo.serve._batch import Batch, Row, row_of
from emendo.serve._worker import Worker
from emendo.serve.backend import Ask, BusyError, InForce, Piece


@dataclass(frozen=True, slots=True)
class Bounds:
    """The bounds of the local engine.

    Attributes:
        rows: the largest number of requests that are answered at once.
        tokens: the largest number of tokens, of prompts and answers together, that these may come to.
        waiting: the largest number of requests that wait; a further one is refused.
    """

    rows: int = 32
    tokens: int = 32_768
    waiting: int = 256


@dataclass(eq=False)
class _Ticket:
    """A request in the engine, and where its pieces go."""

    ask: Ask
    force: InForce
    loop: asyncio.AbstractEventLoop
    pieces: asyncio.Queue[Piece | Exception] = field(default_factory=asyncio.Queue)
    held: list[Piece | Exception] = field(default_factory=list)
    row: Row | None = None
    gone: bool = False


class Engine:
    """Answers requests with a decoder on this machine.

    Args:
        lm: the decoder, which only the worker runs.
        worker: the thread that runs it.
        bounds: of memory and queue.

    Raises:
        ModelError: the model is no decoder.
    """

    def __init__(self, lm: LM, worker: Worker, bounds: Bounds | None = None) -> None:
        if lm.kind != "causal":
            raise ModelError(f"Only decoders are served, and {lm.name} is not one.")
        self.lm, self.worker, self.bounds = lm, worker, bounds or Bounds()
        self._batch = Batch(lm)
        self._running: list[_Ticket] = []
        self._waiting: deque[_Ticket] = deque()
        self._lock = threading.Lock()
        self._active = False

    async def answer(self, ask: Ask, force: InForce) -> AsyncGenerator[Piece]:
        """See :meth:`emendo.serve.backend.Backend.answer`."""
        ticket = _Ticket(ask, force, asyncio.get_running_loop())
        with self._lock:
            if len(self._waiting) >= self.bounds.waiting:
                raise BusyError(f"{len(self._waiting)} requests wait already; try again later.")
            self._waiting.append(ticket)
            start, self._active = not self._active, True
        if start:
            self.worker.submit(self._tick)
        try:
            while True:
                piece = await ticket.pieces.get()
                if isinstance(piece, Exception):
                    raise piece
                yield piece
                if piece.finish is not None:
                    return
        finally:
            ticket.gone = True

    async def ready(self) -> bool:
        """See :meth:`emendo.serve.backend.Backend.ready`."""
        return len(self._waiting) < self.bounds.waiting

    def figures(self) -> Mapping[str, float]:
        """See :meth:`emendo.serve.backend.Backend.figures`."""
        return {"running": len(self._running), "waiting": len(self._waiting)}

    async def close(self) -> None:
        """See :meth:`emendo.serve.backend.Backend.close`."""
        for ticket in (*self._waiting, *self._running):
            ticket.gone = True

    # ------------------------------------------------------------------------------ on the worker's thread

    def _tick(self) -> None:
        """Let rows leave and join, and generate a token for each; then queue the next tick."""
        try:
            self._leave()
            out = self._join()
            joined = {id(ticket) for ticket, _ in out}
            if self._running and not joined:
                out = list(zip(self._running, self._batch.step(), strict=True))
            self._deliver(out)
        except Exception as error:  # noqa: BLE001 - a server goes on, and those who wait are told
            self._deliver([(ticket, error) for ticket in self._running])
            self._batch, self._running = Batch(self.lm), []
        with self._lock:
            self._active = bool(self._running or self._waiting)
        if self._active:
            self.worker.submit(self._tick)

    def _leave(self) -> None:
        """Drop the rows that have ended, and those whose client is gone."""
        kept = [i for i, ticket in enumerate(self._running) if not ticket.gone]
        self._batch.keep(kept)
        self._running = [self._running[i] for i in kept]

    def _join(self) -> list[tuple[_Ticket, Piece | Exception]]:
        """Admit waiting requests, as far as there is room; gives their first pieces."""
        out: list[tuple[_Ticket, Piece | Exception]] = []
        new: list[_Ticket] = []
        used = sum(row.size for row in self._batch.rows)
        while self._batch.joins and len(self._running) + len(new) < self.bounds.rows:
            with self._lock:
                if not self._waiting:
                    break
                ticket = self._waiting.popleft()
            if ticket.gone:
                continue
            try:
                row = ticket.row = ticket.row or row_of(self.lm, ticket.ask, ticket.force)
            except Exception as error:  # noqa: BLE001 - of this request alone
                out.append((ticket, error))
                continue
            if used and used + row.size > self.bounds.tokens:
                with self._lock:
                    self._waiting.appendleft(ticket)
                break
            used += row.size
            new.append(ticket)
        if new:
            self._running += new
            rows = [ticket.row for ticket in new if ticket.row is not None]
            out += zip(new, self._batch.join(rows), strict=True)
        return out

    def _deliver(self, out: list[tuple[_Ticket, Piece | Exception]]) -> None:
        """Hand pieces over with one wake-up of each event loop; those who read no stream are woken at the end."""
        loops: dict[asyncio.AbstractEventLoop, list[tuple[_Ticket, list[Piece | Exception]]]] = {}
        for ticket, piece in out:
            ticket.held.append(piece)
            if isinstance(piece, Exception) or piece.finish is not None:
                ticket.gone = True
            if ticket.gone or ticket.ask.stream:
                loops.setdefault(ticket.loop, []).append((ticket, ticket.held))
                ticket.held = []
        for loop, own in loops.items():
            with suppress(RuntimeError):  # it is closed: nobody waits
                loop.call_soon_threadsafe(_put, own)


def _put(out: list[tuple[_Ticket, list[Piece | Exception]]]) -> None:
    for ticket, pieces in out:
        for piece in pieces:
            ticket.pieces.put_nowait(piece)
