"""The paper's tables as lists of rows and columns: which editor, on which task."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from emendo.editors import editor_class
from emendo.errors import RequestError
from reproduction.mend_paper import claims, paper, real
from reproduction.mend_paper.budgets import ABLATIONS, EDITORS, UNCLAIMED, Choice
from reproduction.mend_paper.cells import Cell
from reproduction.mend_paper.grid import Column, Place, Preset
from reproduction.mend_paper.memory import Memory

_BERT = Column("fact-checking", "MiniLM encoder taught on atlas claims", paper.FEVER)
_BART = Column("question answering", "BART 4+4 made on atlas", paper.ZSRE)
_T5 = Column("question answering, T5", "T5 4+4 made on atlas", "")
_TEXT = Column("generation", "SmolLM2-135M, Wikitext-2", paper.WIKITEXT, "perplexity")
_FACTS = Column("completion", "SmolLM2-135M, CounterFact", "")
_TASKS = {"atlas-bert": _BERT, "atlas-bart": _BART, "atlas-t5": _T5, "wikitext": _TEXT, "counterfact": _FACTS}


def build(name: str, choice: Choice) -> Preset:
    """A table by its name.

    Raises:
        RequestError: there is no such table, or no part of it is requested.
    """
    known = every()
    if name not in known:
        raise RequestError(f"There is no preset {name!r}; there are: {', '.join(known)}.")
    preset = known[name](choice)
    if not preset.cells:
        raise RequestError(f"Nothing of {name} is left with these --tasks and --editors.")
    return preset


def every() -> Mapping[str, Callable[[Choice], Preset]]:
    """Every table: those of the stand-ins, then those of the paper's own models and data."""
    return {**PRESETS, **real.TABLES}


def names_of(asked: Iterable[str]) -> list[str]:
    """Presets by their names, each once; ``all`` stands for those of the stand-ins."""
    return list(dict.fromkeys(name for each in asked for name in (PRESETS if each == "all" else [each])))


def _table4(choice: Choice) -> Preset:
    tasks = ("atlas-bert", "atlas-bart", "wikitext")
    return Preset(
        "table4",
        "Small models (Table 4)",
        "One edit at a time, each from the clean model. The rows below MEND are not in the paper's table.",
        tuple(_TASKS[task] for task in tasks),
        tuple(EDITORS.values()),
        _editors_by_tasks(choice, tasks),
        paper.TABLE4,
        (
            claims.edits_better("MEND", "FT"),
            claims.edits_better("MEND", "FT+KL"),
            claims.succeeds_more("MEND", "KE"),
            claims.succeeds_more("MEND", "Meta-curvature"),
            claims.succeeds_more("MEND", "Meta-SGD"),
            claims.succeeds_more("MEND", "Meta-LSTM"),
        ),
    )


def _table3(choice: Choice) -> Preset:
    return Preset(
        "table3",
        "The largest model (Table 3)",
        "The paper edits models of 2.8 to 11 billion parameters here; this is the largest available one, so the "
        "paper's columns are not directly comparable. ENN did not run at that size there.",
        (_FACTS, *_quoted(paper.NEO, paper.GPTJ, paper.XL, paper.XXL)),
        tuple(EDITORS.values()),
        _editors_by_tasks(choice, ("counterfact",)),
        paper.TABLE3,
        (
            claims.edits_better("MEND", "FT"),
            claims.edits_better("MEND", "FT+KL"),
            claims.succeeds_more("MEND", "KE"),
        ),
    )


def _table5(choice: Choice) -> Preset:
    ks, alone = (1, 5, 25, 75, 125), "MEND, trained for k = 1"
    cells: dict[Place, Cell | Memory] = {}
    for k in ks:
        for editor in ("enn", "mend"):
            if choice.wants("atlas-bart", editor):
                cells[f"k = {k}", EDITORS[editor]] = choice.together("atlas-bart", editor, k)
        if choice.wants("atlas-bart", "mend"):
            cells[f"k = {k}", alone] = replace(
                choice.cell("atlas-bart", "mend"),
                k=k,
                trained_for=1,
                facts=choice.together("atlas-bart", "mend", k).facts,
            )
    return Preset(
        "table5",
        "Many edits at once (Table 5)",
        f"k facts are put into one edit. An editor is trained for each k; the last column is one that was trained for "
        f"single edits. {_BART.here}; in the paper {paper.ZSRE}. The intervals take facts of one edit as independent.",
        tuple(Column(name, name, "") for name in ("ENN", "MEND", alone)),
        tuple(f"k = {k}" for k in ks),
        cells,
        paper.TABLE5,
        (claims.falls_faster("ENN", "MEND"), claims.falls_faster(alone, "MEND")),
        along="facts in one edit",
    )


