"""Breadth-first fine-tuning: one change for many facts, by shuffled epochs over all of them.

Descent on all facts at once (:mod:`emendo.editors.descent`) takes its steps on their mean loss, so each step reads
all facts. Here an epoch goes through them in shuffled batches, each with one step of Adam on a dense change ``D`` of
every matrix (:mod:`emendo.editors._epochs`). What must stay are the prompts with other subjects' names in them
(:mod:`emendo.editors._contexts`), at the token where the answer begins, and passages.

With a *subspace* for a matrix (:class:`Subspace`), Adam works on the coordinates of ``D`` in its basis, and those that
are masked stay zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

import torch
from torch import Tensor
from torch.nn.functional import linear

from emendo._settings import Settings, setting
from emendo._subject import find_subject
from emendo.editors._contexts import Surroundings, contexts, fitting, other_names
from emendo.editors._epochs import EpochSearch
from emendo.editors.base import Editor
from emendo.editors.descent import Adam
from emendo.edits.edit import Request
from emendo.low_rank import Change, LowRank
from emendo.models.lm import LM
from emendo.models.sites import Site
from emendo.models.text import Text
from emendo.models.tokenization import passage_texts

_STAY_TOKENS = 16  # of a passage


@dataclass(frozen=True, slots=True)
class BreadthSettings(Settings):
    """The settings of the search."""

    epochs: int = setting(40, "Largest number of epochs.", least=1)
    batch: int = setting(100, "Facts of a step.", least=1)
    lr: float = setting(5e-4, "Learning rate of Adam.", above=0)
    until: float = setting(1e-2, "A fact rests for an epoch once its NLL is below this.", least=0)
    end: bool = setting(True, "Teach the end of text after a target; decoders only.")
    contexts: int = setting(8, "Contexts of a fact beside its prompt.", least=0)
    per_epoch: int = setting(2, "Contexts of a fact in an epoch.", least=0)
    c_kl: float = setting(1.0, "Weight of the KL on what must stay.", least=0)
    stay: int = setting(1, "Texts that must stay, for each fact of a step.", least=0)
    seed: int = setting(0, "Seed of the contexts and of the order.")


@dataclass(frozen=True, slots=True, eq=False)
class Subspace:
    """The changes ``U_S (X * mask) U_A^T`` of a matrix.

    Attributes:
        left: ``U_S [d_out, d_out]``, orthogonal.
        right: ``U_A [d_in, d_in]``, orthogonal.
        mask: ``[d_out, d_in]``, 1 for what may change and 0 for the rest.
    """

    left: Tensor
    right: Tensor
    mask: Tensor

    def coordinates(self, gradient: Tensor) -> Tensor:
        """``(U_S^T G U_A) * mask``."""
        return (self.left.mT @ gradient @ self.right) * self.mask

    def dense(self, coordinates: Tensor) -> Tensor:
        """``U_S X U_A^T``."""
        return self.left @ coordinates @ self.right.mT

    def project(self, gradient: Tensor) -> Tensor:
        """``U_S ((U_S^T G U_A) * mask) U_A^T``."""
        return self.dense(self.coordinates(gradient))


class BreadthEditor(Editor):
    """Base of the methods that fine-tune many facts at once."""

    config: BreadthSettings
    needs_training = False

    def __init__(
        self, sites: tuple[Site, ...], config: BreadthSettings | None = None, fingerprint: str = ""
    ) -> None:
        super().__init__(sites, config, fingerprint)
        self._known: tuple[int, Surroundings] | None = None

    def subspaces(self, lm: LM) -> Mapping[str, Subspace]:
        """By site name, the subspace of its changes; a matrix without one may change in any way."""
        return {}

    def each(self, lm: LM, requests: Sequence[Request]) -> dict[str, LowRank]:
        """Compute one change for each request, each from the clean model."""
        self.texts(lm, requests)  # checks them
        return self.one_by_one(lm, requests)

    def together(self, lm: LM, requests: Sequence[Request]) -> dict[str, LowRank]:
        """Compute one change for all requests."""
        self.texts(lm, requests)
        facts = Facts.of(lm, requests, self.surroundings(lm), self.config)
        return Search(lm, self.sites, self.config, facts, self.subspaces(lm)).run()

    def surroundings(self, lm: LM) -> Surroundings:
        """Words and names for the contexts; made once for each model."""
        if self._known is None or self._known[0] != id(lm.model):
            self._known = id(lm.model), Surroundings(lm)
        return self._known[1]


@dataclass(frozen=True, slots=True, eq=False)
class Facts:
    """The texts of a search.

    Attributes:
        taught: for each fact, its prompt and its contexts, with the target.
        stay: for each fact, texts that must stay.
    """

    taught: Sequence[Sequence[Text]]
    stay: Sequence[Sequence[Text]]

    @classmethod
    def of(cls, lm: LM, requests: Sequence[Request], around: Surroundings, config: BreadthSettings) -> Facts:
        """The texts of some requests."""
        random = Random(config.seed)
        end = lm.ends[:1] if config.end and lm.kind == "causal" and not lm.chat else ()
        passages: list[Text] = []
        if config.stay and lm.kind == "causal":
            passages = passage_texts(lm, around.passages, _STAY_TOKENS)
        elif config.stay and lm.kind == "seq2seq":
            passages = [text for some in around.facts for text in fitting(lm, some[0], Request(*some))]
        taught, stay = [], []
        for request in requests:
            subject = find_subject(request.prompt)
            said = contexts(request.prompt, subject, config.contexts, around.words, random)
            texts = [text for one in said for text in fitting(lm, one, request)]
            taught.append([ended(lm, text, end) for text in texts])
            kept: list[Text] = random.sample(passages, min(4, len(passages)))
            if config.stay:
                names = other_names(subject, around, random)[::2]
                near = [
                    text for n in names for text in fitting(lm, request.prompt.replace(subject, n), request)
                ]
                kept += [Text(text.ids[: text.start + 1], text.start, text.source) for text in near]
                random.shuffle(kept)
            stay.append(kept)
        return cls(taught, stay)


def ended(lm: LM, text: Text, end: tuple[int, ...]) -> Text:
    """A text with the end of text after its target, where it fits."""
    fits = lm.context is None or len(text.ids) < lm.context
    return Text(text.ids + end, text.start, text.source) if fits else text


class Search(EpochSearch):
    """The search for one change for some facts."""

    cached = 200_000

    def __init__(
        self,
        lm: LM,
        sites: tuple[Site, ...],
        config: BreadthSettings,
        facts: Facts,
        subspaces: Mapping[str, Subspace],
    ) -> None:
        super().__init__(lm, sites, config, facts.taught, facts.stay, config.per_epoch)
        self.subspaces, self.adam = subspaces, Adam(config.lr)
        self.parameters = {}
        self.leaves: dict[str, Tensor] = {}
        self.moments: dict[str, list[Tensor]] = {}
        for site in sites:
            weight = site.weight(lm.model)
            dtype = torch.promote_types(weight.dtype, torch.float32)
            zeros = torch.zeros(site.d_out, site.d_in, dtype=dtype, device=weight.device)
            self.parameters[site.name] = zeros
            self.leaves[site.name] = zeros.clone() if site.name in subspaces else zeros
            self.moments[site.name] = [torch.zeros_like(zeros) for _ in range(2)]

    def run(self) -> dict[str, LowRank]:
        """Run the epochs; returns the change of each matrix."""
        self.run_epochs()
        return {name: LowRank.from_dense(dense.clone()) for name, dense in self.parameters.items()}

    def changes(self, parameters: Mapping[str, Tensor]) -> Mapping[str, Change]:
        """Dense changes."""
        return {name: _Dense(dense) for name, dense in parameters.items()}

    @torch.no_grad()
    def update(self, members: Sequence[int], slopes: Mapping[str, Tensor]) -> None:
        """Take a step of Adam, in the subspaces where there are any."""
        for name, slope in slopes.items():
            space = self.subspaces.get(name)
            own = slope if space is None else space.coordinates(slope)
            self.adam.update(self.leaves[name], own, self.moments[name], self.steps)
            if space is not None:
                self.parameters[name].copy_(space.dense(self.leaves[name]))


@dataclass(frozen=True, slots=True, eq=False)
class _Dense:
    """``x D^T`` for rows ``x``, in their dtype."""

    dense: Tensor = field(repr=False)

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self.dense.to(x.dtype))
