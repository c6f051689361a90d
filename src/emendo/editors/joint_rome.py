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
and the keys of earlier edits (``k``; :meth:`JointRome.continue_from`). The search goes by epochs
(:mod:`emendo.editors._epochs`); a step of Adam moves the values of its own facts only, in the presence of all others. A
fact takes a row of ``Q`` and a column of ``V`` in each matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from emendo._settings import setting
from emendo._storage import cache_folder
from emendo.editors._epochs import EpochSearch
from emendo.editors._values import (
    ContextSettings,
    SubjectEditor,
    Surrounded,
    inputs_of,
    mean_key,
    writing_sites,
)
from emendo.edits.edit import Request
from emendo.least_squares import solve
from emendo.low_rank import LowRank
from emendo.models.lm import LM
from emendo.models.moments import kept_moments, running_text
from emendo.models.sites import Site
from emendo.models.text import Text
from emendo.models.tokenization import passage_texts

_STAY_TOKENS = 20  # of a passage
_AWAY = 10.0  # weight of the prompts with other names against running text
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
        return writing_sites(model, 1, 3)

    def each(self, lm: LM, requests: Sequence[Request]) -> dict[str, LowRank]:
        """Compute one change for each request, each from the clean model."""
        self.checked(lm, requests)
        return self.one_by_one(lm, requests)

    @torch.no_grad()
    def together(self, lm: LM, requests: Sequence[Request]) -> dict[str, LowRank]:
        """Compute one change for all requests."""
        self.checked(lm, requests)
        return JointSearch(self, lm, requests).run()

    @torch.no_grad()
    def continue_from(self, lm: LM, requests: Sequence[Request]) -> None:
        """Leave the keys of these facts, which the model holds, as they are in the following edits."""
        self.checked(lm, requests)
        for name, keys in self.keys_of(lm, requests).items():
            sums, count = self.earlier.get(name, (keys.new_zeros(keys.shape[1], keys.shape[1]), 0))
            self.earlier[name] = sums + keys.mT @ keys, count + len(keys)

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
            config, found = self.config, {}
            lines = running_text(lm, config.text, config.passages)
            for name, own in kept_moments(lm, self.sites, lines, cache_folder() / "moments").items():
                found[name] = own.inputs.double()
                found[name].diagonal().add_(config.ridge * found[name].diagonal().mean())
            self._running = id(lm.model), found, passage_texts(lm, lines, _STAY_TOKENS)
        return self._running[1:]


class JointSearch(EpochSearch):
    """The search for the values of some facts.

    Args:
        editor: the method.
        lm: the model.
        requests: the facts.

    Attributes:
        keys: matrix -> ``K [facts, d_in]``, float64.
        right: matrix -> ``Q [facts, d_in]``.
        unit: root mean square of the hidden state.
        steps_of: for each fact, how many steps its values have taken.
    """

    cached = 1_000_000
    learnt = 0.5

    def __init__(self, editor: JointRome, lm: LM, requests: Sequence[Request]) -> None:
        config = editor.config
        facts = [editor.surrounded(lm, request) for request in requests]
        taught, stay = [fact.texts for fact in facts], [fact.stay for fact in facts]
        super().__init__(lm, editor.sites, config, taught, stay, config.per_step)
        self.passages = editor.passages(lm) if config.running else []
        self.running, self.lr = min(config.running, len(self.passages)), config.lr
        self.keys, self.right = self._directions(editor, facts)
        self.store.ensure([texts[0] for texts in taught])
        hidden = torch.cat([self.store.hidden[texts[0]][-1:] for texts in taught])
        self.unit = float(hidden.float().square().mean().sqrt())
        self.parameters = {}
        for site in editor.sites:
            weight = site.weight(lm.model)
            dtype = torch.promote_types(weight.dtype, torch.float32)
            self.parameters[site.name] = torch.zeros(
                site.d_out, len(facts), dtype=dtype, device=weight.device
            )
        self.means, self.squares = (
            {name: torch.zeros_like(own) for name, own in self.parameters.items()} for _ in range(2)
        )
        self.steps_of = torch.zeros(len(facts), device=weight.device)

    def run(self) -> dict[str, LowRank]:
        """Run the epochs; returns the change of each matrix."""
        self.run_epochs()
        return self.changes(self.parameters)

    def changes(self, parameters: Mapping[str, Tensor]) -> dict[str, LowRank]:
        """``V Q`` of each matrix for its ``V``."""
        return {name: LowRank(own, self.right[name].to(own)) for name, own in parameters.items()}

    def staying(self, members: Sequence[int], epoch: int) -> list[Text]:
        """The texts of a step that must stay: those of its facts, and passages."""
        return [*super().staying(members, epoch), *self.random.sample(self.passages, self.running)]

    def update(self, members: Sequence[int], slopes: Mapping[str, Tensor]) -> None:
        """Take a step of Adam with the values of some facts."""
        own = torch.tensor(members, dtype=torch.long, device=self.steps_of.device)
        self.steps_of[own] += 1
        first, second = _DECAY
        root = (1 - second ** self.steps_of[own]).sqrt()
        rate = self.lr * self.unit * root / (1 - first ** self.steps_of[own])
        for name, slope in slopes.items():
            mean = self.means[name][:, own].lerp(slope[:, own], 1 - first)
            square = self.squares[name][:, own].lerp(slope[:, own].square(), 1 - second)
            self.means[name][:, own], self.squares[name][:, own] = mean, square
            self.parameters[name][:, own] -= rate * mean / (square.sqrt() + 1e-12)

    def _directions(
        self, editor: JointRome, facts: Sequence[Surrounded]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """``K`` and ``Q`` of each matrix."""
        keys: dict[str, list[Tensor]] = {site.name: [] for site in editor.sites}
        others = {site.name: torch.zeros(site.d_in, site.d_in, dtype=torch.float64) for site in editor.sites}
        for fact in facts:
            rows = inputs_of(self.new_store(), editor.sites, [*fact.texts, *fact.near])
            for name, own in rows.items():
                keys[name].append(mean_key(own, fact.ends))
                if fact.near:
                    away = torch.cat(own[len(fact.ends) :])
                    away = away.to(torch.promote_types(away.dtype, torch.float32))
                    others[name] += (away.mT @ away).to(others[name])
        count = max(1, sum(len(text.inputs) for fact in facts for text in fact.near))
        found = {name: torch.stack(own) for name, own in keys.items()}
        right = {
            name: rows_for(found[name], moment + others[name] * (_AWAY / count), editor.config.overlap)
            for name, moment in editor.moments(self.lm).items()
        }
        return found, right


def rows_for(keys: Tensor, moment: Tensor, overlap: float) -> Tensor:
    """``Q [n, d_in]`` for keys ``[n, d_in]``."""
    toward = solve(moment, keys.mT)
    inner = keys @ toward
    inner.diagonal().add_(overlap * inner.diagonal().mean())
    return solve(inner, toward.mT)
