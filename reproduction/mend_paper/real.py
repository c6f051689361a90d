"""The paper's tables on the paper's own models and data: ``python -m reproduction.mend_paper --preset paper-table4``.

Models and matrices are those of :mod:`emendo.train.presets`. All files are in the folder of ``--data``; a model is read
from its folder ``models/NAME``, where there is one, else from the hub.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from emendo.data import Probe, Record, read_records
from emendo.errors import DataError
from emendo.train.presets import MODELS
from reproduction.mend_paper import claims, paper
from reproduction.mend_paper.budgets import ABLATIONS, EDITORS, PAPER_TASKS, UNCLAIMED, Choice
from reproduction.mend_paper.grid import Column, Place, Preset

if TYPE_CHECKING:
    from reproduction.mend_paper.cells import Cell
    from reproduction.mend_paper.memory import Memory

_PROBES = 4  # locality prompts of an edit
_HELD_BACK = 500  # training records for validation
_WORDS, _CUT = 50, 100  # of a passage: at least, and at most


@dataclass(frozen=True, slots=True)
class Files:
    """The files of a data set.

    Attributes:
        train: records to train on.
        test: records to measure on.
        passages: texts for locality, a passage a line: for training, and for tests; both the same file where it is to
            be divided.
        questions: questions with answers for locality, for training and for tests.
    """

    train: str
    test: str
    passages: tuple[str, str] | None = None
    questions: tuple[str, str] | None = None

    @property
    def every(self) -> tuple[str, ...]:
        """All of them."""
        return (self.train, self.test, *(self.passages or ()), *(self.questions or ()))


_ZSRE = Files(
    "zsre/structured_zeroshot-train-new_annotated_final.jsonl",
    "zsre/structured_zeroshot-dev-new_annotated_final.jsonl",
)
_SAMPLED = Files("10token/data/self_sample/train.json", "10token/data/self_sample/valid.json")
_WEBTEXT = replace(_SAMPLED, passages=("openwebtext.txt", "openwebtext.txt"))
_QUESTIONS = replace(_ZSRE, questions=("nq/train.json", "nq/validation.json"))
FILES: Mapping[str, Files] = {
    "fever-bert-base": Files("fever/fever-train-kilt.jsonl", "fever/fever-dev-kilt.jsonl"),
    "zsre-bart-base": _ZSRE,
    "wikitext-distilgpt2": replace(_SAMPLED, passages=("wikitext-103/train.txt", "wikitext-103/valid.txt")),
    "wikitext-gpt-neo-2.7b": _WEBTEXT,
    "wikitext-gpt-j-6b": _WEBTEXT,
    "zsre-t5-xl": _QUESTIONS,
    "zsre-t5-xxl": _QUESTIONS,
}
"""The files of each task, under the names that the MEND code gives them; passages as text files."""


@dataclass(frozen=True, slots=True)
class Parts:
    """The data of a task: records, and passages for a model that continues texts."""

    train: tuple[Record, ...]
    validation: tuple[Record, ...]
    test: tuple[Record, ...]
    passages: tuple[str, ...] = ()
    test_passages: tuple[str, ...] = ()


def model_of(task: str, data: Path) -> str:
    """The folder or the hub's id of a task's model.

    Raises:
        DataError: it is not on the hub, and there is no folder.
    """
    name = PAPER_TASKS[task]
    folder = data / "models" / name
    if folder.is_dir():
        return str(folder)
    if (checkpoint := MODELS[name].checkpoint) is None:
        raise DataError(
            f"The task {task!r} needs {folder}: make it from the checkpoint of De Cao et al. with python -m "
            f"reproduction.mend_paper.convert {name}."
        )
    return checkpoint


def parts_of(task: str, data: Path) -> Parts:
    """The data of a task.

    The last 500 training records choose the best editor, and those of the validation file are measured on; the paper
    uses the validation file for both.

    Raises:
        DataError: a file is malformed.
    """
    files = FILES[task]
    train, test = (
        read_records(data / file, skip_bad=True, need_paraphrase=True).records
        for file in (files.train, files.test)
    )
    passages: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    if files.passages is not None:
        passages = _passages(*(data / file for file in files.passages))
    else:
        asked = [_questions(data / file) for file in files.questions or ()] or [_own(train), _own(test)]
        train, test = (
            _with_probes(records, pool) for records, pool in zip((train, test), asked, strict=True)
        )
    held_back = min(_HELD_BACK, len(train) // 2)
    return Parts(train[: len(train) - held_back], train[len(train) - held_back :], test, *passages)


def _own(records: Sequence[Record]) -> list[Probe]:
    return [Probe(record.prompt, record.answer) for record in records if record.answer]


def _questions(path: Path) -> list[Probe]:
    """Questions with their shortest answers, as the MEND code stores those of Natural Questions."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        pairs = list(zip(found["questions"], found["answers"], strict=True))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} must hold an object with the lists 'questions' and 'answers': {error}"
        ) from error
    return [Probe(question, answer) for question, answer in pairs if question.strip() and answer.strip()]


