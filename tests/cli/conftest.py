"""A tiny model in a folder, facts in a file, a trained run, and a way to call commands."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cases import build_lm, records
from cli.samples import SHORT, Answer, Emendo
from emendo.cli import _loading as loading
from emendo.cli import app
from emendo.data import write_records
from emendo.data.abilities import abilities
from emendo.edits import fusing
from emendo.evaluate.intervals import bootstrap_interval
from emendo.report import _health_plot, plots


@pytest.fixture(autouse=True, scope="session")
def any_processor() -> Iterator[None]:
    """Models are trained in the same format whatever this processor is fastest with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "fastest_dtype", lambda device: "float32")
        yield


@pytest.fixture(autouse=True, scope="session")
def little_text() -> Iterator[None]:
    """Damage is looked for in a few questions, and edits are fused with a few passages."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("emendo.cli._evaluate.abilities", partial(abilities, each=4))
        patch.setattr(fusing, "_PASSAGES", 16)
        patch.setattr(fusing, "_FACTS", 20)
        yield


@pytest.fixture(autouse=True, scope="session")
def blank_plots() -> Iterator[None]:
    """The plots of reports are blank, and intervals are of few resamples; both have tests of their own."""
    with pytest.MonkeyPatch.context() as patch:
        blank = b'<svg xmlns="http://www.w3.org/2000/svg"></svg>'
        patch.setattr(_health_plot, "render", plots.render)  # `doctor --plot` writes a file of its own
        patch.setattr(plots, "render", lambda figure, image="svg": blank)
        patch.setitem(bootstrap_interval.__kwdefaults__, "draws", 100)
        yield


@pytest.fixture(scope="session")
def emendo_command(tmp_path_factory: pytest.TempPathFactory) -> Emendo:
    cache = tmp_path_factory.mktemp("cache")

    def call(*args: object, code: int = 0) -> Answer:
        result = CliRunner().invoke(app, [str(arg) for arg in args], env={"EMENDO_CACHE": str(cache)})
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, result.output
        return Answer(result.exit_code, result.stdout, result.stderr)

    return call


def _save(folder: Path, seed: int = 0) -> Path:
    lm = build_lm("llama", seed=seed)
    lm.model.config.max_position_embeddings = 256  # a Llama has no table of positions
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = _save(tmp_path_factory.mktemp("models") / "tiny")
    yield folder
    assert not (folder / "emendo-ledger").exists(), "a test gave the model of all tests a ledger"


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _save(tmp_path_factory.mktemp("models") / "other", seed=1)


@pytest.fixture(scope="session")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "facts.jsonl"
    write_records(records(30), path)
    return path


@pytest.fixture(scope="session")
def trained(
    emendo_command: Emendo, model: Path, facts: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of a finished run."""
    out = tmp_path_factory.mktemp("runs") / "trained"
    emendo_command("train", "--model", model, "--data", facts, "--out", out, *SHORT)
    return out


@pytest.fixture(scope="session")
def edit_folder(emendo_command: Emendo, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An edit."""
    out = tmp_path_factory.mktemp("edits") / "edit"
    emendo_command("edit", "--editor", trained, "The capital of Bada is", "Oslo", "--out", out)
    return out
