"""LocFT: breadth-first fine-tuning of one matrix.

"Fine-tuning Done Right in Model Editing", ICLR 2026 (arXiv 2509.22072, LocFT-BF): plain fine-tuning edits thousands of
facts if it goes through them epoch by epoch in batches, not fact by fact until each is learnt, on one well-chosen
matrix. Adam at 5e-4, batches of 100, a batch whose loss is below 1e-2 skipped, and the end of text after every target.
Differences to the paper: facts rest one by one, not batch by batch; contexts beside the prompt, and a KL on what must
stay (:mod:`emendo.editors._breadth`). ``contexts=0`` with ``c_kl=0`` is the paper's loss.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from emendo.editors._breadth import BreadthEditor, BreadthSettings
from emendo.models.sites import Site, find_sites, find_stacks


@dataclass(frozen=True, slots=True)
class LocftConfig(BreadthSettings):
    """The settings of LocFT."""


class Locft(BreadthEditor):
    """LocFT; see the module's docstring."""

    name = "locft"
    Config = LocftConfig
    config: LocftConfig

    @classmethod
    def default_sites(cls, model: nn.Module) -> tuple[Site, ...]:
        """The last MLP matrix of the block at 2/3 of the depth."""
        block = find_stacks(model)[0].depth * 2 // 3
        return find_sites(model, blocks=range(block, block + 1))[-1:]
