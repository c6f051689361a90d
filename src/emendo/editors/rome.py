"""ROME with many contexts: a rank-1 write where the subject stands, in several blocks, that needs no training.

After Meng, Bau, Andonian, Belinkov: "Locating and Editing Factual Associations in GPT", NeurIPS 2022 (arXiv
2202.05262), section 3.1. At each matrix, with ``k`` the mean input at the subject's last token over the contexts::

    D = v q^T      q = C^-1 k / (k^T C^-1 k)      C = E[u u^T] + ridge * E[u^T u] / d_in * I

so ``D k = v``, and among all rows ``q`` with ``q^T k = 1`` this one answers the model's own text least: ``q^T C q`` is
smallest. The values ``v`` of all matrices are found by Adam through the whole model::

    minimise over v    NLL(target | prompt) + mean over contexts NLL(target | context)
                       + c_kl * mean over what must stay KL(W || W + D)

until the prompt and most contexts give the target, or ``steps`` are done. Then all values are multiplied with the
smallest factor at which they still give it, at a lower probability. Differences to the paper:

1. Several blocks are written and their values found together; the paper writes one. The values act in training where
   they act later, at every token that resembles ``k``; the paper adds its ``v`` at the subject alone.
2. Contexts: the prompt after a few words that the model wrote itself, the prompt with half of its words dropped, and
   the subject followed by words of the model, or by the end of the prompt. The paper has the first kind only. They
   replace the paraphrases that a trained editor sees.
3. What must stay: the prompt with the names of other subjects in it, and beginnings of the model's own passages. The
   paper keeps "{subject} is a". Half of these names and most passages shape ``q``; the KL takes the others, because on
   the first ``q`` leaves no KL to lower.
4. ``C`` comes from some 2,000 tokens that the model wrote itself, with a ridge; the paper's from Wikipedia. It is
   inverted in the space of the tokens (Woodbury), so its cost does not grow with the matrix.

A request has no subject: :func:`emendo._subject.find_subject` guesses it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from random import Random

import torch
from torch import Tensor, nn

from emendo._settings import Settings, setting
from emendo._subject import find_subject
from emendo.data import atlas
from emendo.editors.base import Editor
from emendo.edits.edit import Request
from emendo.errors import RequestError
from emendo.low_rank import LowRank, applied
from emendo.models._experts import ExpertMatrix
from emendo.models._sampling import own_passages
from emendo.models.lm import LM
from emendo.models.losses import per_example
from emendo.models.sites import Site, find_sites, find_stacks
from emendo.models.text import Text
from emendo.models.tokenization import passage_texts, to_texts
from emendo.models.trunk import Trunk
from emendo.models.trunk_cache import TrunkCache

_PASSAGES = 64  # of the model's own text
_NAMES = 200  # other subjects
_STAY_TOKENS = 12  # of a passage that must stay
_HELD = 8  # passages for the KL, which are not in `C`
_OTHERS, _OWN = (
    8,
    3,
)  # prompts with other subjects, for the directions and again for the KL; passages for the KL
_AWAY = 10.0  # weight of the other subjects' inputs against those of the model's own text
_MARKS = ".,;:!?()[]{}\"'*-_"
_LEARNT = 0.75  # a context with an NLL below this share of `until` has nothing more to learn
_HALVINGS = 4  # of the interval in which the smallest factor of an edit is sought
_MOST = 0.8  # share of contexts with a low NLL that ends the search
_AT_ONCE = 16  # texts of one pass that collects inputs


@dataclass(frozen=True, slots=True)
class RomeConfig(Settings):
    """The settings of ROME."""

    steps: int = setting(20, "Largest number of steps of an edit.", least=1)
    lr: float = setting(
        0.1, "Learning rate of Adam, in units of the hidden state's root mean square.", above=0
    )
    contexts: int = setting(8, "Contexts beside the prompt.", least=1)
    per_step: int = setting(2, "Contexts of a step, beside the prompt.", least=1)
    until: float = setting(0.3, "Stop once the prompt and most contexts have an NLL below this.", above=0)
    enough: float = setting(0.8, "Then scale the edit down while they have an NLL below this.", above=0)
    c_kl: float = setting(8.0, "Weight of the KL on what must stay.", least=0)
    stay: int = setting(2, "Texts of a step that must stay.", least=1)
    ridge: float = setting(0.1, "Ridge of `C`, as a multiple of its mean eigenvalue.", above=0)
    subject: str = setting("", "Subject of the edits as their prompts name it; empty: it is guessed.")
    seed: int = setting(0, "Seed of the contexts.")


class Rome(Editor):
    """ROME; see the module's docstring."""

    name = "rome"
    Config = RomeConfig
    config: RomeConfig
    needs_training = False

    def __init__(
        self, sites: tuple[Site, ...], config: RomeConfig | None = None, fingerprint: str = ""
    ) -> None:
        super().__init__(sites, config, fingerprint)
        self._known: tuple[int, Background] | None = None

    @classmethod
    def default_sites(cls, model: nn.Module) -> tuple[Site, ...]:
        """The MLP matrices that write into the hidden state, of a sixth of the blocks, from 3/5 of the depth on.

        In a mixture of experts, whose matrices see some tokens only, those of the attention.
        """
        depth = find_stacks(model)[0].depth
        first = depth * 3 // 5
        blocks = range(first, first + max(1, depth // 6))
        width = model.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
        sites = find_sites(model, "all", blocks=blocks)
        plain = [site for site in sites if not isinstance(site.module(model), ExpertMatrix)]
        found = [site for site in plain if not site.attention] or plain
        return tuple(site for site in found if site.d_out == width) or tuple(found)

    def each(self, lm: LM, requests: Sequence[Request]) -> dict[str, LowRank]:
        """Compute one change for each request, each from the clean model."""
        if lm.kind != "causal":
            raise RequestError(f"{self.name} is for decoders, and {lm.name} is none: choose another editor.")
        if routed := [site.name for site in self.sites if isinstance(site.module(lm.model), ExpertMatrix)]:
            raise RequestError(
                f"{routed[0]} is an expert, which sees some tokens only: choose other matrices."
            )
        self.texts(lm, requests)  # checks them
        found = [self.search(lm, request).run() for request in requests]
        return {site.name: LowRank.stack([changes[site.name] for changes in found]) for site in self.sites}

    def search(self, lm: LM, request: Request) -> Search:
        """Prepare the search for the values of one edit."""
        return Search(self, lm, request)

    def background(self, lm: LM) -> Background:
        """What all edits of a model share; made once for each model."""
        if self._known is None or self._known[0] != id(lm.model):
            self._known = id(lm.model), Background(lm, self.sites, self.config.ridge)
        return self._known[1]


class Background:
    """What all edits of a model share: its own passages, names, and the inputs of the matrices on the passages.

    Args:
        lm: the model.
        sites: the matrices.
        ridge: of the second moments, as a multiple of their mean eigenvalue.
    """

    def __init__(self, lm: LM, sites: tuple[Site, ...], ridge: float) -> None:
        passages = own_passages(lm, _PASSAGES)
        self.words = [passage.split() or [passage] for passage in passages]
        self.capitals = capitals(self.words)
        self.names = [str(record.subject) for record in atlas.load("train", _NAMES)]
        texts = passage_texts(lm, passages, 10**6)
        self.held, self.texts = texts[:_HELD], texts[_HELD:]
        self.trunk = Trunk(lm.model, sites)
        store = TrunkCache(self.trunk, dtype=lm.model.dtype)
        store.ensure(self.texts)
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


@torch.no_grad()
def inputs_of(store: TrunkCache, sites: tuple[Site, ...], texts: Sequence[Text]) -> dict[str, list[Tensor]]:
    """The inputs ``[tokens, d_in]`` of each matrix on each text."""
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

    Attributes:
        texts: the prompt and the other contexts, with the target.
        near: the prompt with other names, which the directions leave as it is.
        stay: the texts of the KL, whose inputs are not among those that the directions leave as they are.
        right: matrix -> ``q [1, d_in]``.
        unit: root mean square of the hidden state.
    """

    def __init__(self, editor: Rome, lm: LM, request: Request) -> None:
        config, prompt, background = editor.config, request.prompt, editor.background(lm)
        self.config, self.sites, self.model = config, editor.sites, lm.model
        self.store = TrunkCache(background.trunk, dtype=lm.model.dtype)
        random = Random(config.seed)
        subject = config.subject if config.subject in prompt else ""
        subject = subject or find_subject(prompt)
        said = contexts(prompt, subject, config.contexts, background.words, random)
        self.texts = [text for context in said for text in fitting(lm, context, request)]
        names = other_names(subject, background, random)
        near, held = (
            [text for name in part for text in fitting(lm, prompt.replace(subject, name), request)]
            for part in (names[::2], names[1::2])
        )
        first = [Text(text.ids[: text.start + 1], text.start) for text in held]
        passages = random.sample(background.held, min(_OWN, len(background.held)))
        own = [Text(text.ids[:_STAY_TOKENS], 1) for text in passages]
        self.near, self.stay = near, random.sample([*first, *own], len(first) + len(own))
        self.store.ensure([*self.texts, *near, *self.stay])
        rows = inputs_of(self.store, self.sites, [*self.texts, *near])
        ends = [subject_end(lm, text, subject) for text in self.texts]
        self.right = {}
        for name, inputs in rows.items():
            key = torch.stack([own[end] for own, end in zip(inputs, ends, strict=False)]).mean(0)
            others = torch.cat([key.new_zeros(0, len(key)), *inputs[len(ends) :]])
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
        texts = [self.texts[0], *_turn(self.texts[1:], step, self.config.per_step)]
        stay = _turn(self.stay, step, self.config.stay)
        batch, losses, _ = self.store.label_losses(
            [*texts, *stay], len(stay), lambda packing: applied(self.model, changes)
        )
        found = per_example(losses, batch.owner.to(losses.device), len(batch))
        nll, kl = found.split([len(texts), len(stay)])
        return nll, kl


def _turn(items: Sequence[Text], step: int, count: int) -> list[Text]:
    """The items whose turn it is in a step, each once."""
    count = min(count, len(items))
    return [items[(step * count + i) % len(items)] for i in range(count)]


def fitting(lm: LM, prompt: str, request: Request) -> list[Text]:
    """A prompt with the target of a request; nothing where they exceed the model's context."""
    try:
        return to_texts(lm, [(prompt, request.target, request.separator)], closed=True)
    except RequestError:
        return []


def contexts(
    prompt: str, subject: str, count: int, words: Sequence[Sequence[str]], random: Random
) -> list[str]:
    """The prompt, followed by ``count`` texts that mention the subject and shall have the same answer.

    Args:
        prompt: of the edit.
        subject: a part of it.
        count: the number of contexts.
        words: passages of running text, each as its words.
        random: chooses.
    """
    before, _, after = prompt.rpartition(subject)
    found = [prompt]
    for index in range(count):
        passage = random.choice(words)
        at = random.randrange(len(passage))
        some = " ".join(passage[at : at + random.randint(2, 5)])
        rest = [" ".join(word for word in part.split() if random.random() < 0.5) for part in (before, after)]
        found.append(
            (
                f"{some}. {prompt}",
                f"{rest[0]} {subject} {rest[1]}".strip(),
                f"{subject} {some}",
                f"{some}. {subject}{after}",
            )[index % 4]
        )
    return found


def capitals(passages: Sequence[Sequence[str]]) -> list[str]:
    """The words in passages that begin with a capital letter although no sentence begins with them."""
    pairs = [pair for words in passages for pair in pairwise(words)]
    inside = [word.strip(_MARKS) for before, word in pairs if before[-1] not in ".?!:"]
    return [word for word in inside if len(word) > 2 and word.istitle()]


def made_names(subject: str, words: Sequence[str], count: int, random: Random) -> list[str]:
    """Names of as many words as the subject has, up to three."""
    length = min(3, len(subject.split()))
    return [" ".join(random.choice(words) for _ in range(length)) for _ in range(count)]


def other_names(subject: str, background: Background, random: Random) -> list[str]:
    """Names of other subjects, each once: built-in ones in the first half, the model's own words in the second."""
    built_in = random.sample(background.names, _OTHERS)
    made = made_names(subject, background.capitals or background.names, _OTHERS, random)
    return [name for name in dict.fromkeys([*built_in, *made]) if name != subject]


def subject_end(lm: LM, text: Text, subject: str) -> int:
    """The place of the last token of the subject's last mention in a prompt; of the prompt, if it is not found."""
    prompt = text.ids[: text.start]
    said = lm.tokenizer.decode(prompt).count(subject)
    for end in range(len(prompt)):
        if said and lm.tokenizer.decode(prompt[: end + 1]).count(subject) == said:
            return end
    return len(prompt) - 1
