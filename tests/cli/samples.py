"""What the tests of several commands share."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SHORT = (
    "--steps",
    "12",
    "--batch",
    "2",
    "--warmup",
    "2",
    "--validate-every",
    "5",
    "--rank",
    "8",
    "--last",
    "2",
)
"""Options of a training run of a second."""
BRIEF = (*SHORT, "--steps", "2", "--warmup", "1", "--validate-on", "2")
"""Options of a run of two steps, where it does not matter what is learnt."""


@dataclass(frozen=True)
class Answer:
    """What a command said."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Emendo = Callable[..., Answer]
