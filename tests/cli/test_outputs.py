"""One rule for every path that a command writes to: nothing that emendo did not write is ever lost."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from cli.samples import SHORT, Emendo
from emendo import _outputs

PROMPT = "The capital of Bada is"


@dataclass
class Place:
    """The inputs of a command, all in one folder of the test's own."""

    root: Path
    model: Path
    facts: Path
    edit: Path
    adapter: Path
    editor: Path


@pytest.fixture(scope="module")
def originals(
    emendo_command: Emendo, model: Path, facts: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    root = tmp_path_factory.mktemp("originals")
    shutil.copytree(model, root / "model")
    shutil.copy(facts, root / "facts.jsonl")
    shutil.copytree(trained, root / "run")
    own = ("--model", root / "model")
    emendo_command("edit", "--editor", root / "run", *own, PROMPT, "Oslo", "--out", root / "edit")
    emendo_command("apply", root / "edit", "--force", "--into-weights", *own)
    emendo_command("export", root / "edit", *own, "--out", root / "adapter")
    return root


@pytest.fixture
def place(originals: Path, tmp_path: Path) -> Place:
    root = Path(shutil.copytree(originals, tmp_path / "in"))
    return Place(
        root, root / "model", root / "facts.jsonl", root / "edit", root / "adapter", root / "run" / "editor"
    )


Command = Callable[[Place], list[object]]
FOLDERS: dict[str, tuple[Command, _outputs.Kind]] = {
    "edit": (
        lambda p: ["edit", "--editor", p.editor, "--model", p.model, PROMPT, "Lima"],
        _outputs.EDIT,
    ),
    "fuse": (lambda p: ["fuse", p.edit, "--model", p.model], _outputs.EDIT),
    "import": (lambda p: ["import", p.adapter, "--model", p.model], _outputs.EDIT),
    "export": (lambda p: ["export", p.edit, "--model", p.model], _outputs.ADAPTER),
    "merged": (lambda p: ["export", p.edit, "--to", "merged", "--model", p.model], _outputs.CHECKPOINT),
    "ledger": (lambda p: ["export", "--model", p.model], _outputs.ADAPTER),
    "train": (lambda p: ["train", "--model", p.model, "--data", p.facts, *SHORT], _outputs.TRAINING),
    "demo": (lambda p: ["demo", "--model", p.model, "--dtype", "float32"], _outputs.DEMO),
    "evaluate": (
        lambda p: [
            *("evaluate", "--editor", p.editor, "--model", p.model, "--data", p.facts),
            *("--limit", 2, "--no-generated", "--no-damage"),
        ],
        _outputs.EVALUATION,
    ),
}
ALL = pytest.mark.parametrize("name", FOLDERS)
WRITES = pytest.mark.parametrize("name", [name for name in FOLDERS if name != "demo"])


def tree(root: Path) -> dict[str, bytes | str | None]:
    """Everything below a folder: the content of files, the target of links."""
    found: dict[str, bytes | str | None] = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        found[name] = (
            str(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        )
    return found


def command(name: str, place: Place, out: object, *more: object) -> list[object]:
    extra = [] if name == "demo" else ["--overwrite"]
    return [*FOLDERS[name][0](place), "--out", out, *extra, *more]


@ALL
@pytest.mark.parametrize(
    "target",
    ["model", "model/emendo-ledger", "model/new", ".", "edit", "facts.jsonl", "adapter", "run", "run/editor"],
)
def test_inputs_models_and_ledgers_are_never_written_to(
    emendo_command: Emendo, place: Place, name: str, target: str
) -> None:
    kind = {"run": _outputs.TRAINING, "edit": _outputs.EDIT, "adapter": _outputs.ADAPTER}.get(target)
    if FOLDERS[name][1] is kind and (name, target) != ("fuse", "edit"):
        pytest.skip("an older output of the same kind, and no input")
    before = tree(place.root)
    said = emendo_command(*command(name, place, place.root / target), code=2)
    assert "Error: " in said.err and "Traceback" not in said.err
    assert tree(place.root) == before


@ALL
@pytest.mark.parametrize("link", [False, True])
def test_a_folder_of_the_users_stays(emendo_command: Emendo, place: Place, name: str, link: bool) -> None:
    mine = place.root / "mine"
    (mine / "chapters").mkdir(parents=True)
    (mine / "thesis.txt").write_text("all of it")
    (mine / "edit.json").write_text("[]")  # the name of a marker is no marker
    (mine / "run.json").write_text('{"format": 1}')
    (mine / "emendo.json").write_text("nothing")
    if link:
        (place.root / "link").symlink_to(mine)
    before = tree(place.root)
    said = emendo_command(*command(name, place, place.root / "link" if link else mine), code=2)
    assert "not emendo's" in said.err
    assert tree(place.root) == before


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("edit", ["file", "file/below", "pipe", "circle", "~nosuchuser/x", "x" * 300]),
        *((name, ["pipe", "x" * 300]) for name in FOLDERS if name != "edit"),
    ],
    ids=FOLDERS,
)
def test_files_pipes_and_circles_are_refused(
    emendo_command: Emendo, place: Place, name: str, targets: list[str]
) -> None:
    (place.root / "file").write_text("mine")
    os.mkfifo(place.root / "pipe")
    (place.root / "circle").symlink_to("circle")
    for target in targets:
        where = target if target.startswith("~") else place.root / target
        said = emendo_command(*command(name, place, where), code=2)
        assert "Error: " in said.err and "fault" not in said.err, said.err
    assert (place.root / "file").read_text() == "mine"
    assert (place.root / "pipe").is_fifo() and (place.root / "circle").is_symlink()


