"""ROME with many contexts: a rank-1 write where the subject stands, in several blocks, that needs no training.

After Meng, Bau, Andonian, Belinkov: "Locating and Editing Factual Associations in GPT", NeurIPS 2022 (arXiv
2202.05262), section 3.1. At each matrix, with ``k`` the mean input at the subject's last token over the contexts::

    D = v q^T      q = C^-1 k / (k^T C^-1 k)      C = E[u u^T] + ridge * E[u^T u] / d_in * I

so ``D k = v``, and among all rows ``q`` with ``q^T k = 1`` this one answers the model's own text least: ``q^T C q`` is
smallest. The values ``v`` of all matrices are found by Adam through the whole model::

    minimise over v    NLL(target | prompt) + mean over contexts NLL(target | context)
                       + c_kl * mean over what must stay KL(W || W + D)

until the prompt and most contexts give the target, or ``steps`` are done. Then all values are multiplied with the
smallest factor at which they still give it, at a lower probability. Differences to the paper:

1. Several blocks are written and their values found together; the paper writes one. The values act in training where
   they act later, at every token that resembles ``k``; the paper adds its ``v`` at the subject alone.
2. Contexts: the prompt after a few words that the model wrote itself, the prompt with half of its words dropped, and
   the subject followed by words of the model, or by the end of the prompt. The paper has the first kind only. They
   replace the paraphrases that a trained editor sees.
3. What must stay: the prompt with the names of other subjects in it, and beginnings of the model's own passages. The
   paper keeps "{subject} is a". Half of these names and most passages shape ``q``; the KL takes the others, because on
   the first ``q`` leaves no KL to lower.
4. ``C`` comes from some 2,000 tokens that the model wrote itself, with a ridge; the paper's from Wikipedia. It is
   inverted in the space of the tokens (Woodbury), so its cost does not grow with the matrix.

A request has no subject: :func:`emendo._subject.find_subject` guesses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from emendo.editors._values import ValueEditor, ValueSettings, writing_sites
from emendo.edits.edit import Request
from emendo.low_rank import LowRank
from emendo.models.lm import LM
from emendo.models.sites import Site


@dataclass(frozen=True, slots=True)
class RomeConfig(ValueSettings):
    """The settings of ROME."""


class Rome(ValueEditor):
    """ROME; see the module's docstring."""

    name = "rome"
    Config = RomeConfig
    config: RomeConfig

    @classmethod
    def default_sites(cls, model: nn.Module) -> tuple[Site, ...]:
        """The MLP matrices that write into the hidden state, of a sixth of the blocks, from 3/5 of the depth on.

        In a mixture of experts, whose matrices see some tokens only, those of the attention.
        """
        return writing_sites(model, 3, 5)

    def each(self, lm: LM, requests: Sequence[Request]) -> dict[str, LowRank]:
        """Compute one change for each request, each from the clean model."""
        self.checked(lm, requests)
        found = [self.search(lm, request).run() for request in requests]
        return {site.name: LowRank.stack([changes[site.name] for changes in found]) for site in self.sites}
