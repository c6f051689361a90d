"""KnowledgeEditor (KE): a network that reads the fact and gates the fine-tuning gradient with matrices of rank one.

De Cao, Aziz, Titov: "Editing Factual Knowledge in Language Models", EMNLP 2021 (arXiv 2104.08164). A
bidirectional LSTM reads the condition - the model's own answer, the new answer and the prompt - into one vector, from
which two layers make five outputs for each matrix of ``d_out`` rows and ``d_in`` columns. With ``G`` its gradient::

    (col_a, row_a, col_b, row_b, eta) = V2 tanh(V1 tanh(V0 h))            V1, V2 with weight normalisation
    alpha = softmax(row_a) col_a^T,    beta = softmax(row_b) col_b^T
    dW    = -max_scale * sigmoid(eta) * (G * alpha + beta)                elementwise

``G * alpha = diag(softmax(row_a)) G diag(col_a)``, so ``dW`` stays factored, with one rank more than ``G``.

Where it departs from the paper and its code (nicola-decao/KnowledgeEditor):

1. Sign: the code adds the change and has to learn the sign. Here, as MEND writes it: minus.
2. Start: random outputs there. Here ``col_a`` is given in units of ``2 step d_out / max_scale``, and the bias of ``V2``
   is 1 for it and 0 for the rest, so that an untrained editor takes about a gradient step of size ``step``.
3. The model's own answer: a beam search there. Here the argmax at each of the new answer's positions, which the pass
   that gives the gradient yields at no cost. A class of a classifier is read as the token of its number.
4. The parts of the condition are distinguished by learned vectors instead of the texts " >> " and " || ".
5. Token embeddings: there copied from the model and trained on. Here the model's own, frozen, and normalised to one
   scale, since they differ by orders of magnitude from model to model.
6. Matrices: all but embeddings and heads there. Here the sites, as for every editor.
7. Objective: as MEND's comparison by default. ``"constrained"`` is the paper's ``min NLL subject to KL <= margin`` by a
   Lagrange multiplier, which climbs by plain gradient ascent (there by RMSprop). No label smoothing.
8. No repeated application until the edit succeeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import pack_sequence

from emendo._settings import Settings, setting
from emendo.editors.gradient import Ahead, GradientEditor, edit_factors
from emendo.editors.objective import Episode, Outcome, Weights
from emendo.errors import RequestError
from emendo.low_rank import LowRank
from emendo.models.capture import Factors, move
from emendo.models.lm import LM
from emendo.models.sites import Site
from emendo.models.text import Text, TokenBatch
from emendo.models.trunk import Trunk
from emendo.models.trunk_cache import TrunkCache

CONDITION = "condition"
"""Key of the condition among the factors: ``u`` are token embeddings in order, ``delta`` is their part, one-hot."""

_PARTS = 3  # the model's own answer, the new one, the prompt
_ASCENT = 0.1  # learning rate of the multiplier
_SHRINK, _ENOUGH = 0.8, 0.9  # factor of the margin, and the edit success above which it shrinks


@dataclass(frozen=True, slots=True)
class KeConfig(Settings):
    """KE's settings.

    The values in parentheses are those of the paper, and of MEND's comparison.
    """

    lstm_hidden: int = setting(256, "Width of the LSTM in each direction (128, 512).", least=1)
    condition: int = setting(512, "Width of the vector that the LSTM's states become (1024, 768).", least=1)
    hidden: int = setting(128, "Width between the two layers of each matrix (128, 512).", least=1)
    step: float = setting(3e-3, "Approximate size of the gradient step of an untrained editor.", above=0)
    max_scale: float = setting(1.0, "Largest factor of `G * alpha + beta` (1).", above=0)
    objective: Literal["mend", "constrained"] = setting(
        "mend", "`mend` uses the loss weights of the training; `constrained` is NLL + multiplier * KL."
    )
    margin: float = setting(0.1, "KL in nats that `constrained` allows at first (0.1 and 0.001).", least=0)
    margin_end: float = setting(
        1e-3, "Smallest value that the margin shrinks to (0.001 and 0.00001).", least=0
    )
    embedding: int = setting(0, "Width of the model's token embeddings; 0: that of its blocks.", least=0)

    def _check(self) -> None:
        if self.margin_end > self.margin:
            raise RequestError(
                f"margin_end must be between 0 and margin, which is {self.margin}, but is {self.margin_end}."
            )


class _Reader(nn.Module):
    """The condition's token embeddings to one vector."""

    def __init__(self, width: int, config: KeConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.parts = nn.Parameter(torch.randn(_PARTS, width))
        self.lstm = nn.LSTM(width, config.lstm_hidden, bidirectional=True)
        self.linear = nn.Linear(2 * config.lstm_hidden, config.condition)

    def forward(self, rows: Factors) -> Tensor:
        """The last states of both directions, mapped: ``[examples, condition]``."""
        tokens = self.norm(rows.u) + rows.delta @ self.parts
        counts = torch.bincount(rows.owner, minlength=rows.examples).tolist()
        _, (last, _) = self.lstm(pack_sequence(list(tokens.split(counts)), enforce_sorted=False))
        return self.linear(last.transpose(0, 1).flatten(1)).tanh()  # type: ignore[no-any-return]


class _Gates(nn.Module):
    """The two layers of one matrix; they turn its gradient into a change."""

    def __init__(self, site: Site, config: KeConfig) -> None:
        super().__init__()
        self.sizes = [site.d_in, site.d_out, site.d_in, site.d_out, 1]
        self.max_scale, self.unit = config.max_scale, 2 * config.step * site.d_out / config.max_scale
        first, last = nn.Linear(config.condition, config.hidden), nn.Linear(config.hidden, sum(self.sizes))
        last.bias.data = torch.cat([torch.ones(site.d_in), torch.zeros(sum(self.sizes[1:]))])
        self.layers = nn.Sequential(weight_norm(first), nn.Tanh(), weight_norm(last))

    def forward(self, rows: Factors, condition: Tensor) -> LowRank:
        """One change for each example, of rank ``rows + 1``."""
        col_a, row_a, col_b, row_b, eta = self.layers(condition).split(self.sizes, -1)
        scale = -self.max_scale * eta.sigmoid()
        gradient = rows.lowrank(rows.delta, rows.u)
        left = (scale * row_a.softmax(-1))[:, :, None] * gradient.left
        right = gradient.right * (self.unit * col_a)[:, None, :]
        return LowRank(left, right) + LowRank((scale * row_b.softmax(-1))[:, :, None], col_b[:, None, :])


class KnowledgeEditor(GradientEditor):
    """The KE editor; the module's docstring has its equations."""

    name = "ke"
    Config = KeConfig
    config: KeConfig
    multiplier: Tensor
    margin: Tensor

    def __init__(
        self, sites: tuple[Site, ...], config: KeConfig | None = None, fingerprint: str = ""
    ) -> None:
        super().__init__(sites, config, fingerprint)
        self.width = self.config.embedding or _stream(sites)
        self.reader = _Reader(self.width, self.config)
        self.gates = nn.ModuleList(_Gates(site, self.config) for site in sites)
        self.register_buffer("multiplier", torch.ones((), dtype=torch.float64))
        self.register_buffer("margin", torch.tensor(self.config.margin, dtype=torch.float64))

    def factors(
        self, trunk: Trunk, texts: Sequence[Text], hidden: Tensor | None = None
    ) -> dict[str, Factors]:
        """The factors of the gradient and, under :data:`CONDITION`, the input of the LSTM.

        Raises:
            RequestError: the model's token embeddings have another width than the editor expects.
        """
        answers: list[Tensor] = []

        def keep(logits: Tensor, batch: TokenBatch) -> None:
            answers.extend(logits.argmax(-1).cpu().split([len(text.labels) for text in texts]))

        factors = edit_factors(trunk, self.sites, texts, hidden, seen=keep)
        parts = [
            (tuple(answer.tolist()), text.labels, text.source or text.ids[: text.start])
            for answer, text in zip(answers, texts, strict=True)
        ]
        factors[CONDITION] = _condition(self._embeddings(trunk.model), parts)
        return move(factors, next(self.parameters()).device)

    def forward(self, factors: Mapping[str, Factors]) -> dict[str, LowRank]:
        """Read the conditions, then gate the gradients of every matrix by them."""
        condition = self.reader(factors[CONDITION])
        return {
            site.name: gates(factors[site.name], condition)
            for site, gates in zip(self.sites, self.gates, strict=True)
        }

    def bind(self, lm: LM) -> None:
        """Bind the editor to its model; see :meth:`emendo.editors.base.Editor.bind`.

        Raises:
            RequestError: the model's token embeddings have another width than the editor expects.
        """
        super().bind(lm)
        self._embeddings(lm.model)

    def _embeddings(self, model: Any) -> Any:
        table = model.get_input_embeddings()
        if (width := table.weight.shape[-1]) != self.width:
            raise RequestError(
                f"The model's token embeddings are {width} wide, but this editor reads {self.width}: set "
                f"embedding={width}."
            )
        return table

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
        """As in the base class; the constrained objective trains on NLL + multiplier * KL."""
        if backward:
            weights = self._weights(weights)
        return super().outer_step(store, episodes, ahead, weights, together=together, backward=backward)

    def _weights(self, given: Weights) -> Weights:
        """The given weights, or those of NLL + multiplier * KL."""
        if self.config.objective == "mend":
            return given
        return Weights(c_edit=1.0, prompt_share=given.prompt_share, c_loc=float(self.multiplier))

    def adapt(self, outcome: Outcome, *, validation: bool = False) -> None:
        """Raise the multiplier by the KL above the margin; after a validation, shrink the margin if edits succeed."""
        if not validation:
            self.multiplier += _ASCENT * (outcome.locality_loss - self.margin)
            self.multiplier.clamp_(min=0)
        elif outcome.success > _ENOUGH:
            self.margin.mul_(_SHRINK).clamp_(min=self.config.margin_end)


def _stream(sites: tuple[Site, ...]) -> int:
    """The width of the residual stream, which every matrix reads or writes; the smaller of two candidates."""
    shared = set.intersection(*({*site.shape} for site in sites))
    return min(shared or {width for site in sites for width in site.shape})


@torch.no_grad()
def _condition(table: Any, examples: Sequence[Sequence[tuple[int, ...]]]) -> Factors:
    """The embeddings of each example's own answer, new answer and prompt, one after the other."""
    rows = [
        (token, part, example)
        for example, parts in enumerate(examples)
        for part, tokens in enumerate(parts)
        for token in tokens
    ]
    ids, part, owner = torch.tensor(rows, device=table.weight.device).unbind(1)
    u = table(ids)
    u = u.to(torch.promote_types(u.dtype, torch.float32))
    return Factors(u, F.one_hot(part, _PARTS).to(u), owner, len(examples))
