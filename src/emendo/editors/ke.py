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
   that gives the gradient shows for nothing. A class of a classifier is read as the token of its number.
4. The parts of the condition are set apart by learned vectors instead of the texts " >> " and " || ".
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

from emendo.editors.gradient import GradientEditor, edit_factors
from emendo.editors.objective import Outcome, Weights
from emendo.errors import RequestError
from emendo.low_rank import LowRank
from emendo.models.capture import Factors, move
from emendo.models.lm import LM
from emendo.models.sites import Site
from emendo.models.text import Text, TokenBatch
from emendo.models.trunk import Trunk

CONDITION = "condition"
"""Key of the condition among the factors: ``u`` are token embeddings in order, ``delta`` tells their part, one-hot."""

_PARTS = 3  # the model's own answer, the new one, the prompt
_ASCENT = 0.1  # learning rate of the multiplier
_SHRINK, _ENOUGH = 0.8, 0.9  # what the margin is multiplied by, and the success from which on


@dataclass(frozen=True, slots=True)
class KeConfig:
    """KE's settings.

    Attributes:
        lstm_hidden: width of the LSTM in each direction (128 in the paper, 512 in MEND's comparison).
        condition: width of the vector that stands for the condition (1024 and 768).
        hidden: width between the two layers of each matrix (128 and 512).
        step: size of the gradient step that it starts as, about.
        max_scale: largest factor of ``G * alpha + beta`` (1 in the paper).
        objective: ``"mend"`` takes the weights of the losses from the training's settings; ``"constrained"`` weighs the
            edit loss with 1 and the locality loss with the multiplier.
        margin: the KL in nats that the constrained objective allows at first (0.1 and 0.001 in the paper).
        margin_end: the least that it shrinks to (0.001 and 0.00001).
        embedding: width of the model's token embeddings; 0 takes that of its blocks.
    """

    lstm_hidden: int = 256
    condition: int = 512
    hidden: int = 128
    step: float = 3e-3
    max_scale: float = 1.0
    objective: Literal["mend", "constrained"] = "mend"
    margin: float = 0.1
    margin_end: float = 0.001
    embedding: int = 0

    def __post_init__(self) -> None:
        for name in ("lstm_hidden", "condition", "hidden"):
            if getattr(self, name) < 1:
                raise RequestError(f"KE needs {name} of at least 1, not {getattr(self, name)}.")
        for name in ("step", "max_scale"):
            if not getattr(self, name) > 0:
                raise RequestError(f"KE needs {name} above 0, not {getattr(self, name)}.")
        if self.objective not in ("mend", "constrained"):
            raise RequestError(f"objective={self.objective!r} is not one of mend, constrained.")
        if not 0 <= self.margin_end <= self.margin:
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
    """The two layers of one matrix, and the change that they make of its gradient."""

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
    """The KE editor; see the module's text for its equations."""

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
        """The factors of the gradient and, under :data:`CONDITION`, what the LSTM reads.

        Raises:
            RequestError: the model's token embeddings have another width than the editor expects.
        """
        answers: list[Tensor] = []

        def look(logits: Tensor, batch: TokenBatch) -> None:
            answers.extend(logits.argmax(-1).cpu().split([len(text.labels) for text in texts]))

        factors = edit_factors(trunk, self.sites, texts, hidden, seen=look)
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

    def begin(self, lm: LM) -> None:
        """Check the width of the token embeddings before any work is done.

        Raises:
            RequestError: it is another one than the editor expects.
        """
        self._embeddings(lm.model)

    def _embeddings(self, model: Any) -> Any:
        table = model.get_input_embeddings()
        if (width := table.weight.shape[-1]) != self.width:
            raise RequestError(
                f"The model's token embeddings are {width} wide, but this editor reads {self.width}: make it with "
                f"embedding={width}."
            )
        return table

    def weights(self, asked: Weights) -> Weights:
        """Those asked for, or NLL + multiplier * KL for the constrained objective."""
        if self.config.objective == "mend":
            return asked
        return Weights(c_edit=1.0, prompt_share=asked.prompt_share, c_loc=float(self.multiplier))

    def learnt(self, outcome: Outcome) -> None:
        """Raise the multiplier by how far the KL was above the margin."""
        self.multiplier += _ASCENT * (outcome.locality_loss - self.margin)
        self.multiplier.clamp_(min=0)

    def validated(self, outcome: Outcome) -> None:
        """Shrink the margin where the edits succeed."""
        if outcome.success > _ENOUGH:
            self.margin.mul_(_SHRINK).clamp_(min=self.config.margin_end)


def _stream(sites: tuple[Site, ...]) -> int:
    """The width of the residual stream, which every matrix reads or writes; the smaller where two would do."""
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