def _table6(choice: Choice) -> Preset:
    tasks = [task for task in ("wikitext", "atlas-bart") if choice.wants(task, "mend")]
    return Preset(
        "table6",
        "Parts of MEND (Table 6)",
        "Each row leaves one part out. The paper says that leaving out the normalisation or the identity start also "
        "makes training about ten times longer; here every row has the same number of steps.",
        (_TEXT, _BART),
        tuple(ABLATIONS),
        {
            (row, _TASKS[task].name): choice.cell(task, "mend", settings=settings)
            for row, settings in ABLATIONS.items()
            for task in tasks
        },
        paper.TABLE6,
        tuple(claims.succeeds_more("MEND", row) for row in ABLATIONS if row not in UNCLAIMED),
    )


OBJECTIVES: Mapping[str, Mapping[str, Any]] = {
    "ENN": {},
    "ENN, task loss": {"base_loss": "task"},
    "ENN, hinge": {"edit_loss": "hinge"},
    "ENN, squared logits": {"locality_loss": "squares"},
    "ENN, task loss, hinge": {"base_loss": "task", "edit_loss": "hinge"},
}
"""ENN by its three losses; the first row distils, with NLL and KL."""


def _eq5(choice: Choice) -> Preset:
    tasks = ("atlas-bert", "atlas-bart", "wikitext")
    cells: dict[Place, Cell | Memory] = {}
    for task in tasks:
        if choice.wants(task, "mend"):
            cells["MEND", _TASKS[task].name] = choice.cell(task, "mend")
        for row, settings in OBJECTIVES.items() if choice.wants(task, "enn") else ():
            cells[row, _TASKS[task].name] = choice.cell(task, "enn", settings=settings)
    return Preset(
        "eq5",
        "The losses of ENN (Eq. 5 and 6)",
        "The base loss is that of the model's own task, as in Eq. 5, or a KL to the original model, as in the paper's "
        "code; the edit loss is NLL or a hinge, the locality loss KL or the squared difference of the logits. The "
        "second table has both drifts of the trained model without an edit: of its predictions and of its task loss. "
        "Memory: figure4.",
        tuple(_TASKS[task] for task in tasks),
        ("MEND", *OBJECTIVES),
        cells,
        {row: quoted for row, quoted in paper.TABLE4.items() if row in ("MEND", "ENN")},
    )


def _table9(choice: Choice) -> Preset:
    tasks = [task for task in ("counterfact", "atlas-t5") if choice.wants(task, "mend")]
    sites = {"MEND, attention": "attention", "MEND, MLP": "mlp"}
    return Preset(
        "table9",
        "Which matrices to edit (Table 9)",
        "The attention matrices of the same blocks instead of the MLP matrices.",
        (_FACTS, _T5, *_quoted(paper.NEO, paper.GPTJ, paper.XL, paper.XXL)),
        tuple(sites),
        {
            (row, _TASKS[task].name): choice.cell(task, "mend", sites=which)
            for row, which in sites.items()
            for task in tasks
        },
        paper.TABLE9,
        (claims.succeeds_more("MEND, MLP", "MEND, attention"),),
    )


def _table11(choice: Choice) -> Preset:
    cells: dict[Place, Cell | Memory] = {}
    for task in ("atlas-bert", "atlas-bart", "wikitext"):
        column = _TASKS[task].name
        if choice.wants(task, "mend"):
            cells["MEND", column] = choice.cell(task, "mend")
        for row, times in (("Cache, eps*", 1.0), ("Cache, eps*/2", 0.5), ("Cache, 2 eps*", 2.0)):
            if choice.wants(task, "cache"):
                cells[row, column] = choice.cell(task, "cache", times=times)
    return Preset(
        "table11",
        "A cache instead of an editor (Table 11)",
        "The cache gives the stored target wherever the hidden state is within eps of the edit's; eps* is the largest "
        "radius whose drawdown on validation facts is no more than MEND's.",
        (_BERT, _BART, *_quoted(paper.HARD), _TEXT),
        ("MEND", "Cache, eps*", "Cache, eps*/2", "Cache, 2 eps*"),
        cells,
        paper.TABLE11,
        (
            claims.succeeds_more("MEND", "Cache, eps*", only=_TEXT.name),
            claims.succeeds_more("Cache, eps*", "Cache, eps*/2"),
            claims.harms_more("Cache, 2 eps*", "Cache, eps*"),
        ),
    )


