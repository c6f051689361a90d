"""What the next steps need that does not depend on the editor, computed for several steps at once.

The factors of the edits and the unedited model's answers on the locality texts are the same whatever the editor has
learnt, so they are taken for a group of steps together: texts of similar length share a batch, which halves the
padding and keeps the matrix products large. The answers stay in the store.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from emendo.capture import Factors
from emendo.editors.gradient import GradientEditor
from emendo.outer import BUCKET_TOKENS, Episode
from emendo.store import TrunkStore
from emendo.texts import Text, length_buckets

Ahead = dict[str, Factors]
"""By site, the rows of the edits of one batch of episodes."""


def look_ahead(
    editor: GradientEditor, store: TrunkStore, batches: Sequence[Sequence[Episode]]
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


def _factors(editor: GradientEditor, store: TrunkStore, batches: Sequence[Sequence[Text]]) -> list[Ahead]:
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
