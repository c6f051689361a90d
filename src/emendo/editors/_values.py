"""Values that make a model give a target where a subject stands: the search that ROME and MEMIT share.

At each matrix the change is ``D = v q^T``, where ``q`` answers the subject's last token and little else
(:class:`Whitening`), and Adam finds the values ``v`` of all matrices through the whole model::

    minimise over v    NLL(target | prompt) + mean over contexts NLL(target | context)
                       + c_kl * mean over what must stay KL(W || W + D)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor, nn

from emendo._settings import Settings, setting
from emendo._subject import find_subject
from emendo.editors._contexts import Surroundings, contexts, fitting, other_names, subject_end, turn
from emendo.editors.base import Editor
from emendo.edits.edit import Request
from emendo.errors import RequestError
from emendo.low_rank import LowRank, applied
from emendo.models._experts import ExpertMatrix
from emendo.models.lm import LM
from emendo.models.losses import per_example
from emendo.models.sites import Site, find_sites, find_stacks
from emendo.models.text import Text
from emendo.models.tokenization import passage_texts
from emendo.models.trunk import Trunk
from emendo.models.trunk_cache import TrunkCache

_STAY_TOKENS = 12  # of a passage that must stay
_HELD = 8  # passages for the KL, which are not in `C`
_OWN = 3  # passages for the KL of an edit
_AWAY = 10.0  # weight of the other subjects' inputs against those of the model's own text
_LEARNT = 0.75  # a context with an NLL below this share of `until` has nothing more to learn
_HALVINGS = 4  # of the interval in which the smallest factor of an edit is sought
_MOST = 0.8  # share of contexts with a low NLL that ends the search
_AT_ONCE = 16  # texts of one pass that collects inputs


@dataclass(frozen=True, slots=True)
class ContextSettings(Settings):
    """The settings of the texts around a fact and of the loss."""

    contexts: int = setting(8, "Contexts beside the prompt.", least=1)
    per_step: int = setting(2, "Contexts of a step, beside the prompt.", least=1)
    until: float = setting(0.3, "Stop once the prompt and most contexts have an NLL below this.", above=0)
    c_kl: float = setting(8.0, "Weight of the KL on what must stay.", least=0)
    stay: int = setting(2, "Texts of a step that must stay.", least=1)
    ridge: float = setting(0.1, "Ridge of `C`, as a multiple of its mean eigenvalue.", above=0)
    subject: str = setting("", "Subject of the edits as their prompts name it; empty: it is guessed.")
    seed: int = setting(0, "Seed of the contexts.")


@dataclass(frozen=True, slots=True)
class ValueSettings(ContextSettings):
    """The settings of the search for the values of one fact."""

    steps: int = setting(20, "Largest number of steps of an edit.", least=1)
    lr: float = setting(
        0.1, "Learning rate of Adam, in units of the hidden state's root mean square.", above=0
    )
    enough: float = setting(0.8, "Then scale the edit down while they have an NLL below this.", above=0)


class SubjectEditor(Editor):
    """Base of the methods that write where a subject stands; decoders only."""

    config: ContextSettings
    needs_training = False

    def __init__(
        self, sites: tuple[Site, ...], config: ContextSettings | None = None, fingerprint: str = ""
    ) -> None:
        super().__init__(sites, config, fingerprint)
        self._known: tuple[int, Background] | None = None

    def checked(self, lm: LM, requests: Sequence[Request]) -> None:
        """Make sure that the search can be run.

        Raises:
            RequestError: the model is no decoder, a matrix is an expert, or a request does not fit.
        """
        if lm.kind != "causal":
            raise RequestError(f"{self.name} is for decoders, and {lm.name} is none: choose another editor.")
        if routed := [site.name for site in self.sites if isinstance(site.module(lm.model), ExpertMatrix)]:
            raise RequestError(
                f"{routed[0]} is an expert, which sees some tokens only: choose other matrices."
            )
        self.texts(lm, requests)

    def contexts(self, lm: LM, request: Request, random: Random | None = None) -> tuple[list[Text], str]:
        """The prompt and the contexts of a request, with its target, and the subject in them."""
        prompt, config = request.prompt, self.config
        subject = config.subject if config.subject in prompt else ""
        subject = subject or find_subject(prompt)
        random, words = random or Random(config.seed), self.background(lm).words
        said = contexts(prompt, subject, config.contexts, words, random)
        return [text for context in said for text in fitting(lm, context, request)], subject

    def background(self, lm: LM) -> Background:
        """What all edits of a model share; made once for each model."""
        if self._known is None or self._known[0] != id(lm.model):
            self._known = id(lm.model), Background(lm, self.sites, self.config.ridge)
        return self._known[1]

    def surrounded(self, lm: LM, request: Request) -> Surrounded:
        """The texts around a request; they follow from the seed."""
        background, random = self.background(lm), Random(self.config.seed)
        texts, subject = self.contexts(lm, request, random)
        names = other_names(subject, background, random)
        near, held = (
            [text for name in part for text in fitting(lm, request.prompt.replace(subject, name), request)]
            for part in (names[::2], names[1::2])
        )
        first = [Text(text.ids[: text.start + 1], text.start) for text in held]
        passages = random.sample(background.held, min(_OWN, len(background.held)))
        own = [Text(text.ids[:_STAY_TOKENS], 1) for text in passages]
        stay = random.sample([*first, *own], len(first) + len(own))
        return Surrounded(texts, [subject_end(lm, text, subject) for text in texts], near, stay)

    def keys_of(self, lm: LM, requests: Sequence[Request]) -> dict[str, Tensor]:
        """By site name, the keys ``[requests, d_in]``: mean inputs at the subject's last token, float64."""
        trunk, keys = Trunk(lm.model, self.sites), []
        for request in requests:
            texts, subject = self.contexts(lm, request)
            ends = [subject_end(lm, text, subject) for text in texts]
            rows = inputs_of(TrunkCache(trunk, dtype=lm.model.dtype), self.sites, texts)
            keys.append({name: mean_key(own, ends) for name, own in rows.items()})
        return {site.name: torch.stack([key[site.name] for key in keys]) for site in self.sites}


