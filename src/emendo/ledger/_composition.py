"""A base model with any of its ledger's edits in force: those in the weights attached, the others in a memory.

A long list of edits is composed from its front in blocks, and the composition of the whole blocks is kept in a file of
the user's cache, so that starting does not read every edit. It depends on the edits alone, never on the steps that led
to them: after ``undo`` and ``revert`` the weights are those that they would be without the edit, bit for bit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from emendo._storage import cache_folder, new_file
from emendo.edits.edit import Edit, Origin, Request, compose
from emendo.errors import StorageError
from emendo.ledger._schema import Operation, Values
from emendo.ledger.store import Ledger
from emendo.low_rank import Deltas, LowRank, applied, from_tensors, to_tensors, total
from emendo.memory.bank import EditMemory, Remembered
from emendo.models.lm import LM

_BLOCK = 256  # edits composed at once
_FILES = 4  # compositions kept for each ledger


@dataclass(frozen=True, slots=True)
class Candidate:
    """An edit that the ledger does not have yet.

    Attributes:
        edit: the edit.
        scope: as in :class:`emendo.ledger._schema.Period`; None puts it into the weights.
    """

    edit: Edit
    scope: Values | None = None


class EditStack:
    """A base model and the edits of its ledger, each of the latest ones read once.

    Attributes:
        lm: the base model; its weights are never changed.
        ledger: the ledger that stores the edits.
    """

    def __init__(self, lm: LM, ledger: Ledger) -> None:
        self.lm, self.ledger = lm, ledger
        self._edits: dict[int, Edit] = {}
        self._front: tuple[Sequence[int], str, Deltas] = ((), "", {})
        self._memory: EditMemory | None = None
        self._scopes: dict[int, Values] = {}  # of the edits that the memory holds now
        self._read: tuple[int | None, dict[int, Values]] = (None, {})  # an operation, and the scopes after it

    @property
    def _name(self) -> str:
        """Of the ledger, in the cache."""
        return hashlib.sha256(self.ledger.id.encode()).hexdigest()[:16]

    def edit(self, id: int) -> Edit:
        """An edit of the ledger, active or not.

        Raises:
            RequestError: the ledger has no edit of that number.
            StorageError: it is damaged.
        """
        if id not in self._edits:
            self.ledger.entry(id)
        return self._load([id])[0]

    def composed(self, ids: Sequence[int]) -> Edit | None:
        """Several edits of the ledger as one; None for an empty list."""
        if not ids:
            return None
        if len(ids) < _BLOCK:
            return compose(self._load(ids))
        entries = self.ledger.entries(ids)
        origin = Origin(
            fingerprint=self.ledger.fingerprint,
            model=self.ledger.model,
            editor="composed",
            settings={"of": [entry.digest for entry in entries]},
            requests=tuple(Request.of(r) for entry in entries for r in entry.requests),
            date=max(entry.made for entry in entries),
            chat=all(entry.chat for entry in entries),
        )
        return Edit(self._deltas(ids, ()), origin)

    def in_weights(self, operation: Operation | None) -> tuple[int, ...]:
        """Numbers of the edits that are in the weights after an operation; None stands for the base model."""
        if operation is None:
            return ()
        scopes = self.scopes(operation)
        return tuple(id for id in operation.active if id not in scopes)

    def scopes(self, operation: Operation | None) -> dict[int, Values]:
        """The scopes of the edits in the memory after an operation; those asked for last are kept."""
        if operation is None:
            return {}
        if self._read[0] != operation.id:
            self._read = operation.id, self.ledger.scopes(operation.id)
        return self._read[1]

    def changes(self, operation: Operation | None, *more: Edit) -> dict[str, LowRank]:
        """The changes of the weights after an operation, with those of further edits."""
        return self._deltas(self.in_weights(operation), more)

    def memory(self, operation: Operation | None) -> EditMemory:
        """The memory of the edits that are not in the weights after an operation."""
        scopes = self.scopes(operation)
        if (memory := self._memory) is None:
            cache = cache_folder()
            memory = EditMemory(self.lm, keys=cache / "keys", index=cache / "indexes" / self._name)
            self._memory = memory
            digests = self.ledger.digests(list(scopes))
            marks = {id: _mark(digest, scopes[id]) for id, digest in zip(scopes, digests, strict=True)}
            new = memory.restore(marks, self.edit)
        else:
            for id in [id for id, scope in self._scopes.items() if scopes.get(id) != scope]:
                memory.remove(id)
                del self._scopes[id]
            new = [id for id in scopes if id not in self._scopes]
        memory.add_all(
            {
                entry.id: Remembered(
                    partial(self.edit, entry.id),
                    [request["prompt"] for request in entry.requests],
                    **evidence(scopes[entry.id]),
                    mark=_mark(entry.digest, scopes[entry.id]),
                )
                for entry in self.ledger.entries(new)
            }
        )
        self._scopes = dict(scopes)
        return memory

    @contextmanager
    def applied(self, operation: Operation | None, *more: Candidate) -> Iterator[LM]:
        """The model with the edits of a state, and others after them, for the length of a ``with`` block.

        Args:
            operation: the state after it; None stands for the base model.
            more: further edits.

        Raises:
            MismatchError: an edit was made for another model.
            RequestError: a further edit for the memory has no prompt.
            StorageError: an edit is damaged.
        """
        in_weights = [one.edit for one in more if one.scope is None]
        routed = [one for one in more if one.scope is not None]
        with ExitStack() as stack:
            lm = self.lm
            if routed or self.scopes(operation):
                memory = self.memory(operation)
                for one in routed:
                    stack.callback(memory.remove, memory.add(one.edit, **evidence(one.scope)))
                lm = stack.enter_context(memory.applied())
            stack.enter_context(applied(self.lm.model, self.changes(operation, *in_weights)))
            yield lm

    def _deltas(self, ids: Sequence[int], more: Iterable[Edit]) -> dict[str, LowRank]:
        """The sum of the changes of each matrix."""
        whole = len(ids) // _BLOCK * _BLOCK
        changes = [self._composed_blocks(ids[:whole])] if whole else []
        for edit in (*self._load(ids[whole:]), *more):
            edit.check(self.lm)
            changes.append(edit.deltas)
        return total(changes)

    def _load(self, ids: Sequence[int]) -> list[Edit]:
        """Edits of the ledger in the given order; those read last stay in memory."""
        missing = [id for id in ids if id not in self._edits]
        found = {id: Edit.from_bytes(data) for id, data in self.ledger.load_many(missing)}
        edits = [found[id] if id in found else self._edits[id] for id in ids]
        self._edits = dict([*self._edits.items(), *found.items()][-2 * _BLOCK :])
        return edits

    def _composed_blocks(self, ids: Sequence[int]) -> Deltas:
        """The composition of whole blocks: from memory, from the longest one that is kept, or from the start."""
        last_ids, last_key, last = self._front
        if last_ids == ids:
            return last
        keys = _keys(self.ledger.digests(ids))
        folder = cache_folder() / "composed" / self._name
        done, deltas = 0, dict[str, LowRank]()
        for count in range(len(keys), 0, -1):
            kept = last if last_key == keys[count - 1] else _read(folder / keys[count - 1])
            if kept is not None:
                done, deltas = count, dict(kept)
                break
        for count in range(done, len(keys)):
            block = [
                Edit.from_bytes(data) for _, data in self.ledger.load_many(ids[count * _BLOCK :][:_BLOCK])
            ]
            for edit in block:
                edit.check(self.lm)
            joined = total([deltas, *(edit.deltas for edit in block)])
            deltas = {name: _smaller(delta) for name, delta in joined.items()}
        if done < len(keys):
            _write(folder / keys[-1], deltas)
        self._front = (ids, keys[-1], deltas)
        return deltas


def evidence(scope: Values | None) -> dict[str, Any]:
    """The arguments of a memory's edit in a stored scope; fields of a later emendo are not read."""
    return {
        name: value for name, value in (scope or {}).items() if name in ("subject", "paraphrases", "aliases")
    }


