"""Caches of what depends on the text alone: trunk outputs, and the unedited model's answers.

A cache belongs to one model and one split; another model's cache needs another folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from itertools import accumulate, chain
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from emendo._storage import new_file
from emendo.models._packing import Packing
from emendo.models._projection_loss import Expected, divergence
from emendo.models.losses import TokenLoss, label_losses, token_nll
from emendo.models.streaming import stream
from emendo.models.text import Text, TokenBatch, collate, length_buckets
from emendo.models.trunk import Trunk

_BATCH_TOKENS = 512
"""Padded tokens of a batch whose rows are computed together."""

_LABELS = 48
"""Labels whose logits are held at one time when the unedited answers are computed."""


class TrunkCache:
    """Caches the trunk's output ``hidden [tokens, width]`` of every text.

    For locality texts it also caches the unedited model's answers as a loss needs them: for each label an ``Expected``,
    or where that does not apply, the input of the vocabulary projection. Both are far smaller than the logits.

    Args:
        trunk: computes the outputs.
        folder: where to keep them between runs; None keeps them in memory only.
        dtype: of the trunk's outputs. bfloat16 halves the memory; float32 loses nothing.
    """

    def __init__(self, trunk: Trunk, folder: Path | None = None, dtype: torch.dtype = torch.bfloat16) -> None:
        self.trunk, self.dtype, self.folder = trunk, dtype, folder
        self.hidden = RowCache(lambda text: text.trunk, lambda text: len(text.trunk), dtype, folder)

    @cached_property
    def _unedited(self) -> RowCache:
        """The unedited answers, keyed by the inputs of a text's labels; in float32 at least."""
        dtype = torch.promote_types(next(self.model.parameters()).dtype, torch.float32)
        name = "unedited" if self.trunk.projection is None else "expected"
        return RowCache(
            _label_inputs, lambda text: len(text.labels), dtype, self.folder and self.folder / name
        )

    def __len__(self) -> int:
        return len(self.hidden)

    @property
    def model(self) -> nn.Module:
        """The model that the trunk is part of."""
        return self.trunk.model

    def with_trunk(self, trunk: Trunk) -> TrunkCache:
        """The same trunk outputs for another model with the same frozen blocks."""
        other = TrunkCache(trunk, dtype=self.dtype)
        other.hidden = self.hidden
        return other

    def missing(self, texts: Iterable[Text]) -> list[Text]:
        """The texts whose trunk output is not cached, each once."""
        return self.hidden.missing(texts)

    def key(self, text: Text) -> bytes:
        """16 bytes that identify a text's trunk output."""
        return self.hidden.key(text)

    def refresh(self) -> None:
        """Read what other processes have added to the folder."""
        self.hidden.refresh()
        if (unedited := vars(self).get("_unedited")) is not None:
            unedited.refresh()

    def ensure(self, texts: Iterable[Text], progress: Callable[[int], None] | None = None) -> int:
        """Compute the trunk outputs that are missing, in batches of similar length.

        If frozen blocks are offloaded, all texts pass through one block after the other.

        Args:
            texts: the texts.
            progress: called with the number of texts after each batch; ``passes`` times for each text.

        Returns:
            The number of texts computed.
        """

        def run(parts: Sequence[Sequence[Text]]) -> Iterator[Tensor]:
            if self.trunk.streams:
                yield from stream(self.trunk, [collate(part) for part in parts], self.folder, progress)
                return
            for part in parts:
                batch = collate(part)
                yield self.trunk.run(batch).cpu()[batch.trunk_mask.bool()]
                if progress is not None:
                    progress(len(part))

        return self.hidden.ensure(texts, run)

    @property
    def passes(self) -> int:
        """How many passes over a text :meth:`ensure` counts."""
        return self.trunk.block if self.trunk.streams else 1

    def ensure_unedited(self, texts: Iterable[Text]) -> int:
        """Compute the unedited model's answers that are missing.

        Args:
            texts: texts whose trunk output is cached.

        Returns:
            The number of texts computed.
        """

        @torch.no_grad()
        def run(part: Sequence[Text]) -> Tensor:
            head = self.trunk.projection
            rows = self.trunk.projection_input(collate(part), self.gather(part))
            if head is None:
                return rows
            return torch.cat([Expected.from_rows(head, some).pack() for some in rows.split(_LABELS)])

        return self._unedited.ensure(texts, lambda parts: map(run, parts))

    def gather(self, texts: Sequence[Text]) -> Tensor:
        """Hidden states ``[texts, tokens, width]``, padded on the right with zeros, as :func:`collate` pads."""
        return pad_sequence([self.hidden[text] for text in texts], batch_first=True)

    def logits(self, texts: Sequence[Text]) -> tuple[TokenBatch, Tensor]:
        """The texts as one batch, and the logits at its label positions, resumed from the cached outputs."""
        batch = collate(texts)
        return batch, self.trunk.logits(batch, self.gather(texts))

    def packed_logits(
        self,
        texts: Sequence[Text],
        context: Callable[[Packing], AbstractContextManager[None]] | None = None,
    ) -> tuple[TokenBatch, Tensor]:
        """The same as :meth:`logits`, without the rows that do not matter (:mod:`emendo.models._packing`).

        Args:
            texts: the texts.
            context: makes the context in which the model runs.
        """
        batch = collate(texts)
        packing = self.trunk.packing(batch)
        with context(packing) if context is not None else nullcontext():
            return batch, self.trunk.logits(batch, self.gather(texts), packing)

    def label_losses(
        self,
        texts: Sequence[Text],
        locality: int,
        context: Callable[[Packing], AbstractContextManager[None]],
        token_loss: TokenLoss = token_nll,
    ) -> tuple[TokenBatch, Tensor, Tensor]:
        """See :meth:`emendo.editors.objective.Passes.label_losses`."""
        batch, unchanged = collate(texts), texts[len(texts) - locality :]
        targets = batch.labels[: int((batch.owner < len(texts) - locality).sum())]
        packing, hidden, head = self.trunk.packing(batch), self.gather(texts), self.trunk.projection
        if head is None or token_loss is not token_nll:
            extra = self._unedited_inputs(unchanged)
            with context(packing):
                logits = self.trunk.logits(batch, hidden, packing, extra)
            after, before = logits.split([len(batch.labels), len(logits) - len(batch.labels)])
            return batch, *label_losses(after, targets.to(logits.device), before, token_loss)
        expected = Expected.from_labels(head, targets)
        if unchanged:
            self.ensure_unedited(unchanged)
            expected = expected.concatenate(Expected.unpack(self._unedited_rows(unchanged)))
        with context(packing):
            rows = self.trunk.projection_input(batch, hidden, packing)
        return batch, *divergence(head, rows, expected)

    def _unedited_rows(self, texts: Sequence[Text]) -> Tensor:
        return torch.cat([self._unedited[text] for text in texts])

    @torch.no_grad()
    def _unedited_inputs(self, texts: Sequence[Text]) -> Tensor | None:
        """The input of the unedited model's vocabulary projection for some texts; None for no texts."""
        if not texts:
            return None
        if self.trunk.projection is not None:  # then the cache holds ``Expected`` instead
            return self.trunk.projection_input(collate(texts), self.gather(texts))
        self.ensure_unedited(texts)
        return self._unedited_rows(texts)


