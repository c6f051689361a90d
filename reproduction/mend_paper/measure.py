"""The MEND paper's measurements of one editor on one task, made by :func:`emendo.evaluate.evaluate`.

Edits are made in groups of ``k`` facts, each group from the clean model. Every prompt is scored teacher forced under
its group's edit and compared with the original model. Where the editor trained the model itself (ENN), the trained
model without an edit is compared too: that tells the effect of training from the effect of editing.

Mitchell et al., "Fast Model Editing at Scale", ICLR 2022: Eq. 1 (edit success), section 5 (drawdown), appendix C.2
(locality KL).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from emendo.data.schema import Record
from emendo.editors import Editor
from emendo.errors import RequestError
from emendo.evaluate import Result, evaluate
from emendo.evaluate.damage import Damage
from emendo.evaluate.edited_models import EditedModels
from emendo.models.lm import LM
from emendo.models.losses import token_kl, token_nll
from emendo.models.text import Text
from emendo.models.tokenization import passage_texts, to_texts
from emendo.models.trunk_cache import TrunkCache
from emendo.progress import SILENT, Progress

Sums = dict[str, float]
"""The sums over one fact's texts, by name: ``"paraphrase hit"``, ``"passage nll after"`` and so on."""

EDITS = 16
"""The number of edits made at once."""
PASSAGES = 4
"""The number of passages that each edit is scored on."""
PASSAGE_TOKENS = 96
"""Tokens that are read of a passage; all but the first of them are scored."""
_TEXTS = 32  # whose logits are held at once
_NAMES = {"edit": "prompt", "paraphrase": "paraphrase", "neighbour": "near", "unrelated": "far"}


@dataclass(frozen=True, slots=True)
class Scores:
    """The measurements of one editor on one task.

    Attributes:
        facts: for each fact, sums over its texts; see :data:`Sums`.
        seconds: the time to make an edit, divided by its facts.
        ranks: of each edit, the highest among the sites; empty where no weights change.
        norms: ``||dW|| / ||W||`` of each edit, averaged over the sites; empty where no weights change.
        apart: whether the editor trained a copy of the model, so that there are figures of that copy too.
    """

    facts: tuple[Sums, ...]
    seconds: float
    ranks: tuple[int, ...]
    norms: tuple[float, ...]
    apart: bool


