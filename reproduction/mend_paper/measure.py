"""The figures of the MEND paper for one editor on one task.

Edits are made in groups of ``k`` facts, every group from the clean model. Each text is scored teacher forced under its
own group's edit, and against the original model: for an editor that trains the model itself (ENN) also against that
trained model, so that what training did and what the edit did stand apart.

Mitchell et al., "Fast Model Editing at Scale", ICLR 2022: Eq. 1 (edit success), section 5 (drawdown), appendix C.2
(locality KL).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from emendo.data.schema import Record
from emendo.editors import Editor
from emendo.edits.edit import Request
from emendo.errors import RequestError
from emendo.evaluate.edited_models import EditedModels, make_edits
from emendo.low_rank import Deltas
from emendo.models.lm import LM
from emendo.models.losses import token_kl, token_nll
from emendo.models.text import Text
from emendo.models.tokenization import passage_texts, to_texts
from emendo.models.trunk import Trunk
from emendo.models.trunk_cache import TrunkCache
from emendo.progress import SILENT, Progress

Kind = Literal["prompt", "rewording", "near", "far", "passage"]
Sums = dict[str, float]
"""What one fact's texts add up to, by name: ``"rewording hit"``, ``"passage nll after"`` and so on."""

EDITS = 16
"""Facts whose edits are made at once."""
PASSAGES = 4
"""Passages that each fact's edit is judged on."""
PASSAGE_TOKENS = 96
"""A passage is its first so many tokens; all but the first of them are scored."""
_LABELS = 512  # label positions whose logits are held at once


@dataclass(frozen=True, slots=True)
class _Item:
    """A text to score under the edit of one group."""

    fact: int
    group: int
    kind: Kind
    text: Text


@dataclass(frozen=True, slots=True)
class Scores:
    """What was seen.

    Attributes:
        facts: for each fact, sums over its texts; see :data:`Sums`.
        seconds: time that making an edit took, divided by the facts in it.
        ranks: of each edit, the highest among the sites; empty where no weights change.
        norms: ``||dW|| / ||W||`` of each edit, averaged over the sites; empty where no weights change.
        apart: whether the editor trained the model itself, so that there are figures against that model too.
    """

    facts: tuple[Sums, ...]
    seconds: float
    ranks: tuple[int, ...]
    norms: tuple[float, ...]
    apart: bool


