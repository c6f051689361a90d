"""The work of `emendo evaluate`: measure, keep the run in its folder, and write the pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from emendo._storage import digest, new_file
from emendo.cli._console import note
from emendo.cli._loading import passages
from emendo.cli._progress import show_progress
from emendo.data import Record
from emendo.data.abilities import OPENINGS, PASSAGES, abilities
from emendo.editors import Editor
from emendo.edits.edit import Request
from emendo.errors import RequestError
from emendo.evaluate import Evaluation, evaluate
from emendo.evaluate.damage import Damage
from emendo.evaluate.evaluation import SequentialEvaluation
from emendo.evaluate.harness import Harness
from emendo.evaluate.routed import evaluate_routed
from emendo.evaluate.run_folder import RunFolder, editor_digest, versions
from emendo.evaluate.sequential import RETENTION, evaluate_sequence
from emendo.ledger.guard import targets_reached
from emendo.ledger.health import Health, Limits
from emendo.ledger.probes import ProbeRunner, Probes
from emendo.low_rank import LowRank, applied
from emendo.memory import FALSE_FIRES
from emendo.models.lm import LM
from emendo.report.html import write_report
from emendo.report.markdown import summary
from emendo.train.processes import World

Found = Evaluation | SequentialEvaluation

PAGES = ("report.html", "summary.md")
"""The pages in a run's folder."""

_PASSAGES = 8  # of the user's text that are read


@dataclass(frozen=True, slots=True)
class EvaluateOptions:
    """The options of the command that affect the measurement.

    Attributes:
        generated: score free generation too.
        batch: the number of edits at once.
        together: the number of facts in one edit.
        sequential: make one edit after the other.
        routed: put all edits into one memory, where the prompt decides which one is in force.
        false_fires: the share of the prompts about other subjects that may fire an edit of a memory.
        subjects: tell the memory the subjects that the records name.
        ask_after: the checkpoints of a sequence.
        damage: measure damage.
        guard: let the ledger's guard refuse edits of a sequence.
        text: a file of plain text for the perplexity.
        harness: tasks of the evaluation harness.
        command: the command line that measures the same.

    Raises:
        RequestError: options that exclude each other.
    """

    generated: bool = True
    batch: int = 25
    together: int = 1
    sequential: bool = False
    routed: bool = False
    false_fires: float = FALSE_FIRES
    subjects: bool = False
    ask_after: Sequence[int] = RETENTION
    damage: bool = True
    guard: bool = False
    text: str | None = None
    harness: Harness | None = None
    command: str = ""

    def __post_init__(self) -> None:
        if self.guard and self.together != 1:
            raise RequestError("--guard checks edits of one fact; leave --together out.")
        if self.routed and (self.sequential or self.together != 1 or self.harness is not None):
            raise RequestError(
                "--routed keeps each edit by itself; leave --together, --sequential and --lm-eval out."
            )
        if not self.routed and (self.subjects or self.false_fires != FALSE_FIRES):
            raise RequestError("--subjects and --false-fires are for --routed; give it too.")
        if self.guard and not self.sequential:
            raise RequestError("--guard checks edits made one after the other; give --sequential too.")
        if self.text is not None and not self.damage:
            raise RequestError(
                "--text is for the perplexity, which --no-damage leaves out; give one of them."
            )


def harness(tasks: str | None, limit: int | None, folder: Path | None) -> Harness | None:
    """The tasks of the evaluation harness, from the options.

    Raises:
        RequestError: options that do not fit together, or the harness is not installed.
    """
    if tasks is None:
        if limit is not None or folder is not None:
            raise RequestError("--lm-eval-limit and --lm-eval-tasks are for the tasks that --lm-eval names.")
        return None
    return Harness([task.strip() for task in tasks.split(",")], limit, folder)


