"""Any sequence of steps, against lists."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from emendo.errors import ConflictError, RequestError
from emendo.ledger import Ledger
from ledger.samples import FINGERPRINT, MEMORY, about, consistent, payload

NAMES = ("a", "b", "c")


class Steps(RuleBasedStateMachine):
    """The model is the list of all states, each a list of payload numbers, and a dict of tags."""

    @initialize()
    def begin(self) -> None:
        self.folder = tempfile.TemporaryDirectory(dir=MEMORY)
        self.ledger = Ledger.create(self.folder.name, FINGERPRINT, "tiny")
        self.states: list[list[int]] = [[]]
        self.tags: dict[str, int] = {}
        self.seen: list[int] = []  # the payload of edit 1, 2, ...

    def teardown(self) -> None:
        if hasattr(self, "ledger"):
            consistent(self.ledger)
            self.folder.cleanup()

    def _take(self, step: Callable[..., Any], after: list[int] | None, parent: int | None = None) -> None:
        """A step that leads to ``after``, or that cannot be taken."""
        if parent is not None and parent != len(self.states) - 1:
            with pytest.raises(ConflictError):
                step(parent=parent)
        elif after is None:
            with pytest.raises(RequestError):
                step(parent=parent)
        else:
            assert step(parent=parent).id == len(self.states)
            self.states.append(after)

    parents = st.none() | st.integers(0, 12)

    @rule(n=st.integers(0, 5), parent=parents)
    def apply(self, n: int, parent: int | None) -> None:
        now = self.states[-1]
        steps = len(self.states)
        self._take(
            lambda **how: self.ledger.apply(payload(n), about(), **how),
            None if n in now else [*now, n],
            parent,
        )
        if len(self.states) > steps and n not in self.seen:
            self.seen.append(n)

    @rule(n=st.integers(0, 3), parent=parents)
    def undo(self, n: int, parent: int | None) -> None:
        now = self.states[-1]
        possible = 1 <= n <= len(now)
        if n < 1:
            with pytest.raises(RequestError):
                self.ledger.undo(n)
        else:
            self._take(
                lambda **how: self.ledger.undo(n, **how), now[: len(now) - n] if possible else None, parent
            )

    @rule(id=st.integers(0, 7))
    def revert(self, id: int) -> None:
        now = self.states[-1]
        what = self.seen[id - 1] if 1 <= id <= len(self.seen) else None
        after = [n for n in now if n != what] if what in now else None
        self._take(lambda **how: self.ledger.revert(id, **how), after)

    @rule(state=st.integers(0, 12) | st.sampled_from((*NAMES, "head")))
    def checkout(self, state: int | str) -> None:
        number = (
            len(self.states) - 1
            if state == "head"
            else self.tags.get(state)
            if isinstance(state, str)
            else state
        )
        after = self.states[number] if number is not None and number < len(self.states) else None
        self._take(lambda **how: self.ledger.checkout(state, **how), after)

    @rule(name=st.sampled_from(NAMES), operation=st.none() | st.integers(0, 12))
    def tag(self, name: str, operation: int | None) -> None:
        number = len(self.states) - 1 if operation is None else operation
        if name in self.tags or number >= len(self.states):
            with pytest.raises(RequestError):
                self.ledger.tag(name, operation)
        else:
            assert self.ledger.tag(name, operation).operation == number
            self.tags[name] = number

    @precondition(lambda self: len(self.states) > 1)
    @rule(data=st.data())
    def diff(self, data: st.DataObject) -> None:
        a, b = (data.draw(st.integers(0, len(self.states) - 1)) for _ in "ab")
        added, removed = self.ledger.diff(a, b)
        assert [self.seen[entry.id - 1] for entry in added] == [
            n for n in self.states[b] if n not in self.states[a]
        ]
        assert [self.seen[entry.id - 1] for entry in removed] == [
            n for n in self.states[a] if n not in self.states[b]
        ]

    @rule()
    def open_again(self) -> None:
        self.ledger = Ledger.open(self.folder.name, FINGERPRINT)

    @invariant()
    def same(self) -> None:
        if hasattr(self, "ledger"):
            assert [self.ledger.load(entry.id) for entry in self.ledger.active] == [
                payload(n) for n in self.states[-1]
            ]
            assert {tag.name: tag.operation for tag in self.ledger.tags()} == self.tags


TestSteps = Steps.TestCase
TestSteps.settings = settings(max_examples=6, stateful_step_count=15)
