"""Measure the editor that train_shipped.py has trained, and put it where it ships from.

    python scripts/measure_shipped.py --data FOLDER --editor runs/shipped/editor

Every edit is made by itself from the clean model, in float32, with the editor rounded as it ships: on the first
records of ``counterfact-dev.json`` and on the test split of the built-in facts, as plain text and as chat turns. The
figures go into the card of the editor.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

import emendo
from emendo.cli._progress import show_progress
from emendo.data import Record, read_records
from emendo.data.abilities import PASSAGES
from emendo.data.portability import with_consequences
from emendo.editors import Editor, library
from emendo.evaluate import Evaluation, evaluate
from emendo.evaluate.damage import Damage
from emendo.evaluate.results import PORTABLE
from emendo.models.lm import LM

NAME = "mend-smollm2-135m"
LIMITS = (
    "It makes one edit at a time: edits of it that are added up ruin the model from the fifth on.",
    "In the chat template more edits reach a neighbour: a quarter of its answers change.",
    "It reaches one neighbour in five or six: keep its edits in a memory, which asks whether a prompt is in scope.",
    'After 6% of the edits "... is not" is continued by the target.',
    "It learned English facts of some 70 relations, with short answers. Expect less of other facts and languages.",
)


def row(found: Evaluation) -> dict[str, float]:
    """The figures of one evaluation, rounded."""
    values = found.as_dict()
    forced, free, perplexity = values["teacher_forced"], values["generated"], values["damage"]["perplexity"]
    figures = {
        "records": values["records"],
        "edit_success": forced["edit_success"]["mean"],
        "generalisation": forced["generalisation"]["mean"],
        "locality": forced["locality"]["mean"],
        "edit_success_generated": free["edit_success"]["mean"],
        "generalisation_generated": free["generalisation"]["mean"],
        "locality_generated": free["locality"]["mean"],
        "locality_whole_text": free["locality_whole_text"]["mean"],
        "perplexity_clean": perplexity["clean"],
        "perplexity_median": perplexity["median"],
        "perplexity_worst": perplexity["max"],
    }
    if follows := [one for result in found.results for one in result.outcomes if one.kind in PORTABLE]:
        figures["portability"] = fmean(one.teacher_forced for one in follows)
        figures["portability_clean"] = fmean(one.known for one in follows)
    return {name: round(value, 3) for name, value in figures.items() if value is not None}


def negation(lm: LM, editor: Editor, records: Sequence[Record]) -> dict[str, float]:
    """How often "PROMPT not" is continued by the target, without and with the edit."""
    asked = [record for record in records if record.prompt.endswith((" is", " was", " are"))]
    said = {"clean": 0, "edited": 0}
    for record in asked:
        question, edit = f"{record.prompt} not", editor.edit(lm, record.prompt, record.target)
        said["clean"] += lm.generate(question, 6).strip().startswith(record.target)
        with edit.applied(lm):
            said["edited"] += lm.generate(question, 6).strip().startswith(record.target)
    return {f"says_the_target_{name}": round(count / len(asked), 3) for name, count in said.items()}


def main() -> None:
    """Measure and install."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--editor", type=Path, required=True)
    parser.add_argument(
        "--limit", type=int, nargs=3, default=(500, 200, 200), metavar=("PLAIN", "CHAT", "ATLAS")
    )
    parser.add_argument("--to", type=Path, default=library.SHIPPED / NAME)
    asked = parser.parse_args()
    lm = emendo.load("smollm2-135m")
    trained = Editor.from_pretrained(asked.editor)
    trained.chat = None  # both forms are among its training records
    trained.save_pretrained(asked.to, overwrite=True, dtype=torch.bfloat16)
    editor = Editor.from_pretrained(asked.to)
    facts = read_records(asked.data / "counterfact-dev.json").records
    atlas = with_consequences(read_records("atlas", split="test"))
    plain, chat, built_in = asked.limit
    figures: dict[str, Any] = {}
    for name, model, records in (
        ("counterfact", lm, facts[:plain]),
        ("counterfact, chat", lm.reading(chat=True), facts[:chat]),
        ("built-in facts", lm, atlas[:built_in]),
        ("built-in facts, chat", lm.reading(chat=True), atlas[: built_in // 2]),
    ):
        with show_progress() as progress:
            found = evaluate(model, editor, records, damage=Damage(PASSAGES[:4]), progress=progress)
        figures[name] = row(found)
        print(name, json.dumps(figures[name]), flush=True)
    figures["negation"] = negation(lm, editor, facts[:100])
    print("negation", json.dumps(figures["negation"]))
    trained.info |= {"figures": figures, "limits": list(LIMITS)}
    trained.save_pretrained(asked.to, overwrite=True, dtype=torch.bfloat16)
    size = (asked.to / library.WEIGHTS).stat().st_size
    print(f"{asked.to}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