@pytest.mark.slow
@WRITES
def test_own_outputs_are_replaced_and_the_users_files_beside_them_stay(
    emendo_command: Emendo, place: Place, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, out = place.root / "real", place.root / "out"
    real.mkdir()
    out.symlink_to(real)
    foreign = place.root / ".real.old"
    foreign.mkdir()
    (foreign / "mine.txt").write_text("mine")
    words = [*FOLDERS[name][0](place), "--out", out]
    emendo_command(*words)
    own = set(tree(real))
    (real / "notes.txt").write_text("mine")
    (real / "sub").mkdir()
    (real / "sub" / "more.txt").write_text("mine too")
    if name != "evaluate":
        assert "already holds something" in emendo_command(*words, code=2).err
    emendo_command(*words, "--overwrite")
    after = tree(real)
    assert set(after) == own | {"notes.txt", "sub", "sub/more.txt"}
    assert (after["notes.txt"], after["sub/more.txt"]) == (b"mine", b"mine too")
    assert out.is_symlink() and (foreign / "mine.txt").read_text() == "mine"
    assert {path.name for path in place.root.iterdir() if path.name.startswith(".")} == {".real.old"}
    empty = place.root / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    emendo_command(*FOLDERS[name][0](place), "--out", ".")
    assert FOLDERS[name][1].is_own(empty)


@pytest.mark.slow
def test_a_training_run_and_an_evaluation_do_not_replace_each_other(
    emendo_command: Emendo, place: Place
) -> None:
    measured = place.root / "measured"
    emendo_command(*FOLDERS["evaluate"][0](place), "--out", measured)
    before = tree(measured)
    for name in ("train", "demo"):
        assert "not emendo's" in emendo_command(*command(name, place, measured), code=2).err or name == "demo"
    assert tree(measured) == before
    before = tree(place.root / "run")
    emendo_command(*command("evaluate", place, place.root / "run"), code=2)
    assert tree(place.root / "run") == before


# ------------------------------------------------------------------------------------- single files


def test_a_report_replaces_only_a_report(emendo_command: Emendo, place: Place) -> None:
    words = FOLDERS["evaluate"][0](place)
    page, mine = place.root / "page.html", place.root / "mine.html"
    mine.write_text("<!doctype html><p>Written by me.</p>")
    (place.root / "link.html").symlink_to(mine)
    before = tree(place.root)
    for target in (
        mine,
        place.root / "link.html",
        place.facts,
        place.model / "config.json",
        place.edit,
        place.editor,
    ):
        said = emendo_command(*words, "--report", target, "--overwrite", code=2)
        assert (
            "not emendo's" in said.err
            or "which this command reads" in said.err
            or "not a regular" in said.err
        )
        assert said.err.count("hoose another path") == 1
    foreign = emendo_command(*words, "--report", mine, code=2).err
    assert "never replaced: choose another path, or move it away first." in foreign
    emendo_command(*words, "--report", place.model / "page.html", code=2)
    assert tree(place.root) == before
    for _ in range(2):
        emendo_command(*words, "--report", page)
    assert _outputs.REPORT.is_own(page)


@pytest.mark.slow
def test_a_plot_replaces_only_a_plot(emendo_command: Emendo, place: Place) -> None:
    words = ("doctor", "--model", place.model)
    for suffix in ("png", "svg"):
        mine = place.root / f"mine.{suffix}"
        mine.write_bytes(b"a photograph")
        assert "not emendo's" in emendo_command(*words, "--plot", mine, code=2).err
        assert mine.read_bytes() == b"a photograph"
        plot = place.root / f"plot.{suffix}"
        emendo_command(*words, "--plot", plot)
        assert _outputs.PLOT.is_own(plot)
    emendo_command(*words, "--plot", plot)
    assert "lies inside" in emendo_command(*words, "--plot", place.model / "x.png", code=2).err


# ---------------------------------------------------------------- what emendo 0.1.0 wrote is its own


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        *(("edit", _outputs.EDIT), ("fused", _outputs.EDIT), ("evaluation", _outputs.EVALUATION)),
        *(("run-mend", _outputs.TRAINING), ("run-mend/editor", _outputs.EDITOR)),
    ],
)
def test_outputs_of_the_first_version_are_recognised(folder: str, kind: _outputs.Kind) -> None:
    path = Path(__file__).parents[1] / "data" / "e4a7985" / folder
    kinds = [k for k in vars(_outputs).values() if isinstance(k, _outputs.Kind) and k.files]
    assert [k for k in kinds if _outputs._is_own(k, path)] == [kind]
    assert all(kind.owns(entry.name) for entry in path.iterdir())
