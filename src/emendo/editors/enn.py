"""ENN: train the model itself, so that a plain gradient step on a few matrices is a good edit.

Sinitsin, Plokhotnyuk, Pyrkin, Popov, Babenko: "Editable Neural Networks", ICLR 2020 (arXiv 2004.00345), as compared
with MEND in arXiv 2110.11309, appendices B.1 and C.1, Eq. 5 and 6. With the original parameters ``theta_0``, the
trained ones ``theta`` and a learned step size ``eta`` for each edited matrix ``W``::

    theta' = theta - eta * grad_W l_e(theta)          inner_steps times
    L      = c_base * KL(theta_0 || theta) + c_edit * l_e(theta') + c_loc * KL(theta || theta')

``L`` reaches ``theta`` directly and through the gradient in the inner steps (second order). The base loss is taken on
the locality texts; in the locality loss ``theta`` as the reference carries no gradient.

``theta`` and ``log eta`` are the editor's own parameters. The user's model is never changed: edits are made for a copy
of it with the editor's parameters, :meth:`Enn.host`.

Where papers and official codes differ, and what is done here:

1. ``eta``: starts at 1e-2 and is learned in the MEND paper; in its code it hardly moves (as MEND's alpha). Here: its
   logarithm is learned, so that a step never turns into an ascent, in a parameter group of its own.
2. ``c_base`` scales what the MEND code logs, but not the gradient. Here: both.
3. ``l_e``: NLL in the MEND comparison; in Sinitsin et al. a hinge that is 0, and stops the steps, once the target is
   the most likely answer. Here: either, averaged over the answer's tokens; where it is 0 further steps change nothing.
4. Trained: all parameters in the MEND comparison, ``trains="all"``. Also here: ``trains="suffix"``, without the blocks
   below the first edited one, embeddings and vocabulary projection, so that what those blocks gave stays valid.
5. Precision: ENN fails to train in half precision (MEND, section 5). Here: the copy is in float32 at least.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from emendo.data.schema import Probe
from emendo.editors._trained_copy import TrainedCopy
from emendo.editors.gradient import GradientEditor, edit_factors
from emendo.editors.objective import BUCKET_TOKENS, Episode, Outcome, Weights, backward_through, judge
from emendo.edits.edit import Request
from emendo.errors import RequestError
from emendo.low_rank import LowRank, applied
from emendo.models._packing import Packing
from emendo.models.capture import Factors, all_finite
from emendo.models.lm import LM
from emendo.models.losses import TokenLoss, label_losses, per_example, token_kl, token_margin, token_nll
from emendo.models.sites import Site
from emendo.models.text import Text, TokenBatch, collate, length_buckets
from emendo.models.tokenization import to_texts
from emendo.models.trunk import Trunk
from emendo.models.trunk_cache import TrunkCache

_DRIFT_TEXTS = 64  # whose logits are held at a time


@dataclass(frozen=True, slots=True)
class EnnConfig:
    """ENN's settings.

    Attributes:
        inner_lr: step size of every edited matrix at the start (1e-2 in the MEND comparison).
        inner_steps: gradient steps that make an edit (1 in the MEND comparison, up to 10 in Sinitsin et al.).
        first_order: leave out the gradient through the inner steps' gradients.
        trains: ``"all"`` parameters of the model, or the ``"suffix"`` that the trunk's output does not depend on.
        edit_loss: ``"nll"`` of the target or ``"hinge"``, in the inner steps and the outer loss.
        c_base: weight of the base loss, which holds the trained model to the original one.
        lr_scale: learning rate of ``log eta`` as a multiple of the model's.
    """

    inner_lr: float = 1e-2
    inner_steps: int = 1
    first_order: bool = False
    trains: Literal["all", "suffix"] = "all"
    edit_loss: Literal["nll", "hinge"] = "nll"
    c_base: float = 1.0
    lr_scale: float = 100.0

    def __post_init__(self) -> None:
        for name, allowed in (("trains", ("all", "suffix")), ("edit_loss", ("nll", "hinge"))):
            if getattr(self, name) not in allowed:
                raise RequestError(f"{name}={getattr(self, name)!r} is not one of {', '.join(allowed)}.")
        if self.inner_steps < 1:
            raise RequestError(f"ENN needs at least 1 inner step, not {self.inner_steps}.")
        if not self.inner_lr > 0:
            raise RequestError(f"inner_lr must be above 0, not {self.inner_lr}.")
        for name in ("c_base", "lr_scale"):
            if not getattr(self, name) >= 0:
                raise RequestError(f"{name} cannot be negative, but is {getattr(self, name)}.")


class Enn(GradientEditor):
    """The ENN editor; see the module's text for its equations.

    Attributes:
        twin: the trained parameters, and the copy of the model that has them.
        log_eta: ``[sites]`` logarithms of the inner step sizes.
    """

    name = "enn"
    Config = EnnConfig
    config: EnnConfig
    looks_ahead = False

    def __init__(
        self, sites: tuple[Site, ...], config: EnnConfig | None = None, fingerprint: str = ""
    ) -> None:
        super().__init__(sites, config, fingerprint)
        self.twin = TrainedCopy(sites, suffix=self.shares_trunk)
        self.log_eta = nn.Parameter(torch.full((len(sites),), math.log(self.config.inner_lr)))

    @property
    def shares_trunk(self) -> bool:
        """Whether the blocks below the first edited one are those of the user's model."""
        return self.config.trains == "suffix"

    def forward(self, factors: Mapping[str, Factors]) -> dict[str, LowRank]:
        """One step of gradient descent: ``dW = -eta * sum_i delta_i u_i^T``."""
        return {
            site.name: rows.lowrank(-eta * rows.delta, rows.u)
            for site, eta in zip(self.sites, self.log_eta.exp(), strict=True)
            for rows in [factors[site.name]]
        }

    def each(self, lm: LM, requests: Sequence[Request]) -> dict[str, LowRank]:
        """One change of the trained model for each request, all in one batch."""
        texts = self.texts(lm, requests)
        self.begin(lm)
        trunk = self.twin.trunk(lm.model)
        with torch.no_grad():
            return self._steps(trunk, texts, trunk.run(collate(texts)))

    def host(self, lm: LM) -> LM:
        """The trained model; its edits carry its own fingerprint, while the editor belongs to the user's model.

        Raises:
            MismatchError: the editor was trained for another model.
        """
        self.begin(lm)
        return self.twin.lm(lm)

    @torch.no_grad()
    def drift(self, lm: LM, probes: Sequence[Probe]) -> dict[str, float]:
        """What the training has changed in the model, before any edit.

        Args:
            lm: the original.
            probes: prompts with the answers to look at.

        Returns:
            ``kl``: KL(original || trained) in nats per answer token, averaged over the probes; ``changed``: share
            of the probes where the argmax of any answer token is another one.

        Raises:
            MismatchError: the editor was trained for another model.
            RequestError: no probe at all, or one that does not fit the model.
        """
        if not probes:
            raise RequestError("There is nothing to measure the drift on: give at least one probe.")
        texts, host = to_texts(lm, [(probe.prompt, probe.answer) for probe in probes]), self.host(lm)
        kl, changed = 0.0, 0
        for start in range(0, len(texts), _DRIFT_TEXTS):
            part = texts[start : start + _DRIFT_TEXTS]
            for before, after in zip(lm.logits(part), host.logits(part), strict=True):
                kl += float(token_kl(before, after).mean())
                changed += not before.argmax(-1).equal(after.argmax(-1))
        return {"kl": kl / len(texts), "changed": changed / len(texts)}

    # ------------------------------------------------------------------------------------- training

    def begin(self, lm: LM) -> None:
        """Take the model's parameters over, unless that is done already.

        Raises:
            MismatchError: the editor belongs to another model.
        """
        self.belong(lm)
        self.twin.trunk(lm.model)

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """The model's parameters at ``lr``, the logarithms of the step sizes at ``lr_scale * lr``."""
        return [
            {"params": list(self.twin.parameters()), "lr": lr},
            {"params": [self.log_eta], "lr": lr * self.config.lr_scale},
        ]

    def judged(
        self,
        store: TrunkCache,
        episodes: Sequence[Episode],
        factors: Mapping[str, Factors],
        weights: Weights,
        *,
        together: int = 1,
        backward: bool = False,
    ) -> Outcome | None:
        """Make the edits of the trained model and judge them against it; the loss has the base loss in it.

        ``locality`` and ``locality_loss`` compare the edited with the un-edited trained model; what separates that one
        from the original is the base loss.
        """
        trunk, texts = self.twin.trunk(store.model), [episode.edit for episode in episodes]
        passes = _Trained(trunk, store.with_trunk(trunk) if self.shares_trunk else None)
        hidden = store.gather(texts) if self.shares_trunk else None
        deltas = self._steps(trunk, texts, hidden, create_graph=backward and not self.config.first_order)
        if not all_finite(factor for d in deltas.values() for factor in (d.left, d.right)):
            return None
        if together > 1:
            deltas = {name: delta.group(together) for name, delta in deltas.items()}
        base = self._base(store, passes, episodes, backward=backward)

        def judged(changes: Mapping[str, LowRank]) -> Outcome:
            rest = (episodes, weights)
            return judge(passes, changes, *rest, together=together, backward=backward, edit_loss=self._loss)

        outcome = backward_through(deltas, judged) if backward else judged(deltas)
        return replace(outcome, loss=outcome.loss + self.config.c_base * base)

    def _base(
        self, store: TrunkCache, passes: _Trained, episodes: Sequence[Episode], *, backward: bool
    ) -> float:
        """KL(original || trained) on the locality texts; what the trained model gives there is then known."""
        shares: dict[Text, float] = {}
        for episode in episodes:
            for text in episode.locality:
                shares[text] = shares.get(text, 0.0) + 1 / (len(episode.locality) * len(episodes))
        total = 0.0
        for part in length_buckets(list(shares), lambda text: text.size, BUCKET_TOKENS):
            batch, logits = passes.logits(part)
            with torch.no_grad():
                original = store.packed_logits(part)[1]
            values = token_kl(original, logits)
            kl = per_example(values, batch.owner.to(values.device), len(part))
            loss = kl @ kl.new_tensor([shares[text] for text in part])
            if backward and self.config.c_base:
                (self.config.c_base * loss).backward()
            total += float(loss.detach())
            passes.known |= zip(part, logits.detach().split([len(text.labels) for text in part]), strict=True)
        return total

    @property
    def _loss(self) -> TokenLoss:
        return token_nll if self.config.edit_loss == "nll" else token_margin

    def _steps(
        self, trunk: Trunk, texts: Sequence[Text], hidden: Tensor | None, *, create_graph: bool = False
    ) -> dict[str, LowRank]:
        """The inner steps on each text from the un-edited model; with ``create_graph`` differentiable in ``theta``."""
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
    """Texts through the trained model; what it gives without an edit is ``known``, by text ``[labels, vocabulary]``.

    Args:
        trunk: the trained model.
        store: what is kept of it; None where no part of it is.
    """

    def __init__(self, trunk: Trunk, store: TrunkCache | None) -> None:
        self.trunk, self.store, self.model = trunk, store, trunk.model
        self.known: dict[Text, Tensor] = {}

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
        return batch, *label_losses(logits, labels, whole, token_loss)
