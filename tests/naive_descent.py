"""Fine-tuning as anyone would write it: the reference of `emendo.editors.descent`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from cases import plain_logits
from emendo.models.lm import LM
from emendo.models.sites import find_sites
from emendo.models.text import Text, collate


def fine_tuned(
    lm: LM,
    texts: Sequence[Text],
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
    steps: int,
    *,
    clip: float = 100.0,
    c_edit: float = 1.0,
    locality: Sequence[Text] = (),
    until: float | None = None,
    project: Callable[[Tensor], Tensor] | None = None,
    proximal: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> tuple[dict[str, Tensor], int]:
    """The change of each matrix, `[d_out, d_in]`, and the number of steps: a copy of the model with trained weights."""
    twin = copy.deepcopy(lm.model)
    sites = find_sites(twin)
    weights = [site.module(twin).weight.requires_grad_() for site in sites]
    start = [weight.detach().clone() for weight in weights]
    moves = optimizer(weights)
    done = 0
    while done < steps:
        logits = [_logits(twin, text) for text in texts]
        losses = [cross_entropy(z, torch.tensor(text.labels)) for z, text in zip(logits, texts, strict=True)]
        right = [z.argmax(-1).tolist() == list(text.labels) for z, text in zip(logits, texts, strict=True)]
        nll = torch.stack(losses).mean()
        if all(right) if until is None else nll < until:
            break
        loss = c_edit * nll
        if locality:
            text = locality[done % len(locality)]
            before, after = _logits(lm.model, text).log_softmax(-1), _logits(twin, text).log_softmax(-1)
            loss = loss + kl_div(after, before, log_target=True, reduction="batchmean")
        moves.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, clip)
        moves.step()
        done += 1
        if project is not None:
            with torch.no_grad():
                for weight, old in zip(weights, start, strict=True):
                    weight.copy_(old + project(weight - old))
        if proximal is not None:
            with torch.no_grad():
                for weight, old in zip(weights, start, strict=True):
                    weight.copy_(old + proximal(weight - old, _metric(moves, weight)))
    changes = [weight.detach() - old for weight, old in zip(weights, start, strict=True)]
    return {site.name: _as_rows(change, site) for site, change in zip(sites, changes, strict=True)}, done


def _metric(moves: torch.optim.Optimizer, weight: Tensor) -> Tensor:
    """What PyTorch's Adam or RMSprop divided its direction by in the last step."""
    state, group = moves.state[weight], moves.param_groups[0]
    if isinstance(moves, torch.optim.RMSprop):
        return (state["square_avg"].sqrt() + group["eps"]) / group["lr"]
    second = state["exp_avg_sq"] / (1 - group["betas"][1] ** state["step"])
    return (second.sqrt() + group["eps"]) / group["lr"]


def _logits(model: Any, text: Text) -> Tensor:
    return plain_logits(model, collate([text]))


def _as_rows(change: Tensor, site: Any) -> Tensor:
    return change.T if site.transposed else change
