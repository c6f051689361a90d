"""A batch of answers in progress: each row under its own edits, rows join and leave between tokens.

Rows are padded on the left. One step reads one token of every row; rows that are new are read as a batch of their own
first, and their keys and values are put beside those of the others.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from emendo.errors import RequestError
from emendo.low_rank import Change, RowGroups, applied, prepared, total
from emendo.models.caching import can_grow, concatenated, new_cache, selected
from emendo.models.lm import LM
from emendo.models.text import padded
from emendo.serve._text import BROKEN, TextStream
from emendo.serve.backend import Ask, Finish, InForce, Piece, Token

_SETS = 64  # sets of edits that are kept ready


@dataclass(eq=False)
class Row:
    """An answer in progress.

    Attributes:
        ask: the request.
        force: the edits in force.
        ids: the prompt's tokens.
        room: the largest number of tokens to generate.
        out: the tokens generated so far.
        text: the same as text, as far as it is certain.
        random: of a row that samples.
    """

    ask: Ask
    force: InForce
    ids: tuple[int, ...]
    room: int
    text: TextStream
    out: list[int] = field(default_factory=list)
    random: torch.Generator | None = None

    @property
    def size(self) -> int:
        """The largest number of tokens that it may come to."""
        return len(self.ids) + self.room

    @property
    def edits(self) -> tuple[str, ...]:
        """The digests of the edits in force."""
        return tuple(part.digest for part in self.force.parts)


def row_of(lm: LM, ask: Ask, force: InForce) -> Row:
    """A request as a row.

    Raises:
        RequestError: it does not fit the model.
        MismatchError: an edit does not.
    """
    for part in force.parts:
        part.edit.check(lm)
    if ask.messages:
        ids = lm.conversation_ids(ask.messages)
    else:
        (text,) = lm.prompt_texts([ask.prompt])
        ids = text.ids[: text.start]
    left = None if lm.context is None else lm.context - len(ids)
    if left is not None and left < 1:
        raise RequestError(
            f"The prompt has {len(ids)} tokens and the model's context is {lm.context}: there is no room for an answer."
        )
    wanted = [n for n in (ask.max_tokens, left) if n is not None]
    if not wanted:
        raise RequestError("The model has no largest number of tokens: give max_tokens.")
    random = None
    if ask.temperature > 0:
        random = torch.Generator()
        random.manual_seed(ask.seed) if ask.seed is not None else random.seed()
    return Row(ask, force, ids, min(wanted), TextStream(lm.tokenizer, ask.stop), random=random)


class Batch:
    """Rows that are answered together.

    Args:
        lm: a decoder.
    """

    def __init__(self, lm: LM) -> None:
        self.lm = lm
        self.rows: list[Row] = []
        self._cache: Any = None
        self._mask = torch.empty(0)
        self._last = torch.empty(0)
        self._changes: Mapping[str, Change] | None = None
        self._prepared: OrderedDict[tuple[str, ...], dict[str, Change]] = OrderedDict()
        arguments = inspect.signature(lm.model.forward).parameters
        self._positions = "position_ids" in arguments
        self._named = (
            "cache" if "cache" in arguments else "past_key_values"
        )  # the name before transformers 5.23

    @property
    def joins(self) -> bool:
        """Whether rows can join now; some caches (sliding windows, states of recurrent blocks) cannot be padded."""
        return not self.rows or can_grow(self._cache)

    @torch.no_grad()
    def join(self, rows: Sequence[Row]) -> list[Piece]:
        """Read the prompts of new rows, and give the first piece of each."""
        ids, mask = padded([row.ids for row in rows], self.lm.pad_id, "left")
        ids, mask = ids.to(self.lm.device), mask.to(self.lm.device)
        cache = new_cache(self.lm.model)
        logits = self._forward(ids, mask, cache, self._changes_of(rows))
        pieces, last = self._advance(rows, logits)
        if self.rows:
            self._cache = concatenated(self._cache, cache)
            width = max(self._mask.shape[1], mask.shape[1])
            self._mask = torch.cat([_widened(self._mask, width), _widened(mask, width)])
            self._last = torch.cat([self._last, last])
        else:
            self._cache, self._mask, self._last = cache, mask, last
        self.rows += rows
        self._changes = None
        return pieces

    @torch.no_grad()
    def step(self) -> list[Piece]:
        """Generate one token for each row, and give the piece of each."""
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(self.rows), 1)], 1)
        if self._changes is None:
            self._changes = self._changes_of(self.rows)
        logits = self._forward(self._last[:, None], self._mask, self._cache, self._changes)
        pieces, self._last = self._advance(self.rows, logits)
        return pieces

    def keep(self, places: Sequence[int]) -> None:
        """Keep some rows, and drop the padding that none of them needs."""
        if len(places) == len(self.rows):
            return
        self.rows = [self.rows[i] for i in places]
        self._changes = None
        if not self.rows:
            self._cache = None
            return
        index = torch.tensor(places, device=self._mask.device)
        self._mask, self._last = self._mask[index], self._last[index]
        start = int(self._mask.any(0).int().argmax()) if can_grow(self._cache) else 0
        self._mask = self._mask[:, start:]
        self._cache = selected(self._cache, index, start)

    def _forward(self, ids: Tensor, mask: Tensor, cache: Any, changes: Mapping[str, Change]) -> Tensor:
        """The logits ``[rows, vocabulary]`` after the last token."""
        inputs = {"input_ids": ids, "attention_mask": mask, self._named: cache, "use_cache": True}
        if self._positions:
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        head = self.lm.model.get_output_embeddings()
        last_only = head.register_forward_pre_hook(lambda _, args: (args[0][:, -1:].contiguous(), *args[1:]))
        with last_only, applied(self.lm.model, changes):
            logits: Tensor = self.lm.model(**inputs).logits[:, -1].float()
        return logits

    def _changes_of(self, rows: Sequence[Row]) -> dict[str, Change]:
        groups: dict[tuple[str, ...], list[int]] = {}
        for i, row in enumerate(rows):
            groups.setdefault(row.edits, []).append(i)
        by_site: dict[str, list[tuple[Sequence[int], Change]]] = {}
        for edits, places in groups.items():
            for name, change in self._changes_under(edits, rows[places[0]].force).items():
                by_site.setdefault(name, []).append((places, change))
        return {name: RowGroups(len(rows), own) for name, own in by_site.items()}

    def _changes_under(self, edits: tuple[str, ...], force: InForce) -> dict[str, Change]:
        """The changes of a set of edits; those used last are kept."""
        if not edits:
            return {}
        if edits not in self._prepared:
            deltas = total(part.edit.deltas for part in force.parts)
            self._prepared[edits] = {name: prepared(delta) for name, delta in deltas.items()}
        self._prepared.move_to_end(edits)
        while len(self._prepared) > _SETS:
            self._prepared.popitem(last=False)
        return self._prepared[edits]

    # --------------------------------------------------------------------------------------------- tokens

    def _advance(self, rows: Sequence[Row], logits: Tensor) -> tuple[list[Piece], Tensor]:
        """Choose the next token ``[rows]`` of each row."""
        first = [i for i, row in enumerate(rows) if not row.out]
        if first and self.lm.never_first:
            logits = logits.clone()
            logits[torch.tensor(first)[:, None], torch.tensor(self.lm.never_first)] = -torch.inf
        chosen = logits.argmax(-1)
        for i, row in enumerate(rows):
            if row.random is not None:
                weights = probabilities(logits[i].cpu(), row.ask.temperature, row.ask.top_p)
                chosen[i] = torch.multinomial(weights, 1, generator=row.random)
        return [self._piece(row, int(chosen[i]), logits[i]) for i, row in enumerate(rows)], chosen

    def _piece(self, row: Row, token: int, logits: Tensor) -> Piece:
        row.out.append(token)
        finish: Finish | None = None
        ended = token in self.lm.ends
        if ended:
            finish = "stop"
        elif len(row.out) >= row.room:
            finish = "length"
        text, stopped = row.text.add(() if ended else (token,), last=finish is not None)
        tokens = () if row.ask.logprobs is None or ended else (self._token(token, logits, row.ask.logprobs),)
        return Piece(text, len(row.out), len(row.ids), tokens, "stop" if stopped else finish)

    def _token(self, token: int, logits: Tensor, count: int) -> Token:
        logprobs = logits.log_softmax(-1)
        values, ids = logprobs.topk(min(count, len(logprobs))) if count else ((), ())
        top = tuple((self._shown(int(i)), float(value)) for i, value in zip(ids, values, strict=True))
        return Token(self._shown(token), float(logprobs[token]), top)

    def _shown(self, token: int) -> str:
        """A token as text; one that is part of a character as the tokenizer's vocabulary has it."""
        text: str = self.lm.tokenizer.decode([token])
        return text if BROKEN not in text else str(self.lm.tokenizer.convert_ids_to_tokens(token))


def probabilities(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """The probabilities ``[vocabulary]`` that a sampled token has.

    Args:
        logits: ``[vocabulary]``.
        temperature: divides the logits.
        top_p: from 0 to 1; the least likely tokens that lie beyond this share have none.
    """
    ordered, order = (logits / temperature).softmax(-1).sort(descending=True)
    beyond = ordered.cumsum(-1) - ordered >= top_p
    beyond[0] = False
    kept = ordered.masked_fill(beyond, 0.0)
    return torch.zeros_like(kept).index_copy(0, order, kept / kept.sum())


def _widened(mask: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(mask, (width - mask.shape[1], 0))
