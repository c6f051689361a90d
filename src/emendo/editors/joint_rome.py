"""ROME for many facts: one change of some matrices, whose values for all facts are found together.

After Meng et al. (:mod:`emendo.editors.rome`) and MEMIT (arXiv 2210.07229). MEMIT searches for each fact's value by
itself and then writes all of them; the sum answers otherwise than each did alone. Here every matrix has one change with
a row of ``Q`` and a column of ``V`` for each fact, and ``V`` is found through the model that holds all of it::

    D = V Q          Q = (K C^-1 K^T + overlap * mean diagonal * I)^-1 K C^-1          K: one key for each fact
    C = E[u u^T] + ridge + 10 E[o o^T] + E[k k^T]

    minimise over V    NLL(target | prompt) + mean over contexts NLL(target | context)
                       + c_kl * mean over what must stay KL(W || W + D)

A key is the mean input at the subject's last token over the contexts. ``Q`` answers each key with its own fact alone,
up to ``overlap``, and as little as possible running text (``E[u u^T]``), the prompts with other names in them (``o``)
and the keys of earlier edits (``k``; :meth:`JointRome.continue_from`). An epoch goes through the facts in shuffled
batches. A step of Adam moves the values of its own facts only, in the presence of all others; a fact whose texts all
have an NLL below ``until`` rests for an epoch. A fact takes a row of ``Q`` and a column of ``V`` in each matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor, nn

from emendo._settings import setting
from emendo._storage import cache_folder
from emendo.editors._contexts import subject_end
from emendo.editors._values import ContextSettings, SubjectEditor, inputs_of, turn, writing_sites
from emendo.edits.edit import Request
from emendo.least_squares import solve
from emendo.low_rank import LowRank, applied
from emendo.models._sampling import own_passages
from emendo.models.lm import LM
from emendo.models.losses import per_example
from emendo.models.moments import moments_over, passages_of
from emendo.models.sites import Site, find_stacks
from emendo.models.text import Text, length_buckets
from emendo.models.tokenization import passage_texts
from emendo.models.trunk import Trunk
from emendo.models.trunk_cache import TrunkCache

_PASS_TOKENS = 768  # padded tokens of a pass
_STAY_TOKENS = 20  # of a passage
_CACHED = 1_000_000  # tokens whose trunk outputs are kept
_AWAY = 10.0  # weight of the prompts with other names against running text
_LEARNT = 0.5  # a text with an NLL below this share of `until` has nothing more to learn
_DECAY = (0.9, 0.999)  # of Adam


@dataclass(frozen=True, slots=True)
class JointRomeConfig(ContextSettings):
    """The settings of joint ROME."""

    epochs: int = setting(14, "Largest number of epochs.", least=1)
    batch: int = setting(10, "Facts of a step.", least=1)
    lr: float = setting(
        0.02, "Learning rate of Adam, in units of the hidden state's root mean square.", above=0
    )
    until: float = setting(0.5, "A fact rests for an epoch once its NLL is below this.", above=0)
    c_kl: float = setting(20.0, "Weight of the KL on what must stay.", least=0)
    running: int = setting(5, "Passages of a step that must stay.", least=0)
    ridge: float = setting(0.03, "Ridge of `C`, as a multiple of its mean eigenvalue.", above=0)
    overlap: float = setting(0.1, "How much the rows of `Q` may answer each other's keys.", above=0)
    text: str = setting("", "File of plain text, a paragraph a line; empty: the model's own text.")
    passages: int = setting(1024, "Passages of the model's own text.", least=2)


class JointRome(SubjectEditor):
    """Joint ROME; see the module's docstring."""

    name = "joint-rome"
    Config = JointRomeConfig
    config: JointRomeConfig

    def __init__(
        self, sites: tuple[Site, ...], config: JointRomeConfig | None = None, fingerprint: str = ""
    ) -> None:
        super().__init__(sites, config, fingerprint)
        self._running: tuple[int, dict[str, Tensor], list[Text]] | None = None
        self.earlier: dict[str, tuple[Tensor, int]] = {}
        """By site name, ``K^T K [d_in, d_in]`` of the edits before, and the number of their facts."""

    @classmethod
    def default_sites(cls, model: nn.Module) -> tuple[Site, ...]:
        """The MLP matrices that write into the hidden state, of a sixth of the blocks, from 1/3 of the depth on."""
        depth = find_stacks(model)[0].depth
        first = depth // 3
        return writing_sites(model, range(first, first + max(1, depth // 6)))

    def each(self, lm: LM, requests: Sequence[Request]) -> dict[str, LowRank]:
        """Compute one change for each request, each from the clean model."""
        self.checked(lm, requests)
        found = [self.together(lm, [request]) for request in requests]
        return {site.name: LowRank.stack([changes[site.name] for changes in found]) for site in self.sites}

    @torch.no_grad()
    def together(self, lm: LM, requests: Sequence[Request]) -> dict[str, LowRank]:
        """Compute one change for all requests."""
        self.checked(lm, requests)
        return JointSearch(self, lm, requests).run()

    @torch.no_grad()
    def continue_from(self, lm: LM, requests: Sequence[Request]) -> None:
        """Leave the keys of these facts, which the model holds, as they are in the following edits."""
        self.checked(lm, requests)
        store, keys = TrunkCache(Trunk(lm.model, self.sites), dtype=lm.model.dtype), []
        for request in requests:
            texts, subject = self.contexts(lm, request)
            ends = [subject_end(lm, text, subject) for text in texts]
            rows = inputs_of(store, self.sites, texts)
            keys.append({name: mean_key(own, ends) for name, own in rows.items()})
        for site in self.sites:
            own = torch.stack([key[site.name] for key in keys])
            sums, count = self.earlier.get(site.name, (torch.zeros(site.d_in, site.d_in).to(own), 0))
            self.earlier[site.name] = sums + own.mT @ own, count + len(own)

    def start_over(self) -> None:
        """Forget the edits of :meth:`continue_from`."""
        self.earlier = {}

    def moments(self, lm: LM) -> dict[str, Tensor]:
        """``E[u u^T]`` of each matrix over running text, with the ridge and the earlier keys; float64."""
        found = {}
        for name, moment in self._text(lm)[0].items():
            sums, count = self.earlier.get(name, (torch.zeros_like(moment), 1))
            found[name] = moment + sums / count
        return found

    def passages(self, lm: LM) -> list[Text]:
        """Beginnings of the running text."""
        return self._text(lm)[1]

    def _text(self, lm: LM) -> tuple[dict[str, Tensor], list[Text]]:
        """The moments with their ridge, and the passages; those of the model as it is when they are first needed."""
        if self._running is None or self._running[0] != id(lm.model):
            config, folder = self.config, cache_folder() / "written"
            found = {}
            for name, own in moments_over(lm, self.sites, config.text, config.passages).items():
                found[name] = own.inputs.double()
                found[name].diagonal().add_(config.ridge * found[name].diagonal().mean())
            lines = passages_of(config.text) if config.text else own_passages(lm, config.passages, folder)
            self._running = id(lm.model), found, passage_texts(lm, lines, _STAY_TOKENS)
        return self._running[1:]


def mean_key(rows: Sequence[Tensor], ends: Sequence[int]) -> Tensor:
    """The mean input ``[d_in]`` at a place of each text, float64; texts without a place are left out."""
    return torch.stack([row[end] for row, end in zip(rows, ends, strict=False)]).double().mean(0)


class JointSearch:
    """The search for the values of some facts.

    Args:
        editor: the method.
        lm: the model.
        requests: the facts.

    Attributes:
        taught: for each fact, its prompt and its contexts, with the target.
        stay: for each fact, texts that must stay.
        keys: matrix -> ``K [facts, d_in]``, float64.
        right: matrix -> ``Q [facts, d_in]``.
        unit: root mean square of the hidden state.
    """

    def __init__(self, editor: JointRome, lm: LM, requests: Sequence[Request]) -> None:
        self.lm, self.config, self.sites = lm, editor.config, editor.sites
        self.trunk, self.random = Trunk(lm.model, editor.sites), Random(editor.config.seed)
        self.passages = editor.passages(lm) if editor.config.running else []
        self.taught: list[Sequence[Text]] = []
        self.stay: list[Sequence[Text]] = []
        keys: dict[str, list[Tensor]] = {site.name: [] for site in self.sites}
        moments, count = editor.moments(lm), 0
        others = {site.name: torch.zeros(site.d_in, site.d_in, dtype=torch.float64) for site in self.sites}
        for request in requests:
            found = editor.surrounded(lm, request)
            self.taught.append(found.texts)
            self.stay.append(found.stay)
            store = self._new_store()
            for name, rows in inputs_of(store, self.sites, [*found.texts, *found.near]).items():
                keys[name].append(mean_key(rows, found.ends))
                if found.near:
                    away = torch.cat(rows[len(found.ends) :])
                    away = away.to(torch.promote_types(away.dtype, torch.float32))
                    others[name] += (away.mT @ away).to(others[name])
            count += sum(len(text.inputs) for text in found.near)
        self.keys = {name: torch.stack(own) for name, own in keys.items()}
        self.right = {
            name: self._rows(self.keys[name], moment + others[name] * (_AWAY / max(1, count)))
            for name, moment in moments.items()
        }
        self.store = self._new_store()
        self.store.ensure([texts[0] for texts in self.taught])
        hidden = torch.cat([self.store.hidden[texts[0]][-1:] for texts in self.taught])
        self.unit = float(hidden.float().square().mean().sqrt())
        self.values: dict[str, Tensor] = {}
        for site in self.sites:
            weight = site.weight(lm.model)
            dtype = torch.promote_types(weight.dtype, torch.float32)
            self.values[site.name] = torch.zeros(site.d_out, len(requests), dtype=dtype, device=weight.device)
        self.means, self.squares = (
            {name: torch.zeros_like(own) for name, own in self.values.items()} for _ in range(2)
        )
        self.steps = torch.zeros(len(requests), device=next(iter(self.values.values())).device)

    def run(self) -> dict[str, LowRank]:
        """Run the epochs; returns the change of each matrix."""
        rests: set[int] = set()
        for epoch in range(self.config.epochs):
            active = [i for i in range(len(self.taught)) if i not in rests]
            self.random.shuffle(active)
            rests_before, rests = rests, set()
            for at in range(0, len(active), self.config.batch):
                rests |= self._step(active[at : at + self.config.batch], epoch)
            if len(rests) == len(active) and not rests_before:
                break
        return {name: LowRank(own, self.right[name].to(own)) for name, own in self.values.items()}

    def losses(self, values: Mapping[str, Tensor], texts: Sequence[Text], stay: int) -> Tensor:
        """The NLL of texts, or the KL of texts that must stay, in the model with the change of some values."""
        self.store.ensure(texts)
        changes = {name: LowRank(own, self.right[name].to(own)) for name, own in values.items()}
        batch, losses, _ = self.store.label_losses(
            texts, stay, lambda packing: applied(self.lm.model, changes)
        )
        return per_example(losses, batch.owner.to(losses.device), len(batch))

    def _step(self, members: Sequence[int], epoch: int) -> set[int]:
        """Take one step; returns the facts that may rest."""
        config = self.config
        taught = [
            (i, weight, text)
            for i in members
            for weight, text in [
                (1.0, self.taught[i][0]),
                *((1 / config.per_step, text) for text in turn(self.taught[i][1:], epoch, config.per_step)),
            ]
        ]
        stay = [text for i in members for text in turn(self.stay[i], epoch, config.stay)]
        stay += self.random.sample(self.passages, min(config.running, len(self.passages)))
        slopes = {name: torch.zeros_like(own) for name, own in self.values.items()}
        worst = dict.fromkeys(members, 0.0)
        for part in length_buckets(taught, lambda one: one[2].size, _PASS_TOKENS):
            found = self._descend([text for *_, text in part], 0, [weight for _, weight, _ in part], slopes)
            for (i, *_), value in zip(part, found, strict=True):
                worst[i] = max(worst[i], value)
        weight = config.c_kl * len(members) / max(1, len(stay))
        for some in length_buckets(stay, lambda text: text.size, _PASS_TOKENS) if config.c_kl else ():
            self._descend(some, len(some), [weight] * len(some), slopes)
        rests = {i for i in members if worst[i] < config.until}
        self._update([i for i in members if i not in rests], slopes)
        if sum(map(len, self.store.hidden.chunks)) > _CACHED:
            self.store = self._new_store()
        return rests

    def _descend(
        self, texts: Sequence[Text], stay: int, weights: Sequence[float], slopes: dict[str, Tensor]
    ) -> list[float]:
        """Add the gradient of the weighted losses of some texts to ``slopes``; returns their losses."""
        with torch.enable_grad():
            values = {name: own.clone().requires_grad_() for name, own in self.values.items()}
            found = self.losses(values, texts, stay)
            left = found if stay else found.clamp(min=_LEARNT * self.config.until)
            total = (left * torch.tensor(weights).to(left)).sum()
            for name, slope in zip(values, torch.autograd.grad(total, list(values.values())), strict=True):
                slopes[name] += slope
        return found.detach().tolist()

    def _update(self, members: Sequence[int], slopes: Mapping[str, Tensor]) -> None:
        """Take a step of Adam with the values of some facts."""
        own = torch.tensor(members, dtype=torch.long, device=self.steps.device)
        self.steps[own] += 1
        first, second = _DECAY
        rate = (
            self.config.lr
            * self.unit
            * (1 - second ** self.steps[own]).sqrt()
            / (1 - first ** self.steps[own])
        )
        for name, slope in slopes.items():
            mean = self.means[name][:, own].lerp(slope[:, own], 1 - first)
            square = self.squares[name][:, own].lerp(slope[:, own].square(), 1 - second)
            self.means[name][:, own], self.squares[name][:, own] = mean, square
            self.values[name][:, own] -= rate * mean / (square.sqrt() + 1e-12)

    def _rows(self, keys: Tensor, moment: Tensor) -> Tensor:
        """``Q [n, d_in]`` for keys ``[n, d_in]``."""
        toward = solve(moment, keys.mT)
        inner = keys @ toward
        inner.diagonal().add_(self.config.overlap * inner.diagonal().mean())
        return solve(inner, toward.mT)

    def _new_store(self) -> TrunkCache:
        return TrunkCache(self.trunk, dtype=self.lm.model.dtype)