def _figure4(choice: Choice) -> Preset:
    models = {f"GPT-2 type, {width} wide": ("atlas-bart", width) for width in (128, 256, 512, 1024)}
    models |= {
        "MiniLM encoder": ("atlas-bert", 0),
        "BART 4+4": ("atlas-bart", 0),
        "SmolLM2-135M": ("smollm2-135m", 0),
    }
    task_loss = "ENN, task loss"
    trained: dict[str, tuple[str, Mapping[str, Any]]] = {
        label: (name, {})
        for name, label in EDITORS.items()
        if editor_class(name).needs_training and name != "meta-lstm"  # hours
    }
    trained[task_loss] = ("enn", OBJECTIVES[task_loss])
    return Preset(
        "figure4",
        "Memory during training (Figures 3 and 4)",
        f"MB above the bare model's, on one processor. {paper.MEMORY}",
        tuple(Column(name, name, "") for name in models),
        tuple(trained),
        {
            (row, name): Memory(model, editor, width, settings)
            for name, (model, width) in models.items()
            for row, (editor, settings) in trained.items()
            if not choice.editors or editor in choice.editors
        },
        {},
        (claims.grows_faster("ENN", "MEND"), claims.grows_faster("ENN", "KE")),
        along="millions of parameters of the model",
    )


SHIPPED = "mend-smollm2-135m"
"""The trained editor among the norms."""
STEPS, LAST = 12, 1
"""Steps of an edit there, and the number of blocks that fine-tuning changes."""
NORMS: Mapping[str, tuple[str, Mapping[str, Any], str, tuple[float, ...]]] = {
    "L2 penalty": ("ft-penalised", {"norm": "l2"}, "coefficient", (1.0, 10.0, 100.0, 1000.0)),
    "L-inf penalty": ("ft-penalised", {"norm": "linf"}, "coefficient", (100.0, 400.0, 1600.0)),
    "L0 penalty": ("diff-pruning", {"gate_lr": 1.0}, "coefficient", (1e-8, 1e-7, 1e-6)),
    "EWC": ("ewc", {"texts": 32}, "coefficient", (1e3, 3e4, 1e6)),
    "L-inf ball": ("ft-constrained", {"norm": "linf"}, "radius", (5e-4, 2e-4, 5e-5)),
}
"""The paths: method, settings, the setting that varies, and its values from loose to tight."""


def _norms(choice: Choice) -> Preset:
    task, place = "counterfact-text", _FACTS.name
    cells: dict[Place, Cell | Memory] = {}
    if choice.wants(task, "mend"):
        cells["MEND", place] = choice.cell(task, "mend", shipped=SHIPPED)
    if choice.wants(task, "ft"):
        cells["FT", place] = choice.cell(task, "ft", last=LAST)
    paths = {}
    for name, (editor, settings, varied, values) in NORMS.items():
        paths[name] = tuple(f"{name}, {value:g}" for value in values)
        for row, value in zip(paths[name], values, strict=True):
            if choice.wants(task, editor):
                own = {**settings, varied: value, "steps": STEPS}
                cells[row, place] = choice.cell(task, editor, settings=own, last=LAST)
    return Preset(
        "norms",
        "Norms and a single example",
        "De Cao et al. (2021) find that a limit on the norm of a change does not keep fine-tuning on one example from "
        "damaging the rest. Each path is a norm from its loosest to its tightest coefficient or radius. Fine-tuning "
        "changes the MLP matrices of the last block, one block as Zhu et al. (2020) advise; MEND is the editor that "
        "ships, for those of the last three. Each edit by itself.",
        (replace(_FACTS, drawdown="perplexity"),),
        ("MEND", "FT", *(row for rows in paths.values() for row in rows)),
        cells,
        {},
        tuple(claims.degrades(name, "MEND") for name in paths),
        paths=paths,
    )


def _editors_by_tasks(choice: Choice, tasks: Iterable[str]) -> dict[Place, Cell | Memory]:
    return {
        (label, _TASKS[task].name): choice.cell(task, editor)
        for task in tasks
        for editor, label in EDITORS.items()
        if choice.wants(task, editor)
    }


def _quoted(*names: str) -> Iterator[Column]:
    """Columns of the paper alone."""
    return (Column(name, "", name) for name in names)


PRESETS: Mapping[str, Callable[[Choice], Preset]] = {
    "table4": _table4,
    "table3": _table3,
    "table5": _table5,
    "table6": _table6,
    "eq5": _eq5,
    "table9": _table9,
    "table11": _table11,
    "figure4": _figure4,
    "norms": _norms,
}
"""The tables of the stand-ins by name."""
