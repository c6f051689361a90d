"""The loop: what comes out, when it stops, what it does about values that are not finite."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import Recorded, build_lm, records, unchanged
from emendo.editors.mend import Mend, MendConfig
from emendo.editors.objective import Outcome
from emendo.errors import MismatchError, RequestError, TrainingError
from emendo.models.lm import LM
from emendo.models.sites import find_sites
from emendo.train import TrainConfig, TrainResult, loop, train

CONFIG = TrainConfig(
    steps=12, batch=2, lr=1e-3, warmup=2, validate_every=4, validate_on=2, checkpoint_every=1e9
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMENDO_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def lm() -> Iterator[LM]:
    made = build_lm("llama")
    with unchanged(made.model):
        yield made


def new_editor(lm: LM) -> Mend:
    torch.manual_seed(0)
    return Mend(find_sites(lm.model, last=2), MendConfig(rank=8, alpha=1e-2))


def go(lm: LM, config: TrainConfig = CONFIG, **options: Any) -> TrainResult:
    editor = options.pop("editor", None) or new_editor(lm)
    return train(lm, editor, records(24)[:16], records(24)[16:], config, **options)


def spy(monkeypatch: pytest.MonkeyPatch, before: Callable[[int, Mend], Outcome | str | None]) -> list[int]:
    """Call ``before(call, editor)`` in place of each training step; ``"go on"`` then takes the real one."""
    real, calls = loop.training_step, []

    def step(editor: Mend, *args: Any) -> Outcome | None:
        calls.append(len(calls))
        found = before(calls[-1], editor)
        return real(editor, *args) if found == "go on" else found  # type: ignore[return-value]

    monkeypatch.setattr(loop, "training_step", step)
    return calls


def parameters(editor: Mend) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in editor.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def outcome(loss: float, score: float = 0.5) -> Outcome:
    return Outcome(loss, loss, 0.0, score, score, score)


def test_the_editor_learns_and_the_model_stays_as_it_was(lm: LM) -> None:
    config = replace(CONFIG, steps=30, batch=8, lr=1e-2, warmup=3, c_edit=1.0, validate_every=5)
    torch.manual_seed(0)
    editor = Mend(find_sites(lm.model, last=2), MendConfig(rank=16, alpha=5e-2))
    with unchanged(lm.model):
        result = go(lm, config, editor=editor)
    losses = [row["validation loss"] for row in result.history if "validation loss" in row]
    assert min(losses) < 0.9 * losses[0]
    assert (result.steps, result.stopped) == (30, "finished")
    assert not result.editor.training
    assert result.editor.info["steps"] == 30 and result.editor.info["skipped_steps"] == 0


def test_the_same_seed_gives_the_same_editor(lm: LM) -> None:
    one, other = go(lm), go(lm)
    assert same(one.editor.state_dict(), other.editor.state_dict())
    assert one.history == other.history
    third = go(lm, replace(CONFIG, seed=1))
    assert not same(one.editor.state_dict(), third.editor.state_dict())


def test_progress_hears_steps_validations_and_the_trunk(lm: LM) -> None:
    progress = Recorded()
    go(lm, progress=progress)
    assert [heading.split() for heading, _ in progress.reports] == [["step", f"{n}"] for n in (4, 8, 12)]
    training = [row for row in progress.updates if row[0] == "training"]
    assert ("training", 10, 12) in training and {total for _, _, total in training} == {12}
    assert [row for row in progress.updates if row[0] == "validation"] == [("validation", 1, 1)] * 3
    assert {"loss", "success", "locality", "episodes/s", "time left"} <= progress.figures["training"].keys()
    trunk = [row for row in progress.updates if row[0] == "frozen part"]
    assert trunk[-1][1] == trunk[-1][2]


@pytest.mark.parametrize(
    ("outcomes", "kept"),
    [
        ([(1.0, 0.5), (3.0, 0.9), (2.0, 0.8)], 1),  # the best score, not the last one nor the lowest loss
        ([(1.0, 0.5), (1.0, 0.9), (2.0, 0.89)], 2),  # of scores that are alike the later
        ([(3.0, 0.0), (1.0, 0.0), (2.0, 0.0)], 1),  # while nothing succeeds, the lowest loss
    ],
)
def test_the_best_editor_comes_back(
    lm: LM, monkeypatch: pytest.MonkeyPatch, outcomes: list[tuple[float, float]], kept: int
) -> None:
    coming, seen = iter(outcomes), []

    def validate(editor: Mend, *args: Any) -> Outcome:
        seen.append(parameters(editor))
        return outcome(*next(coming))

    monkeypatch.setattr(loop, "validation_step", validate)
    result = go(lm)
    assert [same(parameters(result.editor), editor) for editor in seen] == [i == kept for i in range(3)]


def test_early_stopping(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([0.9, 0.5, 0.4, 1.0])
    monkeypatch.setattr(loop, "validation_step", lambda *_: outcome(1.0, next(scores)))
    result = go(lm, replace(CONFIG, steps=100, patience=2, validate_every=3))
    assert (result.stopped, result.steps) == ("early", 9)


def test_without_validation_records_the_last_editor_comes_back(lm: LM) -> None:
    result = train(lm, new_editor(lm), records(8), [], replace(CONFIG, patience=1))
    assert (result.stopped, result.steps) == ("finished", 12)
    assert not any("validation loss" in row for row in result.history)


@pytest.mark.slow
def test_validation_feeds_no_statistics(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter(range(100, 0, -1))  # the last one is the best
    real = loop.validation_step

    def validate(*args: Any) -> Outcome:
        real(*args)
        return outcome(float(next(losses)))

    monkeypatch.setattr(loop, "validation_step", validate)
    seldom = go(lm).editor
    often = go(lm, replace(CONFIG, validate_every=1)).editor
    counts = [
        {name: float(t) for name, t in editor.state_dict().items() if name.endswith("count")}
        for editor in (seldom, often)
    ]
    assert counts[0] == counts[1] and min(counts[0].values()) > 0


@pytest.mark.slow
def test_the_time_limit_stops_and_shapes_the_schedule(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10_000))
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    rates: list[float] = []
    real = torch.optim.Adam.step

    def step(self: torch.optim.Adam, *args: Any, **kwargs: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    result = go(lm, replace(CONFIG, steps=10_000, warmup=0, minutes=1.0, validate_every=9_999))
    assert result.stopped == "time"
    assert 10 < result.steps < 60
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > 0.9 * CONFIG.lr and rates[-1] < 0.1 * CONFIG.lr


@pytest.mark.slow
def test_the_learning_rate_rises_then_falls_to_two_percent(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[tuple[float, float]] = []
    monkeypatch.setattr(
        torch.optim.Adam, "step", lambda self: rates.append(tuple(g["lr"] for g in self.param_groups))
    )
    go(lm, replace(CONFIG, steps=40, batch=2, warmup=10, validate_every=99))
    networks, alphas = zip(*rates, strict=True)
    assert max(networks) < CONFIG.lr
    assert networks.index(max(networks)) == pytest.approx(10, abs=1)
    assert networks[0] == pytest.approx(CONFIG.lr / 10, rel=0.01)
    assert networks[-1] == pytest.approx(0.02 * CONFIG.lr, rel=0.1)
    assert alphas[5] == pytest.approx(networks[5] * MendConfig().alpha_lr)


def test_steps_that_are_not_finite_change_no_parameter(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[dict[str, Tensor]] = []

    def before(call: int, editor: Mend) -> Outcome | str | None:
        kept.append(parameters(editor))
        if call in (3, 4):
            return None
        if call == 6:  # the loss is fine, its gradient is not
            for parameter in editor.parameters():
                parameter.grad = torch.full_like(parameter, float("inf"))
            return outcome(1.0)
        return "go on"

    spy(monkeypatch, before)
    result = go(lm)
    assert result.editor.info["skipped_steps"] == 3
    assert result.steps == 12
    for call in range(len(kept) - 1):
        assert same(kept[call], kept[call + 1]) == (call in (3, 4, 6)), call


def test_five_such_steps_in_a_row_are_fatal(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = spy(monkeypatch, lambda call, editor: "go on" if call in (0, 5) else None)
    with pytest.raises(TrainingError, match=r"5 steps in a row .* not finite.* --lr"):
        go(lm)
    assert len(calls) == 11  # 1 to 4 were not enough


def test_ctrl_c_ends_after_the_step_and_a_second_one_at_once(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    def once(call: int, editor: Mend) -> str:
        if call == 4:
            signal.raise_signal(signal.SIGINT)
        return "go on"

    handler = signal.getsignal(signal.SIGINT)
    spy(monkeypatch, once)
    result = go(lm)
    assert (result.stopped, result.steps) == ("interrupted", 5)
    assert signal.getsignal(signal.SIGINT) is handler

    def twice(call: int, editor: Mend) -> str:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return "go on"

    spy(monkeypatch, twice)
    with unchanged(lm.model), pytest.raises(KeyboardInterrupt):
        go(lm)
    assert signal.getsignal(signal.SIGINT) is handler


def test_an_editor_of_another_model_is_refused(lm: LM) -> None:
    editor = new_editor(lm)
    editor.fingerprint = "0123456789abcdef"
    with pytest.raises(MismatchError, match="trained for a model with fingerprint"):
        go(lm, editor=editor)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"steps": 0}, "--steps must be at least 1"),
        ({"batch": -1}, "--batch must be at least 1"),
        ({"lr": 0.0}, "--lr must be above 0"),
        ({"lr": float("nan")}, "--lr must be a number, not nan"),
        ({"c_edit": -1.0}, "--c-edit must be above 0"),
        ({"minutes": 0.0}, "--minutes must be above 0"),
        ({"warmup": -1}, "--warmup must be at least 0, not -1"),
        ({"near": -1}, "--near must be at least 0, not -1"),
        ({"near": 0, "sibling": 0, "text": 0}, "At least one locality example"),
    ],
)
def test_settings_that_make_no_sense(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        TrainConfig(**setting)
