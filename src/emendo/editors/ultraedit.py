"""UltraEdit: one pass of gradients and one least-squares solve for many facts, without training or search.

Gu et al.: "UltraEdit: Training-, Subject-, and Memory-Free Lifelong Editing in Large Language Models", TMLR 2026.
In a *turn* of up to 100 facts, for each matrix, with one row of ``H`` (inputs) and ``G`` (gradients of the NLL at its
outputs) for each answer token::

    h^, g^ = (h - mean) / std, (g - mean) / std         v = -eta * ||h^||^2 * g^
    D = V^T H (H^T H + ridge * I)^-1                    with the rows h as they are

That is MALMEN's solve with the identity for its networks. Means and deviations run over all turns and all earlier
edits: :meth:`UltraEdit.continue_from` takes an edit's in, and a saved editor keeps them. They are exact, where the
published code's are biased and NaN for a single row. A first row alone has no mean to be compared with: ``h`` and ``g``
stand as they are.

``whiten`` removes the correlations of ``g`` too (StableEdit, arXiv 2605.11836, which takes a ridge of 10). Not in the
papers: ``rounds`` repeats a turn's step in the model that holds it, for the facts that are not learnt yet.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from emendo._settings import Settings, setting
from emendo.editors._answer_rows import Statistics, label_rows
from emendo.editors._values import writing_sites
from emendo.editors.base import Editor
from emendo.edits.edit import Request
from emendo.errors import RequestError
from emendo.least_squares import change_of
from emendo.low_rank import LowRank, applied
from emendo.models._experts import ExpertMatrix
from emendo.models.lm import LM
from emendo.models.sites import Site
from emendo.models.text import Text, length_buckets
from emendo.models.trunk import Trunk
from emendo.models.trunk_cache import TrunkCache

_PASS_TOKENS = 768


@dataclass(frozen=True, slots=True)
class UltraEditConfig(Settings):
    """The settings of UltraEdit."""

    eta: float = setting(1e-6, "Step size `eta`.", above=0)
    ridge: float = setting(1.0, "Ridge of the solve.", above=0)
    turn: int = setting(100, "Facts of a turn.", least=1)
    whiten: bool = setting(False, "Whiten the gradients fully, not only each dimension.")
    rounds: int = setting(1, "Steps of a turn (1).", least=1)


class UltraEdit(Editor):
    """UltraEdit; see the module's docstring."""

    name = "ultraedit"
    Config = UltraEditConfig
    config: UltraEditConfig
    needs_training = False

    def __init__(
        self, sites: tuple[Site, ...], config: UltraEditConfig | None = None, fingerprint: str = ""
    ) -> None:
        super().__init__(sites, config, fingerprint)
        shapes = dict.fromkeys(site.shape for site in sites)
        self.shapes = {shape: str(number) for number, shape in enumerate(shapes)}
        self.statistics = self._no_statistics()
        self._fresh: tuple[tuple[Request, ...], nn.ModuleDict] | None = None

    @classmethod
    def default_sites(cls, model: nn.Module) -> tuple[Site, ...]:
        """The MLP matrices that write into the hidden state, of a sixth of the blocks, from 3/5 of the depth on."""
        return writing_sites(model, 3, 5)

    def each(self, lm: LM, requests: Sequence[Request]) -> dict[str, LowRank]:
        """Compute one change for each request, each from the clean model."""
        self._readable(lm, requests)
        return self.one_by_one(lm, requests)

    def together(self, lm: LM, requests: Sequence[Request]) -> dict[str, LowRank]:
        """Compute one change for all requests, turn by turn."""
        texts = self._readable(lm, requests)
        statistics = copy.deepcopy(self.statistics)
        dtype = torch.promote_types(lm.model.dtype, torch.float32)
        total = {
            site.name: torch.zeros(site.d_out, site.d_in, dtype=dtype, device=site.weight(lm.model).device)
            for site in self.sites
        }
        store = TrunkCache(Trunk(lm.model, self.sites), dtype=lm.model.dtype)
        for at in range(0, len(texts), self.config.turn):
            turn = texts[at : at + self.config.turn]
            for step in range(self.config.rounds):
                if turn:
                    turn = self._step(store, turn, total, statistics, first=step == 0)
        self._fresh = tuple(requests), statistics
        return {name: LowRank.from_dense(dense) for name, dense in total.items()}

    def continue_from(self, lm: LM, requests: Sequence[Request]) -> None:
        """Take the statistics of an edit of these requests in; it must be the last one that was made."""
        if self._fresh is None or self._fresh[0] != tuple(requests):
            raise RequestError("continue_from takes the requests of the last edit that this editor has made.")
        self.statistics = self._fresh[1]

    def start_over(self) -> None:
        """Forget the statistics of earlier edits."""
        self.statistics = self._no_statistics()

    def _no_statistics(self) -> nn.ModuleDict:
        return nn.ModuleDict(
            {key: Statistics(shape, self.config.whiten) for shape, key in self.shapes.items()}
        )

    def _readable(self, lm: LM, requests: Sequence[Request]) -> list[Text]:
        if lm.kind != "causal":
            raise RequestError(f"{self.name} is for decoders, and {lm.name} is none: choose another editor.")
        if routed := [site.name for site in self.sites if isinstance(site.module(lm.model), ExpertMatrix)]:
            raise RequestError(
                f"{routed[0]} is an expert, which sees some tokens only: choose other matrices."
            )
        return self.texts(lm, requests)

    def _step(
        self,
        store: TrunkCache,
        texts: Sequence[Text],
        total: dict[str, Tensor],
        statistics: nn.ModuleDict,
        *,
        first: bool,
    ) -> list[Text]:
        """Add the step of a turn to ``total``; returns the texts whose targets were not the argmax before it."""
        store = store.with_trunk(store.trunk)
        store.ensure(texts)
        rows: dict[str, list[tuple[Tensor, Tensor]]] = {site.name: [] for site in self.sites}
        left: list[Text] = []
        with applied(store.model, {name: LowRank.from_dense(dense) for name, dense in total.items()}):
            for part in length_buckets(texts, lambda text: text.size, _PASS_TOKENS):
                found, right = label_rows(store, self.sites, part)
                for name, own in found.items():
                    rows[name].append(own)
                left += [text for text, reached in zip(part, right.tolist(), strict=True) if not reached]
        joined = {name: [torch.cat(own) for own in zip(*parts, strict=True)] for name, parts in rows.items()}
        if first:
            for site in self.sites:
                self._of(statistics, site).update(*joined[site.name])
        for site in self.sites:
            h, g = joined[site.name]
            values = self.config.eta * self._of(statistics, site).values(h, g)
            ridge = self.config.ridge * torch.eye(site.d_in, dtype=torch.float64, device=h.device)
            change = change_of(h, values, ridge)
            total[site.name] += (change.left @ change.right).to(total[site.name])
        return left

    def _of(self, statistics: nn.ModuleDict, site: Site) -> Statistics:
        found = statistics[self.shapes[site.shape]]
        assert isinstance(found, Statistics)
        return found
