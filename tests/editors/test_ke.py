"""KnowledgeEditor against its equations, written with dense matrices, and what it reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import build_lm, plain_logits, records_for
from emendo.editors.gradient import edit_factors
from emendo.editors.ke import CONDITION, KeConfig, KnowledgeEditor
from emendo.errors import RequestError
from emendo.models.capture import Factors
from emendo.models.lm import LM
from emendo.models.sites import Site, find_sites
from emendo.models.text import collate
from emendo.models.tokenization import to_texts
from emendo.models.trunk import Trunk

SMALL = KeConfig(lstm_hidden=4, condition=6, hidden=5, step=0.2, max_scale=0.7)


def site(index: int, d_in: int, d_out: int) -> Site:
    return Site(f"blocks.{index}.w", d_in, d_out, "blocks", index, attention=False, transposed=False)


SITES = (site(0, 3, 5), site(1, 5, 3), site(2, 3, 3))


def random_factors(examples: int = 3) -> dict[str, Factors]:
    made = {}
    for index, s in enumerate(SITES):
        owner = torch.arange(examples).repeat_interleave(torch.arange(examples) + 1 + index % 2)
        u, delta = (torch.randn(len(owner), width, dtype=torch.float64) for width in s.shape)
        made[s.name] = Factors(u, delta, owner, examples)
    owner = torch.arange(examples).repeat_interleave(torch.tensor([4, 7, 3]))
    part = torch.tensor([0, 1, 2, 2, 0, 0, 1, 1, 2, 2, 2, 0, 1, 2])
    u = torch.randn(len(owner), 3, dtype=torch.float64)
    return made | {CONDITION: Factors(u, nn.functional.one_hot(part, 3).double(), owner, examples)}


def filled(config: KeConfig = SMALL) -> KnowledgeEditor:
    editor = KnowledgeEditor(SITES, config).double()
    for parameter in editor.parameters():
        nn.init.normal_(parameter, std=0.5)
    return editor


def read_by_hand(reader: Any, u: Tensor, parts: Tensor) -> Tensor:
    """The condition's vector: one token after the other through both directions of the LSTM."""
    tokens = []
    for row, part in zip(u, parts, strict=True):
        scaled = (row - row.mean()) / (row.var(unbiased=False) + 1e-5).sqrt()
        tokens.append(reader.norm.weight * scaled + reader.norm.bias + reader.parts[part])
    ends = []
    for end, order in (("l0", tokens), ("l0_reverse", tokens[::-1])):
        weight = {name: getattr(reader.lstm, f"{name}_{end}") for name in ("weight_ih", "weight_hh")}
        bias = getattr(reader.lstm, f"bias_ih_{end}") + getattr(reader.lstm, f"bias_hh_{end}")
        hidden = cell = torch.zeros(weight["weight_hh"].shape[1], dtype=u.dtype)
        for token in order:
            gates = weight["weight_ih"] @ token + weight["weight_hh"] @ hidden + bias
            i, f, g, o = gates.chunk(4)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            hidden = o.sigmoid() * cell.tanh()
        ends.append(hidden)
    return torch.tanh(reader.linear.weight @ torch.cat(ends) + reader.linear.bias)


def normed(layer: Any, x: Tensor) -> Tensor:
    length, direction = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1
    return (length * direction / direction.square().sum(1, keepdim=True).sqrt()) @ x + layer.bias


def by_hand(editor: KnowledgeEditor, factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    """The equations with dense gradients and dense masks, one example at a time."""
    config, result, read = editor.config, {}, factors[CONDITION]
    for s, gates in zip(editor.sites, editor.gates, strict=True):
        rows, changes = factors[s.name], []
        for example in range(rows.examples):
            mine = read.owner == example
            h = read_by_hand(editor.reader, read.u[mine], read.delta[mine].argmax(-1))
            first, _, last = gates.layers  # type: ignore[union-attr]
            out = normed(last, normed(first, h).tanh())
            col_a, row_a, col_b, row_b, eta = out.split([s.d_in, s.d_out, s.d_in, s.d_out, 1])
            col_a = col_a * (2 * config.step * s.d_out / config.max_scale)
            mine = rows.owner == example
            gradient = torch.zeros(s.d_out, s.d_in, dtype=torch.float64)
            for u, delta in zip(rows.u[mine], rows.delta[mine], strict=True):
                gradient += torch.outer(delta, u)
            alpha = torch.outer(row_a.softmax(0), col_a)
            beta = torch.outer(row_b.softmax(0), col_b)
            changes.append(-config.max_scale * eta.sigmoid() * (gradient * alpha + beta))
        result[s.name] = torch.stack(changes)
    return result


def test_changes_and_gradients_follow_the_equations() -> None:
    editor, factors = filled(), random_factors()
    found, expected = editor(factors), by_hand(editor, factors)
    probes = {s.name: torch.randn(3, s.d_out, s.d_in, dtype=torch.float64) for s in SITES}
    gradients = []
    for changes in ({name: change.dense() for name, change in found.items()}, expected):
        value = sum((changes[name] * probes[name]).sum() for name in probes)
        gradients.append(torch.autograd.grad(value, list(editor.parameters())))  # type: ignore[arg-type]
    for s in SITES:
        torch.testing.assert_close(found[s.name].dense(), expected[s.name], rtol=1e-10, atol=1e-12)
    for (name, _), one, other in zip(editor.named_parameters(), *gradients, strict=True):
        assert one.any(), name
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12, msg=name)


