"""ENN: whose its edits are, that the user's model stays, training, saving, drift."""

from __future__ import annotations

import copy
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cases import build_lm, records_for, unchanged
from emendo.data.schema import Probe
from emendo.editors import Editor
from emendo.editors.enn import Enn, EnnConfig
from emendo.edits.edit import Request
from emendo.errors import MismatchError, RequestError
from emendo.models._fingerprint import fingerprint
from emendo.models.lm import LM
from emendo.models.sites import find_sites
from emendo.models.tokenization import to_texts
from emendo.train import TrainConfig, TrainResult, loop, train

CONFIG = TrainConfig(steps=3, batch=2, lr=1e-3, warmup=1, validate_every=99, checkpoint_every=1e9)
PROBES = [Probe("The capital of Bafode is", "Rome"), Probe("Two and two are", "four")]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMENDO_CACHE", str(tmp_path / "cache"))


def moved(lm: LM, **config: Any) -> Enn:
    """After a little training."""
    editor = Enn(find_sites(lm.model, last=1), EnnConfig(**config))
    return train(lm, editor, records_for(lm, 12), [], CONFIG).editor  # type: ignore[return-value]


def test_an_edit_belongs_to_the_host(tiny_gpt2: LM, tiny_llama: LM) -> None:
    editor = moved(tiny_gpt2)
    host, edit = editor.host(tiny_gpt2), editor.edit(tiny_gpt2, "The capital of Fosoba is", "Oslo")
    assert host.fingerprint.startswith(fingerprint(host.model))
    assert host.fingerprint != tiny_gpt2.fingerprint
    assert edit.origin.fingerprint == host.fingerprint
    with pytest.raises(MismatchError):
        edit.attach(tiny_gpt2)
    texts = to_texts(tiny_gpt2, [("The capital of Fosoba is", "Oslo")])
    (clean,) = host.logits(texts)
    with edit.applied(host):
        (changed,) = host.logits(texts)
    assert not changed.equal(clean) and host.logits(texts)[0].equal(clean)
    assert editor.fingerprint == tiny_gpt2.fingerprint
    with pytest.raises(MismatchError, match="trained for a model with fingerprint"):
        editor.host(tiny_llama)


def test_the_host_follows_the_training(tiny_gpt2: LM) -> None:
    editor = Enn(find_sites(tiny_gpt2.model, last=1))
    seen = []

    def see() -> None:
        host = editor.host(tiny_gpt2)
        assert host.fingerprint.startswith(fingerprint(host.model))
        assert editor.training or editor.host(tiny_gpt2) is host
        seen.append(host.fingerprint)

    see()
    assert seen == [tiny_gpt2.fingerprint]
    state = copy.deepcopy(editor.eval().state_dict())
    see()
    optimizer = torch.optim.SGD(editor.train().parameters(), lr=1.0, fused=True)
    for _ in range(2):
        for parameter in editor.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        see()
    editor.eval()
    see()
    editor.load_state_dict(state)
    see()
    assert [seen.index(name) for name in seen] == [0, 0, 2, 3, 3, 0]


def test_where_the_hinge_is_zero_nothing_changes() -> None:
    lm, prompt = build_lm("bert"), "The capital of Fosoba is"
    editor = Enn(find_sites(lm.model), EnnConfig(edit_loss="hinge", inner_steps=3))
    for label in lm.labels:
        deltas = editor.each(lm, [Request(prompt, label)])
        zero = [not bool(delta.norm().any()) for delta in deltas.values()]
        assert zero == [label == lm.generate(prompt)] * len(editor.sites), label


def test_nothing_reaches_the_users_model(tiny_gpt2: LM) -> None:
    model = copy.deepcopy(tiny_gpt2.model).requires_grad_()
    lm = LM(model, tiny_gpt2.tokenizer)
    for trains in ("all", "suffix"):
        editor = Enn(find_sites(model, last=1), EnnConfig(trains=trains))
        with unchanged(model):
            train(lm, editor, records_for(lm, 12), [], CONFIG)
            editor.edit(lm, "The capital of Fosoba is", "Oslo")
            assert editor.drift(lm, PROBES)["kl"] > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_is_trained_in_float32(dtype: torch.dtype) -> None:
    lm = build_lm("llama", dtype)
    with unchanged(lm.model):
        editor = Enn(find_sites(lm.model, last=1), EnnConfig(trains="suffix"))
        train(lm, editor, records_for(lm, 12), [], CONFIG)
    assert {p.dtype for p in (*editor.parameters(), *editor.host(lm).model.parameters())} == {torch.float32}
    assert editor.drift(lm, PROBES)["kl"] < 0.1


# ---------------------------------------------------------------------------------------- training


