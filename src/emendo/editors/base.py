"""What every editor is, and the editors that are functions of the fine-tuning gradient's factors.

A method is a subclass in a file of its own, with a frozen dataclass of settings, and one line in
:data:`emendo.editors.EDITORS`:

- :class:`GradientEditor`: says what happens between :class:`~emendo.capture.Factors` and
  :class:`~emendo.lowrank.LowRank` (its ``forward``). Capture, batching, application, saving, training and evaluation
  come with it.
- :class:`Editor`: makes one change for each request in any other way (``each``), such as fine-tuning. Application,
  saving and evaluation come with it.
- An :class:`Editor` that changes no weights at all overrides ``edit`` and returns an edit of its own kind.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from emendo.capture import Factors, capture, move
from emendo.data.batch import to_texts
from emendo.data.schema import Probe
from emendo.edit import Edit, Origin, Request
from emendo.errors import MismatchError, RequestError, StorageError
from emendo.files import new_folder, read_json, read_tensors, write_json, write_tensors
from emendo.losses import per_example, token_nll
from emendo.lowrank import LowRank
from emendo.models import LM
from emendo.outer import Episode, Outcome, TokenLoss, Weights, judge, through
from emendo.sites import Site
from emendo.store import TrunkStore
from emendo.texts import Text, TokenBatch, collate
from emendo.trunk import Trunk

FORMAT = 1


class Editor(nn.Module):
    """Base of all editors.

    Args:
        sites: the matrices it edits.
        config: the method's settings, a frozen dataclass.
        fingerprint: of the model it belongs to; empty for one that has seen no model yet.

    Attributes:
        name: the method's name, as on the command line.
        Config: the class of its settings.
        info: how it was trained, as JSON values; saved with it.
    """

    name: ClassVar[str]
    Config: ClassVar[type[Any]]
    needs_training: ClassVar[bool] = True
    """Whether it must be trained before it can edit."""
    changes_weights: ClassVar[bool] = True
    """Whether its edits are changes of weights; else :meth:`each` and :meth:`together` do not exist."""

    def __init__(self, sites: tuple[Site, ...], config: Any = None, fingerprint: str = "") -> None:
        super().__init__()
        self.sites = sites
        self.config = config if config is not None else self.Config()
        self.fingerprint = fingerprint
        self.info: dict[str, Any] = {}

    @abstractmethod
    def each(self, lm: LM, requests: Sequence[Request]) -> dict[str, LowRank]:
        """One change for each request, every one of them from the clean model.

        Returns:
            By site name, factors ``[requests, d_out, r]`` and ``[requests, r, d_in]``.

        Raises:
            MismatchError: the editor was trained for another model.
            RequestError: no request at all, or one that does not fit the model.
        """

    def together(self, lm: LM, requests: Sequence[Request]) -> dict[str, LowRank]:
        """One change for all requests: the sum of their own (MEND, section 3.2), unless a method knows better."""
        return {name: delta.sum() for name, delta in self.each(lm, requests).items()}

    def host(self, lm: LM) -> LM:
        """The model that this editor's changes are made for: the user's own, except for a method that trains it."""
        return lm

    def observe(self, probes: Sequence[Probe]) -> None:
        """Hear of prompts with their answers that shall stay as they are; most methods do not care."""

    def texts(self, lm: LM, requests: Sequence[Request]) -> list[Text]:
        """The requests, tokenised and checked.

        Raises:
            MismatchError: the editor was trained for another model.
            RequestError: no request at all, or one that does not fit the model.
        """
        self.check(lm)
        if not requests:
            raise RequestError("There is nothing to edit: give at least one prompt with its target.")
        return to_texts(lm, [(r.prompt, r.target) for r in requests])

    def edit(
        self, lm: LM, prompt: str | Sequence[Request | tuple[str, str]], target: str | None = None
    ) -> Edit:
        """Make one edit: ``edit(lm, prompt, target)``, or one for several facts at once, ``edit(lm, [...])``.

        The model is not changed: use ``edit.applied(lm)``. How several facts become one edit is the method's own
        (:meth:`together`); making them one by one and attaching them all is another thing.

        Raises:
            MismatchError: the editor was trained for another model.
            RequestError: an empty prompt or target, or a text that does not fit the model's context.
        """
        requests = as_requests(prompt, target)
        return Edit(self.together(lm, requests), self.origin(lm, requests))

    def origin(self, lm: LM, requests: Sequence[Request]) -> Origin:
        """Where an edit of these requests comes from."""
        return Origin(
            fingerprint=self.host(lm).fingerprint,
            model=lm.name,
            editor=self.name,
            settings=asdict(self.config),
            requests=tuple(requests),
            date=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def check(self, lm: LM) -> None:
        """Make sure that the editor belongs to this model.

        Raises:
            MismatchError: it was trained for another one.
        """
        if self.fingerprint and self.fingerprint != lm.fingerprint:
            raise MismatchError(
                f"This editor was trained for a model with fingerprint {self.fingerprint}, but {lm.name!r} has "
                f"{lm.fingerprint}. Train one for this model: emendo train --model {lm.name}"
            )

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write ``editor.safetensors`` and ``editor.json`` into a folder, all or nothing.

        Raises:
            StorageError: the folder already holds something, or cannot be written.
        """
        with new_folder(folder, overwrite=overwrite) as new:
            write_tensors(new / "editor.safetensors", self.state_dict())
            write_json(
                new / "editor.json",
                {
                    "format": FORMAT,
                    "editor": self.name,
                    "config": asdict(self.config),
                    "sites": [asdict(site) for site in self.sites],
                    "fingerprint": self.fingerprint,
                    "info": self.info,
                },
            )

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read a trained editor from its folder; ``Editor.from_pretrained`` finds the method by itself.

        Raises:
            StorageError: a file is missing, damaged, or from a newer emendo.
        """
        from emendo.editors import editor_class

        where = Path(folder).expanduser()
        head = read_json(where / "editor.json")
        if not isinstance(head, dict) or head.get("format") not in range(1, FORMAT + 1):
            raise StorageError(f"{where / 'editor.json'} is not an editor that this version can read.")
        try:
            kind = editor_class(head["editor"])
            if not issubclass(kind, cls):
                raise StorageError(f"{where} holds a {head['editor']!r} editor, not {cls.name!r}.")
            known = {field.name for field in fields(kind.Config)}
            config = kind.Config(**{k: v for k, v in head["config"].items() if k in known})
            editor = kind(tuple(Site(**site) for site in head["sites"]), config, head["fingerprint"])
            editor.load_state_dict(read_tensors(where / "editor.safetensors"))
            editor.info = head.get("info", {})
        except (AttributeError, KeyError, TypeError, RuntimeError) as error:
            if isinstance(error, StorageError):
                raise
            raise StorageError(f"{where} is damaged: {error}") from error
        return editor.eval()


class GradientEditor(Editor):
    """Base of the editors that turn the factors of the fine-tuning gradient into a change, and can be trained to."""

    looks_ahead: bool = True
    """Whether the factors are those of a frozen model, so that they can be taken before they are needed."""

    @abstractmethod
    def forward(self, factors: Mapping[str, Factors]) -> dict[str, LowRank]:
        """The method itself.

        Args:
            factors: by site name, the rows of all examples.

        Returns:
            By site name, one change for each example, differentiable in what the editor learns.
        """

    def factors(
        self, trunk: Trunk, texts: Sequence[Text], hidden: Tensor | None = None
    ) -> dict[str, Factors]:
        """The factors that this editor works on, on its own device; see :func:`edit_factors`."""
        device = next((p.device for p in self.parameters()), None)
        factors = edit_factors(trunk, self.sites, texts, hidden)
        return factors if device is None else move(factors, device)

    def each(self, lm: LM, requests: Sequence[Request]) -> dict[str, LowRank]:
        """One change for each request, all in one batch."""
        texts = self.texts(lm, requests)
        factors = self.factors(Trunk(self.host(lm).model, self.sites), texts)
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                return self(factors)  # type: ignore[no-any-return]
        finally:
            self.train(training)

    # ------------------------------------------------------------------------------------- training

    def begin(self, lm: LM) -> None:
        """Get ready to be trained on this model."""

    def trainable(self, lm: LM) -> Iterable[nn.Parameter]:
        """What training changes: the editor's own parameters."""
        return self.parameters()

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """Optimiser groups; a method with learning rates of its own overrides this."""
        return [{"params": list(self.parameters()), "lr": lr}]

    def weights(self, asked: Weights) -> Weights:
        """The weights of the losses at this step: those asked for, unless a method sets its own."""
        return asked

    def learnt(self, outcome: Outcome) -> None:
        """Hear what a step gave, after it."""

    def validated(self, outcome: Outcome) -> None:
        """Hear what a validation gave."""

    def judged(
        self,
        store: TrunkStore,
        episodes: Sequence[Episode],
        factors: Mapping[str, Factors],
        reference: Mapping[Text, Tensor],
        weights: Weights,
        *,
        together: int = 1,
        backward: bool = False,
    ) -> Outcome | None:
        """Make the edits of some episodes and judge them; with ``backward`` also add to the parameters' gradients.

        Args:
            store: the trunk's output of every text, and the way on from there.
            episodes: what to edit and to judge by.
            factors: of the episodes' edits; empty where :attr:`looks_ahead` is False.
            reference: locality text -> the unedited model's logits ``[labels, vocabulary]``.
            weights: of the losses.
            together: how many consecutive episodes are put into one edit.
            backward: whether this is a training step.

        Returns:
            What the edits did; None where a factor was not finite.
        """
        if not all(bool(f.u.isfinite().all()) and bool(f.delta.isfinite().all()) for f in factors.values()):
            return None
        deltas = self(factors)
        if together > 1:
            deltas = {name: delta.group(together) for name, delta in deltas.items()}
        rest = (episodes, reference, weights)
        if not backward:
            return judge(store, deltas, *rest, together=together)
        return through(deltas, lambda leaves: judge(store, leaves, *rest, together=together, backward=True))


