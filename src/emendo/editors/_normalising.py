"""Editors that normalise the factors: by statistics of the edit train set, or by running ones.

Mitchell et al., arXiv 2110.11309, appendix A: ``u`` and ``delta`` are normalised to mean 0 and variance 1 in each
dimension, with means and variances over the edit train set and the sequence index. ``statistics=train-set`` takes them
so: one pass over the factors of the training facts, before training (:meth:`GradientEditor.observe`), one chunk at a
time. ``statistics=running`` updates them at every training step before they are used, as the official code does.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from emendo._settings import setting
from emendo.editors._nets import RunningStats, joined
from emendo.editors.gradient import GradientEditor
from emendo.models.capture import Factors


def statistics_setting() -> Literal["train-set", "running"]:
    """The setting of the kind of statistics."""
    value: Literal["train-set", "running"] = setting(
        "running",
        "Statistics of the normalisation: of the `train-set`, in one pass before training, or `running` in training.",
        before="running",
    )
    return value


def statistics_on_setting() -> int:
    """The setting of the number of facts of the pass."""
    count: int = setting(
        1000, "Largest number of training facts of the pass for `train-set` (all facts).", least=1
    )
    return count


class _Settings(Protocol):
    """The settings that a normalising editor has."""

    @property
    def norm(self) -> bool: ...
    @property
    def statistics(self) -> Literal["train-set", "running"]: ...
    @property
    def statistics_on(self) -> int: ...


class NormalisingNet(nn.Module):
    """Base of the part of an editor that normalises the factors of some matrices of one shape.

    Args:
        shape: inputs and outputs of the matrices.
        config: whether it normalises, and by which statistics.
    """

    def __init__(self, shape: tuple[int, int], config: _Settings) -> None:
        super().__init__()
        self.shape, self.norm, self.running = shape, config.norm, config.statistics == "running"
        self.u_stats, self.delta_stats = (RunningStats(width) for width in shape)

    def observe(self, factors: Sequence[Factors]) -> None:
        """Update the statistics with rows; those that are not finite are left out."""
        rows, _ = joined(factors)
        self._update(rows[rows.isfinite().all(-1)])

    def normalised(self, factors: Sequence[Factors]) -> tuple[Tensor, list[int]]:
        """Rows ``[n, d_in + d_out]`` of u and delta, normalised, and the number of rows of each matrix.

        In training mode running statistics are updated first.
        """
        rows, sizes = joined(factors)
        if self.norm:
            if self.running and self.training:
                self._update(rows)
            for part, stats in zip(rows.split(self.shape, -1), (self.u_stats, self.delta_stats), strict=True):
                stats(part, out=part)
        return rows, sizes

    def _update(self, rows: Tensor) -> None:
        u, delta = rows.split(self.shape, -1)
        self.u_stats.update(u)
        self.delta_stats.update(delta)


class NormalisingEditor(GradientEditor):
    """Base of the editors that normalise the factors."""

    @abstractmethod
    def nets_of_sites(self) -> Iterator[tuple[NormalisingNet, list[str]]]:
        """Each network with the names of its sites."""

    @property
    def observes(self) -> int:
        """As in the base class; 0 too where there are statistics already."""
        config: _Settings = self.config
        taken = any(bool(net.u_stats.count) for net, _ in self.nets_of_sites())
        return 0 if taken or not config.norm or config.statistics == "running" else config.statistics_on

    @torch.no_grad()
    def observe(self, factors: Mapping[str, Factors]) -> None:
        """Update the statistics with the rows of some facts."""
        for net, names in self.nets_of_sites():
            net.observe([factors[name] for name in names])


class GroupedEditor(NormalisingEditor):
    """Base of the normalising editors with one network for each group of matrices."""

    members: dict[str, list[int]]
    """Name of a network -> the indices of its matrices in ``sites``; see :func:`emendo.models.sites.group_sites`."""

    @property
    @abstractmethod
    def networks(self) -> nn.ModuleDict:
        """The network of each group, which maps the factors of its matrices to their ``(u~, delta~)``."""

    def mapped(self, factors: Mapping[str, Factors]) -> list[tuple[Factors, Tensor, Tensor]]:
        """The factors of each matrix and its ``u~`` and ``delta~``, in the order of the sites."""
        found: dict[int, tuple[Factors, Tensor, Tensor]] = {}
        for key, members in self.members.items():
            group = [factors[self.sites[index].name] for index in members]
            for index, own, (u, delta) in zip(members, group, self.networks[key](group), strict=True):
                found[index] = own, u, delta
        return [found[index] for index in range(len(self.sites))]

    def nets_of_sites(self) -> Iterator[tuple[NormalisingNet, list[str]]]:
        """Each group's network with its sites."""
        for key, members in self.members.items():
            net = self.networks[key]
            assert isinstance(net, NormalisingNet)
            yield net, [self.sites[index].name for index in members]
