"""What `emendo evaluate` does once its options are understood."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from emendo._storage import digest, new_file
from emendo.cli._console import note
from emendo.cli._loading import passages
from emendo.cli._processes import Processes
from emendo.cli._progress import show_progress
from emendo.data import Record
from emendo.data.abilities import OPENINGS, PASSAGES, abilities
from emendo.editors import Editor
from emendo.edits import Request, weight_norm
from emendo.errors import RequestError
from emendo.evaluate import Evaluation, evaluate
from emendo.evaluate.damage import Damage
from emendo.evaluate.evaluation import SequentialEvaluation
from emendo.evaluate.harness import Harness
from emendo.evaluate.run_folder import RunFolder, editor_digest, versions
from emendo.evaluate.sequential import RETENTION, evaluate_sequence
from emendo.ledger.guard import targets_reached
from emendo.ledger.health import Health, Limits
from emendo.ledger.probes import ProbeRunner, Probes
from emendo.low_rank import LowRank, applied
from emendo.models.lm import LM
from emendo.report.html import write_report
from emendo.report.markdown import summary

PAGES = ("report.html", "summary.md")
"""What a run's folder holds for people."""

_PASSAGES = 8
"""Passages of a text that the user gives."""


@dataclass(frozen=True, slots=True)
class Ask:
    """What the options say.

    Attributes:
        generated: measure free generation too.
        batch: how many edits are measured at once.
        together: facts in one edit.
        sequential: one edit after the other.
        ask_after: after how many edits of a sequence to ask for all so far.
        damage: look for damage.
        guard: let the ledger's guard refuse edits of a sequence.
        text: a file of plain text for the perplexity.
        harness: tasks of the evaluation harness to ask.
        command: how to do it again.
    """

    generated: bool = True
    batch: int = 25
    together: int = 1
    sequential: bool = False
    ask_after: Sequence[int] = RETENTION
    damage: bool = True
    guard: bool = False
    text: str | None = None
    harness: Harness | None = None
    command: str = ""

    def __post_init__(self) -> None:
        if self.sequential and self.together != 1:
            raise RequestError("--sequential makes one edit of each fact; leave --together out.")
        if self.guard and not self.sequential:
            raise RequestError("--guard stands before edits one after the other; it needs --sequential.")
        if self.text is not None and not self.damage:
            raise RequestError("--text is for the perplexity, which --no-damage leaves out.")


def harness(tasks: str | None, limit: int | None, folder: Path | None) -> Harness | None:
    """What the options about the evaluation harness say.

    Raises:
        RequestError: they do not go together, or the harness is not installed.
    """
    if tasks is None:
        if limit is not None or folder is not None:
            raise RequestError("--lm-eval-limit and --lm-eval-tasks are for the tasks that --lm-eval names.")
        return None
    return Harness([task.strip() for task in tasks.split(",")], limit, folder)


def measure(
    lm: LM, editor: Editor, records: Sequence[Record], ask: Ask, out: Path | None, *, overwrite: bool = False
) -> tuple[Evaluation | SequentialEvaluation, Sequence[Record]]:
    """Measure, in a folder or without one, and write the folder's report.

    Raises:
        StorageError: the folder holds something else, or cannot be written.
        RequestError: something that does not fit the model.
    """
    damage = _damage(lm, records, ask)
    team = Processes.present()
    if team.size > 1:
        return _shared(lm, editor, records, ask, damage, out, overwrite, team)
    if out is None:
        return _measured(lm, editor, records, ask, damage, None), records
    run = RunFolder.begin(
        out, records, _asked(lm, editor, ask, damage), command=ask.command, overwrite=overwrite
    )
    if run.finished:
        note(f"{out} holds this evaluation already; nothing is measured again.")
        found = run.found()
        if not all((out / name).exists() for name in PAGES):
            _pages(out, found, run)
        return found, run.records
    if run.begun:
        note(f"Going on with {out}: {run.begun} parts are there.")
    found = _measured(lm, editor, run.records, ask, damage, run)
    _finish(run, found, ask)
    return found, run.records


def _shared(
    lm: LM,
    editor: Editor,
    records: Sequence[Record],
    ask: Ask,
    damage: Damage | None,
    out: Path | None,
    overwrite: bool,
    team: Processes,
) -> tuple[Evaluation | SequentialEvaluation, Sequence[Record]]:
    """Measure a share of the run in each of several processes; the first of them puts all together.

    Raises:
        RequestError: there is no folder to share, or the edits cannot be shared.
    """
    if out is None or ask.sequential:
        raise RequestError(
            "Several processes share a run through its folder: give --out. Edits one after the other (--sequential) "
            "cannot be shared."
        )
    begun = (out, records, _asked(lm, editor, ask, damage))
    if team.first:
        RunFolder.begin(*begun, command=ask.command, overwrite=overwrite)
    team.wait()
    run = RunFolder.begin(*begun, command=ask.command)
    if not run.finished:
        share = _measured(lm, editor, run.records, ask, damage, run, (team.place, team.size))
    team.wait()
    if not team.first:
        return (run.found() if run.finished else share), run.records
    if not run.finished:
        _finish(run, _measured(lm, editor, run.records, ask, damage, run), ask)  # every part is there
    return run.found(), run.records