@pytest.mark.slow
def test_training_lowers_the_loss(tiny_llama: LM) -> None:
    config = replace(CONFIG, steps=9, batch=4, lr=1e-3, c_edit=1.0, validate_every=1, validate_on=4)
    editor = Enn(find_sites(tiny_llama.model, last=2), EnnConfig(inner_lr=0.1, trains="suffix"))
    made = records_for(tiny_llama, 20)
    result = train(tiny_llama, editor, made[:16], made[16:], config)
    losses = [row["validation loss"] for row in result.history if "validation loss" in row]
    assert losses[-1] < 0.9 * losses[0], losses


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one(
    tiny_llama: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, steps=5, validate_every=2, validate_on=2)
    real, calls = loop.training_step, []

    def go(name: str, **options: Any) -> TrainResult:
        editor = Enn(find_sites(tiny_llama.model, last=2))
        made = records_for(tiny_llama, 14)
        return train(tiny_llama, editor, made[:12], made[12:], config, out=tmp_path / name, **options)

    def stop(*args: Any) -> Any:
        calls.append(0)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return real(*args)

    whole = go("whole")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "training_step", stop)
        assert go("parts").stopped == "interrupted"
    resumed = go("parts", resume=True)
    assert resumed.history == whole.history
    ours, theirs = resumed.editor.state_dict(), whole.editor.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in theirs)


@pytest.mark.parametrize("trains", ["all", "suffix"])
def test_what_is_saved_comes_back(tiny_llama: LM, tmp_path: Path, trains: str) -> None:
    editor = moved(tiny_llama, trains=trains, inner_steps=2)
    editor.save_pretrained(tmp_path / "enn")
    loaded = Editor.from_pretrained(tmp_path / "enn")
    assert isinstance(loaded, Enn) and loaded.config == editor.config
    texts = to_texts(tiny_llama, [(probe.prompt, probe.answer) for probe in PROBES])
    pairs = zip(loaded.host(tiny_llama).logits(texts), editor.host(tiny_llama).logits(texts), strict=True)
    assert all(ours.equal(theirs) for ours, theirs in pairs)
    facts = [Request(probe.prompt, probe.answer) for probe in PROBES]
    ours, theirs = loaded.each(tiny_llama, facts), editor.each(tiny_llama, facts)
    for name, delta in theirs.items():
        assert ours[name].left.equal(delta.left) and ours[name].right.equal(delta.right)


def test_drift_is_zero_before_training_and_the_definition_after(tiny_llama: LM) -> None:
    untrained = Enn(find_sites(tiny_llama.model))
    assert untrained.drift(tiny_llama, PROBES) == {"kl": 0.0, "changed": 0.0, "task_loss": 0.0}
    editor = moved(tiny_llama)
    with torch.no_grad():
        editor.twin.theta[
            "lm_head/weight" if "lm_head/weight" in editor.twin.theta else "model/norm/weight"
        ].neg_()
    kl, changed, task_loss = 0.0, 0, 0.0
    for text in to_texts(tiny_llama, [(probe.prompt, probe.answer) for probe in PROBES]):
        p, q = (
            model(torch.tensor([text.inputs])).logits[0, text.start - 1 :].detach().double().softmax(-1)
            for model in (tiny_llama.model, editor.host(tiny_llama).model)
        )
        kl += float((p * (p / q).log()).sum(-1).mean()) / len(PROBES)
        at = range(len(text.labels)), list(text.labels)
        task_loss += float((p[at].log() - q[at].log()).mean()) / len(PROBES)
        changed += bool((p.argmax(-1) != q.argmax(-1)).any())
    found = editor.drift(tiny_llama, PROBES)
    assert changed and found["changed"] == changed / len(PROBES)
    assert found["kl"] == pytest.approx(kl, rel=1e-4)
    assert found["task_loss"] == pytest.approx(task_loss, rel=1e-4)
    with pytest.raises(RequestError, match="at least one probe"):
        editor.drift(tiny_llama, [])


def test_learning_rates(tiny_llama: LM) -> None:
    editor = Enn(find_sites(tiny_llama.model), EnnConfig(lr_scale=50.0, inner_lr=0.02))
    editor.bind(tiny_llama)
    model, steps = editor.parameter_groups(1e-3)
    assert len(model["params"]) == len(list(tiny_llama.model.parameters())) and model["lr"] == 1e-3
    assert steps["params"] == [editor.log_eta] and steps["lr"] == pytest.approx(0.05)
    assert len(list(editor.parameters())) == len(model["params"]) + 1
    torch.testing.assert_close(editor.log_eta.exp(), torch.full((len(editor.sites),), 0.02))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"inner_lr": 0.0}, "inner_lr must be above 0, not 0.0"),
        ({"inner_steps": 0}, "inner_steps must be at least 1, not 0"),
        ({"trains": "some"}, "trains must be one of all, suffix, not 'some'"),
        ({"edit_loss": "l2"}, "edit_loss must be one of nll, hinge, not 'l2'"),
        ({"c_base": -1.0}, "c_base must be at least 0, not -1.0"),
        ({"lr_scale": float("nan")}, "lr_scale must be a number, not nan"),
    ],
)
def test_settings_that_make_no_sense(config: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        EnnConfig(**config)
