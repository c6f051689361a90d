"""One training step: capture, edit, outer losses, and back through the editor once.

For a batch of B episodes the editor makes B separate edits (or one for every ``together`` of them), and each is judged
on its own texts: see :mod:`emendo.outer` for the losses, and for how a method takes part
:meth:`emendo.editors.gradient.GradientEditor.judged`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from emendo.editors.gradient import GradientEditor
from emendo.outer import Episode, Outcome, Weights
from emendo.store import TrunkStore
from emendo.train.ahead import Ahead, look_ahead


def training_step(
    editor: GradientEditor,
    store: TrunkStore,
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
        ahead: what :func:`~emendo.train.ahead.look_ahead` gave for the batch, where it was called before.
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
    store: TrunkStore,
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
