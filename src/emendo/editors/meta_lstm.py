"""The LSTM meta-learner: a recurrent network reads every weight's gradient and sets its step size and forget rate.

Ravi, Larochelle: "Optimization as a Model for Few-Shot Learning", ICLR 2017. The state of a weight is the cell of an
LSTM, whose gates replace the constants of gradient descent. With ``g_t`` the weight's gradient and ``l_t`` the loss at
step ``t``, and ``h_t`` the output of an ordinary LSTM that reads both::

    h_t     = LSTM(pre(g_t), pre(l_t), h_{t-1})
    i_t     = sigmoid(w_i . [h_t, theta_{t-1}, i_{t-1}] + b_i)        step size
    f_t     = sigmoid(w_f . [h_t, theta_{t-1}, f_{t-1}] + b_f)        what is kept
    theta_t = f_t * theta_{t-1} - i_t * g_t
    pre(x)  = (log|x| / p, sign x)  where |x| >= e^-p,  else (-1, e^p x)        p = 10 (Andrychowicz et al., 2016)

All weights of all matrices share the networks; each has a state of its own. As in the paper the gradients count as
constants when the networks learn, so no second derivative is needed.

Where this differs from the paper:

1. The paper learns the weights that the steps start from; here they are the frozen model's.
2. ``cell="change"`` applies ``f`` to the change of the weight, so that forgetting leads back to the model. The paper's
   ``cell="weights"`` applies it to the weight, which then shrinks towards 0 wherever ``f < 1``.
3. ``w_i = w_f = 0`` at the start, small and random in the paper: an untrained editor takes plain steps of size
   ``alpha``. The paper's ``f`` starts near 1 as well.

The edits are dense, as those of Meta-SGD. The network runs once for every weight, step and edit, a block of weights at
a time (and once more in the backward pass, so that memory does not grow with them): the method is for small models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from emendo._settings import Settings, setting
from emendo.editors.gradient import Ahead, GradientEditor, edit_factors
from emendo.editors.objective import Episode, Outcome, Weights, backward_through, outer_losses
from emendo.edits.edit import Request
from emendo.low_rank import LowRank, applied
from emendo.models.capture import all_finite
from emendo.models.lm import LM
from emendo.models.losses import per_example, token_nll
from emendo.models.sites import Site
from emendo.models.text import Text, TokenBatch, collate
from emendo.models.trunk import Trunk
from emendo.models.trunk_cache import TrunkCache

_P = 10.0
_BLOCK = 1 << 14  # weights whose states are held at one time


@dataclass(frozen=True, slots=True)
class MetaLstmConfig(Settings):
    """The settings of the LSTM meta-learner; the values in parentheses are the paper's."""

    hidden: int = setting(20, "Width of the LSTM that reads the gradients (20).", least=1)
    inner_steps: int = setting(2, "Gradient steps of an edit (5 to 12).", least=1)
    alpha: float = setting(3e-3, "Step size of every weight at the start.", above=0, most=0.999)
    keep: float = setting(0.99, "Forget gate of every weight at the start.", above=0, most=0.999)
    cell: Literal["change", "weights"] = setting(
        "change", "State that the forget gate keeps: the change, or the weight itself (as in the paper)."
    )


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """The input of one step.

    Attributes:
        losses: ``[examples]``.
        gradients: by site name, one for each example.
    """

    losses: Tensor
    gradients: Mapping[str, LowRank]