def measure(
    lm: LM,
    editor: Editor,
    records: Sequence[Record],
    passages: Sequence[str] = (),
    *,
    k: int = 1,
    progress: Progress = SILENT,
) -> Scores:
    """Make the edits and score every text of their records under them.

    Nothing here is random. The model is unchanged afterwards.

    Args:
        lm: the original model.
        editor: a trained editor.
        records: the facts to edit; a last group of fewer than ``k`` is left out.
        passages: plain texts for the perplexity; fact ``i`` is scored on the ``PASSAGES`` texts from ``PASSAGES * i``
            on, cyclically.
        k: the number of facts in one edit.
        progress: receives the progress.

    Raises:
        RequestError: fewer records than make one edit, or a text that does not fit the model.
        MismatchError: the editor was trained for another model.
    """
    if k < 1 or len(records) < k:
        raise RequestError(f"k={k} facts make one edit, but there are {len(records)} records to edit.")
    records = records[: len(records) // k * k]
    trained = editor.host(lm)
    host = None if trained is lm else trained
    evaluation = evaluate(
        lm,
        editor,
        records,
        generated=False,
        fact_in_context=False,
        batch=max(EDITS, k),
        together=k,
        damage=_PassageSums(passages, facts=k, host=host) if passages else None,
        progress=progress,
    )
    facts = [_sums(result, first=place % k == 0) for place, result in enumerate(evaluation.results)]
    if host is not None:
        for fact, drift in zip(facts, _drift(lm, host, records), strict=True):
            fact.update(drift)
    edits = evaluation.results[::k]
    changed = bool(edits[0].norms)
    return Scores(
        facts=tuple(facts),
        seconds=evaluation.seconds_per_edit_in_batch,
        ranks=tuple(edit.rank for edit in edits) if changed else (),
        norms=tuple(edit.norm for edit in edits) if changed else (),
        apart=host is not None,
    )


def _sums(result: Result, *, first: bool) -> Sums:
    """The sums of one fact; those of the passages belong to the first fact of an edit."""
    sums: Sums = defaultdict(float)
    for outcome in result.outcomes:
        if outcome.kind not in _NAMES:
            continue
        own: Sums = {"count": 1.0}
        if outcome.local:
            own |= {
                "hit before": float(outcome.known),
                "hit": float(outcome.share_after == 1),
                "same": float(outcome.teacher_forced),
                "kl": outcome.kl,
            }
        else:
            own["hit"] = float(outcome.teacher_forced)
        for name, value in own.items():
            sums[f"{_NAMES[outcome.kind]} {name}"] += value
    return {**sums, **(result.damage if first else {})}


@torch.no_grad()
def _drift(lm: LM, host: LM, records: Sequence[Record]) -> Iterator[Sums]:
    """For each record, the sums of its locality prompts in the model that the editor trained, without an edit."""
    for record in records:
        sums: Sums = defaultdict(float)
        for kind, probes in (("near", record.neighbours), ("far", record.unrelated)):
            texts = to_texts(lm, [(probe.prompt, probe.answer) for probe in probes])
            for text, before, after in zip(texts, _logits(lm, texts), _logits(host, texts), strict=True):
                labels = torch.tensor(text.labels, device=after.device)
                sums[f"{kind} hit host"] += _right(after, text)
                sums[f"{kind} same host"] += float(after.argmax(-1).equal(before.argmax(-1)))
                sums[f"{kind} kl host"] += float(token_kl(before, after).mean())
                sums[f"{kind} nll before"] += float(token_nll(before, labels).mean())
                sums[f"{kind} nll host"] += float(token_nll(after, labels).mean())
        yield dict(sums)


def _logits(lm: LM, texts: Sequence[Text]) -> Iterator[Tensor]:
    for at in range(0, len(texts), _TEXTS):
        yield from lm.logits(texts[at : at + _TEXTS])


def _right(logits: Tensor, text: Text) -> float:
    """1 where every label is the argmax, else 0."""
    return float(logits.argmax(-1).tolist() == list(text.labels))


@dataclass(eq=False)
class _PassageSums(Damage):
    """The effect of each edit on running text, as sums over the tokens of the passages that its facts are scored on.

    Attributes:
        facts: the number of facts in one edit.
        host: the model that the editor trained, where it did.
    """

    facts: int = 1
    host: LM | None = None

    def begin(self, lm: LM, store: TrunkCache, edits: int) -> None:
        """Tokenise the passages, and run the trunk and the trained model over them.

        Raises:
            RequestError: the model does not continue texts.
        """
        if lm.kind != "causal":
            raise RequestError(f"{lm.name} continues no texts, so it has no perplexity.")
        self._texts = passage_texts(lm, self.passages, PASSAGE_TOKENS)
        self._store = store
        store.ensure(self._texts)

    def clean(self) -> Mapping[str, float]:
        """Nothing: the sums of an edit hold those of the original model."""
        return {}

    def describe(self) -> dict[str, object]:
        """How it was measured."""
        return {"passages": f"{PASSAGES} an edited fact, {PASSAGE_TOKENS} tokens each"}

    def measure(self, edited: EditedModels, edits: Sequence[int]) -> list[dict[str, float]]:
        """The sums of each edit."""
        return [self._of(edited, row, edit) for row, edit in enumerate(edits)]

    def _of(self, edited: EditedModels, row: int, edit: int) -> dict[str, float]:
        places = [
            (PASSAGES * fact + i) % len(self._texts)
            for fact in range(edit * self.facts, (edit + 1) * self.facts)
            for i in range(min(PASSAGES, len(self._texts)))
        ]
        texts = [self._texts[place] for place in places]
        after = edited.logits([row] * len(texts), texts)
        before = self._store.logits(texts)[1].split([len(text.labels) for text in texts])
        hosted = self.host.logits(texts) if self.host is not None else [None] * len(texts)
        sums: Sums = defaultdict(float)
        for text, was, now, host in zip(texts, before, after, hosted, strict=True):
            labels = torch.tensor(text.labels, device=now.device)
            sums["passage count"] += 1
            sums["passage tokens"] += len(labels)
            sums["passage nll before"] += float(token_nll(was, labels).sum())
            sums["passage nll"] += float(token_nll(now, labels).sum())
            sums["passage kl"] += float(token_kl(was, now).sum())
            sums["passage same tokens"] += float(was.argmax(-1).eq(now.argmax(-1)).sum())
            if host is not None:
                sums["passage nll host"] += float(token_nll(host, labels).sum())
                sums["passage kl host"] += float(token_kl(was, host).sum())
                sums["passage same tokens host"] += float(was.argmax(-1).eq(host.argmax(-1)).sum())
        return dict(sums)
