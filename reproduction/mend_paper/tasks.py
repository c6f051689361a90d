"""The tasks: a model each, with records for training, validation and tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from emendo.data import read_records
from emendo.data.schema import Record
from emendo.errors import DataError, RequestError
from emendo.models import loading as models
from emendo.progress import SILENT, Progress
from emendo.train.presets import MODELS
from reproduction.mend_paper import real
from reproduction.mend_paper.budgets import PAPER_TASKS
from reproduction.mend_paper.facts import FACTS, as_claims, known, with_known_probes
from reproduction.mend_paper.passages import continuations, read_passages

Kind = Literal["qa", "fact-checking", "generation"]

_SMOLLM = "smollm2-135m"
_SHORT = 25  # words of a passage beside CounterFact
_HELD_BACK = 100  # known facts for validation
_LAYOUTS = {
    "counterfact-train.json": "a JSON array in the CounterFact layout ('prompt', 'target_new', ...)",
    "counterfact-dev.json": "a JSON array in the CounterFact layout ('prompt', 'target_new', ...)",
    "zsre-mend-dev.json": "a JSON array in the zsRE layout ('src', 'alt', 'rephrase', ...)",
    "wikitext2-valid.txt": "the tokenised Wikitext-2 validation text, one paragraph a line",
}


_PAPER_FILE = "docs/how-to/paper-models.md lists the files of the paper's data"


@dataclass(frozen=True, slots=True)
class Task:
    """A model and the edits that methods are compared on.

    Attributes:
        name: of the task.
        model: a name for `emendo.models.loading.load`, or one for `reproduction.mend_paper.zoo.make`.
        kind: the model's job.
        train: records to train an editor on.
        validation: records to choose by.
        test: records to measure on.
        note: how the data were made.
        passages: texts for locality in training, where the model generates; they hold no answers.
        test_passages: texts for locality in tests, from other paragraphs.
    """

    name: str
    model: str
    kind: Kind
    train: tuple[Record, ...]
    validation: tuple[Record, ...]
    test: tuple[Record, ...]
    note: str
    passages: tuple[str, ...] = ()
    test_passages: tuple[str, ...] = ()


def task(name: str, *, data: Path | None = None, progress: Progress = SILENT) -> Task:
    """The task of a name.

    Args:
        name: one of `TASKS`.
        data: the folder with the files that some tasks read.
        progress: receives the progress of making the data; only "wikitext" takes more than seconds.

    Raises:
        RequestError: there is no such task.
        DataError: a file that the task needs is missing or malformed.
    """
    if name not in TASKS:
        raise RequestError(f"There is no task {name!r}; choose one of {', '.join(TASKS)}.")
    return TASKS[name](name, data, progress)


def check(names: Iterable[str], data: Path | None) -> None:
    """Make sure that the files of these tasks are there, before any work is done.

    Raises:
        DataError: a file is missing; the message describes it.
    """
    for name in names:
        for file in FILES.get(name, ()):
            _file(name, data, file)


def _counterfact(name: str, data: Path | None, progress: Progress, validation: int = 200) -> Task:
    records = read_records(_file(name, data, "counterfact-train.json")).records
    test = read_records(_file(name, data, "counterfact-dev.json")).records
    return Task(
        name,
        _SMOLLM,
        "qa",
        records[:-validation],
        records[-validation:],
        test,
        f"CounterFact: its training file, the last {validation} of it for validation; its dev file for tests",
    )


def _counterfact_text(name: str, data: Path | None, progress: Progress) -> Task:
    found = _counterfact(name, data, progress)
    passages = read_passages(_file(name, data, "wikitext2-valid.txt")).test
    short = tuple(" ".join(passage.split()[:_SHORT]) for passage in passages)
    return replace(
        found, test_passages=short, note=f"{found.note}; {_SHORT} words each of Wikitext-2 passages"
    )


def _zsre(name: str, data: Path | None, progress: Progress, sizes: tuple[int, int] = (450, 50)) -> Task:
    found = read_records(_file(name, data, "zsre-mend-dev.json"), skip_bad=True)
    train, rest = found[: sizes[0]], found[sizes[0] :]
    return Task(
        name,
        _SMOLLM,
        "qa",
        train,
        rest[: sizes[1]],
        rest[sizes[1] :],
        f"zsRE in the layout of the MEND code, cut into three in the order of the file; {len(found.skipped)} bad "
        "record(s) left out",
    )


def _atlas(name: str, data: Path | None, progress: Progress) -> Task:
    train, validation, test = (
        read_records("atlas", split=s).records for s in ("train", "validation", "test")
    )
    return Task(name, _SMOLLM, "qa", train, validation, test, "the built-in facts in their own split")


def _questions(name: str, data: Path | None, progress: Progress) -> Task:
    train, validation, test = _known()
    return Task(
        name,
        name,
        "qa",
        with_known_probes(train, train),
        with_known_probes(validation, train + validation),
        with_known_probes(test, test),
        f"built-in facts that the model knows ({_facts()}), in the wordings that it was trained on, since so small "
        "a model does not understand others; probes are known facts of the same split",
    )


def _fact_checking(name: str, data: Path | None, progress: Progress) -> Task:
    train, validation, test = _known()
    return Task(
        name,
        name,
        "fact-checking",
        as_claims(train, train),
        as_claims(validation, train + validation),
        as_claims(test, test),
        f"claims about built-in facts that the model has learned ({_facts()}), true or false with probability 1/2; the "
        "edit always turns the class around (in FEVER as MEND used it half of the edits ask for the class that the "
        "model gives anyway, which any method gets right by doing nothing); probes are such claims of the same split",
    )


def _wikitext(
    name: str, data: Path | None, progress: Progress, sizes: tuple[int, int, int] = (500, 50, 150)
) -> Task:
    found = read_passages(_file(name, data, "wikitext2-valid.txt"))
    records = continuations(found.prompts, sum(sizes), partial(models.load, _SMOLLM), _SMOLLM, progress)
    train, rest = records[: sizes[0]], records[sizes[0] :]
    return Task(
        name,
        _SMOLLM,
        "generation",
        train,
        rest[: sizes[1]],
        rest[sizes[1] :],
        "20 to 40 words of a Wikitext-2 paragraph, to be continued by 10 tokens that the model itself gave "
        "(temperature 1) when it saw the second half of them only; a paraphrase lacks up to half of the words",
        found.train,
        found.test,
    )


def _paper(name: str, data: Path | None, progress: Progress) -> Task:
    check([name], data)
    assert data is not None
    parts = real.parts_of(name, data)
    model = real.model_of(name, data)
    what = MODELS[PAPER_TASKS[name]].task
    kind: Kind = "qa" if what == "question answering" else what
    return Task(
        name,
        model,
        kind,
        parts.train,
        parts.validation,
        parts.test,
        "the paper's data; the last training records choose the best editor, the validation file is measured on",
        parts.passages,
        parts.test_passages,
    )


TASKS: dict[str, Callable[[str, Path | None, Progress], Task]] = {
    "counterfact": _counterfact,
    "counterfact-text": _counterfact_text,
    "zsre": _zsre,
    "atlas": _atlas,
    "atlas-t5": _questions,
    "atlas-bart": _questions,
    "atlas-bert": _fact_checking,
    "wikitext": _wikitext,
    **dict.fromkeys(PAPER_TASKS, _paper),
}
"""The tasks by name."""

FILES = {
    "counterfact": ("counterfact-train.json", "counterfact-dev.json"),
    "counterfact-text": ("counterfact-train.json", "counterfact-dev.json", "wikitext2-valid.txt"),
    "zsre": ("zsre-mend-dev.json",),
    "wikitext": ("wikitext2-valid.txt",),
    **{task: files.every for task, files in real.FILES.items()},
}
"""The files that a task reads."""


def _known() -> tuple[tuple[Record, ...], tuple[Record, ...], tuple[Record, ...]]:
    train = known("train")
    return train[:-_HELD_BACK], train[-_HELD_BACK:], known("test")


def _facts() -> str:
    return (
        f"the first {FACTS[0]} training records, the last {_HELD_BACK} of them for validation, and the first "
        f"{FACTS[1]} test records"
    )


def _file(name: str, data: Path | None, file: str) -> Path:
    """A file of the data folder."""
    if data is not None and (data / file).is_file():
        return data / file
    where = "no data folder was given" if data is None else f"{data} does not hold it"
    raise DataError(
        f"The task {name!r} reads {file}, but {where}; give a folder with that file: {_LAYOUTS.get(file, _PAPER_FILE)}."
    )