def test_the_rank_is_one_more_than_the_rows() -> None:
    factors = random_factors()
    for name, change in filled()(factors).items():
        assert change.rank == int(torch.bincount(factors[name].owner).max()) + 1


def test_what_else_is_read_at_the_same_time_does_not_matter() -> None:
    """Conditions of other lengths before and after it, or none."""
    editor, factors = filled(), random_factors()
    together = editor(factors)
    for example in range(3):
        alone = {}
        for name, f in factors.items():
            mine = f.owner == example
            alone[name] = Factors(f.u[mine], f.delta[mine], f.owner[mine] * 0, 1)
        for name, change in editor(alone).items():
            torch.testing.assert_close(change.dense()[0], together[name].dense()[example])


# -------------------------------------------------------------------------------------------- start


def test_it_starts_as_about_a_gradient_step(tiny_gpt2: LM) -> None:
    """It descends; and where nothing depends on what is read, it is that step exactly."""
    sites = find_sites(tiny_gpt2.model)
    editor = KnowledgeEditor(sites, replace(SMALL, step=0.02))
    texts = to_texts(tiny_gpt2, [(r.prompt, r.target) for r in records_for(tiny_gpt2, 3)])
    trunk = Trunk(tiny_gpt2.model, sites)
    plain = edit_factors(trunk, sites, texts)
    factors = editor.factors(trunk, texts)
    steps = {name: rows.lowrank(-0.02 * rows.delta, rows.u).dense() for name, rows in plain.items()}
    for name, change in editor(factors).items():
        assert bool(((change.dense() * steps[name]).sum((1, 2)) > 0).all())
    for gates in editor.gates:
        nn.init.zeros_(gates.layers[2].parametrizations.weight.original0)  # type: ignore[union-attr, index]
    for name, change in editor(factors).items():
        torch.testing.assert_close(change.dense(), steps[name], rtol=1e-4, atol=1e-6)


def test_everything_learns_from_the_first_step_on() -> None:
    editor = KnowledgeEditor(SITES, SMALL).double()
    sum((change.dense() ** 3).sum() for change in editor(random_factors()).values()).backward()  # type: ignore[union-attr]
    for name, parameter in editor.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


# ------------------------------------------------------------------------------------- what it reads


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bart", "bert", "roberta"])
def test_it_reads_the_models_answer_the_new_answer_and_the_prompt(kind: str) -> None:
    lm = build_lm(kind)
    editor = KnowledgeEditor(find_sites(lm.model), SMALL)
    texts = to_texts(lm, [(r.prompt, r.target) for r in records_for(lm, 4)])
    found = editor.factors(Trunk(lm.model, editor.sites), texts)
    assert found.keys() == {CONDITION, *(s.name for s in editor.sites)}
    read = found[CONDITION]
    assert read.examples == 4
    answers = 0
    for i, text in enumerate(texts):
        own = plain_logits(lm.model, collate([text])).argmax(-1).tolist()
        prompt = text.source if lm.kind == "seq2seq" else text.ids[: text.start]
        expected = [*own, *text.labels, *prompt]
        mine = read.owner == i
        assert torch.equal(read.u[mine], lm.model.get_input_embeddings()(torch.tensor(expected)))
        parts = [len(own), len(own), len(prompt)]
        assert read.delta[mine].argmax(-1).tolist() == [p for p, n in enumerate(parts) for _ in range(n)]
        answers += own != list(text.labels)
    assert answers > 0


def test_its_edits_depend_on_what_it_read(tiny_llama: LM) -> None:
    """The same gradient after another condition gives another change."""
    editor, factors = filled(), random_factors()
    read = factors[CONDITION]
    other = editor({**factors, CONDITION: replace(read, u=read.u.flip(0))})
    for name, change in editor(factors).items():
        assert (change.dense() - other[name].dense()).abs().max() > 1e-3


def test_embeddings_of_another_width_are_refused(tiny_llama: LM) -> None:
    lm = build_lm("opt", word_embed_proj_dim=16)
    sites = find_sites(lm.model)
    for refused in (KnowledgeEditor(sites), KnowledgeEditor(sites, KeConfig(embedding=17))):
        with pytest.raises(RequestError, match="embedding=16"):
            refused.bind(lm)
    edit = KnowledgeEditor(sites, replace(SMALL, embedding=16)).edit(lm, "The capital of Fosoba is", "Oslo")
    assert all(norm > 0 for norm in edit.relative_norms(lm).values())
    down = find_sites(tiny_llama.model, "*.down_proj")
    KnowledgeEditor(down, SMALL).bind(tiny_llama)  # 48 x 32 alone: the blocks are 32 wide


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lstm_hidden": 0}, "at least 1"),
        ({"hidden": 0}, "at least 1"),
        ({"condition": -1}, "at least 1"),
        ({"step": 0.0}, "above 0"),
        ({"max_scale": 0.0}, "above 0"),
        ({"objective": "lp"}, "mend, constrained"),
        ({"margin": 0.1, "margin_end": 0.2}, "between 0 and margin"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        KeConfig(**settings)
