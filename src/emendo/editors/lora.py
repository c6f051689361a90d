"""LoRA: fine-tuning of a low-rank change, until the target is the most likely answer.

Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen: "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022
(arXiv 2106.09685), section 4.1: ``D = B A``, with ``A`` random and ``B = 0`` at the start.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from emendo._settings import Settings, setting
from emendo.editors.descent import Adam, Descent, DescentEditor, Leaves
from emendo.models.lm import LM
from emendo.models.sites import Site


@dataclass(frozen=True, slots=True)
class LoraConfig(Settings):
    """The settings of LoRA."""

    rank: int = setting(8, "Rank of the change of each matrix.", least=1)
    steps: int = setting(50, "Largest number of steps of an edit.", least=1)
    lr: float = setting(5e-3, "Learning rate of Adam.", above=0)
    seed: int = setting(0, "Seed of `A`.")


class Lora(DescentEditor):
    """LoRA; see the module's docstring."""

    name = "lora"
    Config = LoraConfig
    config: LoraConfig

    def descent(self, lm: LM) -> Descent:
        """The settings of the search on this model."""
        generator = torch.Generator().manual_seed(self.config.seed)
        start = partial(_start, rank=self.config.rank, generator=generator)
        return Descent(optimizer=Adam(self.config.lr), steps=self.config.steps, start=start)


def _start(site: Site, rank: int, generator: torch.Generator) -> Leaves:
    """``B [d_out, rank]`` and ``A [rank, d_in]``, drawn as in PEFT."""
    A = torch.empty(rank, site.d_in)
    nn.init.kaiming_uniform_(A, a=5**0.5, generator=generator)
    return torch.zeros(site.d_out, rank), A
