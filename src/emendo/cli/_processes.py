"""The processes of `accelerate launch`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Processes:
    """The processes that share one piece of work.

    Attributes:
        place: index of this process.
        size: number of processes.
        state: that of Accelerate; None for a single process.
    """

    place: int = 0
    size: int = 1
    state: Any = None

    @classmethod
    def present(cls) -> Processes:
        """The processes started by ``accelerate launch`` or ``torchrun``; otherwise this one alone."""
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return cls()
        from accelerate import PartialState

        state = PartialState(cpu=os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true"))
        return cls(state.process_index, state.num_processes, state)

    @property
    def first(self) -> bool:
        """Whether this process reports for all."""
        return self.place == 0

    @property
    def device(self) -> str | None:
        """The device of this process's model; None for a single process."""
        return None if self.state is None else str(self.state.device)

    def wait(self) -> None:
        """Wait until every process has reached this point."""
        if self.state is not None:
            self.state.wait_for_everyone()
