"""Runs that several processes share, against the run of one; the processes are threads with a model each."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cases import EDITOR_CASES, build_lm, in_slow_suite, records
from emendo.editors import GradientEditor, trained_class
from emendo.editors._nets import RunningStats
from emendo.editors.objective import Episode, Outcome
from emendo.errors import LostProcessError, RequestError, TrainingError
from emendo.models.lm import LM
from emendo.models.sites import find_sites
from emendo.models.text import Text
from emendo.models.trunk import Trunk
from emendo.train import TrainConfig, TrainResult, loop, train
from emendo.train.processes import World
from emendo.train.step import joint_outcome
from train.worlds import Thread, shared

CONFIG = TrainConfig(
    steps=6, batch=4, lr=1e-3, warmup=2, validate_every=3, validate_on=6, checkpoint_every=1e9, text=0
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMENDO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("emendo.train.episodes.WINDOW", 16)
    monkeypatch.setattr("emendo.train.loop._REPORT_EVERY", 1)


_RANDOM = threading.Lock()  # the threads share one generator


def new_pair(name: str = "mend", **settings: Any) -> tuple[LM, GradientEditor]:
    """A model and its editor, the same at every call."""
    with _RANDOM:
        lm = build_lm("llama", torch.float64)
        return lm, new_editor(name, lm, **settings)


def new_editor(name: str, lm: LM, **settings: Any) -> GradientEditor:
    kind = trained_class(name)
    torch.manual_seed(0)
    own = {**EDITOR_CASES[name].config, **settings}
    return kind(find_sites(lm.model, last=2), kind.Config(**own)).double()


def run(
    world: World, config: TrainConfig = CONFIG, *, name: str = "mend", settings: Any = None, **options: Any
) -> TrainResult:
    """The run of one process, with a model of its own in float64, so that only real differences count."""
    lm, editor = new_pair(name, **(settings or {}))
    facts = records(26)
    return train(lm, editor, facts[:20], facts[20:], config, world=world, **options)


def same(one: TrainResult, other: TrainResult) -> None:
    """The editors and their figures are the same except for rounding; trunk outputs are bfloat16 in both."""
    ours, theirs = one.editor.state_dict(), other.editor.state_dict()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-9, msg=name)
    assert len(one.history) == len(other.history)
    for row, known in zip(one.history, other.history, strict=True):
        assert row == pytest.approx(known, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("size", [2, *in_slow_suite(3, 4)])
def test_the_editor_does_not_depend_on_the_number_of_processes(size: int) -> None:
    alone = run(World())
    for found in shared(size, run):
        same(found, alone)
        assert found.editor.info == {**alone.editor.info, "seconds": found.editor.info["seconds"]}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("mend", {"statistics": "train-set", "statistics_on": 13}),  # a chunk that cannot be divided
        *in_slow_suite(("ke", {"objective": "constrained"}), ("enn", {}), ("meta-sgd", {})),
    ],
)
def test_every_kind_of_editor(name: str, settings: dict[str, Any]) -> None:
    config = replace(CONFIG, steps=3, near=2)
    with sdpa_kernel(SDPBackend.MATH):  # enn asks for it, for all threads, and takes that back
        alone = run(World(), config, name=name, settings=settings)
        several = shared(2, lambda world: run(world, config, name=name, settings=settings))
    for found in several:
        same(found, alone)


def test_an_edit_of_several_facts_is_not_divided() -> None:
    config = replace(CONFIG, together=2, steps=3)
    alone = run(World(), config)
    for found in shared(2, lambda world: run(world, config)):
        same(found, alone)


def test_gradients_are_summed_before_they_are_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step's gradient as the optimiser sees it, with a limit that it exceeds and uneven shares."""
    seen: dict[int, list[Tensor]] = {}
    real = torch.optim.Adam.step

    def step(self: Any, *args: Any, **more: Any) -> Any:
        grads = [p.grad.clone() for group in self.param_groups for p in group["params"] if p.grad is not None]
        seen.setdefault(threading.get_ident(), grads)
        return real(self, *args, **more)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    config = replace(CONFIG, steps=1, batch=5, clip=1e-3)
    run(World(), config)
    (alone,) = seen.values()
    norm = torch.stack([grad.norm() for grad in alone]).norm()
    assert float(norm) == pytest.approx(1e-3, rel=1e-3)
    seen.clear()
    shared(2, lambda world: run(world, config))
    for grads in seen.values():
        torch.testing.assert_close(grads, alone, rtol=1e-4, atol=1e-9)
    assert len(seen) == 2


