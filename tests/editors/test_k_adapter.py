"""K-Adapter: the chain against a plain module, its training by autograd, and adapters that add up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cases import build_lm, plain_logits, records_for, unchanged
from emendo.editors import read_edit
from emendo.editors.k_adapter import AdapterEdit, KAdapter, KAdapterConfig, compose
from emendo.models.lm import LM
from emendo.models.sites import find_sites, find_stacks
from emendo.models.text import TokenBatch, collate
from emendo.models.tokenization import to_texts


class Plain(nn.Module):
    """The reference: a whole pass that keeps every block's output, then the chain, written out."""

    def __init__(self, edit: AdapterEdit) -> None:
        super().__init__()
        (self.adapter,) = edit.adapters
        layers = self.adapter.layers
        self.blocks = [*layers]
        self.down = nn.ParameterList(layer.down.double().clone() for layer in layers.values())
        self.bias = nn.ParameterList(layer.bias.double().clone() for layer in layers.values())
        self.up = nn.ParameterList(layer.up.double().clone() for layer in layers.values())

    def forward(self, states: dict[str, Tensor]) -> Tensor:
        total = torch.zeros_like(states[self.blocks[0]])
        for name, down, bias, up in zip(self.blocks, self.down, self.bias, self.up, strict=True):
            h = states[name]
            x = h / (h.pow(2).mean(-1, keepdim=True) + 1e-12).sqrt() + total
            total = total + nn.functional.linear(torch.relu(nn.functional.linear(x, down, bias)), up)
        return total * self.adapter.scale.double()


def states(lm: LM, batch: TokenBatch, added: Tensor | None = None) -> tuple[dict[str, Tensor], Tensor]:
    """Every block's output in the last stack, and the logits with something added to the last of them."""
    stack, seen = find_stacks(lm.model)[-1], {}
    handles = []

    def keep(name: str, last: bool) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            seen[name] = hidden.detach()
            if not last or added is None:
                return None
            return (hidden + added, *output[1:]) if isinstance(output, tuple) else hidden + added

        return hook

    for i in range(stack.depth):
        name = f"{stack.name}.{i}"
        handles.append(lm.model.get_submodule(name).register_forward_hook(keep(name, i == stack.depth - 1)))
    logits = plain_logits(lm.model, batch)
    for handle in handles:
        handle.remove()
    return seen, logits


def edits(lm: LM, n: int, **config: Any) -> list[AdapterEdit]:
    editor = KAdapter(
        find_sites(lm.model, last=2), KAdapterConfig(**{"width": 4, "steps": 3, "lr": 0.05, **config})
    )
    return [editor.edit(lm, r.prompt, r.target) for r in records_for(lm, n)]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bart", "bert"])
def test_the_chain_is_that_of_a_plain_module(kind: str) -> None:
    lm = build_lm(kind, torch.float64)
    record, batch = next(
        (record, batch)
        for record in records_for(lm, 8)
        for batch in [collate(to_texts(lm, [(record.prompt, record.target)]))]
        if not bool((plain_logits(lm.model, batch).argmax(-1) == batch.labels).all())
    )
    editors = [
        KAdapter(find_sites(lm.model, last=2), KAdapterConfig(width=4, steps=steps, lr=lr))
        for steps, lr in ((1, 1e-300), (3, 0.05))
    ]
    with unchanged(lm.model):
        start, edit = (editor.edit(lm, record.prompt, record.target) for editor in editors)
    plain = Plain(start)
    adam = torch.optim.Adam(plain.parameters(), 0.05)
    for _ in range(3):
        clean, _ = states(lm, batch)
        _, logits = states(lm, batch, plain(clean))
        if bool((logits.argmax(-1) == batch.labels).all()):
            break
        adam.zero_grad()
        cross_entropy(logits, batch.labels).backward()
        adam.step()
    _, expected = states(lm, batch, plain(clean))
    with edit.applied(lm):
        torch.testing.assert_close(plain_logits(lm.model, batch), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, states(lm, batch)[1], rtol=1e-3)


def test_adapters_add_up_and_do_not_see_one_another(tmp_path: Path) -> None:
    lm = build_lm("llama", torch.float64)
    one, two = edits(lm, 2)
    record = records_for(lm, 3)[2]
    batch = collate(to_texts(lm, [(record.prompt, record.target)]))
    clean, _ = states(lm, batch)
    _, expected = states(lm, batch, Plain(one)(clean) + Plain(two)(clean))
    both = compose([one, two])
    both.save_pretrained(tmp_path / "both")
    with unchanged(lm.model), torch.no_grad():
        for edit in (both, read_edit(tmp_path / "both")):
            with edit.applied(lm):
                torch.testing.assert_close(plain_logits(lm.model, batch), expected, rtol=1e-5, atol=1e-6)
        with two.applied(lm), one.applied(lm):
            torch.testing.assert_close(plain_logits(lm.model, batch), expected, rtol=1e-5, atol=1e-6)
    assert both.origin.requests == (*one.origin.requests, *two.origin.requests)
