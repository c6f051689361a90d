"""Train the editor that ships with emendo for smollm2-135m. Resumes where it was stopped.

    python scripts/train_shipped.py --data FOLDER --out runs/shipped

FOLDER holds ``counterfact-train.json``, ``counterfact-dev.json`` (its last records choose the best editor; its
subjects are never trained on) and ``pararel.jsonl``. The first phase mixes statements, questions and chat turns of
three sources, with whole continuations among the locality texts; the second goes on with all of CounterFact; the third
closes the targets of chat turns and halves the part of an edit that every text has in common; the fourth takes all
facts in fresh forms, each with a whole continuation that must stay. Together three hours on two cores with AMX.
measure_shipped.py measures the result and installs it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

import emendo
from emendo.cli._progress import show_progress
from emendo.data import Record, read_records, write_records
from emendo.editors import Editor, editor_class
from emendo.models._sampling import own_passages
from emendo.models.lm import LM
from emendo.models.loading import cache_folder
from emendo.models.sites import find_sites
from emendo.train import TrainConfig, train
from shipped_records import END, fourth_records, make_records, second_records, third_records

MODEL = "smollm2-135m"
COUNTS = {"counterfact": 8_000, "atlas": 2_500, "pararel": 4_500}
ALL = {"counterfact": 100_000, "atlas": 2_500, "pararel": 4_500}
"""Facts of the fourth phase."""
FIRST = 10_000
"""Records of the first phase, out of those of COUNTS in their shuffled order."""
PASSAGES = 1024
SHARED = {"validate_on": 140, "validate_every": 500, "patience": 100, "checkpoint_every": 300.0, "text": 1}
PHASES = (
    TrainConfig(steps=2600, warmup=200, c_edit=0.3, near=2, sibling=1, unrelated=1, seed=0, **SHARED),
    TrainConfig(steps=2000, warmup=60, c_edit=0.25, near=1, sibling=1, unrelated=0, seed=1, **SHARED),
    TrainConfig(steps=1000, warmup=60, near=1, sibling=1, unrelated=1, lr=4e-4, seed=4, **SHARED),
    TrainConfig(steps=2400, warmup=80, near=2, sibling=0, unrelated=1, lr=6e-4, seed=5, **SHARED),
)
FIRST_TOKEN = (1.0, 1.0, 0.5, 0.5)
"""The editor's setting ``first_token`` in each phase."""
CLOSED = 3
"""The first phase whose chat turns have targets that end."""


def validation_records(lm: LM, data: Path, *, closed: bool) -> list[Record]:
    """Facts that are neither trained on nor reported: the end of counterfact-dev, plain and chat, and atlas.

    Args:
        lm: has the chat template.
        data: the folder with ``counterfact-dev.json``.
        closed: whether the targets of chat turns have the end of the turn.
    """
    frame = lm.reading(chat=True).framing.frame
    found = []
    for place, record in enumerate(read_records(data / "counterfact-dev.json").records[-100:]):
        if place % 2:
            near = tuple(replace(probe, prompt=frame(probe.prompt)) for probe in record.neighbours)
            record = replace(
                record,
                prompt=frame(record.prompt),
                target=record.target + END * closed,
                paraphrases=tuple(map(frame, record.paraphrases)),
                neighbours=near,
                unrelated=(),
            )
        found.append(record)
    return [*found, *read_records("atlas", split="validation").records[:40]]


def kept(file: Path, make: Callable[[], Sequence[Record]]) -> list[Record]:
    """The records of a file, which is written first if it is not there."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_records(make(), file)
    return list(read_records(file))


def main() -> None:
    """Make the records and train, phase by phase."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, help="of each phase, to try the script")
    parser.add_argument("--counts", type=int, nargs=3, metavar=("COUNTERFACT", "ATLAS", "PARAREL"))
    parser.add_argument(
        "--dtype", default="bfloat16", help="number format of the model while it trains the editor"
    )
    asked = parser.parse_args()
    counts = dict(zip(COUNTS, asked.counts, strict=True)) if asked.counts else COUNTS
    lm = emendo.load(MODEL, dtype=asked.dtype)
    passages = own_passages(lm, PASSAGES, cache_folder() / "written")
    sentences = [text.split(".")[0].strip() + "." for text in passages if 20 < len(text.split(".")[0]) < 120]

    def first() -> list[Record]:
        return kept(
            asked.out / "records.jsonl", lambda: make_records(lm, asked.data, sentences, counts)[:FIRST]
        )

    sources = (
        first,
        lambda: second_records(asked.data, first()),
        lambda: third_records(asked.data, first()),
        lambda: kept(
            asked.out / "fourth.jsonl",
            lambda: fourth_records(lm, asked.data, sentences, counts if asked.counts else ALL),
        ),
    )
    folder = None
    for number, (config, records) in enumerate(zip(PHASES, sources, strict=True), 1):
        before, folder = folder, asked.out / f"phase-{number}"
        if (folder / "editor").exists():
            continue
        if asked.steps:
            config = replace(config, steps=asked.steps)
        torch.manual_seed(config.seed)
        kind = editor_class("mend")
        settings = kind.Config(first_token=FIRST_TOKEN[number - 1])
        editor = kind(find_sites(lm.model, "mlp", last=3), settings)
        if before is not None:
            editor.load_state_dict(Editor.from_pretrained(before / "editor").state_dict())
        resume = (folder / "checkpoint.safetensors").exists()
        held_out = validation_records(lm, asked.data, closed=number >= CLOSED)
        with show_progress() as progress:
            result = train(
                lm,
                editor,
                records(),
                held_out,
                config,
                out=folder,
                resume=resume,
                passages=passages,
                progress=progress,
            )
        if result.stopped == "interrupted":
            return
        editor.info |= {"model_name": MODEL, "data": "counterfact-train, atlas, pararel"}
        editor.save_pretrained(folder / "editor")
        print(f"phase {number}: {result.steps} steps, {result.seconds / 60:.0f} minutes")


if __name__ == "__main__":
    main()