def test_a_step_is_skipped_by_all_where_one_has_a_value_that_is_not_finite(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = loop.training_step
    lock, calls = threading.Lock(), Counter[int]()

    def step(editor: Any, *args: Any) -> Outcome | None:
        found = real(editor, *args)
        with lock:
            calls[threading.get_ident()] += 1
            second = len(calls) == 2 and list(calls).index(threading.get_ident()) == 1
        return None if second and calls[threading.get_ident()] == 2 else found

    monkeypatch.setattr(loop, "training_step", step)
    one, other = shared(2, run)
    assert one.editor.info["skipped_steps"] == other.editor.info["skipped_steps"] == 1
    same(one, other)


def test_factors_that_are_not_finite_in_one_process_reach_no_statistics(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All leave the step out before they exchange statistics, or they would wait for one another for ever."""
    real = trained_class("mend").look_ahead

    def look_ahead(self: Any, store: Any, batches: Any, window: Any = ()) -> Any:
        found = real(self, store, batches, window)
        if self.broken:
            next(iter(found[1].values())).u[0] = torch.inf
        return found

    def go(world: World) -> TrainResult:
        lm, editor = new_pair()
        editor.broken = world.rank == 1
        return train(lm, editor, records(20), [], replace(CONFIG, steps=4), world=world)

    monkeypatch.setattr(trained_class("mend"), "broken", False, raising=False)
    monkeypatch.setattr(trained_class("mend"), "look_ahead", look_ahead)
    one, other = shared(2, go)
    assert one.editor.info["skipped_steps"] == other.editor.info["skipped_steps"] == 1
    assert all(tensor.isfinite().all() for tensor in one.editor.state_dict().values())
    same(one, other)


def test_each_text_passes_through_one_trunk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real, lock, seen = Trunk.run, threading.Lock(), Counter[tuple[int, ...]]()

    def count(self: Trunk, batch: Any) -> Tensor:
        if (
            threading.current_thread() is not threading.main_thread() and len(batch.owner) != 3
        ):  # no test of the trunk
            with lock:
                rows = zip(batch.input_ids, batch.trunk_mask.bool(), strict=True)
                seen.update(tuple(ids[mask].tolist()) for ids, mask in rows)
        return real(self, batch)

    monkeypatch.setattr(Trunk, "run", count)
    shared(2, lambda world: run(world, replace(CONFIG, validate_on=2), out=tmp_path / "run"))
    assert len(seen) > 40 and set(seen.values()) == {1}


def test_a_run_goes_on_in_another_number_of_processes(tmp_path: Path) -> None:
    alone = run(World(), out=tmp_path / "alone")

    def stopped(world: World) -> TrainResult:
        return run(_Stopping(world, 4), out=tmp_path / "shared")

    assert {found.stopped for found in shared(2, stopped)} == {"interrupted"}
    same(run(World(), out=tmp_path / "shared", resume=True), alone)


class _Stopping(Thread):
    """One process of several, the last of which is interrupted at a step."""

    def __init__(self, world: Any, step: int) -> None:
        super().__init__(world.rank, world.size, world.meeting)
        self.step = step

    def gather(self, values: Tensor) -> Tensor:
        if values.dtype == torch.float64 and values.shape == (2,):  # the clock, and whether it is interrupted
            self.step -= 1
            if self.step < 0 and self.rank == self.size - 1:
                values = torch.tensor([values[0], 1.0], dtype=torch.float64)
        return super().gather(values)


@pytest.mark.parametrize("at", [19, *in_slow_suite(15, 29, 39)])
def test_the_loss_of_a_process_leaves_a_run_that_can_be_resumed(tmp_path: Path, at: int) -> None:
    alone = run(World(), out=tmp_path / "alone")

    class Dying(Thread):
        def _all(self, value: Any) -> list[Any]:
            if self.rank == 1 and self.exchanges == at:
                raise SystemError("killed")
            return super()._all(value)

    def go(world: Any) -> TrainResult:
        return run(Dying(world.rank, world.size, world.meeting), out=tmp_path / "shared")

    said: list[str] = []

    def watched(world: Any) -> TrainResult:
        try:
            return go(world)
        except LostProcessError as error:
            said.append(str(error))
            raise

    with pytest.raises(SystemError, match="killed"):
        shared(2, watched)
    assert len(said) == 1 and "saved at step" in said[0]
    results = shared(2, lambda world: run(world, out=tmp_path / "shared", resume=True))
    for found in results:
        same(found, alone)


def test_more_processes_than_edits_are_refused() -> None:
    with pytest.raises(RequestError, match="3 processes cannot share a batch of 2 edits"):
        shared(3, lambda world: run(world, replace(CONFIG, together=2)))


def test_processes_with_different_runs_are_refused() -> None:
    with pytest.raises(TrainingError, match="different runs"):
        shared(2, lambda world: run(world, replace(CONFIG, seed=world.rank)))


def test_all_train_the_editor_of_the_main_process() -> None:
    def go(world: World) -> TrainResult:
        lm, editor = new_pair()
        with torch.no_grad():
            for parameter in editor.parameters():
                parameter.add_(world.rank)
        return train(lm, editor, records(20), [], replace(CONFIG, steps=2), world=world)

    one, other = shared(2, go)
    same(one, other)
    same(one, go(World()))


def test_figures_of_shares_are_weighted_by_what_they_are_means_over() -> None:
    """Two episodes with four locality texts, and one with one."""
    text = Text((1, 2, 3), 2)
    episodes = [Episode(text, text, (text,) * count) for count in (3, 1, 1)]
    outcomes = [Outcome(1.0, 2.0, 3.0, 0.5, 1.0, 0.25), Outcome(4.0, 5.0, 6.0, 1.0, 0.0, 1.0)]

    def go(world: World) -> Outcome | None:
        return joint_outcome(world, outcomes[world.rank], episodes[:2] if world.main else episodes[2:])

    expected = Outcome(2.0, 3.0, 3.6, 2 / 3, 2 / 3, 0.4)
    for found in shared(2, go):
        assert found is not None and asdict(found) == pytest.approx(asdict(expected))
    assert shared(2, lambda world: joint_outcome(world, outcomes[0] if world.main else None, episodes)) == [
        None,
        None,
    ]


def test_statistics_of_shares_are_those_of_all_rows() -> None:
    rows = torch.randn(11, 3, dtype=torch.float64) * 5 + 2
    whole = RunningStats(3)
    whole.update(rows[:7])
    whole.update(rows[7:])

    def go(world: World) -> RunningStats:
        stats = RunningStats(3)
        stats.gather = world.gather
        stats.update(world.share(rows[:7]))  # type: ignore[arg-type]
        stats.update(rows[7:] if world.main else rows[:0])
        return stats

    for found in shared(3, go):
        for name, tensor in whole.state_dict().items():
            torch.testing.assert_close(found.state_dict()[name], tensor, rtol=1e-12, atol=1e-12)


def test_shares_cover_everything_once_in_whole_units() -> None:
    for size in (1, 2, 3, 5):
        for count in (5, 6, 15):
            shares = shared(size, lambda world, n=count: world.share(list(range(3 * n)), 3))
            assert [item for share in shares for item in share] == list(range(3 * count))
            assert all(len(share) % 3 == 0 for share in shares)
            assert max(map(len, shares)) - min(map(len, shares)) <= 3