class MetaLstm(GradientEditor):
    """The LSTM meta-learner; the module's docstring has its equations."""

    name = "meta-lstm"
    Config = MetaLstmConfig
    config: MetaLstmConfig

    def __init__(
        self, sites: tuple[Site, ...], config: MetaLstmConfig | None = None, fingerprint: str = ""
    ) -> None:
        super().__init__(sites, config, fingerprint)
        self.reader = nn.LSTMCell(4, self.config.hidden)
        self.size = _gate(self.config.hidden, self.config.alpha)
        self.kept = _gate(self.config.hidden, self.config.keep)

    def forward(self, steps: Sequence[Step], weights: Mapping[str, Tensor]) -> dict[str, LowRank]:  # type: ignore[override]
        """The changes after some steps.

        Args:
            steps: the steps so far.
            weights: by site name, ``[d_out, d_in]``.

        Returns:
            By site name, one dense change for each example.
        """
        return {site.name: self._matrix(steps, site.name, weights[site.name]) for site in self.sites}

    def _matrix(self, steps: Sequence[Step], name: str, weight: Tensor) -> LowRank:
        """The changes ``[examples, d_out, d_in]`` of one matrix, a block of rows at a time."""
        d_out, d_in = weight.shape
        height = max(1, _BLOCK // d_in)
        changes = []
        for example, losses in enumerate(torch.stack([step.losses for step in steps], 1)):
            own = [step.gradients[name][example] for step in steps]
            blocks = []
            for at in range(0, d_out, height):
                rows = slice(at, at + height)
                gradients = torch.stack([(g.left[rows] @ g.right).flatten() for g in own])
                start = weight[rows].to(gradients).flatten()
                if torch.is_grad_enabled():
                    block = checkpoint(self.run, gradients, losses, start, use_reentrant=False)
                else:
                    block = self.run(gradients, losses, start)
                blocks.append(block.view(-1, d_in))
            changes.append(torch.cat(blocks))
        return LowRank.from_dense(torch.stack(changes))

    def run(self, gradients: Tensor, losses: Tensor, weights: Tensor) -> Tensor:
        """The changes ``[n]`` of some weights after all steps.

        Args:
            gradients: ``[steps, n]``.
            losses: ``[steps]``.
            weights: ``[n]``.
        """
        count = len(weights)
        state = (weights.new_zeros(count, self.config.hidden),) * 2
        size = kept = weights.new_zeros(count, 1)
        change = torch.zeros_like(weights)
        for gradient, loss in zip(gradients, losses, strict=True):
            state = self.reader(
                torch.cat([preprocessed(gradient), preprocessed(loss.expand(count))], 1), state
            )
            theta = (weights + change)[:, None]
            size = self.size(torch.cat([state[0], theta, size], 1)).sigmoid()
            kept = self.kept(torch.cat([state[0], theta, kept], 1)).sigmoid()
            held = kept[:, 0] * change
            if self.config.cell == "weights":
                held = held - (1 - kept[:, 0]) * weights
            change = held - size[:, 0] * gradient
        return change

    def changes(self, trunk: Trunk, texts: Sequence[Text]) -> dict[str, LowRank]:
        """One change for each text, after all steps."""
        weights = self._weights(trunk)
        steps = self._steps(trunk, texts, trunk.run(collate(texts)), weights)
        return self(steps, weights)  # type: ignore[no-any-return]

    def together(self, lm: LM, requests: Sequence[Request]) -> dict[str, LowRank]:
        """The sum of all requests' own changes, as one dense change."""
        each = self.each(lm, requests)
        return {name: LowRank.from_dense(change.dense().sum(0)) for name, change in each.items()}

    def _weights(self, trunk: Trunk) -> dict[str, Tensor]:
        return {site.name: site.weight(trunk.model).detach() for site in self.sites}

    @torch.no_grad()
    def _steps(
        self, trunk: Trunk, texts: Sequence[Text], hidden: Tensor, weights: Mapping[str, Tensor]
    ) -> list[Step]:
        """The input of every step on each text, from the unedited model on."""
        steps: list[Step] = []
        device = self.size.weight.device
        for _ in range(self.config.inner_steps):
            losses: list[Tensor] = []

            def keep(logits: Tensor, batch: TokenBatch, losses: list[Tensor] = losses) -> None:
                labels, owner = batch.labels.to(logits.device), batch.owner.to(logits.device)
                losses.append(per_example(token_nll(logits, labels), owner, len(texts)))

            with applied(trunk.model, self(steps, weights) if steps else {}):
                factors = edit_factors(trunk, self.sites, texts, hidden, seen=keep)
            gradients = {name: rows.lowrank(rows.delta, rows.u).to(device) for name, rows in factors.items()}
            steps.append(Step(losses[0].to(device), gradients))
        return steps

    # ------------------------------------------------------------------------------------- training

    def look_ahead(
        self, store: TrunkCache, batches: Sequence[Sequence[Episode]], window: Sequence[Episode] = ()
    ) -> list[Ahead]:
        """The unedited answers alone: all gradients but the first depend on the networks."""
        for episodes in (window, [episode for batch in batches for episode in batch]):
            store.ensure_unedited(text for episode in episodes for text in episode.locality)
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
        """As in the base class; the gradients of all steps are taken here."""
        texts, matrices = [episode.edit for episode in episodes], self._weights(store.trunk)
        steps = self._steps(store.trunk, texts, store.gather(texts), matrices)
        if not all_finite(side for s in steps for g in s.gradients.values() for side in (g.left, g.right)):
            return None
        deltas: dict[str, LowRank] = self(steps, matrices)
        if together > 1:
            deltas = {name: delta.group(together) for name, delta in deltas.items()}
        losses = partial(
            outer_losses, store, episodes=episodes, weights=weights, together=together, backward=backward
        )
        return backward_through(deltas, losses) if backward else losses(deltas)


def preprocessed(x: Tensor) -> Tensor:
    """``[n, 2]``: the size of numbers ``[n]`` on a logarithmic scale, and their sign."""
    large = x.abs() >= math.exp(-_P)
    size = torch.where(large, x.abs().clamp(min=math.exp(-_P)).log() / _P, -torch.ones_like(x))
    return torch.stack([size, torch.where(large, x.sign(), math.exp(_P) * x)], 1)


def _gate(hidden: int, start: float) -> nn.Linear:
    """A gate over ``[h, theta, its last value]`` that is ``start`` everywhere at the start."""
    gate = nn.Linear(hidden + 2, 1)
    nn.init.zeros_(gate.weight)
    nn.init.constant_(gate.bias, math.log(start / (1 - start)))
    return gate