@dataclass(frozen=True)
class Job:
    """An evaluation to be done.

    Attributes:
        lm: the model.
        editor: makes the edits.
        records: the facts.
        options: how they are measured.
        unused: counts of unused fields and records of the file, by name.
    """

    lm: LM
    editor: Editor
    records: Sequence[Record]
    options: EvaluateOptions
    unused: Mapping[str, Any]

    def run(self, out: Path | None, team: World, *, overwrite: bool = False) -> Found:
        """Measure, in a folder or without one, alone or in several processes, and write the folder's pages.

        Raises:
            StorageError: the folder holds something else, or cannot be written.
            RequestError: something that does not fit the model.
        """
        damage = self._damage()
        if team.size > 1:
            return self._run_shared(damage, out, overwrite, team)
        if out is None:
            return self._measure(damage, None)
        run = self._begin(damage, out, overwrite)
        if run.finished:
            note(f"{out} holds this evaluation already; nothing is measured again.")
            found = run.found()
            if not all((out / name).exists() for name in PAGES):
                _write_pages(found, run)
            return found
        if run.begun:
            note(f"Resuming {out}: {run.begun} parts are done.")
        found = self._measure(damage, run)
        self._finish(run, found)
        return found

    def _run_shared(self, damage: Damage | None, out: Path | None, overwrite: bool, team: World) -> Found:
        """Measure a share of the run in each of several processes; the first of them assembles the results.

        Raises:
            RequestError: there is no folder to share, or the edits cannot be shared.
        """
        if out is None or self.options.sequential or self.options.routed:
            raise RequestError(
                "Several processes share a run through its folder: give --out. Edits one after the other "
                "(--sequential) or in one memory (--routed) cannot be shared."
            )
        if team.main:
            self._begin(damage, out, overwrite)
        team.wait()
        run = self._begin(damage, out, False)
        if not run.finished:
            share = self._measure(damage, run, (team.rank, team.size))
        team.wait()
        if not team.main:
            return run.found() if run.finished else share
        if not run.finished:
            self._finish(run, self._measure(damage, run))  # from the parts of all processes
        return run.found()

    def _begin(self, damage: Damage | None, out: Path, overwrite: bool) -> RunFolder:
        inputs = self._inputs(damage)
        return RunFolder.begin(out, self.records, inputs, command=self.options.command, overwrite=overwrite)

    def _finish(self, run: RunFolder, found: Found) -> None:
        run.finish(found, self.options.harness.rows if self.options.harness is not None else ())
        _write_pages(found, run)

    def _measure(
        self, damage: Damage | None, run: RunFolder | None, share: tuple[int, int] = (0, 1)
    ) -> Found:
        options = self.options
        records = self.records if run is None else run.records
        found: Found
        with show_progress() as progress:
            if options.sequential:
                found = evaluate_sequence(
                    self.lm,
                    self.editor,
                    records,
                    at=options.ask_after,
                    together=options.together,
                    generated=options.generated,
                    damage=damage,
                    gate=GuardGate(self.lm, self.editor) if options.guard else None,
                    parts=run,
                    harness=options.harness,
                    progress=progress,
                )
            elif options.routed:
                found = evaluate_routed(
                    self.lm,
                    self.editor,
                    records,
                    generated=options.generated,
                    batch=options.batch,
                    false_fires=options.false_fires,
                    subjects=options.subjects,
                    parts=run,
                    progress=progress,
                )
            else:
                found = evaluate(
                    self.lm,
                    self.editor,
                    records,
                    generated=options.generated,
                    batch=options.batch,
                    together=options.together,
                    damage=damage,
                    parts=run,
                    share=share,
                    harness=options.harness if share[1] == 1 else None,
                    progress=progress,
                )
        unused = dict(self.unused)
        if (rest := len(records) % options.together) and not options.sequential:
            unused["records of an incomplete last group"] = rest
        return replace(found, protocol={**found.protocol, "not_used": unused}) if unused else found

    def _damage(self) -> Damage | None:
        if not self.options.damage or self.options.routed or self.lm.kind != "causal":
            return None
        texts = PASSAGES[:4] if self.options.text is None else passages(self.options.text)[:_PASSAGES]
        return Damage(texts, abilities(self.records), OPENINGS if self.options.generated else ())

    def _inputs(self, damage: Damage | None) -> dict[str, Any]:
        """Everything that the answers depend on besides the records; runs with other inputs are not resumed."""
        options = self.options
        inputs = {
            "model": self.lm.name,
            "fingerprint": self.lm.fingerprint,
            "dtype": str(self.lm.model.dtype).removeprefix("torch."),
            "editor": self.editor.name,
            "editor_digest": editor_digest(self.editor),
            "generated": options.generated,
            "batch": options.batch,
            "together": options.together,
            "sequential": options.sequential,
        }
        if self.lm.chat:  # absent otherwise, so that runs from before there was --chat can be resumed
            inputs["chat"] = True
        if options.sequential:
            inputs["ask_after"] = list(options.ask_after)
            inputs["guard"] = options.guard
            if options.generated:
                inputs["retained_generated"] = True
        if options.routed:
            inputs["routed"] = [options.false_fires, options.subjects]
        if options.harness is not None:
            inputs["lm_eval"] = options.harness.asked()
        if damage is not None:
            inputs["damage"] = digest(
                [list(damage.passages), [str(i) for i in damage.items], list(damage.openings)]
            )
        return inputs


