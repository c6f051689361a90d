"""The editors that turn the factors of the fine-tuning gradient into a change, and can be trained to."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from emendo.capture import Factors, capture, move
from emendo.edit import Request
from emendo.editors.base import Editor
from emendo.losses import per_example, token_nll
from emendo.lowrank import LowRank
from emendo.models import LM
from emendo.outer import Episode, Outcome, TokenLoss, Weights, judge, through
from emendo.sites import Site
from emendo.store import TrunkStore
from emendo.texts import Text, TokenBatch, collate
from emendo.trunk import Trunk


class GradientEditor(Editor):
    """Base of the editors that turn the factors of the fine-tuning gradient into a change, and can be trained to."""

    looks_ahead: bool = True
    """Whether the factors are those of a frozen model, so that they can be taken before they are needed."""

    @abstractmethod
    def forward(self, factors: Mapping[str, Factors]) -> dict[str, LowRank]:
        """The method itself.

        Args:
            factors: by site name, the rows of all examples.

        Returns:
            By site name, one change for each example, differentiable in what the editor learns.
        """

    def factors(
        self, trunk: Trunk, texts: Sequence[Text], hidden: Tensor | None = None
    ) -> dict[str, Factors]:
        """The factors that this editor works on, on its own device; see :func:`edit_factors`."""
        device = next((p.device for p in self.parameters()), None)
        factors = edit_factors(trunk, self.sites, texts, hidden)
        return factors if device is None else move(factors, device)

    def each(self, lm: LM, requests: Sequence[Request]) -> dict[str, LowRank]:
        """One change for each request, all in one batch."""
        texts = self.texts(lm, requests)
        factors = self.factors(Trunk(self.host(lm).model, self.sites), texts)
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                return self(factors)  # type: ignore[no-any-return]
        finally:
            self.train(training)

    # ------------------------------------------------------------------------------------- training

    def begin(self, lm: LM) -> None:
        """Get ready to be trained on this model."""

    def trainable(self, lm: LM) -> Iterable[nn.Parameter]:
        """What training changes: the editor's own parameters."""
        return self.parameters()

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """Optimiser groups; a method with learning rates of its own overrides this."""
        return [{"params": list(self.parameters()), "lr": lr}]

    def weights(self, asked: Weights) -> Weights:
        """The weights of the losses at this step: those asked for, unless a method sets its own."""
        return asked

    def learnt(self, outcome: Outcome) -> None:
        """Hear what a step gave, after it."""

    def validated(self, outcome: Outcome) -> None:
        """Hear what a validation gave."""

    def judged(
        self,
        store: TrunkStore,
        episodes: Sequence[Episode],
        factors: Mapping[str, Factors],
        reference: Mapping[Text, Tensor],
        weights: Weights,
        *,
        together: int = 1,
        backward: bool = False,
    ) -> Outcome | None:
        """Make the edits of some episodes and judge them; with ``backward`` also add to the parameters' gradients.

        Args:
            store: the trunk's output of every text, and the way on from there.
            episodes: what to edit and to judge by.
            factors: of the episodes' edits; empty where :attr:`looks_ahead` is False.
            reference: locality text -> the unedited model's logits ``[labels, vocabulary]``.
            weights: of the losses.
            together: how many consecutive episodes are put into one edit.
            backward: whether this is a training step.

        Returns:
            What the edits did; None where a factor was not finite.
        """
        if not all(bool(f.u.isfinite().all()) and bool(f.delta.isfinite().all()) for f in factors.values()):
            return None
        deltas = self(factors)
        if together > 1:
            deltas = {name: delta.group(together) for name, delta in deltas.items()}
        rest = (episodes, reference, weights)
        if not backward:
            return judge(store, deltas, *rest, together=together)
        return through(deltas, lambda leaves: judge(store, leaves, *rest, together=together, backward=True))


def edit_factors(
    trunk: Trunk,
    sites: tuple[Site, ...],
    texts: Sequence[Text],
    hidden: Tensor | None = None,
    *,
    token_loss: TokenLoss = token_nll,
    create_graph: bool = False,
    seen: Callable[[Tensor, TokenBatch], None] | None = None,
) -> dict[str, Factors]:
    """The factors of each text's own fine-tuning gradient: NLL of its answer, averaged over its tokens.

    Args:
        trunk: the split model.
        sites: where to capture.
        texts: prompts with their targets.
        hidden: the trunk's output ``[texts, tokens, width]``, where it is already known.
        token_loss: the loss of each label, in place of the NLL.
        create_graph: leave the factors differentiable in the model's parameters.
        seen: shown the logits at the label positions and the batch, on the way.
    """
    batch = collate(texts)
    if hidden is None and not create_graph:
        hidden = trunk.run(batch)

    def loss() -> Tensor:
        logits = trunk.logits(batch, hidden)
        if seen is not None:
            seen(logits.detach(), batch)
        values = token_loss(logits, batch.labels.to(logits.device))
        return per_example(values, batch.owner.to(logits.device), len(texts))

    return capture(trunk.model, sites, loss, create_graph=create_graph)[1]
