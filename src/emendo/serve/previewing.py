"""An edit tried on the working model: the answers before and after, and the guard's judgement. Nothing is applied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from emendo.editors import Editor
from emendo.edits import Request
from emendo.edits.edit import as_weights
from emendo.ledger.health import Health
from emendo.ledger.workspace import Workspace
from emendo.memory.bank import RoutedLM

Kind = Literal["edit", "paraphrase", "neighbour"]
_TOKENS = 12  # of an answer


@dataclass(frozen=True, slots=True)
class PreviewRow:
    """A prompt, answered without and with the edit.

    Attributes:
        kind: the edit's own prompt, a paraphrase, or a neighbour that must stay as it is.
        prompt: the prompt.
        before: the answer of the working model.
        after: the same with the edit.
        fires: whether the edit is in force for the prompt.
        score: of the router for the best edit, from 0 to 1.
    """

    kind: Kind
    prompt: str
    before: str
    after: str
    fires: bool
    score: float

    @property
    def right(self) -> bool:
        """Whether the edit is in force where it should be, and only there."""
        return self.fires == (self.kind != "neighbour")


@dataclass(frozen=True, slots=True)
class Preview:
    """What an edit would do.

    Attributes:
        rows: the prompts with their answers.
        health: the guard's figures.
        problems: those beyond the limits, in words.
    """

    rows: tuple[PreviewRow, ...]
    health: Health
    problems: tuple[str, ...]


def preview(
    work: Workspace,
    editor: Editor,
    request: Request,
    paraphrases: Sequence[str],
    neighbours: Sequence[str],
    scope: dict[str, Any],
) -> Preview:
    """Make an edit and try it.

    Args:
        work: the model, which nothing else runs at the same time, with its ledger and guard.
        editor: makes the edit.
        request: the prompt and its new answer.
        paraphrases: further prompts that ask for it.
        neighbours: prompts that must stay as they are.
        scope: as in :meth:`emendo.ledger.workspace.Workspace.apply`.

    Raises:
        RequestError: a text does not fit the model.
    """
    edit = as_weights(work.make(editor, [request]), "A ledger stores changes of weights")
    kinds: list[Kind] = ["edit", *["paraphrase"] * len(paraphrases), *["neighbour"] * len(neighbours)]  # type: ignore[list-item]
    prompts = [request.prompt, *paraphrases, *neighbours]
    known = work.ledger.scopes()
    with work.applied() as lm:
        before = lm.generate(prompts, _TOKENS)
    with work.tried(edit, scope) as lm:
        assert isinstance(lm, RoutedLM)
        after, choices = lm.generate(prompts, _TOKENS), lm.memory.route(prompts)
    rows = tuple(
        PreviewRow(kind, prompt, old, new, choice.edit is not None and choice.edit not in known, choice.score)
        for kind, prompt, old, new, choice in zip(kinds, prompts, before, after, choices, strict=True)
    )
    health = work.check(edit, paraphrases, scope)
    return Preview(rows, health, tuple(health.problems(work.limits)))
