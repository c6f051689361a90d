"""Gradient descent on the edit itself: the base of the editors that need no training.

For each edit, with ``D`` its change of the edited matrices ``W``::

    minimise over D    c_edit * mean NLL(targets | W + D)  +  KL(W || W + D) on one locality text a step

``D`` is kept beside the frozen weights as the product of its *leaves*, which an optimiser updates: one dense matrix, or
``left`` and ``right``. Its gradient is captured as rank-1 factors, one row per token (:mod:`emendo.models.capture`):
``G = sum_i delta_i u_i^T``, so ``dL/dleft = G right^T`` and ``dL/dright = left^T G``. An optimiser works elementwise,
so ``G`` is formed block by block where it is used and never held as a matrix.

The frozen trunk runs once per text; a step runs the blocks from the first edited one on. Several edits share these
passes. Each has its own leaves, optimiser state and step count, so no edit depends on the others in its batch, and one
that is finished makes room for the next.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import ClassVar, Literal

import torch
from torch import Tensor

from emendo._settings import Settings, setting
from emendo.editors.base import Editor
from emendo.edits.edit import Request
from emendo.errors import TrainingError
from emendo.low_rank import Change, LowRank, RowGroups, applied
from emendo.models.capture import Factors, capture
from emendo.models.lm import LM
from emendo.models.losses import per_example, token_kl, token_nll
from emendo.models.sites import Site
from emendo.models.text import Text, length_buckets
from emendo.models.trunk import Trunk
from emendo.models.trunk_cache import TrunkCache

_BYTES = 1.5e9  # of the leaves and optimiser states of all edits in progress
_PASS_TOKENS = 2048  # padded tokens of a pass where one edit has many texts
_AHEAD = 16  # locality texts of one pass
_BLOCK = 1 << 16  # entries updated at one time, so that they stay in the processor's cache

Leaves = tuple[Tensor, ...]
"""A dense change ``[d_out, d_in]``, or its factors ``[d_out, r]`` and ``[r, d_in]``."""

Proximal = Callable[[Tensor, Tensor], Tensor]
"""``leaf`` and ``metric`` -> the ``x`` that minimises ``penalty(x) + sum(metric * (x - leaf)^2) / 2``; of one shape."""


def dense(site: Site) -> Leaves:
    """The leaf of a dense change: zeros ``[d_out, d_in]``."""
    return (torch.zeros(site.d_out, site.d_in),)


@dataclass(frozen=True, slots=True)
class RmsProp:
    """RMSprop, as ``torch.optim.RMSprop``; its first step changes every entry by ``10 * lr``."""

    lr: float
    decay: float = 0.99
    eps: float = 1e-8
    moments: ClassVar[int] = 1

    def update(self, weights: Tensor, gradient: Tensor, moments: Sequence[Tensor], step: int) -> None:
        """Update ``weights`` in place; ``step`` counts from 1."""
        (square,) = moments
        square.mul_(self.decay).addcmul_(gradient, gradient, value=1 - self.decay)
        weights.addcdiv_(gradient, square.sqrt().add_(self.eps), value=-self.lr)

    def metric(self, moments: Sequence[Tensor], step: int) -> Tensor:
        """The ``h`` by which the update divided: ``weights -= direction / h``."""
        return moments[0].sqrt().add_(self.eps).div_(self.lr)


@dataclass(frozen=True, slots=True)
class Adam:
    """Adam, as ``torch.optim.Adam``."""

    lr: float
    decay: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    moments: ClassVar[int] = 2

    def update(self, weights: Tensor, gradient: Tensor, moments: Sequence[Tensor], step: int) -> None:
        """Update ``weights`` in place; ``step`` counts from 1."""
        mean, square = moments
        first, second = self.decay
        mean.lerp_(gradient, 1 - first)
        square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        root = square.sqrt().div_(math.sqrt(1 - second**step)).add_(self.eps)
        weights.addcdiv_(mean, root, value=-self.lr / (1 - first**step))

    def metric(self, moments: Sequence[Tensor], step: int) -> Tensor:
        """The ``h`` by which the update divided: ``weights -= direction / h``."""
        return moments[1].sqrt().div_(math.sqrt(1 - self.decay[1] ** step)).add_(self.eps).div_(self.lr)


Optimizer = RmsProp | Adam

OPTIMIZERS: Mapping[str, type[Optimizer]] = {"rmsprop": RmsProp, "adam": Adam}
"""Name -> optimiser."""


def update(
    optimizer: Optimizer, weights: Tensor, gradient: LowRank, moments: Sequence[Tensor], step: int
) -> None:
    """Update ``weights [n, m]`` in place by a gradient in factored form, block by block.

    Args:
        optimizer: the optimiser.
        weights: the weights to update.
        gradient: their gradient.
        moments: the optimiser's state, ``optimizer.moments`` tensors like ``weights``, zero at the start.
        step: the number of this step, counted from 1.
    """
    height = max(1, _BLOCK // weights.shape[1]) if weights.device.type == "cpu" else len(weights)
    for at in range(0, len(weights), height):
        rows = slice(at, at + height)
        block = gradient.left[rows] @ gradient.right
        optimizer.update(weights[rows], block, [moment[rows] for moment in moments], step)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Descent:
    """The settings of a search for changes.

    Attributes:
        optimizer: updates the leaves.
        steps: largest number of steps of an edit.
        start: gives the initial leaves of a site.
        project: site name -> a projection that is applied to each of its leaves after every step.
        proximal: site name -> the proximal operator of a penalty that is added to the loss. It is applied to each of
            its leaves after every step, in the optimiser's metric, so that the search comes to rest where the
            penalised loss is stationary, whatever the optimiser (Yun, Lozano, Yang: "Adaptive Proximal Gradient
            Methods for Structured Neural Networks", NeurIPS 2021).
        until: an edit is finished once its NLL, in nats per target token, is below this; None: once every token of
            every target is the argmax. Checked before each step.
        c_edit: weight of the NLL.
        locality: texts of the locality loss, one for each step, repeated from the start when used up; may be empty.
        clip: largest norm of an edit's whole gradient.
    """

    optimizer: Optimizer
    steps: int
    start: Callable[[Site], Leaves] = dense
    project: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    proximal: Mapping[str, Proximal] = field(default_factory=dict)
    until: float | None = None
    c_edit: float = 1.0
    locality: Sequence[Text] = ()
    clip: float = 100.0

    def each(self, lm: LM, sites: tuple[Site, ...], texts: Sequence[Text]) -> dict[str, LowRank]:
        """Find a change for each text, each from the clean model, in one batch.

        Raises:
            TrainingError: a gradient is not finite.
        """
        return _Search(self, lm, sites, [[text] for text in texts]).run()

    def together(self, lm: LM, sites: tuple[Site, ...], texts: Sequence[Text]) -> dict[str, LowRank]:
        """Find one change for all texts, by their mean loss; it is finished when all of them are.

        Raises:
            TrainingError: a gradient is not finite.
        """
        return {name: changes[0] for name, changes in _Search(self, lm, sites, [texts]).run().items()}


@dataclass(slots=True, eq=False)
class _Fit:
    """One edit in progress: its texts and, for each site, its leaves and their optimiser state."""

    texts: Sequence[Text]
    leaves: dict[str, Leaves]
    moments: dict[str, list[list[Tensor]]]
    step: int = 0


class _Search:
    """The search for several edits with one text each, or for one edit with any number of texts."""

    def __init__(
        self, how: Descent, lm: LM, sites: tuple[Site, ...], edits: Sequence[Sequence[Text]]
    ) -> None:
        self.how, self.model, self.sites, self.edits = how, lm.model, sites, edits
        self.store = TrunkCache(Trunk(lm.model, sites), dtype=lm.model.dtype)
        self.store.ensure(text for texts in edits for text in texts)
        self.leaves = {
            site.name: tuple(_repeated(leaf, len(edits), site.weight(lm.model)) for leaf in how.start(site))
            for site in sites
        }
        self.clean: dict[int, Tensor] = {}

    @torch.no_grad()
    def run(self) -> dict[str, LowRank]:
        """Run the search; returns one change for each edit, by site name."""
        size = sum(leaf[0].numel() * leaf.element_size() for own in self.leaves.values() for leaf in own)
        room = max(1, int(_BYTES // (size * (1 + self.how.optimizer.moments))))
        waiting = map(self._begin, range(len(self.edits)))
        active: list[_Fit] = []
        while active := active + list(islice(waiting, room - len(active))):
            active = self._step(active)
        return {
            name: LowRank(*own) if len(own) == 2 else LowRank.from_dense(*own)
            for name, own in self.leaves.items()
        }

    def _begin(self, edit: int) -> _Fit:
        leaves = {name: tuple(leaf[edit] for leaf in own) for name, own in self.leaves.items()}
        moments = {
            name: [[torch.zeros_like(leaf) for _ in range(self.how.optimizer.moments)] for leaf in own]
            for name, own in leaves.items()
        }
        return _Fit(self.edits[edit], leaves, moments)

    def _step(self, active: list[_Fit]) -> list[_Fit]:
        """Take a step with each edit that is not finished; returns those that may take another."""
        count, texts = len(active), [text for fit in active for text in fit.texts]
        parts = [texts] if count > 1 else length_buckets(texts, lambda text: text.size, _PASS_TOKENS)
        clean = [self._reference(fit.step) for fit in active] if self.how.locality else []
        weight = self.how.c_edit * count / len(texts)
        changes = {site.name: _change([fit.leaves[site.name] for fit in active]) for site in self.sites}
        with applied(self.model, changes):
            nll, right, factors = zip(*(self._edit_loss(part, weight) for part in parts), strict=True)
            if clean:
                factors = (*factors, self._locality_loss(clean))
        if self.how.until is None:
            done = torch.cat(right).view(count, -1).all(1)
        else:
            done = torch.cat(nll).view(count, -1).mean(1) < self.how.until
        moved = [(row, fit) for row, fit in enumerate(active) if not done[row]]
        for row, fit in moved:
            own = row if count > 1 else None
            self._take_step(fit, {name: _gradient([f[name] for f in factors], own) for name in fit.leaves})
        return [fit for _, fit in moved if fit.step < self.how.steps]

    def _take_step(self, fit: _Fit, gradients: Mapping[str, LowRank]) -> None:
        slopes = {name: _slopes(fit.leaves[name], gradient) for name, gradient in gradients.items()}
        norm = math.hypot(*(float(slope.norm()) for own in slopes.values() for slope in own))
        if not math.isfinite(norm):
            raise TrainingError(
                f"The gradient of an edit is not finite after {fit.step} steps: use a smaller learning rate."
            )
        fit.step += 1
        scale = min(1.0, self.how.clip / (norm + 1e-6))
        for name, own in slopes.items():
            for leaf, slope, moments in zip(fit.leaves[name], own, fit.moments[name], strict=True):
                update(self.how.optimizer, leaf, slope.scale(scale), moments, fit.step)
                if name in self.how.project:
                    leaf.copy_(self.how.project[name](leaf))
                if name in self.how.proximal:
                    metric = self.how.optimizer.metric(moments, fit.step)
                    leaf.copy_(self.how.proximal[name](leaf, metric))

    def _edit_loss(self, texts: Sequence[Text], weight: float) -> tuple[Tensor, Tensor, dict[str, Factors]]:
        """NLL per target token of each text, whether its whole target is the argmax, and the factors of the loss."""
        seen: list[Tensor] = []

        def loss() -> Tensor:
            batch, logits = self.store.logits(texts)
            labels, owner = batch.labels.to(logits.device), batch.owner.to(logits.device)
            nll = per_example(token_nll(logits, labels), owner, len(texts))
            hits = per_example((logits.argmax(-1) == labels).to(nll), owner, len(texts))
            seen.extend((nll.detach(), hits == 1))
            return weight * nll

        factors = capture(self.model, self.sites, loss)[1]
        return seen[0], seen[1], factors

    def _locality_loss(self, clean: Sequence[tuple[Text, Tensor]]) -> dict[str, Factors]:
        """The factors of the KL of each edit's locality text, in nats per answer token."""

        def loss() -> Tensor:
            batch, logits = self.store.logits([text for text, _ in clean])
            values = token_kl(torch.cat([before for _, before in clean]), logits)
            return per_example(values, batch.owner.to(values.device), len(clean))

        return capture(self.model, self.sites, loss)[1]

    def _reference(self, step: int) -> tuple[Text, Tensor]:
        """The locality text of a step, and its logits without any change ``[labels, vocabulary]``."""
        at = step % len(self.how.locality)
        if at not in self.clean:
            ahead = self.how.locality[at : at + _AHEAD]
            self.store.ensure(ahead)
            rows = self.store.logits(ahead)[1].split([len(text.labels) for text in ahead])
            self.clean |= dict(enumerate(rows, at))
        return self.how.locality[at], self.clean[at]


def _change(leaves: Sequence[Leaves]) -> Change:
    """The change of one matrix, for one edit or for one edit per row of the batch; no leaf is copied."""
    changes = [partial(_product, leaves=own) for own in leaves]
    if len(changes) == 1:
        return changes[0]
    return RowGroups(len(changes), [((i,), change) for i, change in enumerate(changes)])


def _product(x: Tensor, leaves: Leaves) -> Tensor:
    """``x D^T`` for rows ``x [n, d_in]``."""
    for leaf in reversed(leaves):
        x = x @ leaf.to(x).mT
    return x


def _gradient(found: Sequence[Factors], example: int | None) -> LowRank:
    """``dL/dW`` of one example, or of all together, from the factors of several passes."""
    rows = [slice(None) if example is None else f.owner == example for f in found]
    delta = torch.cat([f.delta[own] for f, own in zip(found, rows, strict=True)])
    u = torch.cat([f.u[own] for f, own in zip(found, rows, strict=True)])
    many = len(u) > min(u.shape[1], delta.shape[1])
    return LowRank.from_dense(delta.mT @ u) if many else LowRank(delta.mT, u)


def _slopes(leaves: Leaves, gradient: LowRank) -> list[LowRank]:
    """The gradient with respect to each leaf."""
    if len(leaves) == 1:
        return [gradient]
    left, right = leaves
    return [
        LowRank(gradient.left, gradient.right @ right.mT),
        LowRank(left.mT @ gradient.left, gradient.right),
    ]


def _repeated(leaf: Tensor, edits: int, weight: Tensor) -> Tensor:
    """A leaf for each edit, on the weight's device and in float32 at least."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return leaf.to(weight.device, dtype).repeat(edits, 1, 1)


class DescentEditor(Editor):
    """Base of the editors that find each change by descent; a method defines :meth:`descent`."""

    needs_training = False

    @abstractmethod
    def descent(self, lm: LM) -> Descent:
        """The settings of the search on this model."""

    def each(self, lm: LM, requests: Sequence[Request]) -> dict[str, LowRank]:
        """Compute one change for each request, each from the clean model."""
        return self.descent(lm).each(lm, self.sites, self.texts(lm, requests))

    def together(self, lm: LM, requests: Sequence[Request]) -> dict[str, LowRank]:
        """Compute one change for all requests, by their mean loss."""
        return self.descent(lm).together(lm, self.sites, self.texts(lm, requests))


@dataclass(frozen=True, slots=True)
class FineTuningSettings(Settings):
    """The settings that the fine-tuning methods share."""

    steps: int = setting(100, "Largest number of steps of an edit.", least=1)
    lr: float | None = setting(None, "Learning rate.", above=0, unset="by the model's size")
    optimizer: Literal["rmsprop", "adam"] = setting("rmsprop", "Optimiser; the paper uses `rmsprop`.")

    def optimiser_for(self, lm: LM) -> Optimizer:
        """The optimiser for a model, by default with :func:`default_rate`."""
        return OPTIMIZERS[self.optimizer](self.lr or default_rate(lm))


def default_rate(lm: LM) -> float:
    """The default learning rate of RMSprop for fine-tuning on single edits.

    From 2e9 parameters on it is the paper's (MEND, C.1): 5e-6, or 1e-4 for an encoder-decoder. Below that it is 3e-5,
    where the paper has 1e-6: with 1e-6, 1 of 8 edits of SmolLM2-135M succeeded within 100 steps; with 3e-5 all did, in
    3.5 steps on average, as did all edits of three small models (T5, BART, BERT), in 5 to 12.
    """
    if lm.model.num_parameters() < 2e9:
        return 3e-5
    return 1e-4 if lm.kind == "seq2seq" else 5e-6
