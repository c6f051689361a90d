"""In-context editing: no weight is changed; the corrected fact is put before every prompt.

Zheng et al., "Can We Edit Factual Knowledge by In-Context Learning?", EMNLP 2023, arXiv 2305.12740, without their
demonstrations: the facts, one a line, precede the prompt of a decoder or the source of an encoder-decoder, after the
tokens that its tokenizer or chat template puts at the start of every text. Classifiers are refused: their answers are
classes, and they are not trained to read a line such as "claim. true.".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from string import Formatter
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from emendo._settings import Settings, setting
from emendo.editors.base import Editor, as_requests
from emendo.edits.edit import BaseEdit, Origin, Request
from emendo.errors import RequestError
from emendo.models.framing import joined
from emendo.models.lm import LM
from emendo.models.text import Text


@dataclass(frozen=True, slots=True)
class InContextConfig(Settings):
    """The settings of in-context editing."""

    template: str = setting(
        "{prompt} {target}.",
        "Text of a fact, with `{prompt}` and `{target}` in it; a space between them stands for the separator.",
    )

    def _check(self) -> None:
        try:
            names = [name for _, name, _, _ in Formatter().parse(self.template) if name is not None]
        except ValueError:
            names = []
        if sorted(names) != ["prompt", "target"]:
            raise RequestError(
                f"template={self.template!r} must hold {{prompt}} and {{target}}, each once, and no other braces."
            )


@dataclass(frozen=True, eq=False)
class ContextEdit(BaseEdit):
    """A text that precedes every prompt.

    Attributes:
        text: the facts, one a line, each with a line break at its end.
    """

    kind: ClassVar[str] = "in-context"
    text: str
    origin: Origin
    card: Mapping[str, Any] = field(default_factory=dict)

    @contextmanager
    def applied(self, model: LM) -> Iterator[LM]:
        """The model with the text before its prompts; see :meth:`emendo.edits.edit.BaseEdit.applied`.

        Raises:
            RequestError: the text leaves no room for a prompt in the model's context.
        """
        self.check(model)
        yield _InContext.of(model, self.text)

    def _content(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {}, {"text": self.text}

    @classmethod
    def _restored(
        cls, tensors: dict[str, Tensor], values: Any, origin: Origin, card: Mapping[str, Any]
    ) -> Self:
        if not isinstance(values["text"], str):
            raise ValueError("the text")
        return cls(values["text"], origin, card)


@dataclass(frozen=True, eq=False)
class _InContext(LM):
    """A model that reads a text before every prompt.

    Attributes:
        inner: the model that reads it.
        text: the text.
    """

    inner: LM = field(kw_only=True)
    text: str = field(kw_only=True)

    @classmethod
    def of(cls, lm: LM, text: str) -> _InContext:
        """A model with a text before its prompts.

        Raises:
            RequestError: the text fills the model's context.
        """
        reader = cls(lm.model, lm.tokenizer, lm.name, lm.chat, inner=lm, text=text)
        if reader.context is not None and reader.context < 1:
            raise RequestError(
                f"The facts have {len(reader.ids)} tokens but the context of {lm.name} is {lm.context}: "
                "use fewer facts."
            )
        return reader

    @cached_property
    def ids(self) -> tuple[int, ...]:
        """The text's tokens."""
        return tuple(self.tokenizer(self.text, add_special_tokens=False)["input_ids"])

    @cached_property
    def context(self) -> int | None:
        """The rest of the model's context after the text."""
        return None if self.inner.context is None else self.inner.context - len(self.ids)

    @torch.no_grad()
    def logits(self, texts: Sequence[Text]) -> list[Tensor]:
        """As :meth:`LM.logits`, after the text.

        Raises:
            RequestError: a text does not fit the rest of the context.
        """
        return self.inner.logits([self._after_facts(text) for text in texts])

    def _words(self, prompts: list[str], max_new_tokens: int) -> list[str]:
        words: list[str] = self.inner.generate([self.text + prompt for prompt in prompts], max_new_tokens)
        return words

    def _after_facts(self, text: Text) -> Text:
        """A text after the facts.

        Raises:
            RequestError: it does not fit the rest of the context.
        """
        read = text.source or text.ids
        if self.context is not None and len(read) > self.context:
            raise RequestError(
                f"The facts have {len(self.ids)} tokens and leave {self.context} in the context of {self.name}, the "
                f"text has {len(read)}: use fewer facts at once, or shorten the prompt."
            )
        start = self._opening(read)
        joined = (*read[:start], *self.ids, *read[start:])
        if text.source:
            return replace(text, source=joined)
        return replace(text, ids=joined, start=text.start + len(self.ids))

    def _opening(self, ids: tuple[int, ...]) -> int:
        """The number of tokens that the tokenizer or the chat template puts before every text."""
        bare = self.tokenizer(self.framing.frame(""), add_special_tokens=not self.framing.chat)["input_ids"]
        same = [a == b for a, b in zip(bare, ids, strict=False)]
        return [*same, False].index(False)


class InContext(Editor):
    """In-context editing; see the module's docstring."""

    name = "in-context"
    Config = InContextConfig
    config: InContextConfig
    needs_training = False
    makes = ContextEdit
    no_changes = "in-context changes no weights"

    def edit(
        self, lm: LM, prompt: str | Sequence[Request | tuple[str, str]], target: str | None = None
    ) -> ContextEdit:
        """Make an edit of one fact or of several; see :meth:`emendo.editors.base.Editor.edit`.

        Raises:
            RequestError: the model is a classifier, or the facts leave no room in its context.
        """
        requests = as_requests(prompt, target)
        self.texts(lm, requests)
        if lm.kind == "classifier":
            raise RequestError(
                f"in-context puts facts before the prompt, but {lm.name} is a classifier, which answers with classes; "
                "use the cache or an editor that changes weights."
            )
        edit = ContextEdit("".join(f"{self._told(r)}\n" for r in requests), self.origin(lm, requests))
        with edit.applied(lm):
            return edit

    def _told(self, request: Request) -> str:
        """A fact as a line of text."""
        before, spaced, after = self.config.template.partition("{prompt} {target}")
        if not spaced:
            return self.config.template.format(prompt=request.prompt.strip(), target=request.target.strip())
        return f"{before.format()}{joined(*request.pair).strip()}{after.format()}"
