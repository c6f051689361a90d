"""A model split at its first edited block.

Everything below that block is frozen and its output depends on the text alone, so it runs once per text
(:meth:`Trunk.run`) and every later pass starts from what it gave (:meth:`Trunk.logits`). No per-model code:
a forward pre-hook takes the hidden state and stops the pass; to resume, the blocks below are stand-ins that
hand their input on, and a pre-hook feeds the kept hidden state to the first edited block. The list keeps its
length, so layer indices, masks and rotary tables stay right. A pass can also end at the vocabulary projection, with
what that is given (:meth:`Trunk.rows`).

How far the trunk reaches depends on the kind of model:

- a decoder, or a classifier on one stack of blocks: all blocks below the first edited one;
- an encoder-decoder with edits in its encoder: the encoder's blocks below the first edited one. The decoder runs in
  full, since every block of it reads what the edited encoder gives;
- an encoder-decoder with edits in its decoder alone: the whole encoder. The decoder runs in full here too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from emendo.errors import ModelError
from emendo.models._forward import label_logits, model_inputs, wide_attention
from emendo.models._packing import Packing, Rows, even, packable, packed, take
from emendo.models.sites import Site, find_stacks, kind_of
from emendo.models.text import Text, TokenBatch, collate


class Trunk:
    """The frozen blocks of a model below the first edited site, and the way on from there.

    Args:
        model: the model; it is not changed.
        sites: what is edited; the trunk ends below the lowest of their blocks.

    Raises:
        ModelError: the sites stand in stacks that do not belong together, or the model's outputs cannot be scored.
    """

    def __init__(self, model: nn.Module, sites: tuple[Site, ...]) -> None:
        self.model = model
        self.kind = kind_of(model)
        stacks = {stack.name: stack.depth for stack in find_stacks(model)}
        if len(stacks) > 1 + (self.kind == "seq2seq"):
            raise ModelError(
                f"{type(model).__name__} has {len(stacks)} stacks of blocks: {', '.join(stacks)}."
            )
        if strange := {site.stack for site in sites} - stacks.keys():
            raise ModelError(f"The model has no blocks {', '.join(strange)}; it has {', '.join(stacks)}.")
        self.stack = next(iter(stacks))
        """Where it stands: the only stack, or the encoder's, which comes first."""
        self.block = min(
            (site.block for site in sites if site.stack == self.stack), default=stacks[self.stack]
        )
        """The first edited block; the number of blocks where there is none."""
        if self.kind != "seq2seq" and self.block == stacks[self.stack]:
            raise ModelError("A trunk needs at least one site.")
        self._depths = stacks
        self._sites = sites
        self._packable: dict[str, str] | None = None
        parameters = inspect.signature(model.forward).parameters
        self._takes_positions = self.kind == "causal" and "position_ids" in parameters

    @torch.no_grad()
    def run(self, batch: TokenBatch) -> Tensor:
        """The hidden state ``[texts, tokens, width]`` that enters the first edited block.

        For an encoder-decoder the tokens are those of the source; without edits in its encoder, what the whole
        encoder gives.
        """
        if self.kind != "seq2seq":
            return input_of(self._first, lambda: self.model(**self._inputs(batch)))
        encoder = self.model.get_encoder()  # type: ignore[operator]
        inputs = {name: self._inputs(batch)[name] for name in ("input_ids", "attention_mask")}
        if f"{self.block}" in self.model.get_submodule(self.stack)._modules:
            return input_of(self._first, lambda: encoder(**inputs))
        hidden: Tensor = encoder(**inputs).last_hidden_state
        return hidden

    def relevant_rows(self, batch: TokenBatch, *, filled: bool = False) -> dict[str, Rows]:
        """By site, the rows that what is said depends on: the texts', and in a decoder's last MLP the labels' alone.

        Args:
            batch: the texts.
            filled: with a few others, for a number of rows that suits the products (``_packing.even``).
        """
        rows: dict[str, Rows] = {}
        found = {}
        for site in self._sites:
            last = self.kind == "causal" and site.block == self._depths[site.stack] - 1 and not site.attention
            which = "labels" if last else "source" if self._reads_source(site) else "texts"
            if which not in rows:
                rows[which] = _rows(batch, which)
                if filled:
                    rows[which] = self._filled(rows[which], batch, which)
            found[site.name] = rows[which]
        return found

    def packing(self, batch: TokenBatch) -> Packing:
        """Which rows of a batch the edited blocks' MLPs need to see."""
        if self._packable is None:
            self._packable = packable(self.model, self._sites)
        matter = self.relevant_rows(batch, filled=True)
        found = {name: own for name, own in matter.items() if name in self._packable}
        return Packing({self._packable[name]: own for name, own in found.items()}, found)

    def _filled(self, rows: Rows, batch: TokenBatch, which: str) -> Rows:
        mask = batch.trunk_mask if which == "source" else batch.attention_mask
        more = even(len(rows.index), next(self.model.parameters())) - len(rows.index)
        if not more:
            return rows
        free = torch.ones(mask.numel(), dtype=torch.bool).index_fill_(0, rows.index, False)
        others = free.nonzero().squeeze(1)[:more]
        return Rows(torch.cat([rows.index, others]), torch.cat([rows.owner, others // mask.shape[1]]))

    @cached_property
    @torch.no_grad()
    def projection(self) -> nn.Linear | None:
        """The vocabulary projection, if it says all: a frozen plain matrix whose output is the logits.

        None for a classifier, and where a softcap or a bias of the logits follows; seen on one text.
        """
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        if type(head) is not nn.Linear or head.weight.requires_grad:
            return None
        batch = collate([Text((1, 2, 3, 4), 1, (1, 2) if self.kind == "seq2seq" else ())])
        said: list[Tensor] = []
        with head.register_forward_hook(lambda module, args, output: said.append(output)):
            logits: Tensor = self.model(**self._inputs(batch)).logits
        return head if said and logits.any() and logits.equal(said[-1]) else None

    def rows(self, batch: TokenBatch, hidden: Tensor | None = None, packing: Packing | None = None) -> Tensor:
        """What the vocabulary projection is given at the label positions, ``[n, width]``; arguments as for the logits.

        For a classifier, which has no such projection, its logits ``[n, classes]``.
        """
        packing, head = packing or self.packing(batch), self.model.get_output_embeddings()  # type: ignore[operator]
        if head is None:
            return self.logits(batch, hidden, packing)
        seen = input_of(head, lambda: self.logits(batch, hidden, packing))
        return take(seen.flatten(0, 1), batch.positions.to(seen.device))

    def logits(
        self,
        batch: TokenBatch,
        hidden: Tensor | None = None,
        packing: Packing | None = None,
        beside: Tensor | None = None,
    ) -> Tensor:
        """Logits at the label positions only, resumed from the trunk's output.

        Args:
            batch: the texts.
            hidden: ``[texts, tokens, width]`` from :meth:`run`; None runs the whole model.
            packing: of :meth:`packing`, to leave out the rows that do not matter.
            beside: rows of :meth:`rows` whose logits are asked for too.

        Returns:
            ``[n, vocabulary]``, one row for each of the batch's labels (classes in place of the vocabulary for a
            classifier), and after them one for each of ``beside``.
        """
        if packing is not None:
            with packed(self.model, packing), wide_attention(self.model):
                return self.logits(batch, hidden, beside=beside)
        inputs = self._inputs(batch)
        if hidden is None:
            return label_logits(self.model, inputs, batch.positions, beside)
        if f"{self.block}" not in self.model.get_submodule(self.stack)._modules:
            rest = {name: value for name, value in inputs.items() if name != "input_ids"}
            kept = hidden.to(next(self.model.parameters()))
            return label_logits(self.model, {**rest, "encoder_outputs": (kept,)}, batch.positions, beside)
        with self._resuming(hidden):
            return label_logits(self.model, inputs, batch.positions, beside)

    def _inputs(self, batch: TokenBatch) -> dict[str, Any]:
        return model_inputs(self.model, batch, positions=self._takes_positions)

    @property
    def _first(self) -> nn.Module:
        return self.model.get_submodule(f"{self.stack}.{self.block}")

    def _reads_source(self, site: Site) -> bool:
        return self.kind == "seq2seq" and site.stack == self.stack

    @cached_property
    @torch.no_grad()
    def _values(self) -> int:
        """How many values a block gives in a tuple, 0 where it gives the hidden state alone: seen on one token."""
        batch = collate([Text((0, 0), 1, (0,) if self.kind == "seq2seq" else ())])
        return values(self.model.get_submodule(f"{self.stack}.0"), lambda: self.model(**self._inputs(batch)))

    @contextmanager
    def _resuming(self, hidden: Tensor) -> Iterator[None]:
        def feed(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            if args:
                return (hidden.to(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": hidden.to(kwargs["hidden_states"])}

        blocks = self.model.get_submodule(self.stack)
        below = {str(i): blocks.get_submodule(str(i)) for i in range(self.block)}
        first = self._first
        with ExitStack() as stack:
            stack.callback(first.register_forward_pre_hook(feed, with_kwargs=True).remove)
            stack.callback(blocks._modules.update, below)
            if below:
                stack.enter_context(lent_bias(blocks.get_submodule("0"), first))
                blocks._modules |= {key: Pass(block, self._values) for key, block in below.items()}
            yield


def _rows(batch: TokenBatch, which: str) -> Rows:
    """Rows of a batch: those of its ``"labels"``, its ``"texts"`` or their ``"source"``."""
    if which == "labels":
        return Rows(batch.positions, batch.owner)
    mask = batch.trunk_mask if which == "source" else batch.attention_mask
    index = mask.flatten().nonzero().squeeze(1)
    return Rows(index, index // mask.shape[1])


# --------------------
# Passes through a part of a model: ended before a module, or with stand-ins for blocks that need not run.


class _Stop(Exception):  # noqa: N818 - control flow, not an error
    def __init__(self, value: Any) -> None:
        self.value = value


def input_of(module: nn.Module, run: Callable[[], object]) -> Tensor:
    """What a module is given in a pass, which ends there."""

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Stop(args[0] if args else kwargs["hidden_states"])

    with module.register_forward_pre_hook(stop, with_kwargs=True):
        try:
            run()
        except _Stop as stopped:
            return stopped.value  # type: ignore[no-any-return]
    raise ModelError(f"The model never ran its {type(module).__name__}.")


def values(module: nn.Module, run: Callable[[], object]) -> int:
    """How many values a module gives in a tuple, 0 for one that is in none, in a pass which ends there."""

    def stop(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        raise _Stop(len(output) if isinstance(output, tuple) else 0)

    with module.register_forward_hook(stop):
        try:
            run()
        except _Stop as stopped:
            return stopped.value  # type: ignore[no-any-return]
    raise ModelError(f"The model never ran its {type(module).__name__}.")


class Pass(nn.Module):
    """Stands for a block below the trunk's top: hands its input on, answers for the block's attributes.

    Args:
        block: what it stands for.
        values: how many values that gives in a tuple, the hidden state first; 0 where it gives that alone.
    """

    def __init__(self, block: nn.Module, values: int) -> None:
        super().__init__()
        object.__setattr__(self, "block", block)  # not registered as a child: it must not show up as one
        object.__setattr__(self, "values", values)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "block"), name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What came in, in the form that the block gives."""
        return (hidden_states, *(None,) * (self.values - 1)) if self.values else hidden_states


@contextmanager
def lent_bias(owner: nn.Module, borrower: nn.Module) -> Iterator[None]:
    """T5's first block owns the table of relative positions; lend it to the block from which a pass resumes."""
    source, target = _bias_table(owner), _bias_table(borrower)
    if source is None or target is None or target.has_relative_attention_bias:
        yield
        return
    target.relative_attention_bias = source.relative_attention_bias
    target.has_relative_attention_bias = True  # type: ignore[assignment]
    try:
        yield
    finally:
        del target.relative_attention_bias
        target.has_relative_attention_bias = False  # type: ignore[assignment]


def _bias_table(block: nn.Module) -> nn.Module | None:
    """The self-attention of a block of T5's kind, whose blocks hand a relative position bias on to each other."""
    return next((m for m in block.modules() if hasattr(m, "has_relative_attention_bias")), None)
