"""Worlds of threads in one process, for runs that several processes share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, BrokenBarrierError
from typing import Any, TypeVar

import torch
from torch import Tensor

from emendo.errors import LostProcessError
from emendo.train.processes import World

_T = TypeVar("_T")


class Meeting:
    """Where the threads leave their values for one another."""

    def __init__(self, size: int) -> None:
        self.left: list[Any] = [None] * size
        self.barrier = Barrier(size, timeout=60)


class Thread(World):
    """One of the processes, played by a thread; everything is an exchange of values through the meeting."""

    def __init__(self, rank: int, size: int, meeting: Meeting) -> None:
        self.rank, self.size, self.meeting = rank, size, meeting
        self.exchanges = 0

    def _all(self, value: Any) -> list[Any]:
        self.exchanges += 1
        self.meeting.left[self.rank] = value
        try:
            self.meeting.barrier.wait()
            seen = list(self.meeting.left)
            self.meeting.barrier.wait()
        except BrokenBarrierError as error:
            raise LostProcessError("another thread has ended") from error
        return seen

    def gather(self, values: Tensor) -> Tensor:
        return torch.stack(self._all(values.clone()))

    def add(self, tensors: Sequence[Tensor]) -> None:
        for own, all_of_it in zip(
            tensors, zip(*self._all([t.clone() for t in tensors]), strict=True), strict=True
        ):
            own.copy_(sum(all_of_it))

    def from_main(self, make: Callable[[], _T]) -> _T:
        return self._all(make() if self.main else None)[0]  # type: ignore[no-any-return]


def shared(size: int, work: Callable[[World], _T]) -> list[_T]:
    """Call ``work`` in each of several processes; returns what each gives.

    An error ends its process, and with it the exchanges of the others; the first one that is no loss is raised.
    """
    meeting = Meeting(size)

    def run(rank: int) -> _T:
        try:
            return work(Thread(rank, size, meeting))
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        running = [pool.submit(run, rank) for rank in range(size)]
        errors = [error for each in running if (error := each.exception()) is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, LostProcessError)):
        raise error
    return [each.result() for each in running]