def _finish(run: RunFolder, found: Evaluation | SequentialEvaluation, ask: Ask) -> None:
    """Keep what was found, the harness's answers among it, and write the pages."""
    run.finish(found, ask.harness.rows if ask.harness is not None else ())
    _pages(run.folder, found, run)


def _pages(out: Path, found: Evaluation | SequentialEvaluation, run: RunFolder) -> None:
    """Write the report and the summary of a run."""
    write(out / PAGES[0], found, run.head)
    with new_file(out / PAGES[1]) as temporary:
        temporary.write_text(summary(found, run.head), encoding="utf-8")
    note(f"Wrote {out}: {', '.join(PAGES)}, and every answer as Parquet.")


def write(path: Path, found: Evaluation | SequentialEvaluation, head: Mapping[str, Any]) -> None:
    """Write the page.

    Raises:
        StorageError: it cannot be written.
    """
    info = {
        "command": head.get("command"),
        **head.get("asked", {}),
        "versions": head.get("versions", versions()),
    }
    info["seed"] = "0, of the bootstrap; nothing else is drawn"
    if isinstance(found, SequentialEvaluation):
        write_report(path, info=info, sequential=found)
    else:
        write_report(path, info=info, evaluation=found)


def _measured(
    lm: LM,
    editor: Editor,
    records: Sequence[Record],
    ask: Ask,
    damage: Damage | None,
    parts: RunFolder | None,
    share: tuple[int, int] = (0, 1),
) -> Evaluation | SequentialEvaluation:
    with show_progress() as progress:
        if ask.sequential:
            gate = Guarding(lm, editor) if ask.guard else None
            return evaluate_sequence(
                lm,
                editor,
                records,
                at=ask.ask_after,
                generated=ask.generated,
                damage=damage,
                gate=gate,
                parts=parts,
                harness=ask.harness,
                progress=progress,
            )
        return evaluate(
            lm,
            editor,
            records,
            generated=ask.generated,
            batch=ask.batch,
            together=ask.together,
            damage=damage,
            parts=parts,
            share=share,
            harness=ask.harness if share[1] == 1 else None,
            progress=progress,
        )


def _damage(lm: LM, records: Sequence[Record], ask: Ask) -> Damage | None:
    if not ask.damage or lm.kind != "causal":
        return None
    texts = PASSAGES[:4] if ask.text is None else passages(ask.text)[:_PASSAGES]
    return Damage(texts, abilities(records), OPENINGS if ask.generated else ())


def _asked(lm: LM, editor: Editor, ask: Ask, damage: Damage | None) -> dict[str, Any]:
    """All that the answers depend on beside the records."""
    asked = {
        "model": lm.name,
        "fingerprint": lm.fingerprint,
        "dtype": str(lm.model.dtype).removeprefix("torch."),
        "editor": editor.name,
        "editor_digest": editor_digest(editor),
        "generated": ask.generated,
        "batch": ask.batch,
        "together": ask.together,
        "sequential": ask.sequential,
    }
    if lm.chat:  # so that runs of before chat can go on
        asked["chat"] = True
    if ask.sequential:
        asked["ask_after"] = list(ask.ask_after)
        asked["guard"] = ask.guard
        if ask.generated:
            asked["retained_generated"] = True
    if ask.harness is not None:
        asked["lm_eval"] = ask.harness.asked()
    if damage is not None:
        asked["damage"] = digest(
            [list(damage.passages), [str(i) for i in damage.items], list(damage.openings)]
        )
    return asked


# --------------------
# The ledger's guard before the edits of a sequence that is being measured.


class Guarding:
    """Says of each edit whether the guard lets it stay, as :data:`emendo.evaluate.sequential.Gate` asks.

    Args:
        lm: the clean model.
        editor: what makes the edits.
        limits: what the guard lets pass.

    Raises:
        RequestError: the editor trains the model itself, so that there is no clean model to watch.
    """

    def __init__(self, lm: LM, editor: Editor, limits: Limits | None = None) -> None:
        if editor.host(lm) is not lm:
            raise RequestError(
                f"{editor.name} trains the model itself; --guard watches the clean one: leave it out."
            )
        self.lm, self.limits = lm, limits or Limits()
        self.size = {site.name: weight_norm(site.module(lm.model), site.shape) for site in editor.sites}
        self.probes = ProbeRunner(lm, Probes())
        self.clean = self.now = self.probes.run()
        self.prompts: list[str] = []

    def __call__(self, request: Request, change: Mapping[str, LowRank]) -> bool:
        """Look at the model with the change and without it, the earlier edits being attached."""
        with applied(self.lm.model, change):
            after = self.probes.run()
            hit = targets_reached(self.lm, [(request.prompt, request.target)])
        besides = [*self.prompts, request.prompt]
        health = Health.of(
            edit_success=fmean(map(float, hit)),
            paraphrase_success=None,
            norm=max(float(delta.norm()) / self.size[name] for name, delta in change.items()),
            own=after.drift(self.now, besides),
            total=after.drift(self.clean, besides),
        )
        stays = not health.problems(self.limits)
        if stays:
            self.now, self.prompts = after, besides
        return stays
