"""The processes that `accelerate launch` started, where it did."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Processes:
    """Several processes that do one piece of work.

    Attributes:
        place: of this process, from 0 up.
        size: how many there are.
        state: Accelerate's, where there are several.
    """

    place: int = 0
    size: int = 1
    state: Any = None

    @classmethod
    def present(cls) -> Processes:
        """The team that this process is in: that of ``accelerate launch`` or ``torchrun``, else itself alone."""
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return cls()
        from accelerate import PartialState

        state = PartialState(cpu=os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true"))
        return cls(state.process_index, state.num_processes, state)

    @property
    def first(self) -> bool:
        """Whether this process speaks for all."""
        return self.place == 0

    @property
    def device(self) -> str | None:
        """Where this process's model belongs; None for one process alone."""
        return None if self.state is None else str(self.state.device)

    def wait(self) -> None:
        """Go on when all have come here."""
        if self.state is not None:
            self.state.wait_for_everyone()