def _mark(digest: str, scope: Values) -> int:
    """A number that identifies an edit with its scope."""
    text = f"{digest} {json.dumps(evidence(scope), sort_keys=True)}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def _keys(digests: Sequence[str]) -> list[str]:
    """A name for every prefix of whole blocks, from the digests of its edits in their order."""
    keys, chain = [], hashlib.sha256(f"emendo blocks of {_BLOCK}".encode())
    for start in range(0, len(digests), _BLOCK):
        chain.update("".join(digests[start : start + _BLOCK]).encode())
        keys.append(chain.hexdigest())
    return keys


@torch.no_grad()
def _smaller(delta: LowRank) -> LowRank:
    """The change as it is, or multiplied out in float64 where its factors are larger than the matrix."""
    if delta.is_compact:
        return delta
    return LowRank.from_dense((delta.left.double() @ delta.right.double()).to(delta.left.dtype))


def _write(file: Path, deltas: Deltas) -> None:
    """Keep a composition, if the cache can be written, and remove the oldest ones."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in to_tensors(deltas).items()}
    data = safetensors.torch.save(tensors)
    with suppress(OSError):
        with new_file(file) as new:
            new.write_bytes(hashlib.sha256(data).digest() + data)
        for old in sorted(file.parent.iterdir(), key=lambda each: each.stat().st_mtime)[:-_FILES]:
            old.unlink(missing_ok=True)


def _read(file: Path) -> Deltas | None:
    """A composition that was kept; None if there is none, or it is damaged."""
    try:
        content = file.read_bytes()
        digest, data = content[:32], content[32:]
        if hashlib.sha256(data).digest() != digest:
            return None
        return from_tensors(safetensors.torch.load(data))
    except (OSError, SafetensorError, KeyError, ValueError, StorageError):
        return None
