"""ENN against the textbook computation: dense weights, one text after the other, autograd from end to end."""

from __future__ import annotations

import functools
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from cases import build_lm, plain_logits, records_for, unchanged
from emendo.data import Record
from emendo.editors.enn import Enn, EnnConfig
from emendo.editors.objective import Episode, Weights
from emendo.edits.edit import Request
from emendo.errors import RequestError, TrainingError
from emendo.models.lm import LM
from emendo.models.sites import find_sites
from emendo.models.text import Text, collate
from emendo.models.tokenization import passage_texts, to_texts
from emendo.models.trunk import Trunk
from emendo.models.trunk_cache import TrunkCache
from emendo.train import TrainConfig
from emendo.train.episodes import Episodes
from emendo.train.step import training_step, validation_step

PROSE = (
    "The capital of Bade is Paris and the main city of Foka is called Rome.",
    "Two and two are four, and the capital of Lima is Old Town; Oslo is another.",
)
WEIGHTS = Weights(c_edit=0.3, prompt_share=0.4, c_loc=0.7)


@functools.cache
def setting(kind: str, passages: tuple[str, ...] = ()) -> tuple[LM, tuple[Episode, ...], TrunkCache]:
    """A model in float64, two episodes, and the trunk's outputs of their texts."""
    lm = build_lm(kind, torch.float64)
    config = TrainConfig(batch=2, near=1, sibling=1, text=0)
    batch = Episodes(lm, records_for(lm, 12), config, passages, base=2).batch(0)
    store = TrunkCache(Trunk(lm.model, find_sites(lm.model, last=1)), dtype=torch.float64)
    store.ensure(text for episode in batch for text in episode.texts())
    return lm, tuple(batch), store


def editor_for(lm: LM, **config: Any) -> Enn:
    """An editor that is no longer at its start: the model has moved and the step sizes differ."""
    editor = Enn(find_sites(lm.model, last=1), EnnConfig(**config)).double()
    editor.bind(lm)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (*editor.twin.theta.values(), editor.log_eta):
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        editor.log_eta += torch.linspace(0, 2, len(editor.sites))
    return editor


def named(editor: Enn) -> dict[str, Tensor]:
    """The trained parameters under the names that the model has for them."""
    return {key.replace("/", "."): parameter for key, parameter in editor.twin.theta.items()}


