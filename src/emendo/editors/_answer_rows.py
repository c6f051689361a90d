"""The rows of matrices at the tokens where an answer is predicted, and their statistics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from emendo.editors._nets import RunningStats
from emendo.models.losses import per_example, token_nll
from emendo.models.sites import Site
from emendo.models.text import Text
from emendo.models.trunk_cache import TrunkCache


class Statistics(nn.Module):
    """The statistics of the rows ``h`` and ``g`` of matrices of one shape.

    Args:
        shape: ``(d_in, d_out)``.
        whiten: keep the covariance of ``g`` too.
    """

    products: Tensor

    def __init__(self, shape: tuple[int, int], whiten: bool) -> None:
        super().__init__()
        self.h, self.g = (RunningStats(width) for width in shape)
        size = shape[1] if whiten else 0
        self.register_buffer("products", torch.zeros(size, size, dtype=torch.float64))

    def update(self, h: Tensor, g: Tensor) -> None:
        """Take rows in."""
        self.h.update(h)
        self.g.update(g)
        if len(self.products):
            self.products += g.double().mT @ g.double()

    def values(self, h: Tensor, g: Tensor) -> Tensor:
        """``-||h^||^2 g^`` for rows ``h [n, d_in]`` and ``g [n, d_out]``, float64; of the first row alone as it is."""
        if float(self.h.count) < 2:
            return -(h.double().square().sum(-1, keepdim=True) * g.double())
        size: Tensor = self.h(h.double()).square().sum(-1, keepdim=True)
        unit: Tensor = self._whitened(g.double()) if len(self.products) else self.g(g.double())
        return -(size * unit)

    def _whitened(self, g: Tensor) -> Tensor:
        mean, count = self.g.mean, max(2.0, float(self.g.count))
        covariance = (self.products - count * mean[:, None] * mean) / (count - 1)
        values, vectors = torch.linalg.eigh(covariance)
        seen = values > 1e-9 * values.max().clamp(min=1e-30)
        basis = vectors[:, seen] / values[seen].sqrt()
        found: Tensor = (g - mean) @ basis @ vectors[:, seen].mT
        return found


def label_rows(
    store: TrunkCache, sites: tuple[Site, ...], texts: Sequence[Text]
) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
    """The rows of some matrices at the tokens where a label is predicted.

    Returns:
        By site name, inputs ``[labels, d_in]`` and gradients ``[labels, d_out]`` of each text's mean NLL; and whether
        each text's labels are all the argmax, ``[texts]``.
    """
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str) -> Tensor:
        output = output if output.requires_grad else output.detach().requires_grad_()
        seen[name] = args[0].detach(), output
        return output

    handles = [
        site.module(store.model).register_forward_hook(
            lambda module, args, output, name=site.name: keep(module, args, output, name)
        )
        for site in sites
    ]
    try:
        with torch.enable_grad():
            batch, logits = store.logits(texts)
            labels, owner = batch.labels.to(logits.device), batch.owner.to(logits.device)
            loss = per_example(token_nll(logits, labels), owner, len(texts)).sum()
            grads = torch.autograd.grad(loss, [seen[site.name][1] for site in sites])
    finally:
        for handle in handles:
            handle.remove()
    at = batch.positions.to(logits.device)
    found = {
        site.name: (seen[site.name][0].flatten(0, -2)[at], grad.flatten(0, -2)[at])
        for site, grad in zip(sites, grads, strict=True)
    }
    missed = (logits.argmax(-1) != labels).float()
    return found, per_example(missed, owner, len(texts)) == 0
