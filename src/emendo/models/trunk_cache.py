"""What a model's frozen part gives for each text, computed once and kept: trunk outputs, and unedited answers.

The store belongs to one model and one split; another model's store is another folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from emendo._storage import new_file
from emendo.models._packing import Packing
from emendo.models._projection_loss import Expected, divergence
from emendo.models.losses import TokenLoss, compared, token_nll
from emendo.models.text import Text, TokenBatch, collate, length_buckets
from emendo.models.trunk import Trunk

_LABELS = 48
"""Whose logits are held at a time to keep what is expected there."""


class TrunkCache:
    """Keeps ``hidden [tokens, width]`` for every text asked for.

    For texts whose answers must stay it keeps also what a loss needs of the unedited model's, for each label as much as
    ``Expected`` holds, or where that does not do, what the vocabulary projection is given. The
    logits would take a vocabulary's room.

    Args:
        trunk: what computes it.
        folder: where to keep it between runs; None keeps it in memory only.
        dtype: of the trunk's outputs. bfloat16 halves the memory; float32 loses nothing.
    """

    def __init__(self, trunk: Trunk, folder: Path | None = None, dtype: torch.dtype = torch.bfloat16) -> None:
        self.trunk, self.dtype, self.folder = trunk, dtype, folder
        self.kept = RowCache(lambda text: text.trunk, lambda text: len(text.trunk), dtype, folder)

    @cached_property
    def _unedited(self) -> RowCache:
        """By what a text's labels read, rows in float32 at least."""
        dtype = torch.promote_types(next(self.model.parameters()).dtype, torch.float32)
        name = "unedited" if self.trunk.projection is None else "expected"
        return RowCache(_reads, lambda text: len(text.labels), dtype, self.folder and self.folder / name)

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
        beside: Tensor | None = None,
    ) -> tuple[TokenBatch, Tensor]:
        """The same as :meth:`logits`, without the rows that do not matter (:mod:`emendo.models._packing`).

        Args:
            texts: the texts.
            under: gives the context in which the model runs.
            beside: see :meth:`emendo.models.trunk.Trunk.logits`.
        """
        batch = collate(texts)
        packing = self.trunk.packing(batch)
        with under(packing) if under is not None else nullcontext():
            return batch, self.trunk.logits(batch, self.gather(texts), packing, beside)

    def compared(
        self,
        texts: Sequence[Text],
        kept: int,
        under: Callable[[Packing], AbstractContextManager[None]],
        token_loss: TokenLoss = token_nll,
    ) -> tuple[TokenBatch, Tensor, Tensor]:
        """See :meth:`emendo.editors.objective.Passes.compared`."""
        batch, unedited = collate(texts), texts[len(texts) - kept :]
        wanted = int((batch.owner < len(texts) - kept).sum())
        packing, hidden, head = self.trunk.packing(batch), self.gather(texts), self.trunk.projection
        labels = batch.labels[:wanted]
        if head is None or token_loss is not token_nll:
            beside = self._rows(unedited)
            with under(packing):
                logits = self.trunk.logits(batch, hidden, packing, beside)
            after, before = logits.split([len(batch.labels), len(logits) - len(batch.labels)])
            return batch, *compared(after, labels.to(logits.device), before, token_loss)
        expected = Expected.wanted(head, labels)
        if unedited:
            self.ensure_unedited(unedited)
            expected = expected.then(Expected.unpacked(self._of(unedited)))
        with under(packing):
            rows = self.trunk.rows(batch, hidden, packing)
        return batch, *divergence(head, rows, expected)

    def _of(self, texts: Sequence[Text]) -> Tensor:
        return torch.cat([self._unedited[text] for text in texts])

    @torch.no_grad()
    def _rows(self, texts: Sequence[Text]) -> Tensor | None:
        """What the unedited model's vocabulary projection is given for some texts."""
        if not texts:
            return None
        if self.trunk.projection is not None:  # something else is kept
            return self.trunk.rows(collate(texts), self.gather(texts))
        self.ensure_unedited(texts)
        return self._of(texts)

    def over(self, trunk: Trunk) -> TrunkCache:
        """The same kept outputs under another model that shares the frozen part."""
        other = TrunkCache(trunk, dtype=self.dtype)
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
        """Compute what the unedited model answers to those texts of which that is not yet known.

        Args:
            texts: some whose trunk output is kept.

        Returns:
            How many texts were computed.
        """

        @torch.no_grad()
        def run(part: Sequence[Text]) -> Tensor:
            head, rows = self.trunk.projection, self.trunk.rows(collate(part), self.gather(part))
            if head is None:
                return rows
            return torch.cat([Expected.given(head, some).packed() for some in rows.split(_LABELS)])

        return self._unedited.ensure(texts, run)


