"""The frozen blocks of a model that is larger than memory, one block at a time over all texts.

Each block is read once. Between two blocks the hidden states of all texts lie in a file, so that memory holds one
block and one batch. The arithmetic is that of :meth:`emendo.models.trunk.Trunk.run` on the same batches.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from emendo.models.offloading import held
from emendo.models.text import TokenBatch
from emendo.models.trunk import Trunk


def stream(
    trunk: Trunk,
    batches: Sequence[TokenBatch],
    folder: Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Tensor]:
    """Run the frozen blocks over batches of texts.

    Args:
        trunk: a trunk of at least one block.
        batches: the texts.
        folder: a folder with room for the hidden states; None keeps them in memory.
        progress: called with the number of texts of each batch, once for each block.

    Yields:
        For each batch, the trunk's output ``[tokens, width]`` of its texts, without padding.
    """
    with ExitStack() as stack:
        states = _States(None if folder is None else stack.enter_context(_file(folder)))
        for index in range(trunk.block):
            with held([trunk.frozen_block(index)]):
                for number, batch in enumerate(batches):
                    mask = batch.trunk_mask.bool()
                    hidden = None if index == 0 else _padded(states[number], mask)
                    rows = trunk.run_block(index, batch, hidden).cpu()[mask]
                    if progress is not None:
                        progress(len(batch))
                    if index == trunk.block - 1:
                        yield rows
                    else:
                        states[number] = rows


def _file(folder: Path) -> BinaryIO:
    """A file that vanishes when it is closed, or when the process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryFile(dir=folder)


def _padded(rows: Tensor, mask: Tensor) -> Tensor:
    """``rows [tokens, width]`` at the places of ``mask [texts, length]``, with zeros elsewhere."""
    hidden = rows.new_zeros(*mask.shape, rows.shape[-1])
    hidden[mask] = rows
    return hidden


class _States:
    """The hidden states of each batch, in memory or, read and written rather than mapped, in a file."""

    def __init__(self, file: BinaryIO | None) -> None:
        self.file = file
        self.held: list[Tensor] = []  # without values if there is a file
        self.first: list[int] = [0]  # byte at which each batch begins

    def __getitem__(self, number: int) -> Tensor:
        if self.file is None:
            return self.held[number]
        rows = torch.empty_like(self.held[number], device="cpu")
        self.file.seek(self.first[number])
        self.file.readinto(rows.view(torch.uint8).numpy())  # type: ignore[attr-defined]
        return rows

    def __setitem__(self, number: int, rows: Tensor) -> None:
        if number == len(self.held):
            self.held.append(rows if self.file is None else torch.empty_like(rows, device="meta"))
            self.first.append(self.first[number] + rows.nbytes)
        if self.file is None:
            self.held[number] = rows
            return
        self.file.seek(self.first[number])
        self.file.write(rows.contiguous().view(torch.uint8).numpy().data)
