"""K-Adapter: facts are trained into an adapter beside the frozen model, one for each kind of knowledge.

Wang, Tang, Duan, Wei, Huang, Ji, Cao, Jiang, Zhou: "K-Adapter: Infusing Knowledge into Pre-Trained Models with
Adapters", Findings of ACL 2021 (arXiv 2002.01808). An adapter is a chain beside the model: each of its layers reads the
output ``h_k`` of one block and the layer before, and only the end of the chain meets the model again::

    a_0  = 0
    a_k  = a_{k-1} + U_k relu(V_k (h_k / rms(h_k) + a_{k-1}) + b_k)        k = 1 .. K, ``U_k = 0`` at the start
    h'   = h + s * a_K        h: output of the last block;  s: its root mean square on the facts

No block reads what an adapter adds, so adapters do not see one another: they are trained apart, and several at once add
up exactly, ``h + sum_j s_j a^j``, each the same as alone. :func:`compose` makes one edit of them.

A chain with a nonlinearity is no change of a matrix. Its edits are of a kind of their own: they are stored, attached,
taken off and composed as others, but cannot be merged into weights, exported to PEFT or kept in a ledger.

Where this differs from the paper:

1. A layer is a bottleneck for each token, without the paper's two transformer layers in the middle: it needs no cache
   of its own in generation, and no knowledge of the model's attention.
2. The paper concatenates the adapters' outputs with the model's and trains a task's layer on top. Here they are added
   to the hidden state, so that the model's own final norm and vocabulary projection answer.
3. The chain passes on its own sum alone; the paper's layers pass on the hidden state too.
4. Trained on the NLL of the facts until every target token is the argmax; the paper trains on relation classification
   and on dependency parsing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from emendo._settings import Settings, setting
from emendo.editors.base import Editor, as_requests
from emendo.edits.edit import BaseEdit, Origin, Request, common_origin
from emendo.errors import TrainingError
from emendo.models.lm import LM
from emendo.models.losses import per_example, token_nll
from emendo.models.sites import Site, find_stacks
from emendo.models.text import Text, length_buckets
from emendo.models.trunk import Trunk
from emendo.models.trunk_cache import TrunkCache

_PASS_TOKENS = 1024  # padded tokens of a pass
_PARTS = ("down", "bias", "up")


@dataclass(frozen=True, slots=True)
class KAdapterConfig(Settings):
    """The settings of K-Adapter."""

    width: int = setting(64, "Width of the bottleneck of each layer.", least=1)
    steps: int = setting(100, "Largest number of steps of an edit.", least=1)
    lr: float = setting(5e-3, "Learning rate of Adam.", above=0)
    seed: int = setting(0, "Seed of the layers' first matrices.")


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """A layer of an adapter.

    Attributes:
        down: ``V [width, d]``.
        bias: ``b [width]``.
        up: ``U [d, width]``.
    """

    down: Tensor
    bias: Tensor
    up: Tensor

    def __call__(self, hidden: Tensor, before: Tensor) -> Tensor:
        """The sum ``[..., d]`` after this layer, from a block's output and the sum before it."""
        root = hidden.square().mean(-1, keepdim=True).add(1e-12).rsqrt()
        inner = (hidden * root + before) @ self.down.to(hidden).mT + self.bias.to(hidden)
        return before + inner.relu() @ self.up.to(hidden).mT


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """An adapter.

    Attributes:
        layers: block name -> the layer that reads its output, in the order of the blocks.
        end: name of the block whose output the adapter adds to.
        scale: ``[1]`` factor of what it adds.
    """

    layers: Mapping[str, Layer]
    end: str
    scale: Tensor

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        """Run a model with the adapter beside it; several may be attached at once."""
        total: list[Tensor] = []  # of the pass so far

        def read(layer: Layer, *, first: bool) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                hidden = output[0] if isinstance(output, tuple) else output
                before = torch.zeros_like(hidden) if first else total[-1]
                total[:] = [layer(hidden, before)]

            return hook

        def add(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            hidden = hidden + self.scale.to(hidden) * total.pop()
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        with ExitStack() as stack:
            for place, (name, layer) in enumerate(self.layers.items()):
                hook = read(layer, first=place == 0)  # before any hook that adds
                handle = model.get_submodule(name).register_forward_hook(hook, prepend=True)
                stack.callback(handle.remove)
            stack.callback(model.get_submodule(self.end).register_forward_hook(add).remove)
            yield


@dataclass(frozen=True, eq=False)
class AdapterEdit(BaseEdit):
    """Adapters beside a model.

    Attributes:
        adapters: what they add to the hidden state is summed.
    """

    kind: ClassVar[str] = "k-adapter"
    adapters: tuple[Adapter, ...]
    origin: Origin
    card: Mapping[str, Any] = field(default_factory=dict)

    @contextmanager
    def applied(self, model: LM) -> Iterator[LM]:
        """The model with the adapters beside it; see :meth:`emendo.edits.edit.BaseEdit.applied`."""
        self.check(model)
        with ExitStack() as stack:
            for adapter in self.adapters:
                stack.enter_context(adapter.attached(model.model))
            yield model

    def _content(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {
            f"{i}.{part}.{name}": getattr(layer, part)
            for i, adapter in enumerate(self.adapters)
            for name, layer in adapter.layers.items()
            for part in _PARTS
        }
        tensors |= {f"{i}.scale": adapter.scale for i, adapter in enumerate(self.adapters)}
        return tensors, {"adapters": [{"blocks": [*a.layers], "end": a.end} for a in self.adapters]}

    @classmethod
    def _restored(
        cls, tensors: dict[str, Tensor], values: Any, origin: Origin, card: Mapping[str, Any]
    ) -> Self:
        adapters = []
        for i, known in enumerate(values["adapters"]):
            layers = {
                name: Layer(*(tensors[f"{i}.{part}.{name}"] for part in _PARTS)) for name in known["blocks"]
            }
            for layer in layers.values():
                if layer.down.shape != layer.up.mT.shape or layer.bias.shape != layer.down.shape[:1]:
                    raise ValueError("the shape of a layer")
            adapters.append(Adapter(layers, str(known["end"]), tensors[f"{i}.scale"]))
        return cls(tuple(adapters), origin, card)


def compose(edits: Sequence[AdapterEdit]) -> AdapterEdit:
    """Several adapters as one edit; nothing is lost.

    Raises:
        RequestError: there are no edits.
        MismatchError: the edits belong to different models.
    """
    origin = common_origin(edits, KAdapter.name, {})
    return AdapterEdit(tuple(adapter for edit in edits for adapter in edit.adapters), origin)


class KAdapter(Editor):
    """K-Adapter; see the module's docstring.

    A layer reads each block that has a site, in the last stack of the model; without sites, those of the default ones.
    """

    name = "k-adapter"
    Config = KAdapterConfig
    config: KAdapterConfig
    needs_training = False
    makes = AdapterEdit
    no_changes = "k-adapter changes no weights"

    def edit(
        self, lm: LM, prompt: str | Sequence[Request | tuple[str, str]], target: str | None = None
    ) -> AdapterEdit:
        """Train an adapter on one fact or on several; see :meth:`emendo.editors.base.Editor.edit`.

        Raises:
            TrainingError: a loss is not finite.
        """
        requests = as_requests(prompt, target)
        adapter = self._trained(lm, self.texts(lm, requests))
        return AdapterEdit((adapter,), self.origin(lm, requests))

    def _trained(self, lm: LM, texts: Sequence[Text]) -> Adapter:
        sites = self.sites or self.default_sites(lm.model)
        blocks, end = _blocks(lm.model, sites)
        store = TrunkCache(Trunk(lm.model, sites), dtype=lm.model.dtype)
        store.ensure(texts)
        parts = list(length_buckets(texts, lambda text: text.size, _PASS_TOKENS))
        adapter = self._start(blocks, end, store, parts)
        leaves = [getattr(layer, part) for layer in adapter.layers.values() for part in _PARTS]
        for leaf in leaves:
            leaf.requires_grad_()
        adam = torch.optim.Adam(leaves, self.config.lr)
        for step in range(self.config.steps):
            adam.zero_grad()
            right = True
            for part in parts:
                with torch.enable_grad(), adapter.attached(lm.model):
                    batch, logits = store.logits(part)
                    labels, owner = batch.labels.to(logits.device), batch.owner.to(logits.device)
                    loss = per_example(token_nll(logits, labels), owner, len(part)).sum() / len(texts)
                if not bool(loss.isfinite()):
                    raise TrainingError(
                        f"The loss of an adapter is not finite after {step} steps: use a smaller learning rate."
                    )
                right &= bool((logits.argmax(-1) == labels).all())
                for leaf, slope in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
                    leaf.grad = slope if leaf.grad is None else leaf.grad + slope
            if right:
                break
            adam.step()
        for leaf in leaves:
            leaf.requires_grad_(requires_grad=False)
            leaf.grad = None
        return adapter

    def _start(
        self, blocks: Sequence[str], end: str, store: TrunkCache, parts: Sequence[Sequence[Text]]
    ) -> Adapter:
        """An adapter that adds nothing yet; its scale is the root mean square of the last block's output."""
        seen: list[Tensor] = []

        def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            seen.append(output[0] if isinstance(output, tuple) else output)

        squares = []
        with torch.no_grad(), store.model.get_submodule(end).register_forward_hook(keep):
            for part in parts:
                batch, _ = store.logits(part)
                hidden = seen.pop()
                hidden = hidden.reshape(-1, hidden.shape[-1])
                rows = (
                    hidden if store.trunk.kind == "classifier" else hidden[batch.positions.to(hidden.device)]
                )
                squares.append(rows.double().square().mean())
        like = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        scale, d = torch.stack(squares).mean().sqrt().to(like).view(1), hidden.shape[-1]
        generator = torch.Generator().manual_seed(self.config.seed)
        layers = {}
        for name in blocks:
            down = nn.init.kaiming_uniform_(
                torch.empty(self.config.width, d), a=5**0.5, generator=generator
            ).to(like)
            layers[name] = Layer(
                down, like.new_zeros(self.config.width), like.new_zeros(d, self.config.width)
            )
        return Adapter(layers, end, scale)


def _blocks(model: nn.Module, sites: Sequence[Site]) -> tuple[list[str], str]:
    """The names of the blocks that are read, and of the last block."""
    stack = find_stacks(model)[-1]
    chosen = sorted({site.block for site in sites if site.stack == stack.name}) or [stack.depth - 1]
    return [f"{stack.name}.{block}" for block in chosen], f"{stack.name}.{stack.depth - 1}"