class ValueEditor(SubjectEditor):
    """Base of the methods that search for the values of each fact by itself."""

    config: ValueSettings

    def search(self, lm: LM, request: Request, sites: tuple[Site, ...] = ()) -> Search:
        """Prepare the search for the values of one edit, at all matrices or at some."""
        return Search(self, lm, request, sites)


@dataclass(frozen=True, slots=True, eq=False)
class Surrounded:
    """A fact among the texts that it is searched with.

    Attributes:
        texts: the prompt and the other contexts, with the target.
        ends: the place of the subject's last token in each of them.
        near: the prompt with other names, which the directions leave as it is.
        stay: the texts of the KL, whose inputs are not among those that the directions leave as they are.
    """

    texts: Sequence[Text]
    ends: Sequence[int]
    near: Sequence[Text]
    stay: Sequence[Text]


def writing_sites(model: nn.Module, part: int, of: int) -> tuple[Site, ...]:
    """The MLP matrices of a sixth of the blocks that write into the hidden state; in a mixture, those of the attention.

    Args:
        model: the model.
        part: of the depth, in units of one ``of``-th: the first block is that far above the bottom.
        of: how many such units the depth has.
    """
    depth = find_stacks(model)[0].depth
    first = depth * part // of
    blocks = range(first, first + max(1, depth // 6))
    width = model.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
    sites = find_sites(model, "all", blocks=blocks)
    plain = [site for site in sites if not isinstance(site.module(model), ExpertMatrix)]
    found = [site for site in plain if not site.attention] or plain
    return tuple(site for site in found if site.d_out == width) or tuple(found)


class Background(Surroundings):
    """What all edits of a model share: words and names, and the inputs of the matrices on the model's own passages.

    Args:
        lm: the model.
        sites: the matrices.
        ridge: of the second moments, as a multiple of their mean eigenvalue.
    """

    def __init__(self, lm: LM, sites: tuple[Site, ...], ridge: float) -> None:
        super().__init__(lm)
        texts = passage_texts(lm, self.passages, 10**6)
        self.held, self.texts = texts[:_HELD], texts[_HELD:]
        self.trunk = Trunk(lm.model, sites)
        store = TrunkCache(self.trunk, dtype=lm.model.dtype)
        rows = inputs_of(store, sites, self.texts)
        self.whitening = {name: Whitening(torch.cat(own), ridge) for name, own in rows.items()}


class Whitening:
    """``C^-1`` for ``C = X^T X / n + ridge * tr(X^T X) / (n d) * I``, applied by way of the rows' Gram matrix.

    Args:
        rows: ``X [n, d]``.
        ridge: relative to the mean eigenvalue of the second moment.
    """

    def __init__(self, rows: Tensor, ridge: float) -> None:
        self.rows = rows.double()
        self.level = max(ridge * float(self.rows.square().mean()), torch.finfo(torch.float64).tiny)
        gram = self.rows @ self.rows.mT
        gram.diagonal().add_(len(rows) * self.level)
        self.factor = torch.linalg.cholesky(gram)

    def solve(self, x: Tensor) -> Tensor:
        """``C^-1 x`` for columns ``x [d, m]``."""
        inner = torch.cholesky_solve(self.rows @ x, self.factor)
        return (x - self.rows.mT @ inner) / self.level

    def direction(self, key: Tensor, others: Tensor) -> Tensor:
        """The ``q [d]`` with ``q^T key = 1`` that minimises ``q^T (C + 10 * mean of the others' o o^T) q``.

        Args:
            key: ``[d]``.
            others: ``[m, d]`` rows, besides those of ``C``, that the change should leave as they are.
        """
        key, others = key.double(), others.double()
        toward, away = self.solve(torch.cat([key[:, None], others.mT], 1)).split([1, len(others)], 1)
        inner = others @ away
        inner.diagonal().add_(len(others) / _AWAY)
        q: Tensor = (toward - away @ torch.linalg.solve(inner, others @ toward)).squeeze(1)
        return q / (q @ key)


def mean_key(rows: Sequence[Tensor], ends: Sequence[int]) -> Tensor:
    """The mean ``[d_in]``, float64, of the inputs at a place of each text; texts without a place are left out."""
    return torch.stack([row[end] for row, end in zip(rows, ends, strict=False)]).double().mean(0)


@torch.no_grad()
def inputs_of(store: TrunkCache, sites: tuple[Site, ...], texts: Sequence[Text]) -> dict[str, list[Tensor]]:
    """The inputs ``[tokens, d_in]`` of each matrix on each text."""
    store.ensure(texts)
    seen: dict[str, list[Tensor]] = {site.name: [] for site in sites}

    def keep(name: str, lengths: Sequence[int]) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0].reshape(len(lengths), -1, args[0].shape[-1])
            seen[name] += [own[:length] for own, length in zip(rows, lengths, strict=True)]

        return hook

    for at in range(0, len(texts), _AT_ONCE):
        part = [Text(text.ids, len(text.ids) - 1) for text in texts[at : at + _AT_ONCE]]  # one label each
        lengths = [len(text.inputs) for text in part]
        with ExitStack() as stack:
            for site in sites:
                hook = site.module(store.model).register_forward_pre_hook(keep(site.name, lengths))
                stack.callback(hook.remove)
            store.logits(part)
    return seen


class Search:
    """The search for the values of one edit.

    Args:
        editor: the method.
        lm: the model.
        request: the edit.
        sites: the matrices that get a value; by default all of the editor's.

    Attributes:
        texts, ends, near, stay: as in :class:`Surrounded`.
        right: matrix -> ``q [1, d_in]``.
        unit: root mean square of the hidden state.
    """

    def __init__(self, editor: ValueEditor, lm: LM, request: Request, sites: tuple[Site, ...] = ()) -> None:
        background, found = editor.background(lm), editor.surrounded(lm, request)
        self.config, self.sites, self.model = editor.config, sites or editor.sites, lm.model
        self.store = TrunkCache(background.trunk, dtype=lm.model.dtype)
        self.texts, self.ends, self.near, self.stay = found.texts, found.ends, found.near, found.stay
        rows = inputs_of(self.store, self.sites, [*self.texts, *self.near])
        self.store.ensure(self.stay)
        self.right = {}
        for name, inputs in rows.items():
            key = torch.stack([own[end] for own, end in zip(inputs, self.ends, strict=False)]).mean(0)
            others = torch.cat([key.new_zeros(0, len(key)), *inputs[len(self.ends) :]])
            q = background.whitening[name].direction(key, others)
            self.right[name] = q.to(torch.promote_types(key.dtype, torch.float32))[None]
        hidden = self.store.hidden[self.texts[0]]
        self.unit = float(hidden[-1].float().square().mean().sqrt())

    def run(self) -> dict[str, LowRank]:
        """Find the values; returns the change of each matrix."""
        values = {
            site.name: torch.zeros(site.d_out, 1, device=site.weight(self.model).device, requires_grad=True)
            for site in self.sites
        }
        changes = {name: LowRank(value, self.right[name].to(value)) for name, value in values.items()}
        adam = torch.optim.Adam(values.values(), self.config.lr * self.unit)
        reached = 0.0
        for step in range(self.config.steps):
            with torch.enable_grad():
                nll, kl = self._losses(changes, step)
                low = nll.detach() < self.config.until
                reached = (reached + float(low.float().mean())) / 2
                if bool(low[0]) and reached > _MOST:
                    break
                others = nll[1:].clamp(min=_LEARNT * self.config.until).sum() / max(1, len(nll) - 1)
                loss = nll[0] + others + self.config.c_kl * kl.mean()
                slopes = torch.autograd.grad(loss, list(values.values()))
            for value, slope in zip(values.values(), slopes, strict=True):
                value.grad = slope
            adam.step()
        found = {name: LowRank(change.left.detach(), change.right) for name, change in changes.items()}
        factor = self.smallest_factor(found)
        return {name: change.scale(factor) for name, change in found.items()}

    @torch.no_grad()
    def smallest_factor(self, changes: Mapping[str, LowRank]) -> float:
        """The smallest factor at which the prompt and most contexts have a low NLL, at most 1; by bisection."""

        def suffices(factor: float) -> bool:
            scaled = {name: change.scale(factor) for name, change in changes.items()}
            batch, losses, _ = self.store.label_losses(
                self.texts, 0, lambda packing: applied(self.model, scaled)
            )
            low = per_example(losses, batch.owner.to(losses.device), len(batch)) < self.config.enough
            return bool(low[0]) and float(low.float().mean()) > _MOST

        if not suffices(1.0):
            return 1.0
        below, above = 0.0, 1.0
        for _ in range(_HALVINGS):
            middle = (below + above) / 2
            below, above = (below, middle) if suffices(middle) else (middle, above)
        return above

    def _losses(self, changes: Mapping[str, LowRank], step: int) -> tuple[Tensor, Tensor]:
        """The NLL of the prompt and of some contexts, and the KL of some texts that must stay."""
        texts = [self.texts[0], *turn(self.texts[1:], step, self.config.per_step)]
        stay = turn(self.stay, step, self.config.stay)
        batch, losses, _ = self.store.label_losses(
            [*texts, *stay], len(stay), lambda packing: applied(self.model, changes)
        )
        found = per_example(losses, batch.owner.to(losses.device), len(batch))
        nll, kl = found.split([len(texts), len(stay)])
        return nll, kl
