"""Prompts whose answers an edit should leave as they are, for methods that read some."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from emendo.data import atlas
from emendo.data.schema import Probe
from emendo.editors.base import Editor
from emendo.errors import RequestError
from emendo.models.lm import LM

POOL = 200
"""The largest number of locality examples."""


class LocalityEditor(Editor):
    """Base of the methods that read locality examples: those of :meth:`set_locality`, or the first built-in facts."""

    def set_locality(self, probes: Sequence[Probe]) -> None:
        """Use the first 200 of these probes as locality examples; they are saved with the editor."""
        self.info["locality"] = [[probe.prompt, probe.answer] for probe in probes[:POOL]]

    @property
    def given(self) -> list[tuple[str, str]]:
        """The prompts with their answers of :meth:`set_locality`; empty where it has not been called."""
        return [(prompt, answer) for prompt, answer in self.info.get("locality", [])]

    def locality(self, lm: LM) -> list[tuple[str, str]]:
        """The prompts with their answers.

        Raises:
            RequestError: a classifier has none, since the built-in facts have no classes.
        """
        if not self.given and lm.kind == "classifier":
            raise RequestError(
                f"{self.name} needs prompts whose answers must not change, and for a classifier none are built in: "
                "give some with editor.set_locality([Probe(prompt, class), ...])."
            )
        return self.given or list(self._built_in)

    @cached_property
    def _built_in(self) -> tuple[tuple[str, str], ...]:
        return tuple((record.prompt, str(record.answer)) for record in atlas.load("train", POOL))
