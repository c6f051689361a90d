"""What a model's frozen part gives for each text, computed once and kept: trunk outputs, and unedited answers.

The store belongs to one model and one split; another model's store is another folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from emendo.kept import Kept
from emendo.packing import Packing
from emendo.texts import Text, TokenBatch, collate
from emendo.trunk import Trunk


class TrunkStore:
    """Keeps ``hidden [tokens, width]`` for every text asked for.

    For texts whose answers must stay it keeps also what the vocabulary projection of the unedited model sees,
    ``[labels, width]`` in float32 at least; the logits would take a vocabulary's room.

    Args:
        trunk: what computes it.
        folder: where to keep it between runs; None keeps it in memory only.
        dtype: of the trunk's outputs. bfloat16 halves the memory; float32 loses nothing.
    """

    def __init__(self, trunk: Trunk, folder: Path | None = None, dtype: torch.dtype = torch.bfloat16) -> None:
        self.trunk, self.dtype = trunk, dtype
        self.kept = Kept(lambda text: text.trunk, lambda text: len(text.trunk), dtype, folder)
        self._unedited = Kept(
            _reads,
            lambda text: len(text.labels),
            torch.promote_types(next(trunk.model.parameters()).dtype, torch.float32),
            folder and folder / "unedited",
        )

    def __len__(self) -> int:
        return len(self.kept)

    @property
    def model(self) -> nn.Module:
        """The model that the trunk is a part of."""
        return self.trunk.model

    def logits(self, texts: Sequence[Text]) -> tuple[TokenBatch, Tensor]:
        """The texts as one batch, and the logits at its label positions, resumed from what is kept."""
        batch = collate(texts)
        return batch, self.trunk.logits(batch, self.gather(texts))

    def packed(
        self,
        texts: Sequence[Text],
        under: Callable[[Packing], AbstractContextManager[None]] | None = None,
        unedited: Sequence[Text] = (),
    ) -> tuple[TokenBatch, Tensor]:
        """The same as :meth:`logits`, without the rows that do not matter (:mod:`emendo.packing`).

        Args:
            texts: the texts.
            under: gives the context in which the model runs.
            unedited: texts whose logits at the labels, as the model gives them outside of that context, follow those of
                the texts.
        """
        self.ensure_unedited(unedited)
        beside = torch.cat([self._unedited[text] for text in unedited]) if unedited else None
        batch = collate(texts)
        packing = self.trunk.packing(batch)
        with under(packing) if under is not None else nullcontext():
            return batch, self.trunk.logits(batch, self.gather(texts), packing, beside)

    def over(self, trunk: Trunk) -> TrunkStore:
        """The same kept outputs under another model that shares the frozen part."""
        other = TrunkStore(trunk, dtype=self.dtype)
        other.kept = self.kept
        return other

    def missing(self, texts: Iterable[Text]) -> list[Text]:
        """The texts whose trunk output is not yet kept, each once."""
        return self.kept.missing(texts)

    def ensure(self, texts: Iterable[Text], progress: Callable[[int], None] | None = None) -> int:
        """Compute the trunk outputs that are missing, in batches of similar length.

        Args:
            texts: what shall be in the store.
            progress: called with the number of texts after each batch.

        Returns:
            How many texts were computed.
        """

        def run(part: Sequence[Text]) -> Tensor:
            batch = collate(part)
            return self.trunk.run(batch).cpu()[batch.trunk_mask.bool()]

        return self.kept.ensure(texts, run, progress)

    def gather(self, texts: Sequence[Text]) -> Tensor:
        """Hidden states ``[texts, tokens, width]``, padded on the right with zeros, as :func:`collate` pads."""
        return pad_sequence([self.kept[text] for text in texts], batch_first=True)

    def ensure_unedited(self, texts: Iterable[Text]) -> int:
        """Compute what the vocabulary projection sees at the labels of those texts that lack it.

        Args:
            texts: some whose trunk output is kept.

        Returns:
            How many texts were computed.
        """

        def run(part: Sequence[Text]) -> Tensor:
            return self.trunk.rows(collate(part), self.gather(part))

        return self._unedited.ensure(texts, run)


def _reads(text: Text) -> tuple[int, ...]:
    """What the rows at a text's labels depend on: its last token is only predicted."""
    return (text.start, len(text.source), *text.source, *text.inputs)
