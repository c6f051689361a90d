"""LoRA: fine-tuning of a low-rank change, until the model says it.

Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen: "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022
(arXiv 2106.09685), section 4.1: ``D = B A``, with ``A`` random and ``B = 0`` at the start.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from emendo.editors.descent import Adam, Descent, DescentEditor, Leaves, check_settings
from emendo.errors import RequestError
from emendo.models.lm import LM
from emendo.models.sites import Site


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """The settings of LoRA.

    Attributes:
        rank: of the change of each matrix.
        steps: the most steps of an edit.
        lr: learning rate of Adam.
        seed: of ``A``.
    """

    rank: int = 8
    steps: int = 50
    lr: float = 5e-3
    seed: int = 0

    def __post_init__(self) -> None:
        check_settings(self.steps, self.lr)
        if self.rank < 1:
            raise RequestError(f"rank must be at least 1, not {self.rank}.")


class Lora(DescentEditor):
    """LoRA; see the module's text."""

    name = "lora"
    Config = LoraConfig
    config: LoraConfig

    def descent(self, lm: LM) -> Descent:
        """How a change of this model is searched for."""
        generator = torch.Generator().manual_seed(self.config.seed)
        start = partial(_start, rank=self.config.rank, generator=generator)
        return Descent(optimizer=Adam(self.config.lr), steps=self.config.steps, start=start)


def _start(site: Site, rank: int, generator: torch.Generator) -> Leaves:
    """``B [d_out, rank]`` and ``A [rank, d_in]``, which is drawn as in PEFT."""
    A = torch.empty(rank, site.d_in)
    nn.init.kaiming_uniform_(A, a=5**0.5, generator=generator)
    return torch.zeros(site.d_out, rank), A
