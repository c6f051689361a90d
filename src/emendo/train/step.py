"""One training step: capture, edit, outer losses, and back through the editor once.

For a batch of B episodes the editor makes B separate edits (or one for every ``together`` of them), and each is judged
on its own texts: see :mod:`emendo.editors.objective` for the losses, and for how a method takes part
:meth:`emendo.editors.gradient.GradientEditor.judged`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from emendo.editors.gradient import GradientEditor
from emendo.editors.objective import BUCKET_TOKENS, Episode, Outcome, Weights
from emendo.models.capture import Factors
from emendo.models.text import Text, length_buckets
from emendo.models.trunk_cache import TrunkCache


def training_step(
    editor: GradientEditor,
    store: TrunkCache,
    episodes: Sequence[Episode],
    weights: Weights,
    ahead: Ahead | None = None,
    together: int = 1,
) -> Outcome | None:
    """Add the gradient of the mean loss of a batch of episodes to the editor's parameters.

    Args:
        editor: in training mode; its running statistics are updated.
        store: holds the trunk's output of every text of the episodes.
        episodes: the batch.
        weights: of the losses.
        ahead: what :func:`~emendo.train.step.look_ahead` gave for the batch, where it was called before.
        together: how many consecutive episodes are put into one edit.

    Returns:
        What the edits did, or None where a factor, a loss or a gradient was not finite. Then the parameters'
        gradients must not be used; the running statistics have not seen the batch if its factors were at fault.
    """
    if ahead is None:
        (ahead,) = look_ahead(editor, store, [episodes])
    outcome = editor.judged(store, episodes, ahead, weights, together=together, backward=True)
    if outcome is None or outcome.loss != outcome.loss or abs(outcome.loss) == float("inf"):
        return None
    return outcome


@torch.no_grad()
def validation_step(
    editor: GradientEditor,
    store: TrunkCache,
    episodes: Sequence[Episode],
    weights: Weights,
    together: int = 1,
) -> Outcome | None:
    """The same losses and scores without training; the editor is used in eval mode and nothing is updated."""
    training = editor.training
    editor.eval()
    try:
        (ahead,) = look_ahead(editor, store, [episodes])
        return editor.judged(store, episodes, ahead, weights, together=together)
    finally:
        editor.train(training)


# --------------------
# What the next steps need that does not depend on the editor, computed for several steps at once.
#
# The factors of the edits and the unedited model's answers on the locality texts are the same whatever the editor has
# learnt, so they are taken for a group of steps together: texts of similar length share a batch, which halves the
# padding and keeps the matrix products large. The answers stay in the store.

Ahead = dict[str, Factors]
"""By site, the rows of the edits of one batch of episodes."""


def look_ahead(
    editor: GradientEditor, store: TrunkCache, batches: Sequence[Sequence[Episode]]
) -> list[Ahead]:
    """Factors for several batches of episodes; the store learns what the unedited model answers to their texts.

    Args:
        editor: says where to capture; nothing else of it matters.
        store: holds the trunk's output of every text.
        batches: the episodes of the next steps.
    """
    if not editor.looks_ahead:
        return [{} for _ in batches]
    store.ensure_unedited(text for batch in batches for episode in batch for text in episode.locality)
    return _factors(editor, store, [[episode.edit for episode in batch] for batch in batches])


def _factors(editor: GradientEditor, store: TrunkCache, batches: Sequence[Sequence[Text]]) -> list[Ahead]:
    """Capture in batches of similar length, then hand each batch its own rows, in its own order."""
    texts = [text for batch in batches for text in batch]
    found: dict[str, list[Factors]] = {}
    for part in length_buckets(range(len(texts)), lambda i: texts[i].size, BUCKET_TOKENS):
        chosen = [texts[i] for i in part]
        for name, rows in editor.factors(store.trunk, chosen, store.gather(chosen)).items():
            owner = torch.tensor(part).to(rows.owner)[rows.owner]
            found.setdefault(name, []).append(Factors(rows.u, rows.delta, owner, len(texts)))
    bounds = torch.tensor([0, *(len(batch) for batch in batches)]).cumsum(0).tolist()
    split: list[dict[str, Factors]] = [{} for _ in batches]
    for name in list(found):
        parts = found.pop(name)  # its memory is free again once it is put together
        owner, order = torch.cat([part.owner for part in parts]).sort(stable=True)
        u, delta = (torch.cat([getattr(part, factor) for part in parts])[order] for factor in ("u", "delta"))
        cuts = torch.searchsorted(owner, torch.tensor(bounds).to(owner)).tolist()
        for i, rows_of in enumerate(split):
            own = slice(cuts[i], cuts[i + 1])
            rows_of[name] = Factors(u[own], delta[own], owner[own] - bounds[i], len(batches[i]))
    return split
