"""What every editor is: a function from the factors of the fine-tuning gradient to a low-rank change.

A method is a subclass of :class:`Editor` in a file of its own that says what happens between
:class:`~emendo.capture.Factors` and :class:`~emendo.lowrank.LowRank` (its ``forward``), with a frozen dataclass of
settings, and one line in :data:`emendo.editors.EDITORS`. Capture, batching, application, saving, training and
evaluation come with it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from emendo.capture import Factors, capture, move
from emendo.data.batch import Text, collate, encode
from emendo.edit import Edit, Origin, Request
from emendo.errors import MismatchError, RequestError, StorageError
from emendo.files import new_folder, read_json, read_tensors, write_json, write_tensors
from emendo.losses import per_example, token_nll
from emendo.lowrank import LowRank
from emendo.models import LM
from emendo.sites import Site
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

    def __init__(self, sites: tuple[Site, ...], config: Any = None, fingerprint: str = "") -> None:
        super().__init__()
        self.sites = sites
        self.config = config if config is not None else self.Config()
        self.fingerprint = fingerprint
        self.info: dict[str, Any] = {}

    @abstractmethod
    def forward(self, factors: Mapping[str, Factors]) -> dict[str, LowRank]:
        """The method itself.

        Args:
            factors: by site name, the rows of all examples.

        Returns:
            By site name, one change for each example, differentiable in what the editor learns.
        """

    def trainable(self, lm: LM) -> Iterable[nn.Parameter]:
        """What training changes: the editor's own parameters."""
        return self.parameters()

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """Optimiser groups; a method with learning rates of its own overrides this."""
        return [{"params": list(self.parameters()), "lr": lr}]

    def factors(
        self, trunk: Trunk, texts: Sequence[Text], hidden: Tensor | None = None
    ) -> dict[str, Factors]:
        """The factors that this editor works on, on its own device; see :func:`edit_factors`."""
        device = next((p.device for p in self.parameters()), None)
        factors = edit_factors(trunk, self.sites, texts, hidden)
        return factors if device is None else move(factors, device)

    def each(self, lm: LM, requests: Sequence[Request]) -> dict[str, LowRank]:
        """One change for each request, every one of them from the clean model, in one batch.

        Raises:
            MismatchError: the editor was trained for another model.
            RequestError: no request at all, or one that does not fit the model.
        """
        self.check(lm)
        if not requests:
            raise RequestError("There is nothing to edit: give at least one prompt with its target.")
        texts = encode(lm.tokenizer, [(r.prompt, r.target) for r in requests], max_tokens=lm.context)
        factors = self.factors(Trunk(lm.model, self.sites), texts)
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                return self(factors)  # type: ignore[no-any-return]
        finally:
            self.train(training)

    def edit(
        self, lm: LM, prompt: str | Sequence[Request | tuple[str, str]], target: str | None = None
    ) -> Edit:
        """Make one edit: ``edit(lm, prompt, target)``, or one for several facts at once, ``edit(lm, [...])``.

        Several facts are transformed independently and their changes summed (MEND, section 3.2). The model is
        not changed: use ``edit.applied(lm)``.

        Raises:
            MismatchError: the editor was trained for another model.
            RequestError: an empty prompt or target, or a text that does not fit the model's context.
        """
        if isinstance(prompt, str):
            requests = [Request(prompt, target if target is not None else "")]
        else:
            requests = [r if isinstance(r, Request) else Request(*r) for r in prompt]
        deltas = {name: delta.sum() for name, delta in self.each(lm, requests).items()}
        return Edit(deltas, self.origin(lm, requests))

    def origin(self, lm: LM, requests: Sequence[Request]) -> Origin:
        """Where an edit of these requests comes from."""
        return Origin(
            fingerprint=lm.fingerprint,
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


def edit_factors(
    trunk: Trunk, sites: tuple[Site, ...], texts: Sequence[Text], hidden: Tensor | None = None
) -> dict[str, Factors]:
    """The factors of each text's own fine-tuning gradient: NLL of its answer, averaged over its tokens.

    Args:
        trunk: the split model.
        sites: where to capture.
        texts: prompts with their targets.
        hidden: the trunk's output ``[texts, tokens, width]``, where it is already known.
    """
    batch = collate(texts)
    if hidden is None:
        hidden = trunk.run(batch.input_ids, batch.attention_mask)

    def loss() -> Tensor:
        logits = trunk.logits(batch.input_ids, batch.attention_mask, batch.positions, hidden)
        nll = token_nll(logits, batch.labels.to(logits.device))
        return per_example(nll, batch.owner.to(logits.device), len(texts))

    return capture(trunk.model, sites, loss)[1]