def _label_inputs(text: Text) -> tuple[int, ...]:
    """The inputs of the rows at a text's labels: all tokens but the last, which is only predicted."""
    return (text.start, len(text.source), *text.source, *text.inputs)


class RowCache:
    """Rows of numbers ``[rows, width]`` for every text, computed once and kept in memory or in the files of a folder.

    A file ``NAME.bin`` holds rows, memory-mapped; ``NAME.npz`` beside it lists the text of each.

    Args:
        inputs: maps a text to the inputs of its rows; texts with equal inputs share their rows.
        count: the number of rows of a text.
        dtype: of the rows.
        folder: where to keep them between runs; None keeps them in memory only.
    """

    def __init__(
        self,
        inputs: Callable[[Text], Sequence[int]],
        count: Callable[[Text], int],
        dtype: torch.dtype,
        folder: Path | None = None,
    ) -> None:
        self.inputs, self.count, self.dtype, self.folder = inputs, count, dtype, folder
        self.chunks: list[Tensor] = []  # each [rows, width]
        self._index: dict[bytes, tuple[int, int]] = {}  # key -> (chunk, first row)
        self._files: set[Path] = set()  # that have been read
        self.refresh()

    def refresh(self) -> None:
        """Read the files of the folder that are new."""
        if self.folder is not None and self.folder.is_dir():
            for file in sorted(set(self.folder.glob("*.npz")) - self._files):
                self._read(file)

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, text: Text) -> Tensor:
        """The rows ``[rows, width]`` of a cached text."""
        chunk, first = self._index[self.key(text)]
        return self.chunks[chunk][first : first + self.count(text)]

    def missing(self, texts: Iterable[Text]) -> list[Text]:
        """The texts that are not cached, each once."""
        return list({key: text for text in texts if (key := self.key(text)) not in self._index}.values())

    def ensure(
        self,
        texts: Iterable[Text],
        compute: Callable[[Sequence[Sequence[Text]]], Iterable[Tensor]],
    ) -> int:
        """Compute the rows that are missing, in batches of similar length.

        Args:
            texts: the texts.
            compute: batches of texts -> the rows of each batch, one text after the other.

        Returns:
            The number of texts computed.
        """
        todo = self.missing(texts)
        if not todo:
            return 0
        parts = list(length_buckets(todo, lambda text: text.size, _BATCH_TOKENS))
        keys = [self.key(text) for part in parts for text in part]
        first = [0, *accumulate(self.count(text) for text in chain(*parts))][:-1]
        rows = (own.to("cpu", self.dtype) for own in compute(parts))
        if self.folder is None:
            self._index_rows(torch.cat(list(rows)), keys, first)
        else:
            self._write(self.folder, rows, keys, first)
        return len(todo)

    def key(self, text: Text) -> bytes:
        """16 bytes that identify a text's rows."""
        return hashlib.blake2b(np.asarray(self.inputs(text), np.int32).tobytes(), digest_size=16).digest()

    def _write(self, folder: Path, rows: Iterable[Tensor], keys: list[bytes], first: list[int]) -> None:
        name = hashlib.blake2b(b"".join(keys), digest_size=8).hexdigest()
        data, index = folder / f"{name}.bin", folder / f"{name}.npz"
        count = width = 0
        with new_file(data) as temporary, temporary.open("wb") as handle:
            for own in rows:
                own.contiguous().view(torch.uint8).numpy().tofile(handle)
                count, width = count + len(own), own.shape[-1]
        with new_file(index) as temporary, temporary.open("wb") as handle:
            np.savez(
                handle,
                keys=np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), -1),
                first=np.asarray(first),
                shape=np.asarray([count, width]),
            )
        self._read(index)

    def _read(self, index: Path) -> None:
        """Read one pair of files; a pair that is damaged or of another dtype is ignored, and computed again."""
        self._files.add(index)
        data = index.with_suffix(".bin")
        try:
            with index.open("rb") as handle, np.load(handle) as file:
                keys, first, (count, width) = file["keys"], file["first"], file["shape"].tolist()
            complete = data.stat().st_size == count * width * self.dtype.itemsize
        except (OSError, EOFError, KeyError, ValueError, BadZipFile):
            return
        if complete:
            rows = torch.from_file(str(data), shared=False, size=count * width, dtype=self.dtype)
            self._index_rows(rows.view(count, width), [key.tobytes() for key in keys], first.tolist())

    def _index_rows(self, rows: Tensor, keys: list[bytes], first: list[int]) -> None:
        chunk = len(self.chunks)
        self.chunks.append(rows)
        self._index.update((key, (chunk, at)) for key, at in zip(keys, first, strict=True))
