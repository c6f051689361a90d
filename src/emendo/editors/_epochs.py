"""Shuffled epochs over many facts: the search that breadth-first fine-tuning and joint ROME share.

An epoch goes through the facts in shuffled batches, each with one step on some parameters, which make the change of
every matrix::

    mean over facts (NLL(target | prompt) + mean over contexts NLL(target | context))
    + c_kl * mean over what must stay KL(W || W + D)

Contexts take turns from epoch to epoch, and so does what must stay. A fact whose texts all have an NLL below ``until``
rests for an epoch, and the search ends with an epoch in which no fact is left.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from random import Random
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from emendo.editors._contexts import turn
from emendo.errors import TrainingError
from emendo.low_rank import Change, LowRank, applied
from emendo.models.lm import LM
from emendo.models.losses import per_example
from emendo.models.sites import Site
from emendo.models.text import Text, length_buckets
from emendo.models.trunk import Trunk
from emendo.models.trunk_cache import TrunkCache

_PASS_TOKENS = 768  # padded tokens of a pass


class _Settings(Protocol):
    """The settings that a search needs."""

    @property
    def epochs(self) -> int: ...
    @property
    def batch(self) -> int: ...
    @property
    def until(self) -> float: ...
    @property
    def c_kl(self) -> float: ...
    @property
    def stay(self) -> int: ...
    @property
    def seed(self) -> int: ...


class EpochSearch(ABC):
    """Base of a search; a method has the parameters, says how they make the changes, and takes the step.

    Args:
        lm: the model.
        sites: the matrices that change.
        config: the settings.
        taught: for each fact, its prompt and its contexts, with the target.
        stay: for each fact, texts that must stay.
        contexts: the number of contexts of a fact in an epoch.
    """

    cached: ClassVar[int]
    """Tokens whose trunk outputs are kept."""
    learnt: ClassVar[float] = 0.0
    """A text with an NLL below this share of ``until`` has no gradient."""

    parameters: dict[str, Tensor]
    """By site name, what the search moves."""

    def __init__(
        self,
        lm: LM,
        sites: tuple[Site, ...],
        config: _Settings,
        taught: Sequence[Sequence[Text]],
        stay: Sequence[Sequence[Text]],
        contexts: int,
    ) -> None:
        self.lm, self.taught, self.stay, self.steps = lm, taught, stay, 0
        self._config, self._contexts = config, contexts
        self.trunk, self.random = Trunk(lm.model, sites), Random(config.seed)
        self.store = self.new_store()

    @abstractmethod
    def changes(self, parameters: Mapping[str, Tensor]) -> Mapping[str, LowRank | Change]:
        """The change of each matrix that some parameters make."""

    @abstractmethod
    def update(self, members: Sequence[int], slopes: Mapping[str, Tensor]) -> None:
        """Take a step.

        Args:
            members: the facts of the batch that are not learnt.
            slopes: the gradient of the batch's loss with respect to each parameter.
        """

    def run_epochs(self) -> None:
        """Run the epochs."""
        rests: set[int] = set()
        for epoch in range(self._config.epochs):
            active = [i for i in range(len(self.taught)) if i not in rests]
            self.random.shuffle(active)
            rests = set()
            for at in range(0, len(active), self._config.batch):
                rests |= self.step(active[at : at + self._config.batch], epoch)
            if len(rests) == len(active) == len(self.taught):
                break

    def step(self, members: Sequence[int], epoch: int) -> set[int]:
        """Take one step; returns the facts that may rest.

        Raises:
            TrainingError: the gradient is not finite.
        """
        taught = [(i, weight, text) for i in members for weight, text in self._taught(i, epoch)]
        stay = self.staying(members, epoch)
        slopes: dict[str, Tensor] = {}
        rests = set(members)
        for part in length_buckets(taught, lambda one: one[2].size, _PASS_TOKENS):
            weights = [weight / len(members) for _, weight, _ in part]
            nll = self._descend([text for *_, text in part], 0, weights, slopes)
            rests -= {i for (i, *_), value in zip(part, nll, strict=True) if not value < self._config.until}
        for some in length_buckets(stay, lambda text: text.size, _PASS_TOKENS) if self._config.c_kl else ():
            self._descend(some, len(some), [self._config.c_kl / len(stay)] * len(some), slopes)
        if left := [i for i in members if i not in rests]:
            if not all(slope.isfinite().all() for slope in slopes.values()):
                raise TrainingError(
                    f"The gradient is not finite after {self.steps} steps: use a smaller learning rate."
                )
            self.steps += 1
            self.update(left, slopes)
        if sum(map(len, self.store.hidden.chunks)) > self.cached:
            self.store = self.new_store()
        return rests

    def staying(self, members: Sequence[int], epoch: int) -> list[Text]:
        """The texts of a step that must stay."""
        return [text for i in members for text in turn(self.stay[i], epoch, self._config.stay)]

    def new_store(self) -> TrunkCache:
        """A store without texts."""
        return TrunkCache(self.trunk, dtype=self.lm.model.dtype)

    def _taught(self, i: int, epoch: int) -> Iterator[tuple[float, Text]]:
        """The weights and texts of a fact in an epoch: its prompt, and the contexts whose turn it is."""
        yield 1.0, self.taught[i][0]
        some = turn(self.taught[i][1:], epoch, self._contexts)
        yield from ((1 / len(some), text) for text in some)

    def _descend(
        self, texts: Sequence[Text], stay: int, weights: Sequence[float], slopes: dict[str, Tensor]
    ) -> list[float]:
        """Add the gradient of the weighted losses of some texts to ``slopes``; returns their losses."""
        self.store.ensure(texts)
        with torch.enable_grad():
            own = {name: value.detach().requires_grad_() for name, value in self.parameters.items()}
            changes = self.changes(own)
            batch, losses, _ = self.store.label_losses(
                texts, stay, lambda packing: applied(self.lm.model, changes)
            )
            found = per_example(losses, batch.owner.to(losses.device), len(batch))
            left = found if stay else found.clamp(min=self.learnt * self._config.until)
            total = (left * torch.tensor(weights).to(left)).sum()
            grads = torch.autograd.grad(total, list(own.values()), allow_unused=True)
        for name, grad in zip(own, grads, strict=True):
            if grad is not None:
                slopes[name] = slopes[name] + grad if name in slopes else grad
        return found.detach().tolist()
