"""Diff pruning: fine-tuning of a sparse change, whose number of nonzero entries is part of the loss.

Guo, Rush, Kim: "Parameter-Efficient Transfer Learning with Diff Pruning", ACL 2021 (arXiv 2012.07463). Each entry of
the change is ``D = z * w`` with a gate ``z`` drawn at every step from a hard-concrete distribution (Louizos, Welling,
Kingma: "Learning Sparse Neural Networks through L0 Regularization", ICLR 2018)::

    minimise over w, a    E_z NLL(targets | W + z * w)  +  c * E_z (number of nonzero entries)

    z = clamp(s * (r - l) + l, 0, 1)      s = sigmoid(log u - log(1 - u) + a)      u uniform      l = -1.5, r = 1.5
    P(z != 0) = sigmoid(a - log(-l / r))

As in the authors' code ``w`` starts at 0 and ``a`` at 5, and ``a`` has a learning rate of its own. An edit holds the
gates without noise, ``s = sigmoid(a)``, so that its other entries are exactly 0. Left out are the gates for whole
matrices, and the later stages that keep a given number of entries and train them again: the coefficient alone decides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from emendo._settings import Settings, setting
from emendo.editors.base import Editor
from emendo.edits.edit import Request
from emendo.errors import TrainingError
from emendo.low_rank import LowRank, applied
from emendo.models.lm import LM
from emendo.models.losses import per_example, token_nll
from emendo.models.text import Text
from emendo.models.trunk import Trunk
from emendo.models.trunk_cache import TrunkCache

LOWER, UPPER = -1.5, 1.5
"""The interval that a gate is stretched to before it is cut off at 0 and 1."""
_START = 5.0  # of every location
_MARGIN = 1e-4  # smallest distance of the noise from 0 and from 1


@dataclass(frozen=True, slots=True)
class DiffPruningConfig(Settings):
    """The settings of diff pruning."""

    coefficient: float = setting(
        1e-6, "Weight of the expected number of nonzero entries against the NLL in nats.", above=0
    )
    steps: int = setting(30, "Steps of an edit.", least=1)
    lr: float = setting(5e-4, "Learning rate of Adam for the entries.", above=0)
    gate_lr: float = setting(0.3, "Learning rate of Adam for the gates (0.1).", above=0)
    seed: int = setting(0, "Seed of the gates' noise.")


class DiffPruning(Editor):
    """Diff pruning; see the module's docstring."""

    name = "diff-pruning"
    Config = DiffPruningConfig
    config: DiffPruningConfig
    needs_training = False

    def each(self, lm: LM, requests: Sequence[Request]) -> dict[str, LowRank]:
        """Compute one change for each request, each from the clean model."""
        found = [self._search(lm, [text]) for text in self.texts(lm, requests)]
        return {
            site.name: LowRank.from_dense(torch.stack([changes[site.name] for changes in found]))
            for site in self.sites
        }

    def together(self, lm: LM, requests: Sequence[Request]) -> dict[str, LowRank]:
        """Compute one change for all requests, by their mean loss."""
        found = self._search(lm, self.texts(lm, requests))
        return {name: LowRank.from_dense(change) for name, change in found.items()}

    def _search(self, lm: LM, texts: Sequence[Text]) -> dict[str, Tensor]:
        """The dense change ``[d_out, d_in]`` of each matrix for all texts.

        Raises:
            TrainingError: the loss is not finite.
        """
        store = TrunkCache(Trunk(lm.model, self.sites), dtype=lm.model.dtype)
        store.ensure(texts)
        entries, locations = self._begin(lm)
        groups = [
            {"params": [*entries.values()], "lr": self.config.lr},
            {"params": [*locations.values()], "lr": self.config.gate_lr},
        ]
        leaves = [*entries.values(), *locations.values()]
        adam, random = torch.optim.Adam(groups, fused=True), torch.Generator().manual_seed(self.config.seed)
        for step in range(self.config.steps):
            with torch.enable_grad():
                loss = self._nll(store, texts, self._drawn(entries, locations, random))
                if not loss.isfinite():
                    raise TrainingError(
                        f"The loss of an edit is not finite after {step} steps: use a smaller learning rate."
                    )
                nonzero = torch.stack([open_probability(at).sum() for at in locations.values()]).sum()
                total = loss + self.config.coefficient * nonzero
                slopes = torch.autograd.grad(total, leaves, allow_unused=True)  # of an expert without tokens
            for leaf, slope in zip(leaves, slopes, strict=True):
                leaf.grad = slope
            adam.step()
        return {name: (own * gate(locations[name])).detach() for name, own in entries.items()}

    def _begin(self, lm: LM) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The entries and the locations of their gates, ``[d_out, d_in]`` for each matrix."""
        entries, locations = {}, {}
        for site in self.sites:
            weight = site.weight(lm.model)
            dtype = torch.promote_types(weight.dtype, torch.float32)
            zeros = torch.zeros(site.d_out, site.d_in, dtype=dtype, device=weight.device)
            entries[site.name] = zeros.requires_grad_()
            locations[site.name] = torch.full_like(zeros, _START, requires_grad=True)
        return entries, locations

    def _drawn(
        self, entries: Mapping[str, Tensor], locations: Mapping[str, Tensor], random: torch.Generator
    ) -> dict[str, Tensor]:
        """A change of each matrix with gates drawn at random."""
        changes = {}
        for name, own in entries.items():
            noise = torch.rand(own.shape, generator=random, dtype=own.dtype).to(own.device)
            changes[name] = own * gate(locations[name], noise)
        return changes

    def _nll(self, store: TrunkCache, texts: Sequence[Text], changes: Mapping[str, Tensor]) -> Tensor:
        """The mean over the texts of the NLL per target token."""
        with applied(
            store.model, {name: partial(_product, change=change) for name, change in changes.items()}
        ):
            batch, logits = store.logits(texts)
        nll = token_nll(logits, batch.labels.to(logits.device))
        return per_example(nll, batch.owner.to(nll.device), len(texts)).mean()


def gate(location: Tensor, noise: Tensor | None = None) -> Tensor:
    """Gates of the hard-concrete distribution, or those without noise.

    Args:
        location: ``a``.
        noise: numbers between 0 and 1, of the same shape.
    """
    if noise is not None:
        location = location + noise.clamp(_MARGIN, 1 - _MARGIN).logit()
    return (location.sigmoid() * (UPPER - LOWER) + LOWER).clamp(0, 1)


def open_probability(location: Tensor) -> Tensor:
    """The probability that a gate is not 0."""
    return (location - math.log(-LOWER / UPPER)).sigmoid()


def _product(x: Tensor, change: Tensor) -> Tensor:
    """``x D^T`` for rows ``x [n, d_in]``."""
    return x @ change.to(x.dtype).mT
