"""EWC: fine-tuning that keeps the weights that the base task depends on.

Kirkpatrick, Pascanu, Rabinowitz, Veness, Desjardins, Rusu, Milan, Quan, Ramalho, Grabska-Barwinska, Hassabis, Clopath,
Kumaran, Hadsell: "Overcoming catastrophic forgetting in neural networks", PNAS 2017 (arXiv 1612.00796), Eq. 3::

    minimise over D    NLL(targets | W + D)  +  c * sum_i F_i D_i^2 / 2

``F`` is the diagonal of the Fisher information of the base task, per predicted token, so that the penalty is ``c``
times the second-order estimate of ``KL(W || W + D)`` in nats per token, cut down to its diagonal::

    F_i = sum over texts of (d/dW_i  log p(y | text, W))^2  /  number of tokens in y         y drawn from p(. | text, W)

It is the L2 penalty of :mod:`emendo.editors.ft_penalised` with a weight for each entry. The texts are the locality
examples that were given, else text that a decoder writes by itself, else the built-in facts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from emendo._settings import setting
from emendo.editors._locality import LocalityEditor
from emendo.editors._penalties import PenalisedSettings, proximal_l2
from emendo.editors.descent import Adam, Descent, DescentEditor
from emendo.models._sampling import own_passages
from emendo.models.capture import capture
from emendo.models.lm import LM
from emendo.models.losses import token_nll
from emendo.models.sites import Site
from emendo.models.text import Text, length_buckets
from emendo.models.tokenization import passage_texts, to_texts
from emendo.models.trunk import Trunk
from emendo.models.trunk_cache import TrunkCache

_TOKENS = 64  # read of a passage
_PASS_TOKENS = 512  # padded tokens of a pass


@dataclass(frozen=True, slots=True)
class EwcConfig(PenalisedSettings):
    """The settings of EWC."""

    coefficient: float = setting(1.0, "Weight of the penalty against the NLL in nats.", above=0)
    texts: int = setting(64, "Texts of the base task.", least=1)
    seed: int = setting(0, "Seed of the drawn answers.")


class Ewc(LocalityEditor, DescentEditor):
    """EWC; see the module's docstring."""

    name = "ewc"
    Config = EwcConfig
    config: EwcConfig

    def __init__(
        self, sites: tuple[Site, ...], config: EwcConfig | None = None, fingerprint: str = ""
    ) -> None:
        super().__init__(sites, config, fingerprint)
        self._known: tuple[object, dict[str, Tensor]] = None, {}

    def descent(self, lm: LM) -> Descent:
        """The settings of the search on this model."""
        importance = self.importance(lm)
        return Descent(
            optimizer=Adam(self.config.lr),
            steps=self.config.steps,
            proximal={
                name: partial(proximal_l2, weight=own * self.config.coefficient)
                for name, own in importance.items()
            },
            until=self.config.until,
        )

    def importance(self, lm: LM) -> dict[str, Tensor]:
        """``F [d_out, d_in]`` of each matrix, computed once for each model and each choice of texts."""
        key = (id(lm.model), self.config.texts, self.config.seed, tuple(self.given))
        if self._known[0] != key:
            self._known = key, fisher(lm, self.sites, self._base(lm), self.config.seed)
        return self._known[1]

    def _base(self, lm: LM) -> list[Text]:
        """The texts of the base task."""
        count = self.config.texts
        if lm.kind == "causal" and not self.given:
            return passage_texts(lm, own_passages(lm, count), _TOKENS)
        return to_texts(lm, self.locality(lm)[:count])


def fisher(lm: LM, sites: tuple[Site, ...], texts: Sequence[Text], seed: int = 0) -> dict[str, Tensor]:
    """The diagonal of the Fisher information of each matrix per predicted token, ``[d_out, d_in]``.

    Args:
        lm: the model.
        sites: the matrices.
        texts: the inputs; instead of the tokens of an answer, as many are drawn from the model, each after the given
            ones before it.
        seed: of the draws.
    """
    store = TrunkCache(Trunk(lm.model, sites), dtype=lm.model.dtype)
    store.ensure(texts)
    random = torch.Generator().manual_seed(seed)
    total: dict[str, Tensor] = {}
    for part in length_buckets(texts, lambda text: text.size, _PASS_TOKENS):
        factors = capture(lm.model, sites, partial(_drawn_nll, store, part, random))[1]
        for name, own in factors.items():
            for example in range(own.examples):
                rows = own.owner == example
                square = (own.delta[rows].mT @ own.u[rows]).square_()
                total[name] = total[name].add_(square) if name in total else square
    count = sum(len(text.labels) for text in texts)
    return {name: own / count for name, own in total.items()}


def _drawn_nll(store: TrunkCache, texts: Sequence[Text], random: torch.Generator) -> Tensor:
    """The NLL of tokens drawn from the model at the labels of each text, summed over them."""
    batch, logits = store.logits(texts)
    with torch.no_grad():
        labels = torch.multinomial(logits.float().softmax(-1).cpu(), 1, generator=random).squeeze(-1)
    nll = token_nll(logits, labels.to(logits.device))
    return nll.new_zeros(len(texts)).index_add(0, batch.owner.to(nll.device), nll)