def _reads(text: Text) -> tuple[int, ...]:
    """What the rows at a text's labels depend on: its last token is only predicted."""
    return (text.start, len(text.source), *text.source, *text.inputs)


# --------------------
# Rows of numbers for each text, computed once and kept, in memory or in the files of a folder.
#
# A file ``NAME.bin`` holds rows, memory-mapped; ``NAME.npz`` beside it says whose they are.

_BATCH_TOKENS = 512


class RowCache:
    """Keeps ``[rows, width]`` for every text that was asked for.

    Args:
        reads: what the rows of a text depend on; texts that share it share their rows.
        count: how many rows a text has.
        dtype: of what is kept.
        folder: where to keep it between runs; None keeps it in memory only.
    """

    def __init__(
        self,
        reads: Callable[[Text], Sequence[int]],
        count: Callable[[Text], int],
        dtype: torch.dtype,
        folder: Path | None = None,
    ) -> None:
        self.reads, self.count, self.dtype, self.folder = reads, count, dtype, folder
        self.chunks: list[Tensor] = []  # each [rows, width]
        self._index: dict[bytes, tuple[int, int]] = {}  # key -> (chunk, first row)
        if folder is not None and folder.is_dir():
            for file in sorted(folder.glob("*.npz")):
                self._read(file)

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, text: Text) -> Tensor:
        """The rows of a text that is kept, ``[rows, width]``."""
        chunk, first = self._index[self._key(text)]
        return self.chunks[chunk][first : first + self.count(text)]

    def missing(self, texts: Iterable[Text]) -> list[Text]:
        """The texts not yet kept, each once."""
        return list({key: text for text in texts if (key := self._key(text)) not in self._index}.values())

    def ensure(
        self,
        texts: Iterable[Text],
        compute: Callable[[Sequence[Text]], Tensor],
        progress: Callable[[int], None] | None = None,
    ) -> int:
        """Compute what is missing, in batches of similar length.

        Args:
            texts: what shall be kept.
            compute: some texts to the rows of all of them, one after the other.
            progress: called with the number of texts after each batch.

        Returns:
            How many texts were computed.
        """
        todo = self.missing(texts)
        if not todo:
            return 0
        rows, keys, first = [], [], []
        at = 0
        for part in length_buckets(todo, lambda text: text.size, _BATCH_TOKENS):
            rows.append(compute(part).to("cpu", self.dtype))
            for text in part:
                keys.append(self._key(text))
                first.append(at)
                at += self.count(text)
            if progress is not None:
                progress(len(part))
        self._add(torch.cat(rows), keys, first)
        return len(todo)

    def _key(self, text: Text) -> bytes:
        return hashlib.blake2b(np.asarray(self.reads(text), np.int32).tobytes(), digest_size=16).digest()

    def _add(self, rows: Tensor, keys: list[bytes], first: list[int]) -> None:
        if self.folder is not None:
            name = hashlib.blake2b(b"".join(keys), digest_size=8).hexdigest()
            data, index = self.folder / f"{name}.bin", self.folder / f"{name}.npz"
            with new_file(data) as temporary:
                rows.contiguous().view(torch.uint8).numpy().tofile(temporary)
            with new_file(index) as temporary, temporary.open("wb") as handle:
                np.savez(
                    handle,
                    keys=np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), -1),
                    first=np.asarray(first),
                    shape=np.asarray(rows.shape),
                )
            self._read(index)
        else:
            self._keep(rows, keys, first)

    def _read(self, index: Path) -> None:
        """Take in one file; one that is damaged or of another dtype is as good as absent: it is made anew."""
        data = index.with_suffix(".bin")
        try:
            with index.open("rb") as handle, np.load(handle) as file:
                keys, first, (count, width) = file["keys"], file["first"], file["shape"].tolist()
            whole = data.stat().st_size == count * width * self.dtype.itemsize
        except (OSError, EOFError, KeyError, ValueError, BadZipFile):
            return
        if whole:
            rows = torch.from_file(str(data), shared=False, size=count * width, dtype=self.dtype)
            self._keep(rows.view(count, width), [key.tobytes() for key in keys], first.tolist())

    def _keep(self, rows: Tensor, keys: list[bytes], first: list[int]) -> None:
        chunk = len(self.chunks)
        self.chunks.append(rows)
        self._index.update((key, (chunk, at)) for key, at in zip(keys, first, strict=True))
