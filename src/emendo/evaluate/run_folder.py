"""The folder of an evaluation run.

::

    RUN/run.json         what was asked, with which versions, and in the end what came of it
        records.jsonl    the facts
        parts/           answers on the way, part by part; they go when the run is done
        answers.parquet  every raw answer: one row for each prompt of each record
        edits.parquet    every edit: rank, size at each site, seconds, damage
        lm-eval.jsonl    where the evaluation harness was asked: what was said to each of its questions
        report.html, summary.md

The same command goes on where it was stopped: a part that is there is not measured again.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from emendo._outputs import EVALUATION, claim, clear
from emendo._storage import digest, new_file, read_json, write_json
from emendo._version import __version__
from emendo.data.records import read_records, write_records
from emendo.data.schema import Record
from emendo.editors.base import Editor
from emendo.errors import StorageError
from emendo.evaluate.answers import read_answers, write_answers
from emendo.evaluate.evaluation import Checkpoint, Evaluation, SequentialEvaluation
from emendo.evaluate.results import Result

FORMAT = 1


@dataclass
class RunFolder:
    """An evaluation run and its folder.

    Attributes:
        folder: where it is kept.
        records: the facts.
        head: what ``run.json`` says.
    """

    folder: Path
    records: tuple[Record, ...]
    head: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def begin(
        cls,
        folder: Path,
        records: Sequence[Record],
        asked: Mapping[str, Any],
        *,
        command: str = "",
        overwrite: bool = False,
    ) -> RunFolder:
        """Claim a folder for a run, or go on with the one that it holds.

        Args:
            folder: where it shall be kept.
            records: the facts.
            asked: all that the answers depend on beside them, as JSON values.
            command: how to do it again, for people.
            overwrite: replace a run of another kind.

        Raises:
            StorageError: the folder holds something else, or cannot be written.
        """
        key = digest({"asked": dict(asked), "records": [asdict(record) for record in records]})
        if (folder / "run.json").exists() and not overwrite:
            run = cls.open(folder)
            if run.head["key"] != key:
                raise StorageError(
                    f"{folder} holds an evaluation of something else ({run.head['command'] or 'unknown'}); choose "
                    "another --out, or replace it with --overwrite."
                )
            return run
        clear(claim(folder, EVALUATION, overwrite=overwrite), EVALUATION)
        folder.mkdir(parents=True, exist_ok=True)
        write_records(records, folder / "records.jsonl")
        head = {
            "format": FORMAT,
            "key": key,
            "command": command,
            "asked": dict(asked),
            "versions": versions(),
        }
        run = cls(folder, tuple(records), {**head, "result": None})
        run._write_head()
        return run

    @classmethod
    def open(cls, folder: Path) -> RunFolder:
        """Read the run that a folder holds.

        Raises:
            StorageError: it holds none, or a damaged one.
        """
        if not (folder / "run.json").exists():
            raise StorageError(f"{folder} holds no evaluation; make one with: emendo evaluate --out {folder}")
        head = read_json(folder / "run.json")
        if not isinstance(head, dict) or head.get("format") != FORMAT or "key" not in head:
            raise StorageError(
                f"{folder / 'run.json'} is not an evaluation that this version of emendo can read."
            )
        return cls(folder, read_records(folder / "records.jsonl").records, head)

    @property
    def finished(self) -> bool:
        """Whether all of it has been measured."""
        return self.head.get("result") is not None

    @property
    def begun(self) -> int:
        """How many parts there are on the way."""
        return len([*(self.folder / "parts").glob("*.edits.parquet")])

    def read(self, number: int, records: Sequence[Record]) -> tuple[Result, ...] | None:
        """A part; see :class:`emendo.evaluate.run.ResultStore`."""
        found = read_answers(self.folder / "parts", f"{number:05d}.", self.records)
        return None if found is None else tuple(result for _, result in found)

    def write(self, number: int, results: Sequence[Result]) -> None:
        """Keep a part."""
        places = {id(record): place for place, record in enumerate(self.records)}
        rows = [(places[id(result.record)], result) for result in results]
        (self.folder / "parts").mkdir(exist_ok=True)
        write_answers(self.folder / "parts", f"{number:05d}.", rows)

    def finish(
        self, found: Evaluation | SequentialEvaluation, rows: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        """Keep all answers as few files and what else was found; the parts go.

        A sequence is kept as ``right-after.*`` and, for each checkpoint, ``after-N.*``.

        Args:
            found: all of it.
            rows: the answers to the evaluation harness's questions, as JSON values.

        Raises:
            StorageError: something cannot be written; the parts are still there.
        """
        rest: tuple[str, ...] = ("protocol", "clean", "harness")
        if isinstance(found, SequentialEvaluation):
            for point in found.checkpoints:
                write_answers(self.folder, f"after-{point.edits}.", enumerate(point.results))
            write_answers(self.folder, "right-after.", enumerate(found.right_after))
        else:
            rest += ("seconds_per_edit", "seconds_per_edit_in_batch", "cost")
            write_answers(self.folder, "", enumerate(found.results))
        if rows:
            with new_file(self.folder / "lm-eval.jsonl") as temporary:
                lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                temporary.write_text("".join(lines), encoding="utf-8")
        self.head["result"] = {name: getattr(found, name) for name in rest}
        if isinstance(found, SequentialEvaluation):
            self.head["checkpoints"] = [point.edits for point in found.checkpoints]
        self._write_head()
        shutil.rmtree(self.folder / "parts", ignore_errors=True)

    def found(self) -> Evaluation | SequentialEvaluation:
        """What was found.

        Raises:
            StorageError: the run has not finished, or a file is damaged.
        """
        if not self.finished:
            raise StorageError(
                f"The run in {self.folder} has not finished; go on with: {self.head['command']}"
            )
        if "checkpoints" not in self.head:
            return Evaluation(self._results(""), **self.head["result"])
        points = tuple(Checkpoint(n, self._results(f"after-{n}.")) for n in self.head["checkpoints"])
        return SequentialEvaluation(self._results("right-after."), points, **self.head["result"])

    def evaluation(self) -> Evaluation:
        """What was found, where that is no sequence.

        Raises:
            StorageError: the run has not finished, is a sequence, or a file is damaged.
        """
        found = self.found()
        if isinstance(found, SequentialEvaluation):
            raise StorageError(f"{self.folder} holds a sequence of edits, not edits one at a time.")
        return found

    def _results(self, stem: str) -> tuple[Result, ...]:
        found = read_answers(self.folder, stem, self.records)
        if found is None:
            raise StorageError(
                f"{self.folder / stem}edits.parquet is missing; measure anew with --overwrite."
            )
        return tuple(result for _, result in found)

    def _write_head(self) -> None:
        with new_file(self.folder / "run.json") as temporary:
            write_json(temporary, self.head)


def editor_digest(editor: Editor) -> str:
    """16 hex digits that stand for an editor: its method, settings, sites and every number it learnt."""
    found = hashlib.blake2b(digest_size=8)
    sites = [asdict(site) for site in editor.sites]
    found.update(digest({"name": editor.name, "config": asdict(editor.config), "sites": sites}).encode())
    for name, tensor in editor.state_dict().items():
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def versions() -> dict[str, str]:
    """What it was measured with; of a checkout also the commit, with ``+`` where files differ from it."""
    found = {"emendo": __version__, "torch": torch.__version__, "python": platform.python_version()}
    git = ("git", "-C", str(Path(__file__).parents[1]))

    def said(*what: str) -> str:
        return subprocess.run(
            (*git, *what), capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        said("ls-files", "--error-unmatch", "__init__.py")  # a checkout, and not just installed below one
        where, dirty = said("rev-parse", "--short=12", "HEAD"), said("status", "--porcelain", "-uno", ".")
    except (OSError, subprocess.SubprocessError):
        return found
    return found | {"commit": where + ("+" if dirty else "")}
