"""The folder of an evaluation run.

::

    RUN/run.json         the request, versions, and in the end the result
        records.jsonl    the facts
        parts/           answers of an unfinished run, part by part
        answers.parquet  every raw answer: one row for each prompt of each record
        edits.parquet    every edit: rank, size at each site, seconds, damage
        lm-eval.jsonl    the answers to the evaluation harness's questions, if it was run
        report.html, summary.md

A sequence has ``right-after.*.parquet`` and, for each checkpoint, ``after-N.*.parquet``. The same command resumes a
stopped run: a part that is there is not measured again.
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
from emendo._runs import has_run, read_run, write_run
from emendo._storage import digest, finite_values, new_file
from emendo._version import __version__
from emendo.data.records import read_records, write_records
from emendo.data.schema import Record
from emendo.editors.base import Editor
from emendo.errors import StorageError
from emendo.evaluate.answers import read_answers, write_answers
from emendo.evaluate.evaluation import Checkpoint, Evaluation, SequentialEvaluation
from emendo.evaluate.results import Result

RECORDS = "records.jsonl"
_RESULT = (
    "protocol",
    "clean",
    "harness",
)  # fields of a result in run.json; separate edits have these besides:
_SEPARATE = ("seconds_per_edit", "seconds_per_edit_in_batch", "cost", "routing")


@dataclass
class RunFolder:
    """An evaluation run and its folder.

    Attributes:
        folder: its folder.
        records: the facts.
        head: the contents of ``run.json``.
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
        """Claim a folder for a run, or resume the same run in it.

        Args:
            folder: the folder.
            records: the facts.
            asked: everything else that the answers depend on, as JSON values.
            command: the command line that measures the same.
            overwrite: replace another evaluation.

        Raises:
            StorageError: the folder holds something else, or cannot be written.
        """
        key = digest({"asked": dict(asked), "records": [record.as_dict() for record in records]})
        if has_run(folder) and not overwrite:
            head = cls._head(folder)
            if head["key"] != key:
                raise StorageError(
                    f"{folder} holds another evaluation ({head.get('command') or 'unknown'}); choose another "
                    "--out, or replace it with --overwrite."
                )
        else:
            clear(claim(folder, EVALUATION, overwrite=overwrite), EVALUATION)
            head = {
                "key": key,
                "command": command,
                "asked": dict(asked),
                "versions": versions(),
                "result": None,
            }
            write_run(folder, head)  # the marker first: killed from here on, the run can be resumed
        if not (folder / RECORDS).exists():
            write_records(records, folder / RECORDS)
        return cls(folder, tuple(records), head)

    @classmethod
    def open(cls, folder: Path) -> RunFolder:
        """Read the run in a folder.

        Raises:
            StorageError: there is none, or it is damaged.
        """
        head = cls._head(folder)
        return cls(folder, read_records(folder / RECORDS).records, head)

    @staticmethod
    def _head(folder: Path) -> dict[str, Any]:
        return read_run(folder, EVALUATION, f"to read; make one with: emendo evaluate --out {folder}")

    @property
    def finished(self) -> bool:
        """Whether all of it has been measured."""
        return self.head.get("result") is not None

    @property
    def begun(self) -> int:
        """The number of parts of an unfinished run."""
        return len([*(self.folder / "parts").glob("*.edits.parquet")])

    def read(self, number: int, records: Sequence[Record]) -> tuple[Result, ...] | None:
        """Read a part; see :class:`emendo.evaluate.run.ResultStore`."""
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
        """Write the result and remove the parts.

        Args:
            found: the result.
            rows: the answers to the evaluation harness's questions, as JSON values.

        Raises:
            StorageError: something cannot be written; the parts are still there.
        """
        names: tuple[str, ...] = _RESULT
        if isinstance(found, SequentialEvaluation):
            for point in found.checkpoints:
                write_answers(self.folder, f"after-{point.edits}.", enumerate(point.results))
            write_answers(self.folder, "right-after.", enumerate(found.right_after))
            self.head["checkpoints"] = [point.edits for point in found.checkpoints]
        else:
            names += _SEPARATE
            write_answers(self.folder, "", enumerate(found.results))
        if rows:
            with new_file(self.folder / "lm-eval.jsonl") as temporary:
                lines = (json.dumps(finite_values(row), ensure_ascii=False) + "\n" for row in rows)
                temporary.write_text("".join(lines), encoding="utf-8")
        self.head["result"] = finite_values({name: getattr(found, name) for name in names})
        write_run(self.folder, self.head)
        shutil.rmtree(self.folder / "parts", ignore_errors=True)

    def found(self) -> Evaluation | SequentialEvaluation:
        """The result.

        Raises:
            StorageError: the run has not finished, or a file is damaged.
        """
        if not self.finished:
            command = self.head.get("command") or "the same command"
            raise StorageError(f"The run in {self.folder} has not finished; resume it with: {command}")
        result, checkpoints = self.head["result"], self.head.get("checkpoints")
        self._check(result, checkpoints)
        if checkpoints is None:
            return Evaluation(self._results(""), **result)
        points = tuple(Checkpoint(n, self._results(f"after-{n}.")) for n in checkpoints)
        return SequentialEvaluation(self._results("right-after."), points, **result)

    def evaluation(self) -> Evaluation:
        """The result, if it is not a sequence.

        Raises:
            StorageError: the run has not finished, is a sequence, or a file is damaged.
        """
        found = self.found()
        if isinstance(found, SequentialEvaluation):
            raise StorageError(f"{self.folder} holds a sequence of edits, not edits made one at a time.")
        return found

    def _check(self, result: Any, checkpoints: Any) -> None:
        """Make sure that the result in ``run.json`` can be shown."""
        numbers, mappings = (
            (_SEPARATE[:2], (*_RESULT, *_SEPARATE[2:])) if checkpoints is None else ((), _RESULT)
        )
        good = (
            isinstance(result, dict)
            and set(result) <= {*numbers, *mappings}
            and {*numbers, "protocol"} <= set(result)
            and all(isinstance(result[name], int | float) for name in numbers)
            and all(isinstance(result.get(name, {}), dict) for name in mappings)
            and isinstance(result["protocol"].get("edits"), str)
            and all(
                value is None or isinstance(value, int | float)
                for name in ("clean", "cost")
                for value in result.get(name, {}).values()
            )
            and (not (tasks := result.get("harness")) or {"edits", "scores"} <= tasks.keys())
        )
        if checkpoints is not None:
            good &= isinstance(checkpoints, list) and bool(checkpoints)
            good &= all(isinstance(count, int) and count > 0 for count in checkpoints)
        if not good:
            raise StorageError(f"{self.folder / 'run.json'} is damaged; measure again with --overwrite.")

    def _results(self, stem: str) -> tuple[Result, ...]:
        found = read_answers(self.folder, stem, self.records)
        if not found:
            raise StorageError(
                f"{self.folder / stem}edits.parquet is missing or empty; measure again with --overwrite."
            )
        return tuple(result for _, result in found)


def editor_digest(editor: Editor) -> str:
    """16 hex digits that identify an editor: its method, settings, sites and trained numbers."""
    found = hashlib.blake2b(digest_size=8)
    sites = [asdict(site) for site in editor.sites]
    found.update(digest({"name": editor.name, "config": asdict(editor.config), "sites": sites}).encode())
    for name, tensor in editor.state_dict().items():
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def versions() -> dict[str, str]:
    """Versions of emendo, torch and Python; in a checkout also the commit, with ``+`` where files differ from it."""
    found = {"emendo": __version__, "torch": torch.__version__, "python": platform.python_version()}
    git = ("git", "-C", str(Path(__file__).parents[1]))

    def output(*what: str) -> str:
        return subprocess.run(
            (*git, *what), capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        output("ls-files", "--error-unmatch", "__init__.py")  # a checkout, not only installed inside one
        commit, dirty = (
            output("rev-parse", "--short=12", "HEAD"),
            output("status", "--porcelain", "-uno", "."),
        )
    except (OSError, subprocess.SubprocessError):
        return found
    return found | {"commit": commit + ("+" if dirty else "")}
