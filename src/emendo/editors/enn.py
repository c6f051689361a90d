"""ENN: train the model itself, so that a plain gradient step on a few matrices is a good edit.

Sinitsin, Plokhotnyuk, Pyrkin, Popov, Babenko: "Editable Neural Networks", ICLR 2020 (arXiv 2004.00345), as compared
with MEND in arXiv 2110.11309, appendices B.1 and C.1, Eq. 5 and 6. With the original parameters ``theta_0``, the
trained ones ``theta`` and a learned step size ``eta`` for each edited matrix ``W``::

    theta' = theta - eta * grad_W l_e(theta)          inner_steps times
    L      = c_base * L_base(theta) + c_edit * l_e(theta') + c_loc * L_loc(theta, theta')

``L`` reaches ``theta`` directly and through the gradient in the inner steps (second order). The losses:

- ``L_base``: that of the model's own task, ``-log p_theta(D_base)``, on training sequences with their true answers
  (``base_loss=task``, Eq. 5); or ``KL(theta_0 || theta)`` on the locality texts (``base_loss=distill``).
- ``l_e``: NLL, or a hinge (``edit_loss``, Eq. 6).
- ``L_loc``: ``KL(theta || theta')``, or the mean squared difference of the logits (``locality_loss``); ``theta`` as the
  reference carries no gradient.

``D_base`` is running text where the run has some, and else the records: their prompts with the old answers, their
neighbours and their unrelated probes. Locality texts come from the same sources.

``theta`` and ``log eta`` are the editor's own parameters. The user's model is never changed: edits are made for a copy
of it that has the editor's parameters, :meth:`Enn.host`.

Where papers and official codes differ, and what is done here:

1. ``eta``: starts at 1e-2 and is learned in the MEND paper; in its code it hardly moves (as MEND's alpha). Here: its
   logarithm is learned, so that a step never turns into an ascent, in a parameter group of its own.
2. In the MEND code ``c_base`` scales the logged loss but not the gradient. Here it scales both.
3. ``l_e``: NLL in the MEND comparison; in Sinitsin et al. a hinge that is 0, and stops the steps, once the target is
   the most likely answer. Here: either, averaged over the answer's tokens; where it is 0 further steps change nothing.
4. ``L_base``: the task's in Eq. 5 of the MEND paper, distillation in its code. Here: either (docs/log.md).
5. Trained: all parameters in the MEND comparison, ``trains="all"``. Also here: ``trains="suffix"``, without the blocks
   below the first edited one, embeddings and vocabulary projection, so that the outputs of those blocks stay valid.
6. Precision: ENN fails to train in half precision (MEND, section 5). Here: the copy is in float32 at least.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from emendo._settings import Settings, setting
from emendo.data.schema import Probe
from emendo.editors._trained_copy import TrainedCopy
from emendo.editors.gradient import Ahead, GradientEditor, edit_factors
from emendo.editors.objective import BUCKET_TOKENS, Episode, Outcome, Weights, backward_through, outer_losses
from emendo.errors import RequestError
from emendo.low_rank import LowRank, applied
from emendo.models._packing import Packing
from emendo.models.capture import Factors, all_finite
from emendo.models.lm import LM
from emendo.models.losses import (
    TokenLoss,
    label_losses,
    per_example,
    token_kl,
    token_margin,
    token_nll,
    token_squares,
)
from emendo.models.sites import Site
from emendo.models.text import Text, TokenBatch, collate, length_buckets
from emendo.models.tokenization import to_texts
from emendo.models.trunk import Trunk
from emendo.models.trunk_cache import TrunkCache

_DRIFT_TEXTS = 64  # texts of one pass


@dataclass(frozen=True, slots=True)
class EnnConfig(Settings):
    """ENN's settings.

    The values in parentheses are those of the MEND comparison, and of Sinitsin et al.
    """

    inner_lr: float = setting(1e-2, "Step size of every edited matrix at the start (1e-2).", above=0)
    inner_steps: int = setting(1, "Gradient steps of an edit (1, up to 10).", least=1)
    first_order: bool = setting(False, "Omit the gradient through the gradients of the inner steps.")
    trains: Literal["all", "suffix"] = setting(
        "all", "`all` parameters of the model, or the `suffix` that the frozen part does not depend on."
    )
    edit_loss: Literal["nll", "hinge"] = setting("nll", "Loss of the inner steps and of the outer edit loss.")
    locality_loss: Literal["kl", "squares"] = setting(
        "kl",
        "Loss between the trained model and the edited one: KL, or the mean squared difference of the logits.",
    )
    base_loss: Literal["distill", "task"] = setting(
        "distill", "Loss of the trained model: KL to the original, or the NLL of the model's own task (task)."
    )
    base_texts: int = setting(1, "Training sequences for each fact, for `base_loss=task`.", least=1)
    c_base: float = setting(1.0, "Weight of the base loss.", least=0)
    lr_scale: float = setting(100.0, "Learning rate of `log eta` as a multiple of the model's.", least=0)


class Enn(GradientEditor):
    """The ENN editor; the module's docstring has its equations.

    Attributes:
        twin: the trained parameters, and the copy of the model that has them.
        log_eta: ``[sites]`` logarithms of the inner step sizes.
    """

    name = "enn"
    Config = EnnConfig
    config: EnnConfig

    def __init__(
        self, sites: tuple[Site, ...], config: EnnConfig | None = None, fingerprint: str = ""
    ) -> None:
        super().__init__(sites, config, fingerprint)
        self.twin = TrainedCopy(sites, suffix=self.config.trains == "suffix")
        self.log_eta = nn.Parameter(torch.full((len(sites),), math.log(self.config.inner_lr)))

    def forward(self, factors: Mapping[str, Factors]) -> dict[str, LowRank]:
        """One step of gradient descent: ``dW = -eta * sum_i delta_i u_i^T``."""
        return {
            site.name: rows.lowrank(-eta * rows.delta, rows.u)
            for site, eta in zip(self.sites, self.log_eta.exp(), strict=True)
            for rows in [factors[site.name]]
        }

    def changes(self, trunk: Trunk, texts: Sequence[Text]) -> dict[str, LowRank]:
        """One change of the trained model for each text: all inner steps."""
        return self._steps(trunk, texts, trunk.run(collate(texts)))

    def host(self, lm: LM) -> LM:
        """The trained model; edits carry its fingerprint, while the editor is bound to the user's model.

        Raises:
            MismatchError: the editor was trained for another model.
        """
        self.bind(lm)
        return self.twin.lm(lm)

    def no_changes_of(self, lm: LM) -> str:
        """It edits its own copy of the model."""
        return f"{self.name} edits a model that it trained itself, not {lm.name}"

    def host_cache(self, lm: LM, store: TrunkCache) -> TrunkCache | None:
        """The kept trunk outputs, if training has left the blocks below the first edited one unchanged."""
        return self._cache(store, self.twin.trunk(lm.model))

    def _cache(self, store: TrunkCache, trunk: Trunk) -> TrunkCache | None:
        return store.with_trunk(trunk) if self.config.trains == "suffix" else None

    @torch.no_grad()
    def drift(self, lm: LM, probes: Sequence[Probe]) -> dict[str, float]:
        """Measure the change of the model by training, before any edit.

        Args:
            lm: the original.
            probes: prompts with answers.

        Returns:
            ``kl``: KL(original || trained) in nats per answer token, averaged over the probes; ``changed``: share
            of the probes where the argmax of any answer token differs; ``task_loss``: NLL of the answers in the
            trained model minus that in the original, in nats per answer token, averaged over the probes.

        Raises:
            MismatchError: the editor was trained for another model.
            RequestError: no probe, or one that does not fit the model.
        """
        if not probes:
            raise RequestError("The drift is measured on probes: give at least one probe.")
        texts, host = to_texts(lm, [(probe.prompt, probe.answer) for probe in probes]), self.host(lm)
        kl, changed, task_loss = 0.0, 0, 0.0
        for start in range(0, len(texts), _DRIFT_TEXTS):
            part = texts[start : start + _DRIFT_TEXTS]
            for text, before, after in zip(part, lm.logits(part), host.logits(part), strict=True):
                labels = torch.tensor(text.labels, device=after.device)
                kl += float(token_kl(before, after).mean())
                changed += not before.argmax(-1).equal(after.argmax(-1))
                task_loss += float((token_nll(after, labels) - token_nll(before, labels)).mean())
        count = len(texts)
        return {"kl": kl / count, "changed": changed / count, "task_loss": task_loss / count}

    # ------------------------------------------------------------------------------------- training

    def bind(self, lm: LM) -> None:
        """Bind the editor to its model and copy the model's parameters, unless that is done already.

        Raises:
            MismatchError: the editor is bound to another model.
        """
        super().bind(lm)
        self.twin.trunk(lm.model)

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """The model's parameters at ``lr``, the logarithms of the step sizes at ``lr_scale * lr``."""
        return [
            {"params": list(self.twin.parameters()), "lr": lr},
            {"params": [self.log_eta], "lr": lr * self.config.lr_scale},
        ]

    @property
    def base_texts(self) -> int:
        """Training sequences of an episode, where the base loss is the task's."""
        return self.config.base_texts if self.config.base_loss == "task" else 0

    def look_ahead(
        self, store: TrunkCache, batches: Sequence[Sequence[Episode]], window: Sequence[Episode] = ()
    ) -> list[Ahead]:
        """Nothing: all factors and answers depend on the trained parameters."""
        return [{} for _ in batches]

    def outer_step(
        self,
        store: TrunkCache,
        episodes: Sequence[Episode],
        ahead: Ahead,
        weights: Weights,
        *,
        together: int = 1,
        backward: bool = False,
    ) -> Outcome | None:
        """As in the base class, for edits of the trained model; the loss includes the base loss.

        ``locality`` and ``locality_loss`` compare the edited with the unedited trained model.
        """
        trunk, texts = self.twin.trunk(store.model), [episode.edit for episode in episodes]
        cache = self._cache(store, trunk)
        passes = _Trained(trunk, cache, token_kl if self.config.locality_loss == "kl" else token_squares)
        hidden = store.gather(texts) if cache is not None else None
        deltas = self._steps(trunk, texts, hidden, create_graph=backward and not self.config.first_order)
        if not all_finite(factor for d in deltas.values() for factor in (d.left, d.right)):
            return None
        if together > 1:
            deltas = {name: delta.group(together) for name, delta in deltas.items()}
        if self.config.base_loss == "task":
            base = self._task(passes, episodes, backward=backward)
        else:
            base = self._distillation(store, passes, episodes, backward=backward)

        losses = partial(
            outer_losses,
            passes,
            episodes=episodes,
            weights=weights,
            together=together,
            backward=backward,
            edit_loss=self._loss,
        )
        outcome = backward_through(deltas, losses) if backward else losses(deltas)
        return replace(outcome, loss=outcome.loss + self.config.c_base * base)

    def _distillation(
        self, store: TrunkCache, passes: _Trained, episodes: Sequence[Episode], *, backward: bool
    ) -> float:
        """KL(original || trained) on the locality texts; keeps the trained model's logits in ``passes.known``."""

        def loss(part: Sequence[Text], batch: TokenBatch, logits: Tensor) -> Tensor:
            passes.keep(part, logits)
            with torch.no_grad():
                original = store.packed_logits(part)[1]
            return token_kl(original, logits)

        return self._mean(passes, [episode.locality for episode in episodes], loss, backward=backward)

    def _task(self, passes: _Trained, episodes: Sequence[Episode], *, backward: bool) -> float:
        """``-log p_theta(D_base)``, averaged over the labels of a sequence, then over the sequences."""
        with torch.no_grad():
            kept = list(dict.fromkeys(text for episode in episodes for text in episode.locality))
            for part in length_buckets(kept, lambda text: text.size, BUCKET_TOKENS):
                passes.keep(part, passes.logits(part)[1])
        if not all(episode.base for episode in episodes):
            raise RequestError("base_loss=task needs training sequences: Episode.base is empty.")

        def loss(part: Sequence[Text], batch: TokenBatch, logits: Tensor) -> Tensor:
            return token_nll(logits, batch.labels.to(logits.device))

        return self._mean(passes, [episode.base for episode in episodes], loss, backward=backward)

    def _mean(
        self,
        passes: _Trained,
        groups: Sequence[Sequence[Text]],
        loss: Callable[[Sequence[Text], TokenBatch, Tensor], Tensor],
        *,
        backward: bool,
    ) -> float:
        """A loss of the trained model, averaged over each group's texts and then over the groups.

        Args:
            passes: of the trained model.
            groups: for each episode, the texts of its base loss.
            loss: texts as a batch, and the logits at its labels -> the loss of each label.
            backward: back-propagate it, multiplied by ``c_base``.
        """
        shares: dict[Text, float] = {}
        for group in groups:
            for text in group:
                shares[text] = shares.get(text, 0.0) + 1 / (len(group) * len(groups))
        total = 0.0
        for part in length_buckets(list(shares), lambda text: text.size, BUCKET_TOKENS):
            batch, logits = passes.logits(part)
            values = loss(part, batch, logits)
            each = per_example(values, batch.owner.to(values.device), len(part))
            mean = each @ each.new_tensor([shares[text] for text in part])
            if backward and self.config.c_base:
                (self.config.c_base * mean).backward()
            total += float(mean.detach())
        return total

    @property
    def _loss(self) -> TokenLoss:
        return token_nll if self.config.edit_loss == "nll" else token_margin

    def _steps(
        self, trunk: Trunk, texts: Sequence[Text], hidden: Tensor | None, *, create_graph: bool = False
    ) -> dict[str, LowRank]:
        """The inner steps on each text from the unedited model; with ``create_graph`` differentiable in ``theta``."""
        deltas: dict[str, LowRank] = {}
        # No fused attention kernel has a second derivative.
        with sdpa_kernel(SDPBackend.MATH) if create_graph else nullcontext():
            for _ in range(self.config.inner_steps):
                with applied(trunk.model, deltas):
                    factors = edit_factors(
                        trunk, self.sites, texts, hidden, token_loss=self._loss, create_graph=create_graph
                    )
                step = self(factors)
                deltas = {name: deltas[name] + step[name] for name in step} if deltas else step
        return deltas


