"""What a run prepares ahead of its steps: shares of batches, trunk outputs, factors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

import torch

from emendo.editors.gradient import Ahead, GradientEditor
from emendo.editors.objective import Episode
from emendo.models.capture import all_finite
from emendo.models.text import Text
from emendo.models.trunk_cache import TrunkCache
from emendo.progress import Progress
from emendo.train.episodes import GROUP, Episodes
from emendo.train.processes import World


class Preparation:
    """The share of each batch that is this process's, with everything that does not depend on the editor's parameters.

    Args:
        world: the processes.
        editor: the editor.
        episodes: draws the batches.
        store: the trunk's outputs.
        progress: receives how many texts have passed through the trunk.
    """

    def __init__(
        self, world: World, editor: GradientEditor, episodes: Episodes, store: TrunkCache, progress: Progress
    ) -> None:
        self.world, self.editor, self.episodes, self.store = world, editor, episodes, store
        self.progress = progress
        self._streamed = 0  # the first step whose texts have not passed through offloaded frozen blocks
        self._group = -1  # the group of steps in self._looked
        self._looked: list[tuple[Sequence[Episode], Ahead]] = []
        self._finite = [True]  # by step of the group, whether the factors of all processes are finite

    def step(self, step: int) -> tuple[Sequence[Episode], Ahead, bool]:
        """This process's share of the step's batch, and whether the factors of all shares are finite.

        The first step of a group prepares the whole group. A run that is resumed inside a group prepares all of it too,
        and so computes identical numbers.
        """
        group, place = divmod(step, GROUP)
        if self._group != group:
            self._stream(group * GROUP)
            window = self.episodes.window(group * GROUP) or []
            batches = [self.episodes.batch(group * GROUP + i) for i in range(GROUP)]
            own = [self._share(batch) for batch in batches]
            cuts = range(0, len(window), self.episodes.config.batch)
            own_window = [*chain(*(self._share(window[at : at + self.episodes.config.batch]) for at in cuts))]
            self.ensure([*window, *chain(*batches)], [*own_window, *chain(*own)])
            self._looked = []  # frees the last group's factors before this one's are computed
            self._looked = list(zip(own, self.editor.look_ahead(self.store, own, own_window), strict=True))
            self._finite = self._all_finite()
            self._group = group
        return *self._looked[place], self._finite[place]

    def _stream(self, step: int) -> None:
        """Compute the trunk outputs of a whole epoch at once if each block must be read for it."""
        if not self.store.trunk.streams or step < self._streamed:
            return
        steps = self.episodes.rest_of_epoch(step)
        batches = [self.episodes.batch(s) for s in steps]
        self.ensure(chain(*batches), chain(*map(self._share, batches)))
        self._streamed = steps.stop

    def _share(self, batch: Sequence[Episode]) -> Sequence[Episode]:
        return self.world.share(batch, self.episodes.config.together)

    def _all_finite(self) -> list[bool]:
        """For each step of the group, whether the factors of all processes are finite."""
        if self.world.size == 1:
            return [True] * GROUP  # the step itself finds out
        ok = [not a or all_finite(row for f in a.values() for row in (f.u, f.delta)) for _, a in self._looked]
        return self.world.gather(torch.tensor(ok, dtype=torch.float32)).bool().all(0).tolist()

    def ensure(self, episodes: Iterable[Episode], own: Iterable[Episode]) -> None:
        """Compute the missing trunk outputs of this process's own episodes, out of those of all processes."""
        parts = [[text for episode in part for text in episode.texts()] for part in (episodes, own)]
        self.ensure_texts(*parts)

    def ensure_texts(self, texts: Sequence[Text], own: Sequence[Text]) -> None:
        """Compute the missing trunk outputs of this process's own texts, out of those of all processes.

        With a folder each output is computed by one process only, the text's owner, and read by the others.
        """
        if self.world.size > 1 and self.store.folder is not None:
            self._compute(
                [text for text in self.store.missing(texts) if self.world.owns(self.store.key(text))]
            )
            self.world.wait()
            self.store.refresh()
        self._compute(self.store.missing(own))

    def _compute(self, missing: Sequence[Text]) -> None:
        done = 0

        def computed(count: int) -> None:
            nonlocal done
            done += count
            self.progress.update("frozen part", done // self.store.passes, len(missing))

        self.store.ensure(missing, computed)