@torch.no_grad()
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

    Nothing here is random. The model comes back as it was.

    Args:
        lm: the original model.
        editor: a trained editor.
        records: the facts to edit; what does not fill a group of ``k`` at the end is left out.
        passages: plain texts for the perplexity; fact ``i`` is judged on the ``PASSAGES`` from ``PASSAGES * i`` on,
            and around.
        k: how many facts make one edit.
        progress: told how far the work has come.

    Raises:
        RequestError: fewer records than make one edit, or a text that does not fit the model.
        MismatchError: the editor was trained for another model.
    """
    if k < 1 or len(records) < k:
        raise RequestError(f"k={k} facts make one edit, but there are {len(records)} records to edit.")
    items = _items(lm, records[: len(records) // k * k], passages, k)
    store = TrunkCache(Trunk(lm.model, editor.sites), dtype=torch.float32)
    store.ensure(item.text for item in items)
    host = editor.host(lm)
    size = {s.name: float(s.weight(lm.model).double().norm()) for s in editor.sites}
    facts: list[Sums] = [defaultdict(float) for _ in range(len(records) // k * k)]
    seconds, ranks, norms = 0.0, [], []
    edits, at_once = len(records) // k, max(1, EDITS // k)
    for first in range(0, edits, at_once):
        groups = range(first, min(first + at_once, edits))
        wishes = [[Request(r.prompt, r.target) for r in records[g * k : (g + 1) * k]] for g in groups]
        asked = make_edits(lm, editor, wishes, store)
        seconds += asked.seconds
        if asked.deltas:
            ranks += _ranks(asked.deltas)
            norms += _norms(asked.deltas, size)
        for part in _parts([item for item in items if item.group in groups]):
            for item, sums in _scored(part, asked, first, store, None if host is lm else host):
                for name, value in sums.items():
                    facts[item.fact][name] += value
        progress.update("edits", groups.stop, edits)
    return Scores(tuple(map(dict, facts)), seconds / len(facts), tuple(ranks), tuple(norms), host is not lm)


def _items(lm: LM, records: Sequence[Record], passages: Sequence[str], k: int) -> list[_Item]:
    flat: list[tuple[int, Kind, str, str]] = []
    for fact, record in enumerate(records):
        flat.append((fact, "prompt", record.prompt, record.target))
        flat += [(fact, "rewording", prompt, record.target) for prompt in record.paraphrases]
        flat += [(fact, "near", probe.prompt, probe.answer) for probe in record.neighbours]
        flat += [(fact, "far", probe.prompt, probe.answer) for probe in record.unrelated]
    texts = to_texts(lm, [(prompt, answer) for *_, prompt, answer in flat])
    items = [_Item(fact, fact // k, kind, text) for (fact, kind, *_), text in zip(flat, texts, strict=True)]
    found = passage_texts(lm, passages, PASSAGE_TOKENS)
    for fact in range(len(records) if found else 0):
        chosen = {(PASSAGES * fact + i) % len(found) for i in range(PASSAGES)}
        items += [_Item(fact, fact // k, "passage", found[i]) for i in sorted(chosen)]
    return items


def _parts(items: Sequence[_Item]) -> Iterator[list[_Item]]:
    """Items with about ``_LABELS`` labels, those of the same text next to each other."""
    part: list[_Item] = []
    labels = 0
    for item in sorted(items, key=lambda item: (item.text.size, item.text.ids, item.text.source)):
        labels += len(item.text.labels)
        if part and labels > _LABELS:
            yield part
            part, labels = [], len(item.text.labels)
        part.append(item)
    yield part


def _scored(
    part: Sequence[_Item], asked: EditedModels, first: int, store: TrunkCache, host: LM | None
) -> Iterator[tuple[_Item, Sums]]:
    """What each item adds to its fact's sums; the edit of group ``first`` is the first that was made."""
    texts = list(dict.fromkeys(item.text for item in part))
    before = dict(zip(texts, store.logits(texts)[1].split([len(text.labels) for text in texts]), strict=True))
    hosted = dict(zip(texts, host.logits(texts), strict=True)) if host is not None else {}
    afters = asked.logits([item.group - first for item in part], [item.text for item in part])
    for item, after in zip(part, afters, strict=True):
        labels = torch.tensor(item.text.labels, device=after.device)
        sums = {"count": 1.0, "tokens": float(len(labels)), "hit": _right(after, labels)}
        if item.kind not in ("prompt", "rewording"):
            sums |= _against(before[item.text], after, hosted.get(item.text), labels)
        yield item, {f"{item.kind} {name}": value for name, value in sums.items()}


def _against(before: Tensor, after: Tensor, host: Tensor | None, labels: Tensor) -> Sums:
    """What an edit did to one text that shall stay as it is, summed over its label positions.

    Args:
        before: ``[labels, vocabulary]`` logits of the original model.
        after: of the edited one.
        host: of the one that the editor trained, where it did.
        labels: ``[labels]``.
    """
    same = before.argmax(-1).eq(after.argmax(-1))
    sums = {
        "hit before": _right(before, labels),
        "same": float(same.all()),
        "same tokens": float(same.sum()),
        "kl": float(token_kl(before, after).sum()),
        "nll": float(token_nll(after, labels).sum()),
        "nll before": float(token_nll(before, labels).sum()),
    }
    if host is not None:
        sums["hit host"] = _right(host, labels)
        sums["nll host"] = float(token_nll(host, labels).sum())
        sums["kl host"] = float(token_kl(before, host).sum())
    return sums


def _right(logits: Tensor, labels: Tensor) -> float:
    """1 where every label is the argmax, else 0."""
    return float(logits.argmax(-1).eq(labels).all())


def _ranks(deltas: Deltas) -> list[int]:
    """Of each edit, the columns that are not zero at the site that has most of them."""
    used = [(d.left.ne(0).any(-2) & d.right.ne(0).any(-1)).sum(-1) for d in deltas.values()]
    return torch.stack(used).amax(0).tolist()


def _norms(deltas: Deltas, size: Mapping[str, float]) -> list[float]:
    relative: list[Tensor] = [delta.norm() / size[name] for name, delta in deltas.items()]
    return torch.stack(relative).mean(0).tolist()
