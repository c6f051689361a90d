"""A textbook implementation of MEND: the baseline of the benchmarks and the reference of the tests.

Nothing is optimised. Every pass runs the whole model and computes all logits, an edit is a dense matrix that is applied
through ``torch.func.functional_call``, edits are made one after the other, autograd goes through everything, and the
networks have the official rank, 1920. Only torch and a Hugging Face model are needed; emendo is not imported.

The state has the names and shapes of emendo's MEND, so that one can be loaded into the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F


class Text(Protocol):
    """A tokenised prompt with its answer, which begins at ``ids[start]``."""

    ids: tuple[int, ...]
    start: int


class Episode(Protocol):
    """One edit and the texts of its losses."""

    edit: Text
    paraphrase: Text
    locality: Sequence[Text]


@dataclass(frozen=True)
class Losses:
    """The loss of an episode and its parts."""

    loss: float
    edit: float
    locality: float


class Statistics(nn.Module):
    """Mean and standard deviation of all rows seen, updated only in training mode."""

    count: Tensor
    mean: Tensor
    m2: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("m2", torch.zeros(width))

    @torch.no_grad()
    def update(self, rows: Tensor) -> None:
        """Take in ``rows [n, width]``."""
        for row in rows:  # Welford's, as in the official code
            self.count += 1
            step = row - self.mean
            self.mean += step / self.count.to(row.dtype)
            self.m2 += step * (row - self.mean)

    def forward(self, rows: Tensor) -> Tensor:
        """The rows in units of the statistics."""
        std = (
            (self.m2 / (self.count - 1).to(rows.dtype)).sqrt()
            if self.count > 1
            else torch.ones_like(self.mean)
        )
        return (rows - self.mean) / (std + 1e-7)


class Block(nn.Module):
    """Eq. 3a: ``x + clamp(s * (U V x + b) + o, min=0)``."""

    def __init__(self, width: int, rank: int, modes: int) -> None:
        super().__init__()
        rank = min(rank, width)
        self.v = nn.Parameter(torch.empty(rank, width))
        self.u = nn.Parameter(torch.zeros(width, rank))
        self.bias = nn.Parameter(torch.zeros(width))
        self.scale = nn.Parameter(torch.ones(modes, width))
        self.shift = nn.Parameter(torch.zeros(modes, width))
        nn.init.xavier_uniform_(self.v)

    def forward(self, x: Tensor, mode: int) -> Tensor:
        """Rows ``x [n, width]`` of the matrix of this place among those of its shape."""
        pre = x @ self.v.T @ self.u.T + self.bias
        return x + (pre * self.scale[mode] + self.shift[mode]).clamp(min=0)


class Network(nn.Module):
    """The network of all matrices of one shape."""

    def __init__(self, d_in: int, d_out: int, rank: int, modes: int) -> None:
        super().__init__()
        self.d_in = d_in
        self.u_stats, self.delta_stats = Statistics(d_in), Statistics(d_out)
        self.blocks = nn.ModuleList(Block(d_in + d_out, rank, modes) for _ in range(2))

    def forward(self, u: Tensor, delta: Tensor, mode: int) -> tuple[Tensor, Tensor]:
        """``(u~, delta~)`` from ``u [n, d_in]`` and ``delta [n, d_out]``."""
        x = torch.cat([self.u_stats(u), self.delta_stats(delta)], -1)
        for block in self.blocks:
            x = block(x, mode)
        return x[:, : self.d_in], x[:, self.d_in :]


class Textbook(nn.Module):
    """The MEND editor for some linear layers of a model.

    Args:
        model: a causal language model of Hugging Face's; frozen by the caller.
        names: of the modules whose weight is edited, ``nn.Linear`` all of them.
        rank: of the networks.
        alpha: step size at the start.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], rank: int = 1920, alpha: float = 1e-4) -> None:
        super().__init__()
        self.names = list(names)
        self.model = [model]  # in a list, so that it is not a part of the editor
        shapes = {name: tuple(reversed(self.weight(name).shape)) for name in names}
        members: dict[str, list[str]] = {}
        for name, (d_in, d_out) in shapes.items():
            members.setdefault(f"{d_in}x{d_out}", []).append(name)
        self.place = {name: (key, mode) for key, own in members.items() for mode, name in enumerate(own)}
        self.nets = nn.ModuleDict(
            {key: Network(*shapes[own[0]], rank, len(own)) for key, own in members.items()}
        )
        self.alpha = nn.Parameter(torch.full((len(names),), alpha))

    def weight(self, name: str) -> Tensor:
        """The matrix ``[d_out, d_in]`` itself."""
        return self.model[0].get_parameter(f"{name}.weight")

    def factors(self, text: Text) -> dict[str, tuple[Tensor, Tensor]]:
        """Inputs and output gradients of every edited matrix, by a forward and a backward pass of the whole model."""
        inputs, outputs = {}, {}

        def keep(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
                output = output if output.requires_grad else output.requires_grad_()
                inputs[name], outputs[name] = args[0].detach()[0], output
                return output

            return hook

        handles = [self.model[0].get_submodule(name).register_forward_hook(keep(name)) for name in self.names]
        try:
            loss = nll(answer_logits(self.model[0], {}, [text]), [text])
        finally:
            for handle in handles:
                handle.remove()
        gradients = torch.autograd.grad(loss, [outputs[name] for name in self.names])
        found = {}
        for name, gradient in zip(self.names, gradients, strict=True):
            u, delta = inputs[name], gradient[0]
            used = u.ne(0).any(-1) & delta.ne(0).any(-1)
            found[name] = (u[used].to(self.alpha.dtype), delta[used].to(self.alpha.dtype))
        return found

    def edit(self, text: Text) -> dict[str, Tensor]:
        """The edited matrices, dense (Eq. 2); in training mode the statistics see the factors first."""
        factors = self.factors(text)
        if self.training:
            for name, (u, delta) in factors.items():
                network = self.nets[self.place[name][0]]
                network.u_stats.update(u)
                network.delta_stats.update(delta)
        edited = {}
        for name, alpha in zip(self.names, self.alpha, strict=True):
            key, mode = self.place[name]
            u, delta = self.nets[key](*factors[name], mode)
            weight = self.weight(name)
            edited[f"{name}.weight"] = weight - (alpha * (delta.T @ u)).to(weight.dtype)
        return edited

    def training_step(
        self, episodes: Sequence[Episode], c_edit: float = 0.3, prompt_share: float = 0.5
    ) -> list[Losses]:
        """Add the gradient of the mean loss of some episodes, one after the other, to the parameters'."""
        losses = []
        for episode in episodes:
            edited = self.edit(episode.edit)
            prompts, kept = [episode.edit, episode.paraphrase], list(episode.locality)
            with torch.no_grad():
                before = answer_logits(self.model[0], {}, kept)
            after = answer_logits(self.model[0], edited, prompts)
            first, second = (nll(after[i : i + 1], prompts[i : i + 1]) for i in range(2))
            edit = prompt_share * first + (1 - prompt_share) * second
            locality = kl(before, answer_logits(self.model[0], edited, kept))
            loss = c_edit * edit + locality
            (loss / len(episodes)).backward()
            losses.append(Losses(loss.item(), edit.item(), locality.item()))
        return losses


def answer_logits(model: nn.Module, weights: dict[str, Tensor], texts: Sequence[Text]) -> list[Tensor]:
    """All logits of a padded batch, of which those that predict each text's answer are handed back."""
    length = max(len(text.ids) for text in texts) - 1
    ids = torch.zeros(len(texts), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, : len(text.ids) - 1] = torch.tensor(text.ids[:-1])
        mask[row, : len(text.ids) - 1] = 1
    output = functional_call(
        model, weights, (), {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    )
    return [output.logits[row, text.start - 1 : len(text.ids) - 1] for row, text in enumerate(texts)]


def nll(logits: Sequence[Tensor], texts: Sequence[Text]) -> Tensor:
    """Mean over texts of the mean over answer tokens of ``-log p``."""
    each = [
        F.cross_entropy(own, torch.tensor(t.ids[t.start :])) for own, t in zip(logits, texts, strict=True)
    ]
    return torch.stack(each).mean()


def kl(before: Sequence[Tensor], after: Sequence[Tensor]) -> Tensor:
    """Mean over texts of the mean over answer tokens of ``KL(before || after)``."""
    each = []
    for old, new in zip(before, after, strict=True):
        p, q = old.log_softmax(-1), new.log_softmax(-1)
        each.append((p.exp() * (p - q)).sum(-1).mean())
    return torch.stack(each).mean()
