"""A run that was stopped and resumed is the run that was not: same losses, same weights, bit for bit."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from cases import build_lm, in_slow_suite, records, unchanged
from damage import full_disk
from emendo.editors.mend import Mend, MendConfig
from emendo.editors.objective import Outcome
from emendo.errors import StorageError
from emendo.models.lm import LM
from emendo.models.sites import find_sites
from emendo.train import TrainConfig, TrainResult, checkpoint, loop, train

CONFIG = TrainConfig(
    steps=13, batch=2, lr=3e-3, warmup=3, validate_every=5, validate_on=2, checkpoint_every=1e9
)


@pytest.fixture(scope="module")
def lm() -> Iterator[LM]:
    made = build_lm("llama")
    with unchanged(made.model):
        yield made


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that runs stop within trunk windows and between them."""
    monkeypatch.setattr("emendo.train.episodes.WINDOW", 16)


class Lab:
    """Runs in folders of their own, each with a trunk cache of its own."""

    def __init__(self, lm: LM, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lm, self.root, self.monkeypatch = lm, root, monkeypatch

    def train(
        self, name: str, config: TrainConfig = CONFIG, *, resume: bool = False, **settings: Any
    ) -> TrainResult:
        self.monkeypatch.setenv("EMENDO_CACHE", str(self.root / f"{name}-cache"))
        torch.manual_seed(0)
        editor = Mend(find_sites(self.lm.model, last=2), MendConfig(**{"rank": 8, "alpha": 1e-2, **settings}))
        made = records(30)
        return train(self.lm, editor, made[:24], made[24:], config, out=self.root / name, resume=resume)

    def interrupted(self, name: str, step: int, how: str, config: TrainConfig = CONFIG) -> None:
        """Start a run and stop it while it is at ``step``."""
        real, calls = loop.training_step, []

        def stop(*args: Any) -> Any:
            calls.append(0)
            if len(calls) == step:
                if how == "crash":
                    raise MemoryError("the machine went down")
                signal.raise_signal(signal.SIGINT)
            return real(*args)

        with self.monkeypatch.context() as patch:
            patch.setattr(loop, "training_step", stop)
            if how == "crash":
                with pytest.raises(MemoryError):
                    self.train(name, config)
            else:
                assert self.train(name, config).stopped == "interrupted"

    def tensors(self, name: str) -> dict[str, Tensor]:
        with safe_open(self.root / name / checkpoint.FILE, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


@pytest.fixture
def lab(lm: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    return Lab(lm, tmp_path, monkeypatch)


def alike(one: TrainResult, other: TrainResult) -> None:
    assert other.history == one.history
    assert (other.steps, other.stopped) == (one.steps, one.stopped)
    assert_same(one.editor.state_dict(), other.editor.state_dict())


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not one[name].equal(other[name])] == []


@pytest.mark.parametrize(
    ("step", "how"),
    [
        (8, "ctrl-c"),
        *in_slow_suite((1, "ctrl-c"), (3, "ctrl-c"), (12, "ctrl-c"), (7, "crash")),
    ],
)
def test_a_resumed_run_equals_one_that_was_never_stopped(lab: Lab, step: int, how: str) -> None:
    config = replace(CONFIG, checkpoint_every=0.0) if how == "crash" else CONFIG
    whole = lab.train("whole", config)
    lab.interrupted("stopped", step, how, config)
    resumed = lab.train("stopped", config, resume=True)
    alike(whole, resumed)
    assert_same(lab.tensors("whole"), lab.tensors("stopped"))


@pytest.mark.slow
def test_a_run_on_a_half_precision_model_is_resumed_on_that_alone(lab: Lab) -> None:
    half, exact = Lab(build_lm("llama", torch.bfloat16), lab.root, lab.monkeypatch), lab
    whole = half.train("whole")
    half.interrupted("stopped", 8, "ctrl-c")
    assert half.lm.fingerprint == exact.lm.fingerprint
    with pytest.raises(StorageError, match="dtype: 'bfloat16' before, None now"):
        exact.train("stopped", resume=True)
    alike(whole, half.train("stopped", resume=True))
    assert_same(half.tensors("whole"), half.tensors("stopped"))


@pytest.mark.parametrize("how", ["crash", pytest.param("ctrl-c", marks=pytest.mark.slow)])
def test_a_pass_for_the_statistics_goes_on_where_it_was_stopped(lab: Lab, how: str) -> None:
    """Its chunks end after 8, 16 and 24 facts; the run stops after the second, and resumes to the same statistics."""
    lab.monkeypatch.setattr(loop, "_CHUNK", 8)
    config = replace(CONFIG, steps=2, checkpoint_every=0.0)
    whole = lab.train("whole", config, statistics="train-set")
    real, calls = Mend.observe, []

    def stop(editor: Mend, factors: Any) -> None:
        calls.append(0)
        if len(calls) == 3 and how == "crash":
            raise MemoryError("the machine went down")
        real(editor, factors)
        if len(calls) == 2 and how == "ctrl-c":
            signal.raise_signal(signal.SIGINT)

    with lab.monkeypatch.context() as patch:
        patch.setattr(Mend, "observe", stop)
        if how == "crash":
            with pytest.raises(MemoryError):
                lab.train("stopped", config, statistics="train-set")
        else:
            assert lab.train("stopped", config, statistics="train-set").steps == 0
    with safe_open(lab.root / "stopped" / checkpoint.FILE, framework="pt") as file:
        assert checkpoint.json.loads(file.metadata()["state"])["observed"] == 16
    alike(whole, lab.train("stopped", config, resume=True, statistics="train-set"))
    assert_same(lab.tensors("whole"), lab.tensors("stopped"))
    counts = [t for name, t in whole.editor.state_dict().items() if name.endswith("count")]
    longer = lab.train("more", replace(CONFIG, steps=4), statistics="train-set").editor.state_dict()
    assert counts and [longer[n] for n in longer if n.endswith("count")] == counts  # training takes none


def test_a_run_from_before_a_setting_is_resumed(lab: Lab) -> None:
    """Its statistics were running ones, whatever the default is now."""
    lab.interrupted("stopped", 4, "ctrl-c")
    path = lab.root / "stopped" / checkpoint.FILE
    with safe_open(path, framework="pt") as file:
        state = checkpoint.json.loads(file.metadata()["state"])
    del (
        state["settings"]["config"]["statistics"],
        state["settings"]["config"]["statistics_on"],
        state["observed"],
    )
    checkpoint.save_file(lab.tensors("stopped"), path, metadata={"state": checkpoint.json.dumps(state)})
    assert lab.train("stopped", resume=True, statistics="running").stopped == "finished"


@pytest.mark.slow
def test_stopped_twice(lab: Lab) -> None:
    whole = lab.train("whole")
    lab.interrupted("stopped", 5, "ctrl-c")
    real, calls = loop.training_step, []

    def stop(*args: Any) -> Any:
        calls.append(0)
        if len(calls) == 6:
            signal.raise_signal(signal.SIGINT)
        return real(*args)

    with lab.monkeypatch.context() as patch:
        patch.setattr(loop, "training_step", stop)
        assert lab.train("stopped", resume=True).steps == 11
    alike(whole, lab.train("stopped", resume=True))


@pytest.mark.parametrize("losses", [(3.0, 2.0, 1.0), (1.0, 2.0)])  # all steps; stopped early
def test_resuming_what_has_finished_changes_nothing(lab: Lab, losses: tuple[float, ...]) -> None:
    left = iter(losses)
    lab.monkeypatch.setattr(loop, "validation_step", lambda *_: Outcome(next(left), 1.0, 1.0, 0.0, 0.0, 0.0))
    config = replace(CONFIG, patience=1)
    whole = lab.train("run", config)
    assert whole.stopped == ("finished" if len(losses) == 3 else "early")
    alike(whole, lab.train("run", config, resume=True))


@pytest.mark.slow
def test_a_resumed_run_counts_its_time_on(lab: Lab) -> None:
    lab.interrupted("stopped", 4, "ctrl-c")
    with safe_open(lab.root / "stopped" / checkpoint.FILE, framework="pt") as file:
        before = checkpoint.json.loads(file.metadata()["state"])["seconds"]
    assert before > 0
    assert lab.train("stopped", resume=True).seconds > before


def test_a_full_disk_leaves_the_previous_checkpoint(lab: Lab) -> None:
    config = replace(CONFIG, checkpoint_every=0.0)
    whole = lab.train("whole", config)
    real, calls = checkpoint.save_file, []

    def save(tensors: Any, path: Path, **rest: Any) -> None:
        calls.append(0)
        if len(calls) == 7:
            path.write_bytes(b"half of it")
            full_disk()
        real(tensors, path, **rest)

    with lab.monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", save)
        with pytest.raises(StorageError, match=r"No space left.*previous file is unchanged"):
            lab.train("full", config)
    assert [path.name for path in (lab.root / "full").iterdir()] == [checkpoint.FILE]
    alike(whole, lab.train("full", config, resume=True))


def test_what_cannot_be_resumed_is_refused(lab: Lab) -> None:
    with pytest.raises(StorageError, match="no checkpoint to resume"):
        lab.train("nothing", resume=True)
    lab.train("run", replace(CONFIG, steps=2))
    with pytest.raises(StorageError, match=r"other settings \(steps: 2 before, 13 now\)"):
        lab.train("run", resume=True)
    with pytest.raises(StorageError, match=r"'rank': 8.* before, .*'rank': 4.* now"):
        lab.train("run", replace(CONFIG, steps=2), resume=True, rank=4)
    path = lab.root / "run" / checkpoint.FILE
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(StorageError, match="damaged and cannot be resumed"):
        lab.train("run", replace(CONFIG, steps=2), resume=True)


def test_without_a_folder_there_is_nothing_to_resume(lm: LM) -> None:
    editor = Mend(find_sites(lm.model, last=2), MendConfig(rank=8))
    with pytest.raises(StorageError, match="no output folder"):
        train(lm, editor, records(4), [], CONFIG, resume=True)