def _with_probes(records: Sequence[Record], pool: Sequence[Probe]) -> tuple[Record, ...]:
    """The records with other questions of a pool, drawn at random by the prompt."""

    def drawn(record: Record) -> tuple[Probe, ...]:
        probes = Random(record.prompt).sample(pool, min(_PROBES + 1, len(pool)))
        return tuple(probe for probe in probes if probe.prompt != record.prompt)[:_PROBES]

    return tuple(replace(record, unrelated=drawn(record)) for record in records)


def _passages(train: Path, test: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Lines of 50 words and more in ASCII, the first 100 words of each.

    A tenth of a file is for training; of a single file nine tenths are, and the rest for tests.

    Raises:
        DataError: a file cannot be read, or has no such line.
    """

    def lines(path: Path) -> tuple[str, ...]:
        try:
            every = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} cannot be read as a text with one passage a line: {error}") from error
        words = [line.split() for line in every if line.isascii()]
        found = tuple(" ".join(each[:_CUT]) for each in words if len(each) >= _WORDS)
        if len(found) < 2:
            raise DataError(f"{path} has fewer than two lines of at least {_WORDS} words in ASCII.")
        return found

    first = lines(train)
    if train == test:
        cut = min(len(first) - 1, round(0.9 * len(first)))
        return first[:cut], first[cut:]
    return first[: max(1, len(first) // 10)], lines(test)


# The tables

_SMALL = {
    "fever-bert-base": Column("fact-checking", paper.FEVER, paper.FEVER),
    "zsre-bart-base": Column("question answering", paper.ZSRE, paper.ZSRE),
    "wikitext-distilgpt2": Column("generation", paper.WIKITEXT, paper.WIKITEXT, "perplexity"),
}
_LARGE = {
    "wikitext-gpt-neo-2.7b": Column("GPT-Neo", paper.NEO, paper.NEO, "perplexity"),
    "wikitext-gpt-j-6b": Column("GPT-J", paper.GPTJ, paper.GPTJ, "perplexity"),
    "zsre-t5-xl": Column("T5-XL", paper.XL, paper.XL),
    "zsre-t5-xxl": Column("T5-XXL", paper.XXL, paper.XXL),
}
_ROWS = ("ft", "ft-kl", "enn", "ke", "mend")
_BETTER = (
    claims.edits_better("MEND", "FT"),
    claims.edits_better("MEND", "FT+KL"),
    claims.succeeds_more("MEND", "KE"),
)


def _grid(
    tasks: Mapping[str, Column], rows: Mapping[str, Callable[[str], Cell | None]]
) -> dict[Place, Cell | Memory]:
    cells: dict[Place, Cell | Memory] = {}
    for row, make in rows.items():
        for task, column in tasks.items():
            if (cell := make(task)) is not None:
                cells[row, column.name] = cell
    return cells


def _cell(choice: Choice, editor: str, **changes: object) -> Callable[[str], Cell | None]:
    """Makes the cell of an editor on a task, if it is requested."""
    return lambda task: choice.cell(task, editor, **changes) if choice.wants(task, editor) else None


def _editors(
    name: str, title: str, tasks: Mapping[str, Column], figures: paper.Table, choice: Choice
) -> Preset:
    rows = {EDITORS[editor]: _cell(choice, editor) for editor in _ROWS}
    rows = {row: make for row, make in rows.items() if row in figures}
    cells = _grid(tasks, rows)
    return Preset(name, title, _TEXT, tuple(tasks.values()), tuple(rows), cells, figures, _BETTER)


def _table3(choice: Choice) -> Preset:
    return _editors("paper-table3", "Large models of the paper (Table 3)", _LARGE, paper.TABLE3, choice)


def _table4(choice: Choice) -> Preset:
    return _editors("paper-table4", "Small models of the paper (Table 4)", _SMALL, paper.TABLE4, choice)


def _table5(choice: Choice) -> Preset:
    ks, task = (1, 5, 25, 75, 125), "zsre-bart-base"
    cells: dict[Place, Cell | Memory] = {
        (f"k = {k}", EDITORS[editor]): choice.together(task, editor, k)
        for k in ks
        for editor in ("enn", "mend")
        if choice.wants(task, editor)
    }
    return Preset(
        "paper-table5",
        "Many edits at once on the paper's model (Table 5)",
        f"k facts are put into one edit. An editor is trained for each k. {_TEXT}",
        tuple(Column(name, name, "") for name in ("ENN", "MEND")),
        tuple(f"k = {k}" for k in ks),
        cells,
        paper.TABLE5,
        (claims.falls_faster("ENN", "MEND"),),
        along="facts in one edit",
    )


def _table6(choice: Choice) -> Preset:
    tasks = {task: column for task, column in _SMALL.items() if task != "fever-bert-base"}
    rows = {row: _cell(choice, "mend", settings=settings) for row, settings in ABLATIONS.items()}
    return Preset(
        "paper-table6",
        "Parts of MEND on the paper's models (Table 6)",
        _TEXT,
        tuple(tasks.values()),
        tuple(rows),
        _grid(tasks, rows),
        paper.TABLE6,
        tuple(claims.succeeds_more("MEND", row) for row in ABLATIONS if row not in UNCLAIMED),
    )


def _table9(choice: Choice) -> Preset:
    rows = {"MEND, attention": _cell(choice, "mend", sites="attention"), "MEND, MLP": _cell(choice, "mend")}
    cells = _grid(_LARGE, rows)
    claim = claims.succeeds_more("MEND, MLP", "MEND, attention")
    title = "Which matrices to edit in the paper's models (Table 9)"
    return Preset(
        "paper-table9", title, _TEXT, tuple(_LARGE.values()), tuple(rows), cells, paper.TABLE9, (claim,)
    )


def _table11(choice: Choice) -> Preset:
    times = {"Cache, eps*": 1.0, "Cache, eps*/2": 0.5, "Cache, 2 eps*": 2.0}
    rows = {"MEND": _cell(choice, "mend")} | {
        row: _cell(choice, "cache", times=value) for row, value in times.items()
    }
    return Preset(
        "paper-table11",
        "A cache instead of an editor on the paper's models (Table 11)",
        f"The column zsRE-hard is the paper's alone: how its questions were made is not published. {_TEXT}",
        (*_SMALL.values(), Column(paper.HARD, "", paper.HARD)),
        tuple(rows),
        _grid(_SMALL, rows),
        paper.TABLE11,
        (
            claims.succeeds_more("Cache, eps*", "Cache, eps*/2"),
            claims.harms_more("Cache, 2 eps*", "Cache, eps*"),
        ),
    )


_TEXT = "One edit at a time, each from the clean model, with the settings of docs/how-to/paper-models.md."
TABLES: Mapping[str, Callable[[Choice], Preset]] = {
    "paper-table3": _table3,
    "paper-table4": _table4,
    "paper-table5": _table5,
    "paper-table6": _table6,
    "paper-table9": _table9,
    "paper-table11": _table11,
}
"""The tables by name."""
