"""A model split at its first edited block.

The blocks below it are frozen, so their output depends on the text alone: they run once per text (:meth:`Trunk.run`),
and every later pass resumes from their output (:meth:`Trunk.logits`). This needs no code per model. To get the output,
a forward pre-hook on the first edited block records its hidden state and stops the pass. To resume, pass-through
modules replace the blocks below, and a pre-hook feeds the recorded hidden state to the first edited block. The list of
blocks keeps its length, so layer indices, masks and rotary tables stay right. A pass can also stop before the
vocabulary projection and return that module's input (:meth:`Trunk.projection_input`).
A model whose passes cannot resume runs in full each time. The frozen blocks of a model that is larger than memory run
one at a time over all texts (:meth:`Trunk.run_block`, :func:`emendo.models.streaming.stream`).

The extent of the trunk depends on the kind of model:

- decoder, or classifier with one stack of blocks: all blocks below the first edited one;
- encoder-decoder with edits in its encoder: the encoder's blocks below the first edited one. The decoder runs in
  full, because all its blocks read the output of the edited encoder;
- encoder-decoder with edits in its decoder only: the whole encoder. The decoder runs in full here too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from emendo.errors import ModelError
from emendo.models._forward import label_logits, model_inputs, wide_attention
from emendo.models._packing import Packing, Rows, packable, packed, padded_count, take
from emendo.models.offloading import held, is_offloaded
from emendo.models.sites import Site, find_stacks, input_device, kind_of
from emendo.models.text import Text, TokenBatch, collate

_resumable: WeakKeyDictionary[nn.Module, dict[int, bool]] = WeakKeyDictionary()
"""Model -> first edited block -> whether passes can resume there."""


class Trunk:
    """The frozen blocks of a model below the first edited site, and the passes that resume from their output.

    Args:
        model: the model; it is not changed.
        sites: the edited matrices; the trunk ends below the lowest of their blocks.

    Attributes:
        sites: the edited matrices.
        stack: name of the stack that is split: the only one, or the encoder's, which comes first.
        block: index of the first edited block in it; the number of blocks where none is edited.

    Raises:
        ModelError: the sites and stacks do not fit together, or the model's outputs cannot be scored.
    """

    def __init__(self, model: nn.Module, sites: tuple[Site, ...]) -> None:
        self.model = model
        self.kind = kind_of(model)
        depths = {stack.name: stack.depth for stack in find_stacks(model)}
        if unknown := {site.stack for site in sites} - depths.keys():
            raise ModelError(f"The model has no blocks {', '.join(unknown)}; it has {', '.join(depths)}.")
        self.stack = next(iter(depths))
        self.block = min(
            (site.block for site in sites if site.stack == self.stack), default=depths[self.stack]
        )
        if self.kind != "seq2seq" and self.block == depths[self.stack]:
            raise ModelError("A trunk needs at least one site.")
        self._depths = depths
        self.sites = sites
        self._packable: dict[str, str] | None = None
        parameters = inspect.signature(model.forward).parameters
        self._takes_positions = self.kind == "causal" and "position_ids" in parameters
        self._whole = False
        self._whole = not self._resumes()
        if self._whole:
            self._packable = None

    @torch.no_grad()
    def run(self, batch: TokenBatch) -> Tensor:
        """Run the frozen blocks.

        Args:
            batch: the texts.

        Returns:
            The hidden state ``[texts, tokens, width]`` that enters the first edited block. For an encoder-decoder the
            tokens are those of the source, and without edits in its encoder it is the output of the whole encoder.
            Zeros ``[texts, tokens, 1]`` for a model that cannot resume; then every pass runs the whole model.
        """
        if self._whole:
            return torch.zeros(*batch.trunk_mask.shape, 1)
        return self._entering(self.block, batch)

    @torch.no_grad()
    def run_block(self, index: int, batch: TokenBatch, hidden: Tensor | None) -> Tensor:
        """Run one of the frozen blocks.

        Args:
            index: of the block.
            batch: the texts.
            hidden: ``[texts, tokens, width]`` the hidden state that enters the block; None for the first block.

        Returns:
            The hidden state that enters the next block, as of :meth:`run` after the last one.
        """
        with nullcontext() if hidden is None else self._resuming(hidden, index):
            return self._entering(index + 1, batch)

    def _entering(self, index: int, batch: TokenBatch) -> Tensor:
        """The hidden state that enters a block of the split stack, or the output of the whole encoder."""
        inputs = self._inputs(batch)
        model: Any = self.model
        if self.kind == "seq2seq":
            model = model.get_encoder()
            inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        if index < self._depths[self.stack]:
            return self._checked(input_of(self.frozen_block(index), lambda: model(**inputs)), batch)
        return self._checked(model(**inputs).last_hidden_state, batch)

    def frozen_block(self, index: int) -> nn.Module:
        """A block of the split stack."""
        return self.model.get_submodule(f"{self.stack}.{index}")

    @property
    def streams(self) -> bool:
        """Whether frozen blocks are offloaded, so that all texts must pass through each of them at once."""
        return not self._whole and any(is_offloaded(self.frozen_block(i)) for i in range(self.block))

    @contextmanager
    def holding_the_rest(self) -> Iterator[None]:
        """Keep all blocks but the frozen ones in memory; without effect where they are."""
        blocks = [(name, i) for name, depth in self._depths.items() for i in range(depth)]
        rest = [(name, i) for name, i in blocks if name != self.stack or i >= self.block]
        with held(self.model.get_submodule(f"{name}.{i}") for name, i in rest):
            yield

    def _checked(self, hidden: Tensor, batch: TokenBatch) -> Tensor:
        """The hidden state of a batch's own tokens; some models pad further, to whole windows of attention."""
        texts, tokens = batch.trunk_mask.shape
        if hidden.shape[:2] == (tokens, texts) != (texts, tokens):
            raise ModelError(
                f"{type(self.model).__name__} keeps its hidden states as [tokens, texts, width] instead of "
                "[texts, tokens, width], so it cannot be edited."
            )
        if len(hidden) != texts or hidden.shape[1] < tokens:
            raise ValueError(f"{texts} texts of {tokens} tokens have hidden states {list(hidden.shape)}")
        return hidden[:, :tokens].flatten(2)

    def logits(
        self,
        batch: TokenBatch,
        hidden: Tensor | None = None,
        packing: Packing | None = None,
        extra: Tensor | None = None,
    ) -> Tensor:
        """Logits at the label positions only, resumed from the trunk's output.

        Args:
            batch: the texts.
            hidden: ``[texts, tokens, width]`` from :meth:`run`; None runs the whole model.
            packing: from :meth:`packing`, to leave out the rows that do not matter.
            extra: ``[m, width]`` rows from :meth:`projection_input`, whose logits are appended.

        Returns:
            ``[n + m, vocabulary]``: a row for each label of the batch, then one for each row of ``extra``. For a
            classifier, classes in place of the vocabulary.
        """
        if packing is not None:
            with packed(self.model, packing), wide_attention(self.model):
                return self.logits(batch, hidden, extra=extra)
        inputs = self._inputs(batch)
        if hidden is None or self._whole:
            return label_logits(self.model, inputs, batch.positions, extra)
        if not self._edits_stack:
            rest = {name: value for name, value in inputs.items() if name != "input_ids"}
            encoded = hidden.to(input_device(self.model), next(self.model.parameters()).dtype)
            return label_logits(self.model, {**rest, "encoder_outputs": (encoded,)}, batch.positions, extra)
        with self._resuming(hidden, self.block):
            return label_logits(self.model, inputs, batch.positions, extra)

    def projection_input(
        self, batch: TokenBatch, hidden: Tensor | None = None, packing: Packing | None = None
    ) -> Tensor:
        """The input ``[n, width]`` of the vocabulary projection at the label positions.

        For a classifier, which has no such projection, its logits ``[n, classes]``. Arguments as for :meth:`logits`.
        """
        packing, head = packing or self.packing(batch), self.model.get_output_embeddings()  # type: ignore[operator]
        if head is None:
            return self.logits(batch, hidden, packing)
        rows = input_of(head, lambda: self.logits(batch, hidden, packing))
        return take(rows.flatten(0, 1), batch.positions.to(rows.device))

    @cached_property
    @torch.no_grad()
    def projection(self) -> nn.Linear | None:
        """The vocabulary projection, if it is a frozen linear layer whose output is the logits; else None.

        None for a classifier, for a layer that is offloaded, and where the model changes the logits afterwards
        (softcap, bias); tested on one text.
        """
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        if type(head) is not nn.Linear or head.weight.requires_grad or is_offloaded(head):
            return None
        batch = collate([Text((1, 2, 3, 4), 1, (1, 2) if self.kind == "seq2seq" else ())])
        outputs: list[Tensor] = []
        hidden = self._entering(1, batch) if self.streams else None  # any hidden state will do
        with head.register_forward_hook(lambda module, args, output: outputs.append(output)):
            logits = self.logits(batch, hidden)
        return head if outputs and logits.any() and logits.equal(outputs[-1].squeeze(0)) else None

    def relevant_rows(self, batch: TokenBatch, *, padded: bool = False) -> dict[str, Rows]:
        """The rows of each site that the logits at the label positions depend on.

        These are the rows of the texts without padding; in a decoder's last MLP, the label positions alone.

        Args:
            batch: the texts.
            padded: add other rows, up to a number that is multiplied efficiently (``_packing.padded_count``).
        """
        rows: dict[str, Rows] = {}
        found = {}
        for site in self.sites:
            last = (
                self.kind == "causal"
                and not self._whole
                and site.block == self._depths[site.stack] - 1
                and not site.attention
            )
            reads_source = self.kind == "seq2seq" and site.stack == self.stack
            part = "labels" if last else "source" if reads_source else "texts"
            if part not in rows:
                rows[part] = _rows(batch, part)
                if padded:
                    rows[part] = self._padded(rows[part], batch, part)
            found[site.name] = rows[part]
        return found

    def packing(self, batch: TokenBatch) -> Packing:
        """The rows of a batch that the MLPs of the edited blocks need to compute."""
        if self._packable is None:
            self._packable = {} if self._whole else packable(self.model, self.sites)
        relevant = self.relevant_rows(batch, padded=True)
        found = {name: own for name, own in relevant.items() if name in self._packable}
        return Packing({self._packable[name]: own for name, own in found.items()}, found)

    def _padded(self, rows: Rows, batch: TokenBatch, part: str) -> Rows:
        mask = batch.trunk_mask if part == "source" else batch.attention_mask
        more = padded_count(len(rows.index), next(self.model.parameters())) - len(rows.index)
        if not more:
            return rows
        free = torch.ones(mask.numel(), dtype=torch.bool).index_fill_(0, rows.index, False)
        others = free.nonzero().squeeze(1)[:more]
        return Rows(torch.cat([rows.index, others]), torch.cat([rows.owner, others // mask.shape[1]]))

    def _inputs(self, batch: TokenBatch) -> dict[str, Any]:
        return model_inputs(self.model, batch, positions=self._takes_positions)

    @property
    def _edits_stack(self) -> bool:
        """Whether any block of the split stack is edited."""
        return self.block < self._depths[self.stack]

    @torch.no_grad()
    def _resumes(self) -> bool:
        """Whether a resumed and packed pass gives the logits of the whole model; tested once per model on two texts.

        It does not where more than the hidden state goes from block to block (Pegasus-X, ZAYA), where blocks run in a
        loop (Dory, HRM) or several stacks read the text (XLM).
        """
        if len(self._depths) > 1 + (self.kind == "seq2seq"):
            return False
        if not self._edits_stack or self.model.training:
            return True
        known = _resumable.setdefault(self.model, {})
        if self.block not in known:
            known[self.block] = self._test()
        return known[self.block]

    def _test(self) -> bool:
        source = (5, 6, 7, 8) if self.kind == "seq2seq" else ()
        answers = 1 if self.kind == "classifier" else 2
        texts = [Text((1, 2, 3, 4, 5, 6), 6 - answers, source), Text((3, 4, 5, 0), 4 - answers, source[:2])]
        batch = collate(texts)
        try:
            expected = label_logits(self.model, self._inputs(batch), batch.positions)
        except Exception:  # noqa: BLE001 - the pass that edits the model states the reason
            return True
        try:
            hidden = None
            if self.streams:
                for index in range(self.block):
                    hidden = self.run_block(index, batch, hidden)
            found = self.logits(batch, self.run(batch) if hidden is None else hidden, self.packing(batch))
        except ModelError:
            raise
        except Exception:  # noqa: BLE001 - whatever it is, the model cannot resume
            return False
        near = 1e-3 if expected.dtype in (torch.float32, torch.float64) else 0.1
        return bool((found - expected).abs().max() <= near * expected.abs().max())

    @cached_property
    @torch.no_grad()
    def _output(self) -> Any:
        """The output of a block for one token: the hidden state, or a tuple that begins with it."""
        batch = collate([Text((0, 0), 1, (0,) if self.kind == "seq2seq" else ())])
        block = self.model.get_submodule(f"{self.stack}.0")
        return _output_of(block, lambda: self.model(**self._inputs(batch)))

    @contextmanager
    def _resuming(self, hidden: Tensor, index: int) -> Iterator[None]:
        """Passes resume at a block of the split stack, from the hidden state that enters it."""

        def feed(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            given = args[0] if args else kwargs["hidden_states"]
            resumed = hidden.to(given).unflatten(2, given.shape[2:])
            if given.shape[1] > hidden.shape[1]:
                resumed = torch.cat([resumed, given[:, hidden.shape[1] :]], 1)
            return ((resumed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": resumed})

        blocks = self.model.get_submodule(self.stack)
        below = {str(i): blocks.get_submodule(str(i)) for i in range(index)}
        first = self.frozen_block(index)
        with ExitStack() as stack:
            stack.callback(first.register_forward_pre_hook(feed, with_kwargs=True).remove)
            stack.callback(blocks._modules.update, below)
            if below:
                stack.enter_context(_lent_bias(blocks.get_submodule("0"), first))
                size = len(self._output) if isinstance(self._output, tuple | list) else 0
                blocks._modules |= {key: _PassThrough(block, size) for key, block in below.items()}
            yield


def _rows(batch: TokenBatch, part: str) -> Rows:
    """The rows of a batch's ``"labels"``, of its ``"texts"``, or of their ``"source"``."""
    if part == "labels":
        return Rows(batch.positions, batch.owner)
    mask = batch.trunk_mask if part == "source" else batch.attention_mask
    index = mask.flatten().nonzero().squeeze(1)
    return Rows(index, index // mask.shape[1])


class _Stop(Exception):  # noqa: N818 - control flow, not an error
    def __init__(self, value: Any) -> None:
        self.value = value


def input_of(module: nn.Module, run: Callable[[], object]) -> Tensor:
    """The hidden state that a module receives in a pass, which stops there."""

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Stop(args[0] if args else kwargs["hidden_states"])

    with module.register_forward_pre_hook(stop, with_kwargs=True):
        return _stopped(module, run)  # type: ignore[no-any-return]


def _output_of(module: nn.Module, run: Callable[[], object]) -> Any:
    """The output of a module in a pass that stops there."""

    def stop(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        raise _Stop(output)

    with module.register_forward_hook(stop):
        return _stopped(module, run)


def _stopped(module: nn.Module, run: Callable[[], object]) -> Any:
    try:
        run()
    except _Stop as stopped:
        return stopped.value
    raise ModelError(f"The model never ran its {type(module).__name__}.")


class _PassThrough(nn.Module):
    """Replaces a block below the trunk's end: returns its input, and has the block's attributes.

    Args:
        block: the replaced block.
        size: length of the tuple that the block returns, the hidden state first; 0 where it returns that alone.
    """

    def __init__(self, block: nn.Module, size: int) -> None:
        super().__init__()
        object.__setattr__(self, "block", block)  # not registered, so that it is no child module
        object.__setattr__(self, "size", size)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "block"), name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The input, in the form of the block's output."""
        return (hidden_states, *(None,) * (self.size - 1)) if self.size else hidden_states


@contextmanager
def _lent_bias(owner: nn.Module, borrower: nn.Module) -> Iterator[None]:
    """Share the table of relative positions that T5's first block owns with the block from which a pass resumes."""
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
    """The self-attention of a T5-like block, which passes a relative position bias on to the next block."""
    return next((m for m in block.modules() if hasattr(m, "has_relative_attention_bias")), None)
