"""The demo's output: an edit, and scores on facts that the editor has not seen."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.text import Text

from emendo._outputs import DEMO, clear
from emendo._runs import has_run, read_run, write_run
from emendo._storage import new_file, read_json, write_json
from emendo._version import __version__
from emendo.cli._console import note, output
from emendo.cli._paths import claim
from emendo.cli._progress import show_progress
from emendo.cli._runs import Run, digest
from emendo.cli._tables import before_after
from emendo.cli._tables import evaluation as print_evaluation
from emendo.cli.edit import UNRELATED
from emendo.data import Probe, Record
from emendo.data.abilities import PASSAGES
from emendo.editors import Editor
from emendo.editors.library import Entry
from emendo.edits import BaseEdit, Request
from emendo.evaluate import Evaluation, Question, Row, edit_with_answers, evaluate, questions
from emendo.evaluate.damage import Damage
from emendo.models.lm import LM
from emendo.report.html import write_report

EXAMPLE = "country_capital/Australia"
"""The built-in fact that the demo corrects (the model says Sydney); it is in the test split."""
NEIGHBOURS = ("country_capital/Germany", "country_capital/Thailand", "country_capital/Ireland")
"""Facts of the same relation and split that must not change."""

_PASSAGES = 2  # plain texts whose perplexity is taken after every edit
_EACH = 2  # paraphrases, near neighbours and unrelated prompts of each fact that is measured


@dataclass(frozen=True)
class Demo:
    """A demo that has its editor.

    Attributes:
        folder: everything is written there.
        editor: the folder of the editor.
        command: the command line that repeats it.
        info: the facts of the report's head about the editor's training.
        history: the figures of that training.
    """

    folder: Path
    editor: Path
    command: str
    info: Mapping[str, Any]
    history: Sequence[Mapping[str, float]] = ()


def of_run(run: Run) -> Demo:
    """The demo of an editor that it has trained itself."""
    training = run.settings.training
    info = {
        "editor": run.settings.editor,
        "editor_settings": run.settings.editor_settings,
        "parameters": run.result["parameters"],
        "trained_on": f"{run.result['records']} built-in facts (atlas, training split)",
        "steps": run.result["steps"],
        "batch": training["batch"],
        "seed": training["seed"],
        "minutes_of_training": round(run.result["seconds"] / 60, 1),
    }
    command = f"emendo demo --train --model {run.settings.model} --minutes {training['minutes']:g}"
    return Demo(run.folder, run.editor, command, info, read_json(run.folder / "history.json"))


def of_entry(entry: Entry, folder: Path, model: str) -> Demo:
    """The demo of an editor that ships with emendo, in a folder of its own.

    Raises:
        StorageError: the folder holds something else, or cannot be written.
    """
    mine = {"editor": entry.name}
    held = read_run(folder, DEMO, "")["settings"] if has_run(folder) else None
    if held != mine:
        trained = (
            held is not None and held.keys() != mine.keys()
        )  # an editor that took minutes is not replaced
        claim(folder, DEMO, model=model, overwrite=not trained)
        clear(folder, DEMO)
        folder.mkdir(parents=True, exist_ok=True)
        write_run(folder, {"command": "demo", "settings": mine})
    kept = ("data", "steps", "batch", "seed")
    info = {"editor": f"{entry.name}, which ships with emendo"} | {
        k: entry.info[k] for k in kept if k in entry.info
    }
    return Demo(folder, entry.folder, f"emendo demo --model {model}", info)


def show_edit(demo: Demo, lm: LM, editor: Editor, unseen: Sequence[Record]) -> tuple[BaseEdit, list[Row]]:
    """Make the demo's edit, show it and save it.

    Raises:
        StorageError: it cannot be saved.
    """
    by_id = {record.id: record for record in unseen}
    near = tuple(Probe(by_id[name].prompt, by_id[name].answer or "") for name in NEIGHBOURS)
    truth = by_id[EXAMPLE].answer or ""
    record = replace(by_id[EXAMPLE], target=truth, answer=None, neighbours=near)
    asked = [*questions(record, unrelated=0), *(Question("unrelated", text) for text in UNRELATED)]
    edit, rows = edit_with_answers(lm, editor, Request(record.prompt, record.target, record.separator), asked)
    edit.save_pretrained(demo.folder / "edit", overwrite=True)
    output().print(Text.assemble(("\nThe edit", "bold"), f': "{record.prompt}" → "{record.target}"\n'))
    before_after(rows)
    return edit, rows


def show_scores(
    demo: Demo, lm: LM, editor: Editor, unseen: Sequence[Record], edit: BaseEdit, rows: Sequence[Row]
) -> None:
    """Show how the editor does on unseen facts, measured now or earlier, and write the report.

    Raises:
        StorageError: something cannot be written.
    """
    records = [
        replace(
            r,
            paraphrases=r.paraphrases[:_EACH],
            neighbours=r.neighbours[:_EACH],
            unrelated=r.unrelated[:_EACH],
        )
        for r in unseen
    ]
    kept, page = demo.folder / "evaluation.json", demo.folder / "report.html"
    key = _key(demo.editor, records)
    found = read_json(kept) if kept.exists() and page.exists() else {}
    output().print("\nOn facts that the editor has not seen\n", style="bold")
    if found.get("key") == key:
        print_evaluation(found["figures"])
        return
    note(f"Measuring {len(records)} edits.")
    with show_progress() as progress:
        damage = Damage(PASSAGES[:_PASSAGES]) if lm.kind == "causal" else None
        evaluation = evaluate(
            lm, editor, records, fact_in_context=False, damage=damage, progress=progress
        )  # as little as shows what an editor does
    figures = evaluation.as_dict()
    print_evaluation(figures)
    _report(page, demo, lm, evaluation, edit, rows)
    with new_file(kept) as temporary:  # written last, so that it marks a complete evaluation
        write_json(temporary, {"key": key, "figures": figures})


def _report(
    page: Path, demo: Demo, lm: LM, evaluation: Evaluation, edit: BaseEdit, rows: Sequence[Row]
) -> None:
    info: dict[str, Any] = {
        "title": "emendo demo",
        "command": demo.command,
        "model": lm.name,
        **demo.info,
        "measured_on": f"{len(evaluation.results)} built-in facts (atlas, test split)",
        "threads": torch.get_num_threads(),
        "versions": f"emendo {__version__}, torch {torch.__version__}",
    }
    write_report(
        page,
        info=info,
        evaluation=evaluation,
        edit=edit,
        rows=rows,
        norms=edit.relative_norms(lm) or None,
        history=demo.history,
    )


def _key(editor: Path, records: Sequence[Record]) -> str:
    """A key that identifies an evaluation by its inputs."""
    weights = hashlib.blake2b((editor / "editor.safetensors").read_bytes(), digest_size=8).hexdigest()
    return f"{__version__}/{weights}/{digest(records)}/{EXAMPLE}"