class Textbook:
    """Eq. 5 as it stands, on parameters of its own."""

    def __init__(self, lm: LM, editor: Enn) -> None:
        self.lm, self.editor, self.config = lm, editor, editor.config
        self.original = dict(lm.model.named_parameters())
        self.theta = {n: p.detach().clone().requires_grad_() for n, p in named(editor).items()}
        self.log_eta = editor.log_eta.detach().clone().requires_grad_()

    def rows(self, parameters: dict[str, Tensor], text: Text) -> Tensor:
        class Called(torch.nn.Module):
            """`plain_logits` as a function of the parameters."""

            def __init__(self, model: Any) -> None:
                super().__init__()
                self.model = model

            def forward(self, batch: Any) -> Tensor:
                return plain_logits(self.model, batch)

        values = {f"model.{name}": value for name, value in (self.original | parameters).items()}
        return functional_call(Called(self.lm.model), values, (collate([text]),))

    def edit_loss(self, parameters: dict[str, Tensor], text: Text) -> Tensor:
        log_p, total = self.rows(parameters, text).log_softmax(-1), torch.zeros((), dtype=torch.float64)
        for row, label in zip(log_p, text.labels, strict=True):
            others = torch.cat([row[:label], row[label + 1 :]])
            hinge = F.relu(others.max() - row[label])
            total = total + (hinge if self.config.edit_loss == "hinge" else -row[label])
        return total / len(text.labels)

    def task_loss(self, text: Text) -> Tensor:
        log_p = self.rows(self.theta, text).log_softmax(-1)
        return -torch.stack([row[label] for row, label in zip(log_p, text.labels, strict=True)]).mean()

    def locality_loss(self, new: dict[str, Tensor], text: Text) -> Tensor:
        if self.config.locality_loss == "kl":
            return self.kl(self.theta, new, text)
        apart = self.rows(new, text) - self.rows(self.theta, text).detach()
        return torch.stack([(row * row).sum() / len(row) for row in apart]).mean()

    def kl(self, before: dict[str, Tensor], after: dict[str, Tensor], text: Text) -> Tensor:
        p = self.rows(before, text).detach().log_softmax(-1)
        q = self.rows(after, text).log_softmax(-1)
        return (p.exp() * (p - q)).sum(-1).mean()

    def change(self, text: Text) -> dict[str, Tensor]:
        """What the inner steps add to the edited matrices, by parameter."""
        names = [f"{site.name}.weight" for site in self.editor.sites]
        new = dict(self.theta)
        for _ in range(self.config.inner_steps):
            loss = self.edit_loss(new, text)
            gradients = torch.autograd.grad(loss, [new[name] for name in names], create_graph=True)
            if self.config.first_order:
                gradients = tuple(gradient.detach() for gradient in gradients)
            for name, gradient, log_eta in zip(names, gradients, self.log_eta, strict=True):
                new[name] = new[name] - log_eta.exp() * gradient
        return {name: new[name] - self.theta[name] for name in names}

    def losses(self, episode: Episode, group: tuple[Episode, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Base, edit and locality loss of one episode of those that are put into one edit."""
        new, share = dict(self.theta), WEIGHTS.prompt_share
        for member in group:
            new |= {name: new[name] + change for name, change in self.change(member.edit).items()}
        edit = share * self.edit_loss(new, episode.edit) + (1 - share) * self.edit_loss(
            new, episode.paraphrase
        )
        count = len(episode.locality)
        if self.config.base_loss == "task":
            base = sum(self.task_loss(text) for text in episode.base) / len(episode.base)
        else:
            base = sum(self.kl({}, self.theta, text) for text in episode.locality) / count
        local = sum(self.locality_loss(new, text) for text in episode.locality) / count
        return base, edit, local

    def run(self, episodes: tuple[Episode, ...], together: int) -> tuple[float, float, float]:
        """The mean losses; their weighted sum is back-propagated."""
        groups = [episodes[i // together * together :][:together] for i in range(len(episodes))]
        with sdpa_kernel(SDPBackend.MATH):
            each = [self.losses(episode, group) for episode, group in zip(episodes, groups, strict=True)]
        base, edit, local = (torch.stack(column).mean() for column in zip(*each, strict=True))
        (self.config.c_base * base + WEIGHTS.c_edit * edit + WEIGHTS.c_loc * local).backward()
        return base.item(), edit.item(), local.item()

    def gradients(self) -> dict[str, Tensor]:
        found = {name: parameter.grad for name, parameter in self.theta.items()} | {"eta": self.log_eta.grad}
        return {name: gradient for name, gradient in found.items() if gradient is not None}


def gradients(editor: Enn) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in named(editor).items()} | {"eta": editor.log_eta.grad}
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    scale = max(float(gradient.abs().max()) for gradient in theirs.values())
    for (
        name,
        gradient,
    ) in theirs.items():  # some blocks compute their norms in float32 whatever the model's dtype
        torch.testing.assert_close(ours[name], gradient, rtol=1e-5, atol=1e-7 * scale, msg=name)


@pytest.mark.parametrize(
    ("kind", "config", "together"),
    [
        ("gpt2", {}, 1),
        pytest.param("gpt2", {"inner_steps": 2}, 1, marks=pytest.mark.slow),
        pytest.param("gpt2", {"inner_steps": 2, "first_order": True}, 1, marks=pytest.mark.slow),
        ("gpt2", {"edit_loss": "hinge", "c_base": 2.5, "trains": "suffix"}, 2),
        pytest.param("llama", {"inner_steps": 2, "trains": "suffix"}, 1, marks=pytest.mark.slow),
        pytest.param("llama", {"first_order": True, "c_base": 0.0}, 1, marks=pytest.mark.slow),
        ("gpt2", {"base_loss": "task", "locality_loss": "squares", "c_base": 1.5}, 1),
        ("llama", {"base_loss": "task", "trains": "suffix"}, 2),
        pytest.param(
            "bart",
            {"base_loss": "task", "trains": "suffix", "locality_loss": "squares"},
            1,
            marks=pytest.mark.slow,
        ),
        ("bert", {"base_loss": "task", "locality_loss": "squares"}, 1),
        ("t5", {"trains": "suffix"}, 1),
        pytest.param("bart", {}, 1, marks=pytest.mark.slow),  # as T5
        pytest.param("bert", {}, 1, marks=pytest.mark.slow),
    ],
)
def test_losses_and_gradients_are_those_of_the_textbook(
    kind: str, config: dict[str, Any], together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emendo.editors.objective.BUCKET_TOKENS", 30)  # several micro-batches
    monkeypatch.setattr("emendo.editors.enn.BUCKET_TOKENS", 30)
    lm, episodes, store = setting(kind, PROSE if kind == "llama" else ())
    editor = editor_for(lm, inner_lr=0.05, **config).train()
    textbook = Textbook(lm, editor)
    with unchanged(lm.model):
        outcome = training_step(editor, store, episodes, WEIGHTS, together=together)
    base, edit, local = textbook.run(episodes, together)
    assert outcome is not None and min(base, edit, local) > 0
    assert outcome.edit_loss == pytest.approx(edit, rel=1e-6)
    assert outcome.locality_loss == pytest.approx(local, rel=1e-5)
    total = editor.config.c_base * base + WEIGHTS.c_edit * edit + WEIGHTS.c_loc * local
    assert outcome.loss == pytest.approx(total, rel=1e-6)
    ours, theirs = gradients(editor), textbook.gradients()
    assert ours.keys() == theirs.keys() and theirs["eta"].ne(0).all()
    close(ours, theirs)


@pytest.mark.parametrize("kind", ["llama", "bart", "bert"])
def test_training_sequences_are_of_the_models_own_task(kind: str) -> None:
    """Old answers of prompts and probes, never a target that the record asks for; or all tokens of running text."""
    lm = build_lm(kind)
    made = records_for(lm, 12)
    config = TrainConfig(batch=4, text=0)
    batch = Episodes(lm, made, config, base=50).batch(3)
    pairs = {(r.prompt, r.answer) for r in made} | {
        (probe.prompt, probe.answer) for r in made for probe in (*r.neighbours, *r.unrelated)
    }
    allowed = set(to_texts(lm, list(pairs)))
    drawn = {text for episode in batch for text in episode.base}
    assert all(len(episode.base) == 50 for episode in batch) and drawn <= allowed
    assert len(drawn) > 0.9 * len(allowed)
    plain = Episodes(lm, made, config).batch(3)
    assert [replace(episode, base=()) for episode in batch] == plain  # the rest is drawn as without them
    if kind == "llama":
        running = {t for e in Episodes(lm, made, config, PROSE, base=50).batch(0) for t in e.base}
        assert running == set(passage_texts(lm, PROSE, 32))
        assert all(text.start == 1 for text in running)


def test_without_training_sequences_there_is_no_task_loss() -> None:
    lm, episodes, store = setting("gpt2")
    bare = [Record(record.prompt, record.target) for record in records_for(lm, 4)]
    with pytest.raises(
        TrainingError, match="needs training sequences: running text, or records with old answers"
    ):
        Episodes(lm, bare, TrainConfig(text=0), base=1)
    editor = editor_for(lm, base_loss="task")
    with pytest.raises(RequestError, match=r"Episode\.base is empty"):
        training_step(editor, store, [replace(episode, base=()) for episode in episodes], WEIGHTS)


def test_the_second_order_matters() -> None:
    lm, episodes, store = setting("gpt2")
    found = []
    for first_order in (False, True):
        editor = editor_for(lm, inner_lr=0.05, first_order=first_order).train()
        training_step(editor, store, episodes, WEIGHTS)
        found.append(gradients(editor))
    name = f"{find_sites(lm.model, last=1)[0].name}.weight"
    assert (found[0][name] - found[1][name]).norm() > 0.01 * found[0][name].norm()
    torch.testing.assert_close(found[0]["eta"], found[1]["eta"])  # a step size is outside the inner gradient


def test_the_suffix_gets_the_gradients_that_it_has_among_all() -> None:
    lm, episodes, store = setting("gpt2")
    found = []
    for trains in ("suffix", "all"):
        editor = Enn(find_sites(lm.model, last=1), EnnConfig(inner_lr=0.05, trains=trains)).double()
        editor.bind(lm)
        assert (editor.host_cache(lm, store) is not None) == (trains == "suffix")
        training_step(editor.train(), store, episodes, WEIGHTS)
        found.append(gradients(editor))
    suffix, every = found
    assert len(suffix) < len(every)
    close(suffix, {name: every[name] for name in suffix})


def test_validation_sees_the_same_losses_and_changes_nothing() -> None:
    lm, episodes, store = setting("gpt2")
    editor = editor_for(lm, inner_steps=2).train()
    before = {name: tensor.clone() for name, tensor in editor.state_dict().items()}
    validated = validation_step(editor, store, episodes, WEIGHTS)
    assert not gradients(editor) and editor.training
    assert all(tensor.equal(before[name]) for name, tensor in editor.state_dict().items())
    trained = training_step(editor, store, episodes, WEIGHTS)
    assert validated is not None and trained is not None
    assert asdict(validated) == pytest.approx(asdict(trained), rel=1e-6)


def test_what_is_not_finite_is_told() -> None:
    lm, episodes, store = setting("gpt2")
    editor = editor_for(lm).train()
    with torch.no_grad():
        editor.log_eta[0] = float("nan")
    assert training_step(editor, store, episodes, WEIGHTS) is None


@pytest.mark.parametrize("kind", ["gpt2", "t5", "bert"])
def test_an_edit_is_the_inner_steps_on_the_trained_model(kind: str) -> None:
    lm = setting(kind)[0]
    editor = editor_for(lm, inner_steps=2).eval()
    facts = [Request(record.prompt, record.target) for record in records_for(lm, 2)]
    with unchanged(lm.model), torch.no_grad():
        each = editor.each(lm, facts)
        one, both = editor.edit(lm, facts[:1]), editor.edit(lm, facts)
    assert not any(delta.left.requires_grad for delta in each.values())
    texts = to_texts(lm, [(fact.prompt, fact.target) for fact in facts])
    textbook = Textbook(lm, editor)
    with sdpa_kernel(SDPBackend.MATH):
        expected = [textbook.change(text) for text in texts]
    for site in editor.sites:
        for edit, changes in ((one, each[site.name].dense()[0]), (both, each[site.name].dense().sum(0))):
            torch.testing.assert_close(edit.deltas[site.name].dense(), changes, rtol=1e-5, atol=1e-9)
        for i, change in enumerate(expected):
            dense = change[f"{site.name}.weight"].detach()
            ours = each[site.name].dense()[i]
            torch.testing.assert_close(ours.T if site.transposed else ours, dense, rtol=1e-5, atol=1e-9)
