"""One thread that owns what is not safe to share between threads, reached from asyncio."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
R = TypeVar("R")


class Worker:
    """A thread that carries out jobs one after the other, in the order in which they came."""

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name)

    def submit(self, job: Callable[[], Any]) -> None:
        """Queue a job that reports its outcome by itself; after :meth:`close` it is dropped."""
        try:
            self._pool.submit(job)
        except RuntimeError:
            if not self._pool._shutdown:
                raise

    async def run(self, job: Callable[P, R], *args: P.args, **options: P.kwargs) -> R:
        """Queue a job and wait for its result."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, lambda: job(*args, **options))

    def close(self) -> None:
        """Drop the jobs that wait and end after the one that runs."""
        self._pool.shutdown(wait=True, cancel_futures=True)


class Together(Generic[T, R]):
    """Calls that arrive while the thread is busy are carried out as one.

    Args:
        worker: the thread.
        job: maps the arguments of several calls to their results, of which each may be an exception.
    """

    def __init__(self, worker: Worker, job: Callable[[Sequence[T]], Sequence[R | Exception]]) -> None:
        self._worker, self._job = worker, job
        self._lock = threading.Lock()
        self._calls: list[tuple[T, asyncio.Future[R]]] = []

    async def __call__(self, argument: T) -> R:
        """Wait for the result of one call."""
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        with self._lock:
            self._calls.append((argument, future))
            first = len(self._calls) == 1
        if first:
            self._worker.submit(self._run)
        return await future

    def _run(self) -> None:
        with self._lock:
            calls, self._calls = self._calls, []
        try:
            results: Sequence[R | Exception] = self._job([argument for argument, _ in calls])
        except Exception as error:  # noqa: BLE001 - raised where each call waits
            results = [error] * len(calls)
        for (_, future), result in zip(calls, results, strict=True):
            future.get_loop().call_soon_threadsafe(_settle, future, result)


def _settle(future: asyncio.Future[Any], result: Any) -> None:
    if future.done():  # the caller is gone
        return
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)
