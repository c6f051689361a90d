"""Writing values for many facts by least squares: what MEMIT and AlphaEdit share.

Each fact has a value ``v_i``, what shall be added to the output of the last matrix at the subject's last token
(:mod:`emendo.editors._values`), and in every block a key ``k_i``, the mean input of the matrix at that token over the
fact's contexts. The matrices are written in the order in which they run, each on its keys once those before it are
changed; matrix ``l`` of ``L`` takes the share ``1 / (L - l + 1)`` of the residual that is left.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from emendo._settings import setting
from emendo.editors._values import ValueEditor, ValueSettings, inputs_of, mean_key, writing_sites
from emendo.edits.edit import Request
from emendo.low_rank import LowRank, applied
from emendo.models.lm import LM
from emendo.models.moments import Moments, moments_over
from emendo.models.sites import Site
from emendo.models.text import Text
from emendo.models.trunk import Trunk
from emendo.models.trunk_cache import TrunkCache


@dataclass(frozen=True, slots=True)
class KeySettings(ValueSettings):
    """The settings of the methods that write values by least squares."""

    until: float = setting(0.1, "Stop once the prompt and most contexts have an NLL below this.", above=0)
    enough: float = setting(0.1, "Then scale the value down while they have an NLL below this.", above=0)
    text: str = setting("", "File of plain text for `C`, a paragraph a line; empty: the model's own text.")
    rescale: bool = setting(
        False,
        "Scale the hidden states that are written to their mean norm in the clean model, and leave out facts "
        "whose norm is above twice that (NAS, arXiv 2602.02543).",
    )


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """A fact with its value.

    Attributes:
        texts: its prompt and contexts, with the target.
        ends: in each of them, the place of the subject's last token.
        value: ``[d_out]``, to be added to the output of the last matrix at these places.
    """

    texts: Sequence[Text]
    ends: Sequence[int]
    value: Tensor


class KeyEditor(ValueEditor):
    """Base of the methods that write values by least squares; a method defines :meth:`solved`."""

    config: KeySettings

    def __init__(
        self, sites: tuple[Site, ...], config: KeySettings | None = None, fingerprint: str = ""
    ) -> None:
        super().__init__(sites, config, fingerprint)
        self._moments: tuple[int, dict[str, Moments]] | None = None
        self.earlier: dict[str, Tensor] = {}
        """By site name, ``K_p^T K_p [d_in, d_in]`` of the edits before (:meth:`continue_from`)."""

    @classmethod
    def default_sites(cls, model: nn.Module) -> tuple[Site, ...]:
        """The MLP matrices that write into the hidden state, of a sixth of the blocks, from 1/4 of the depth on."""
        return writing_sites(model, 1, 4)

    @abstractmethod
    def solved(self, site: Site, keys: Tensor, residuals: Tensor, moment: Tensor) -> LowRank:
        """The change that writes ``residuals [n, d_out]`` at ``keys [n, d_in]``.

        Args:
            site: the matrix.
            keys: one row for each fact, float64.
            residuals: what shall be added there.
            moment: ``E[u u^T]`` over running text, float64.
        """

    def each(self, lm: LM, requests: Sequence[Request]) -> dict[str, LowRank]:
        """Compute one change for each request, each from the clean model."""
        self.checked(lm, requests)
        return self.one_by_one(lm, requests)

    @torch.no_grad()
    def together(self, lm: LM, requests: Sequence[Request]) -> dict[str, LowRank]:
        """Compute one change for all requests."""
        self.checked(lm, requests)
        facts = [self.found(lm, request) for request in requests]
        values = torch.stack([fact.value for fact in facts]).double()
        if self.config.rescale:
            hidden = torch.stack([self.hidden(lm, fact) for fact in facts])
            values, kept = rescaled(values, hidden)
            facts = [fact for fact, keep in zip(facts, kept.tolist(), strict=True) if keep]
        trunk = Trunk(lm.model, self.sites)
        changes: dict[str, LowRank] = {}
        left = values
        for number, site in enumerate(self.sites):
            keys = self._keys(lm, trunk, site, facts, changes)
            change = self.solved(site, keys, left / (len(self.sites) - number), self.moments(lm)[site.name])
            changes[site.name] = change.to(torch.promote_types(lm.model.dtype, torch.float32))
            left = left - change(keys)
        return changes

    def found(self, lm: LM, request: Request) -> Found:
        """Search for the value of a fact, with the last matrix alone."""
        last = self.sites[-1]
        search = self.search(lm, request, (last,))
        change = search.run()[last.name]
        return Found(search.texts, search.ends, change.left[:, 0])

    def hidden(self, lm: LM, fact: Found) -> Tensor:
        """The hidden state ``[width]`` after the last matrix's block at a fact's subject, float64; mean over texts."""
        last, seen = self.sites[-1], []
        block = lm.model.get_submodule(f"{last.stack}.{last.block}")
        for text, end in zip(fact.texts, fact.ends, strict=True):
            with block.register_forward_hook(lambda module, args, output: seen.append(output)):
                lm.logits([text])
            seen[-1] = (seen[-1][0] if isinstance(seen[-1], tuple) else seen[-1])[0, end].double()
        return torch.stack(seen).mean(0)

    def moments(self, lm: LM) -> dict[str, Tensor]:
        """``E[u u^T]`` of each matrix over running text, float64."""
        if self._moments is None or self._moments[0] != id(lm.model):
            self._moments = id(lm.model), moments_over(lm, self.sites, self.config.text)
        return {name: own.inputs.double() for name, own in self._moments[1].items()}

    @torch.no_grad()
    def continue_from(self, lm: LM, requests: Sequence[Request]) -> None:
        """Keep the keys of these facts, which the model holds, as they are in the following edits."""
        self.checked(lm, requests)
        for name, keys in self.keys_of(lm, requests).items():
            self.earlier[name] = self.earlier.get(name, 0) + keys.mT @ keys

    def start_over(self) -> None:
        """Forget the edits of :meth:`continue_from`."""
        self.earlier = {}

    def _keys(
        self, lm: LM, trunk: Trunk, site: Site, facts: Sequence[Found], changes: dict[str, LowRank]
    ) -> Tensor:
        """The keys ``[facts, d_in]`` of a matrix, float64, in the model with some changes."""
        keys = []
        for fact in facts:
            store = TrunkCache(trunk, dtype=lm.model.dtype)
            with applied(lm.model, changes):
                rows = inputs_of(store, (site,), fact.texts)[site.name]
            keys.append(mean_key(rows, fact.ends))
        return torch.stack(keys)


def rescaled(values: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Rescale what is written to the norm of the clean model, and leave out the facts that need far more.

    Args:
        values: ``[n, d]``, to be added to the hidden states.
        hidden: ``[n, d]``, in the clean model.

    Returns:
        The values of the facts that are kept, and which these are, ``[n]``.
    """
    usual, wanted = hidden.norm(dim=1).mean(), hidden + values
    norms = wanted.norm(dim=1, keepdim=True)
    kept = norms[:, 0] <= 2 * usual
    return (wanted * (usual / norms) - hidden)[kept], kept