def _write_pages(found: Found, run: RunFolder) -> None:
    write_page(run.folder / PAGES[0], found, run.head)
    with new_file(run.folder / PAGES[1]) as temporary:
        temporary.write_text(summary(found, run.head), encoding="utf-8")
    note(f"Wrote {run.folder}: {', '.join(PAGES)}, and every answer as Parquet.")


def write_page(path: Path, found: Found, head: Mapping[str, Any]) -> None:
    """Write the report of an evaluation.

    Args:
        path: of the HTML file.
        found: the evaluation.
        head: the contents of the run's ``run.json``, or ``command`` and ``asked`` alone.

    Raises:
        StorageError: it cannot be written.
    """
    info = {
        "command": head.get("command"),
        **head.get("asked", {}),
        "versions": head.get("versions", versions()),
        "seed": "0, of the bootstrap; nothing else is random",
    }
    if isinstance(found, SequentialEvaluation):
        write_report(path, info=info, sequential=found)
    else:
        write_report(path, info=info, evaluation=found)


class GuardGate:
    """The ledger's guard as a :data:`emendo.evaluate.sequential.Gate`.

    Args:
        lm: the clean model.
        editor: makes the edits.
        limits: of the guard.

    Raises:
        RequestError: the editor does not change the model's own weights, which the guard watches.
    """

    def __init__(self, lm: LM, editor: Editor, limits: Limits | None = None) -> None:
        if why := editor.no_changes_of(lm):
            raise RequestError(f"--guard watches changes of the model's weights; {why}: leave --guard out.")
        self.lm, self.limits = lm, limits or Limits()
        self.size = {site.name: float(site.weight(lm.model).double().norm()) for site in editor.sites}
        self.probes = ProbeRunner(lm, Probes())
        self.clean = self.now = self.probes.run()
        self.prompts: list[str] = []

    def __call__(self, request: Request, change: Mapping[str, LowRank]) -> bool:
        """Whether the edit stays; the earlier edits are attached to the model."""
        with applied(self.lm.model, change):
            after = self.probes.run()
            hit = targets_reached(self.lm, [request.pair])
        edited = [*self.prompts, request.prompt]
        health = Health.of(
            edit_success=fmean(map(float, hit)),
            paraphrase_success=None,
            norm=max(float(delta.norm()) / self.size[name] for name, delta in change.items()),
            own=after.drift(self.now, edited),
            total=after.drift(self.clean, edited),
        )
        stays = not health.problems(self.limits)
        if stays:
            self.now, self.prompts = after, edited
        return stays