def as_requests(
    prompt: str | Sequence[Request | tuple[str, str]], target: str | None = None
) -> list[Request]:
    """One prompt with its target, or several such pairs, as requests.

    Raises:
        RequestError: an empty prompt or target.
    """
    if isinstance(prompt, str):
        return [Request(prompt, target if target is not None else "")]
    return [r if isinstance(r, Request) else Request(*r) for r in prompt]


def edit_factors(
    trunk: Trunk,
    sites: tuple[Site, ...],
    texts: Sequence[Text],
    hidden: Tensor | None = None,
    *,
    token_loss: TokenLoss = token_nll,
    create_graph: bool = False,
    seen: Callable[[Tensor, TokenBatch], None] | None = None,
) -> dict[str, Factors]:
    """The factors of each text's own fine-tuning gradient: NLL of its answer, averaged over its tokens.

    Args:
        trunk: the split model.
        sites: where to capture.
        texts: prompts with their targets.
        hidden: the trunk's output ``[texts, tokens, width]``, where it is already known.
        token_loss: the loss of each label, in place of the NLL.
        create_graph: leave the factors differentiable in the model's parameters.
        seen: shown the logits at the label positions and the batch, on the way.
    """
    batch = collate(texts)
    if hidden is None and not create_graph:
        hidden = trunk.run(batch)

    def loss() -> Tensor:
        logits = trunk.logits(batch, hidden)
        if seen is not None:
            seen(logits.detach(), batch)
        values = token_loss(logits, batch.labels.to(logits.device))
        return per_example(values, batch.owner.to(logits.device), len(texts))

    return capture(trunk.model, sites, loss, create_graph=create_graph)[1]
