"""Several processes that train one editor, as ``torchrun`` and ``accelerate launch`` start them.

Every process has the whole model and the whole editor and takes its share of each batch. Gradients, statistics and
figures are summed over the processes, with their counts, before anything is decided or changed, so that the editor
stays the same in all of them and does not depend on their number, except for rounding. The first process, the main one,
writes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from emendo.errors import LostProcessError

_T = TypeVar("_T")
_TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the others: longer than any piece of work between two exchanges."""


class World:
    """The processes that share a run. This class is the world of a single process; all its exchanges do nothing.

    Attributes:
        rank: index of this process.
        size: number of processes.
        waited: seconds that this process has spent in exchanges, waiting for the others included.
    """

    rank = 0
    size = 1
    waited = 0.0

    @staticmethod
    def present(device: str | None = None) -> World:
        """The processes that ``torchrun`` or ``accelerate launch`` has started; otherwise this one alone.

        Args:
            device: the device that the user asked for; ``"cpu"`` uses no GPU even where there is one.
        """
        return Processes(device) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else World()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Leave together with the other processes, unless an error ends this one."""

    @property
    def main(self) -> bool:
        """Whether this process writes files and reports for all."""
        return self.rank == 0

    def device(self, named: str | None) -> str | None:
        """The device of this process where the user asked for ``named``."""
        return named

    def share(self, items: Sequence[_T], unit: int = 1) -> Sequence[_T]:
        """This process's part of a sequence, in whole units of consecutive items."""
        units = len(items) // unit
        first, end = (units * rank // self.size * unit for rank in (self.rank, self.rank + 1))
        return items[first:end]

    def owns(self, key: bytes) -> bool:
        """Whether this process computes what is kept under a key; every key has one owner."""
        return int.from_bytes(key[:8], "big") % self.size == self.rank

    def gather(self, values: Tensor) -> Tensor:
        """The values of all processes, stacked by rank: ``[...]`` to ``[size, ...]``.

        Raises:
            LostProcessError: another process has ended, as of every exchange.
        """
        return values[None]

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the processes, in place."""

    def from_main(self, make: Callable[[], _T]) -> _T:
        """The main process's value of a function that only that process calls."""
        return make()

    def wait(self) -> None:
        """Wait until every process has reached this point."""
        self.gather(torch.zeros(1))


class Processes(World):
    """The processes of a ``torch.distributed`` group: gloo on CPUs, and NCCL for the tensors of GPUs."""

    def __init__(self, device: str | None = None) -> None:
        on_cpu = device == "cpu" or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")
        self.gpu = (
            int(os.environ.get("LOCAL_RANK", "0")) if torch.cuda.is_available() and not on_cpu else None
        )
        if self.gpu is not None:
            torch.cuda.set_device(self.gpu)
        if not dist.is_initialized():
            dist.init_process_group("gloo" if self.gpu is None else "cpu:gloo,cuda:nccl", timeout=_TIMEOUT)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self.wait()
            dist.destroy_process_group()

    def device(self, named: str | None) -> str | None:
        """The GPU of this process, unless the user asked for another device."""
        return f"cuda:{self.gpu}" if self.gpu is not None and named in (None, "cuda") else named

    def gather(self, values: Tensor) -> Tensor:
        """See :meth:`World.gather`."""
        found = [torch.empty_like(values) for _ in range(self.size)]
        with self._exchange():
            dist.all_gather(found, values)
        return torch.stack(found)

    def add(self, tensors: Sequence[Tensor]) -> None:
        """See :meth:`World.add`."""
        with self._exchange():
            for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
                work.wait()

    def from_main(self, make: Callable[[], _T]) -> _T:
        """See :meth:`World.from_main`."""
        held: list[Any] = [make() if self.main else None]
        with self._exchange():
            dist.broadcast_object_list(held)
        return held[0]  # type: ignore[no-any-return]

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            raise LostProcessError(
                f"Another process of this run has ended or does not answer; its own message says why ({error})."
            ) from error
        finally:
            self.waited += time.monotonic() - began
