"""How an evaluation is done: what is asked, in which parts, and who hears of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from emendo.data.schema import Record
from emendo.errors import RequestError
from emendo.evaluate.results import Result

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


class Parts(Protocol):
    """Where the results of a run are kept, part by part."""

    def read(self, number: int, records: Sequence[Record]) -> tuple[Result, ...] | None:
        """The results of a part; None where it has not been written."""

    def write(self, number: int, results: Sequence[Result]) -> None:
        """Keep the results of a part."""


@dataclass(frozen=True, slots=True)
class Ways:
    """How an evaluation is done.

    Attributes:
        generated: score free greedy generation too.
        batch: how many facts are edited at once, each for itself.
        new_tokens: how many tokens are generated; by default the answer's tokens and 4 more, rounded up to a multiple
            of 8, for each prompt, so that no figure depends on what else is in the batch.
        together: how many facts make one edit.
        told: ask the prompts where nothing shall change also with the edited fact before them.
        share: which part of the work this process does, and of how many.

    Raises:
        RequestError: a number that makes no sense.
    """

    generated: bool = True
    batch: int = 25
    new_tokens: int | None = None
    together: int = 1
    told: bool = True
    share: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        for name in ("batch", "new_tokens", "together"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise RequestError(f"{name}={value}: give a whole number from 1 up.")
