"""A run's folder: raw answers to the last bit, a killed run that goes on, several processes that share one."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cases import records
from damage import Damage, cut, full_disk, remove, rewrite, without
from emendo.data import Record
from emendo.editors.mend import Mend, MendConfig
from emendo.errors import StorageError
from emendo.evaluate import Evaluation, Result, answers, evaluate
from emendo.evaluate.run_folder import RunFolder, editor_digest
from emendo.models.lm import LM
from emendo.models.sites import find_sites
from evaluate.samples import evaluation


def mend(lm: LM, alpha: float = 0.3) -> Mend:
    return Mend(find_sites(lm.model, last=1), MendConfig(rank=4, alpha=alpha, norm=False)).eval()


def some(n: int) -> list[Record]:
    return [dataclasses.replace(r, paraphrases=r.paraphrases[:1], unrelated=()) for r in records(n)]


def figures(found: Evaluation) -> dict[str, object]:
    """All but times."""
    plain = found.as_dict()
    return {
        k: v for k, v in plain.items() if k not in ("seconds_per_edit", "seconds_per_edit_in_batch", "cost")
    }


def test_rows_are_kept_to_the_last_bit(tmp_path: Path) -> None:
    found = evaluation(before=0.1 + 0.2, kl=math.inf, other="ö \n'", rank_after=7, exact=True)
    results = [
        dataclasses.replace(r, norms={"a.b": 1 / 3}, damage={"perplexity": math.inf}, edit=i)
        for i, r in enumerate(found.results)
    ]
    answers.write_answers(tmp_path, "x.", enumerate(results))
    back = answers.read_answers(tmp_path, "x.", [r.record for r in results])
    assert back == list(enumerate(results))
    assert answers.read_answers(tmp_path, "y.", []) is None


def test_what_is_no_number_is_null_in_json(tmp_path: Path) -> None:
    found = dataclasses.replace(evaluation(), clean={"perplexity": math.inf}, cost={"x": math.nan})
    run = RunFolder.begin(tmp_path / "run", [r.record for r in found.results], {})
    run.finish(found, [{"answer": math.nan}])
    for file in ("run.json", "lm-eval.jsonl"):
        text = (run.folder / file).read_text(encoding="utf-8")
        json.loads(text, parse_constant=pytest.fail)
    assert RunFolder.open(run.folder).evaluation().clean == {"perplexity": None}


def pipe(name: str) -> Damage:
    """Put a named pipe, which nobody writes to, in the place of a file."""

    def damage(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return damage


def column(name: str, field: str, change: Callable[[list[object]], list[object]] | None) -> Damage:
    """Change or remove a column of a Parquet file."""

    def damage(folder: Path) -> None:
        table = pq.read_table(folder / name)
        values = table.column(field).to_pylist()
        table = table.drop_columns([field])
        pq.write_table(
            table if change is None else table.append_column(field, [change(values)]), folder / name
        )

    return damage


class Killed(Exception):
    pass


class Mortal(RunFolder):
    """Dies before its second part is written."""

    def write(self, number: int, results: Sequence[Result]) -> None:
        if number == 1:
            raise Killed
        super().write(number, results)


def test_a_killed_run_goes_on_and_gives_the_same_figures(tiny_llama: LM, tmp_path: Path) -> None:
    editor, chosen = mend(tiny_llama), some(6)
    whole = evaluate(tiny_llama, editor, chosen, batch=2, new_tokens=3)
    folder = tmp_path / "run"
    run = RunFolder.begin(folder, chosen, {"editor": editor_digest(editor)}, command="emendo evaluate x")
    mortal = Mortal(folder, run.records, run.head)
    with pytest.raises(Killed):
        evaluate(tiny_llama, editor, mortal.records, batch=2, new_tokens=3, parts=mortal)
    assert run.begun == 1 and not run.finished
    with pytest.raises(StorageError, match="resume it with: emendo evaluate x"):
        run.evaluation()
    again = RunFolder.begin(folder, chosen, {"editor": editor_digest(editor)})
    measured: list[int] = []
    write = again.write
    again.write = lambda number, results: measured.append(number) or write(number, results)  # type: ignore[assignment,func-returns-value]
    found = evaluate(tiny_llama, editor, again.records, batch=2, new_tokens=3, parts=again)
    assert measured == [1, 2]
    assert figures(found) == figures(whole)
    again.finish(found)
    read = RunFolder.open(folder).evaluation()
    assert read.as_dict() == found.as_dict()
    assert not (folder / "parts").exists()


def test_processes_that_share_a_run_give_what_one_gives(tiny_llama: LM, tmp_path: Path) -> None:
    editor, chosen = mend(tiny_llama), some(5)
    whole = evaluate(tiny_llama, editor, chosen, batch=2, generated=False)
    run = RunFolder.begin(tmp_path / "run", chosen, {})
    shares = [
        evaluate(tiny_llama, editor, run.records, batch=2, generated=False, parts=run, share=(rank, 2))
        for rank in (0, 1)
    ]
    assert [len(share.results) for share in shares] == [3, 2]
    assert figures(evaluate(tiny_llama, editor, run.records, batch=2, generated=False, parts=run)) == figures(
        whole
    )


def test_another_run_is_not_overwritten_unasked(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = RunFolder.begin(folder, some(2), {"batch": 1}, command="the first")
    run.finish(dataclasses.replace(evaluation(), results=()))
    for asked, chosen in (({"batch": 2}, some(2)), ({"batch": 1}, some(3))):
        with pytest.raises(StorageError, match=r"another evaluation \(the first\).*--overwrite"):
            RunFolder.begin(folder, chosen, asked)
    assert RunFolder.begin(folder, some(2), {"batch": 1}).finished
    assert not RunFolder.begin(folder, some(3), {"batch": 1}, overwrite=True).finished


def test_a_run_killed_before_its_records_were_written_is_resumed(tmp_path: Path) -> None:
    run = RunFolder.begin(tmp_path / "run", some(2), {})
    (run.folder / "records.jsonl").unlink()
    assert RunFolder.begin(run.folder, some(2), {}).records == tuple(some(2))
    assert RunFolder.open(run.folder).records == tuple(some(2))


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(StorageError, match="not emendo's"):
            RunFolder.begin(tmp_path, some(1), {}, overwrite=overwrite)
    with pytest.raises(StorageError, match="no evaluation"):
        RunFolder.open(tmp_path)


@pytest.mark.parametrize(
    "harm",
    [
        cut("answers.parquet"),
        remove("answers.parquet"),
        cut("edits.parquet"),
        cut("run.json"),
        rewrite("run.json", lambda head: without(head, "key")),
        remove("records.jsonl"),
        pipe("run.json"),
        pipe("answers.parquet"),
        column("answers.parquet", "kind", lambda values: ["fame"] * len(values)),
        column("answers.parquet", "known", lambda values: [None] * len(values)),
        column("answers.parquet", "before", lambda values: ["much"] * len(values)),
        column("answers.parquet", "prompt", None),
        column("edits.parquet", "record", lambda values: [-1] * len(values)),
        column("edits.parquet", "record", lambda values: [None] * len(values)),
        column("edits.parquet", "norms", None),
        rewrite("run.json", lambda head: head | {"result": 5}),
        rewrite("run.json", lambda head: head | {"result": without(head["result"], "protocol")}),
        rewrite("run.json", lambda head: head | {"result": head["result"] | {"seconds_per_edit": "long"}}),
        rewrite("run.json", lambda head: head | {"result": head["result"] | {"clean": {"perplexity": []}}}),
        rewrite("run.json", lambda head: head | {"checkpoints": "all"}),
        rewrite("run.json", lambda head: head | {"format": 99}),
        rewrite("run.json", lambda head: [head]),
    ],
)
def test_damage_is_named(harm, tmp_path: Path) -> None:
    found = evaluation()
    run = RunFolder.begin(tmp_path / "run", [r.record for r in found.results], {})
    run.finish(found)
    harm(run.folder)
    with pytest.raises((StorageError, ValueError), match="run"):
        RunFolder.open(run.folder).evaluation()


def test_answers_of_other_records_are_refused(tmp_path: Path) -> None:
    answers.write_answers(tmp_path, "", enumerate(evaluation().results))
    with pytest.raises(StorageError, match="other records"):
        answers.read_answers(tmp_path, "", records(4)[2:])


def test_a_full_disk_keeps_the_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = evaluation()
    run = RunFolder.begin(tmp_path / "run", [r.record for r in found.results], {})
    run.write(
        0, [dataclasses.replace(r, record=own) for r, own in zip(found.results, run.records, strict=True)]
    )
    monkeypatch.setattr(answers.pq, "write_table", full_disk)
    with pytest.raises(StorageError, match="No space left"):
        run.finish(found)
    assert run.begun == 1


def test_an_editor_is_known_by_its_numbers(tiny_llama: LM) -> None:
    one, same, other = mend(tiny_llama), mend(tiny_llama), mend(tiny_llama, alpha=0.2)
    same.load_state_dict(one.state_dict())
    assert editor_digest(one) == editor_digest(same) != editor_digest(other)
    assert json.dumps(editor_digest(one))
