"""CrispEdit: fine-tuning of several matrices in the directions that carry little of the model's curvature.

"CrispEdit: Low-Curvature Projections for Scalable LLM Editing", 2026 (arXiv 2602.15823). Over running text, with ``u``
the inputs of a matrix and ``delta`` the gradients at its outputs::

    A = E[u u^T] = U_A diag(a) U_A^T        S = E[delta delta^T] = U_S diag(s) U_S^T        (emendo.models.moments)
    Q <- U_S ((U_S^T Q U_A) * M) U_A^T      M keeps the coordinates (i, j) of lowest s_i a_j

``s_i a_j`` is the curvature of coordinate ``(i, j)`` (K-FAC): the largest ones, which hold the share ``gamma`` of the
sum, are left as they are. Every gradient of breadth-first fine-tuning (:mod:`emendo.editors._breadth`) is projected so.
Differences to the paper: Adam works on the coordinates, so that the change itself stays in the subspace, where Adam on
projected gradients leaves it; contexts beside the prompt, and a KL on what must stay.

In sequence, :meth:`Crisp.continue_from` averages the moments of the edits so far in, over all their tokens: without
those of the prompts nearly everything is forgotten (there, 71 to 12).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from emendo._settings import setting
from emendo.editors._breadth import BreadthEditor, BreadthSettings, Subspace
from emendo.editors._values import writing_sites
from emendo.edits.edit import Request
from emendo.errors import RequestError
from emendo.models.lm import LM
from emendo.models.moments import Moments, moments_over, second_moments
from emendo.models.sites import Site


@dataclass(frozen=True, slots=True)
class CrispConfig(BreadthSettings):
    """The settings of CrispEdit."""

    batch: int = setting(32, "Facts of a step.", least=1)
    epochs: int = setting(25, "Largest number of epochs.", least=1)
    text: str = setting(
        "", "File of plain text for `A` and `S`, a paragraph a line; empty: the model's own text."
    )
    gamma: float = setting(
        0.8, "Share of the curvature whose directions are left as they are.", least=0, most=1
    )
    weight: float = setting(1.0, "Weight of a token of earlier edits against one of running text.", least=0)


class Crisp(BreadthEditor):
    """CrispEdit; see the module's docstring."""

    name = "crisp"
    Config = CrispConfig
    config: CrispConfig

    def __init__(
        self, sites: tuple[Site, ...], config: CrispConfig | None = None, fingerprint: str = ""
    ) -> None:
        super().__init__(sites, config, fingerprint)
        self._earlier: dict[str, Moments] = {}
        self._spaces: tuple[int, dict[str, Subspace]] | None = None

    @classmethod
    def default_sites(cls, model: nn.Module) -> tuple[Site, ...]:
        """The MLP matrices that write into the hidden state, of a sixth of the blocks, from 3/5 of the depth on."""
        return writing_sites(model, 3, 5)

    def subspaces(self, lm: LM) -> Mapping[str, Subspace]:
        """The directions of low curvature of each matrix; made once for each model."""
        if lm.kind != "causal":
            raise RequestError(f"{self.name} is for decoders, and {lm.name} is none: choose another editor.")
        if self._spaces is None or self._spaces[0] != id(lm.model):
            moments = moments_over(lm, self.sites, self.config.text)
            joined = {
                name: own.averaged(self._earlier.get(name), self.config.weight)
                for name, own in moments.items()
            }
            spaces = {
                name: low_curvature(own.inputs, own.outputs, self.config.gamma)
                for name, own in joined.items()
            }
            self._spaces = id(lm.model), spaces
        return self._spaces[1]

    def continue_from(self, lm: LM, requests: Sequence[Request]) -> None:
        """Leave the directions of these facts as they are in the following edits."""
        fresh = second_moments(lm, self.sites, self.texts(lm, requests))
        self._earlier = {name: own.averaged(self._earlier.get(name)) for name, own in fresh.items()}
        self._spaces = None

    def start_over(self) -> None:
        """Forget the edits of :meth:`continue_from`."""
        self._earlier, self._spaces = {}, None


def low_curvature(inputs: Tensor, outputs: Tensor, gamma: float) -> Subspace:
    """The subspace without the directions of highest curvature, which hold the share ``gamma`` of it.

    Args:
        inputs: ``A [d_in, d_in]``.
        outputs: ``S [d_out, d_out]``.
        gamma: from 0 (nothing is left out) to 1.
    """
    (a, right), (s, left) = (torch.linalg.eigh(moment.double()) for moment in (inputs, outputs))
    curvature = s.clamp(min=0)[:, None] * a.clamp(min=0)[None]
    order = curvature.flatten().argsort(descending=True)
    share = curvature.flatten()[order].cumsum(0) / curvature.sum().clamp(min=torch.finfo(torch.float64).tiny)
    masked = order[: int((share < gamma).sum()) + 1] if gamma > 0 else order[:0]
    mask = torch.ones_like(curvature).flatten().index_fill(0, masked, 0.0).view_as(curvature)
    return Subspace(left.float(), right.float(), mask.float())
