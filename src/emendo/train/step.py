"""One training step: capture, edit, outer losses, and back through the editor once.

For a batch of B episodes the editor makes B separate edits. Each is judged on its own texts (MEND, Algorithm 1):

    L = c_edit * (p * NLL on the edit prompt + (1 - p) * NLL on the rewording)
        + mean over locality texts of KL(before || after)                          with p = prompt_share

The loss sees the editor only through the changes, so the edited passes run in micro-batches of similar length
that collect ``dL/d(change)``, and one backward pass through the editor follows. Memory does not grow with the
number of outer texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from emendo.capture import Factors
from emendo.data.batch import Text, collate, length_buckets
from emendo.editors.base import Editor
from emendo.losses import per_example, token_kl, token_nll
from emendo.lowrank import LowRank, applied
from emendo.store import TrunkStore
from emendo.train.ahead import BUCKET_TOKENS, Ahead, look_ahead
from emendo.train.episodes import Episode


@dataclass(frozen=True, slots=True)
class Outcome:
    """Means over the episodes of a batch.

    Attributes:
        loss: ``c_edit * edit_loss + locality_loss``.
        edit_loss: NLL in nats per target token, over edit prompt and rewording as weighted in the loss.
        locality_loss: KL(before || after) in nats per answer token.
        success: share of edits whose whole target is the argmax on the edit prompt.
        generalisation: the same on the rewording.
        locality: share of locality texts whose answer's argmax tokens are all unchanged.
    """

    loss: float
    edit_loss: float
    locality_loss: float
    success: float
    generalisation: float
    locality: float


@dataclass(frozen=True, slots=True)
class _Outer:
    """A text that judges the edit of one episode; ``kind`` is 0 edit prompt, 1 rewording, 2 locality."""

    episode: int
    text: Text
    kind: int
    weight: float


def _outer_texts(episodes: Sequence[Episode], c_edit: float, prompt_share: float) -> list[_Outer]:
    outer = []
    for index, episode in enumerate(episodes):
        outer.append(_Outer(index, episode.edit, 0, c_edit * prompt_share))
        outer.append(_Outer(index, episode.paraphrase, 1, c_edit * (1 - prompt_share)))
        outer += [_Outer(index, text, 2, 1 / len(episode.locality)) for text in episode.locality]
    return outer


def training_step(
    editor: Editor,
    store: TrunkStore,
    episodes: Sequence[Episode],
    c_edit: float,
    prompt_share: float = 0.5,
    ahead: Ahead | None = None,
) -> Outcome | None:
    """Add the gradient of the mean loss of a batch of episodes to the editor's parameters.

    Args:
        editor: in training mode; its running statistics are updated.
        store: holds the trunk's output of every text of the episodes.
        episodes: the batch.
        c_edit: weight of the edit loss.
        prompt_share: share of the edit prompt in it.
        ahead: what :func:`~emendo.train.ahead.look_ahead` gave for the batch, where it was called before.

    Returns:
        What the edits did, or None where a factor, a loss or a gradient was not finite. Then the parameters'
        gradients must not be used; the running statistics have not seen the batch if its factors were at fault.
    """
    if ahead is None:
        (ahead,) = look_ahead(editor, store, [episodes])
    if not _finite(ahead.factors):
        return None
    deltas = editor(ahead.factors)
    leaves = {
        name: LowRank(d.left.detach().requires_grad_(), d.right.detach().requires_grad_())
        for name, d in deltas.items()
    }
    outcome = _judge(store, leaves, episodes, ahead.reference, c_edit, prompt_share, backward=True)
    ends, gradients = [], []
    for name, delta in deltas.items():
        for end, leaf in ((delta.left, leaves[name].left), (delta.right, leaves[name].right)):
            if leaf.grad is not None:
                ends.append(end)
                gradients.append(leaf.grad)
    torch.autograd.backward(ends, gradients)
    return outcome if outcome.loss == outcome.loss and abs(outcome.loss) != float("inf") else None


@torch.no_grad()
def validation_step(
    editor: Editor, store: TrunkStore, episodes: Sequence[Episode], c_edit: float, prompt_share: float = 0.5
) -> Outcome:
    """The same losses and scores without training; the editor is used in eval mode and nothing is updated."""
    training = editor.training
    editor.eval()
    try:
        (ahead,) = look_ahead(editor, store, [episodes])
        return _judge(
            store, editor(ahead.factors), episodes, ahead.reference, c_edit, prompt_share, backward=False
        )
    finally:
        editor.train(training)


def _finite(factors: Mapping[str, Factors]) -> bool:
    return all(bool(f.u.isfinite().all()) and bool(f.delta.isfinite().all()) for f in factors.values())


def _judge(
    store: TrunkStore,
    deltas: Mapping[str, LowRank],
    episodes: Sequence[Episode],
    reference: Mapping[Text, Tensor],
    c_edit: float,
    prompt_share: float,
    *,
    backward: bool,
) -> Outcome:
    """Losses and scores of each episode's change on its own texts; gradients go to the changes' leaves."""
    outer = _outer_texts(episodes, c_edit, prompt_share)
    losses = [0.0, 0.0, 0.0]
    correct = [0.0, 0.0, 0.0]
    for part in length_buckets(outer, lambda item: len(item.text.inputs), BUCKET_TOKENS):
        part.sort(key=lambda item: item.kind)
        value, right = _bucket(store, deltas, part, reference)
        kinds = torch.tensor([item.kind for item in part])
        weights = value.new_tensor([item.weight for item in part])
        if backward:
            (value @ weights / len(episodes)).backward()
        for kind in range(3):
            losses[kind] += float(value.detach()[kinds == kind].sum())
            correct[kind] += float(right[kinds == kind].sum())
    count = len(episodes)
    kept = sum(item.kind == 2 for item in outer)
    edit_loss = (prompt_share * losses[0] + (1 - prompt_share) * losses[1]) / count
    locality_loss = losses[2] / kept
    return Outcome(
        loss=c_edit * edit_loss + locality_loss,
        edit_loss=edit_loss,
        locality_loss=locality_loss,
        success=correct[0] / count,
        generalisation=correct[1] / count,
        locality=correct[2] / kept,
    )


def _bucket(
    store: TrunkStore, deltas: Mapping[str, LowRank], part: list[_Outer], reference: Mapping[Text, Tensor]
) -> tuple[Tensor, Tensor]:
    """For some outer texts, each under its own episode's change: loss ``[texts]`` and all-tokens-right ``[texts]``.

    The loss is NLL for edit prompts and rewordings and KL against the unedited model for locality texts, which
    come last.
    """
    trunk = store.trunk
    split = sum(item.kind < 2 for item in part)
    texts = [item.text for item in part]
    batch = collate(texts)
    rows = torch.tensor([item.episode for item in part])
    with applied(
        trunk.model, {name: delta.take(rows.to(delta.left.device)) for name, delta in deltas.items()}
    ):
        logits = trunk.logits(batch.input_ids, batch.attention_mask, batch.positions, store.gather(texts))
    owner, labels = batch.owner.to(logits.device), batch.labels.to(logits.device)
    cut = int((batch.owner < split).sum())
    values, expected = [token_nll(logits[:cut], labels[:cut])], [labels[:cut]]
    if split < len(part):
        before = torch.cat([reference[item.text] for item in part[split:]])
        values.append(token_kl(before, logits[cut:]))
        expected.append(before.argmax(-1))
    right = (logits.detach().argmax(-1) == torch.cat(expected)).float()
    loss = per_example(torch.cat(values), owner, len(part))
    return loss, per_example(right, owner, len(part)).eq(1).float().cpu()