class _Trained:
    """Forward passes of the trained model; see :class:`emendo.editors.objective.Passes`.

    Args:
        trunk: the trained model.
        store: its kept trunk outputs; None if they change in training.
        locality_loss: logits before and after an edit -> the loss of each locality label.

    Attributes:
        known: by text, its logits ``[labels, vocabulary]`` without an edit.
    """

    def __init__(self, trunk: Trunk, store: TrunkCache | None, locality_loss: TokenLoss) -> None:
        self.trunk, self.store, self.model = trunk, store, trunk.model
        self.locality_loss = locality_loss
        self.known: dict[Text, Tensor] = {}

    def keep(self, texts: Sequence[Text], logits: Tensor) -> None:
        """Keep the logits of texts without an edit."""
        self.known |= zip(texts, logits.detach().split([len(text.labels) for text in texts]), strict=True)

    def logits(self, texts: Sequence[Text]) -> tuple[TokenBatch, Tensor]:
        if self.store is not None:
            return self.store.logits(texts)
        batch = collate(texts)
        return batch, self.trunk.logits(batch)

    def label_losses(
        self,
        texts: Sequence[Text],
        locality: int,
        context: Callable[[Packing], AbstractContextManager[None]],
        token_loss: TokenLoss,
    ) -> tuple[TokenBatch, Tensor, Tensor]:
        if self.store is not None:
            batch, logits = self.store.packed_logits(texts, context)
        else:
            with context(Packing()):
                batch, logits = self.logits(texts)
        before = [self.known[text] for text in texts[len(texts) - locality :]] or [logits[:0]]
        whole = torch.cat(before)
        labels = batch.labels[: len(logits) - len(whole)].to(logits.device)
        return batch, *label_losses(logits, labels, whole, token_loss, self.locality_loss)
