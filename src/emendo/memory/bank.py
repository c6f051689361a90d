"""Many edits of one model, each by itself: the prompt decides which one is in force, if any.

::

    memory = EditMemory(lm)
    memory.add(editor.edit(lm, "The capital of Australia is", "Sydney"))
    with memory.applied() as routed:
        routed.generate("What is the capital of Australia?")
    memory.why("What is the capital of Australia?")

An edit whose scope no prompt is in changes nothing: the base model answers, bit for bit. After MELO (Yu et al. 2024,
arXiv 2312.11795) and SERAC (Mitchell et al. 2022).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from emendo._subject import find_subject
from emendo.edits.edit import BaseEdit, Edit, Request, as_weights
from emendo.edits.per_request import applied_to_rows
from emendo.errors import RequestError
from emendo.memory.index import Index, Scope
from emendo.memory.router import Query, Router
from emendo.memory.turns import questions
from emendo.memory.words import Prompt
from emendo.models.lm import LM
from emendo.models.text import Text

FALSE_FIRES = 0.02
"""Share of the prompts about other subjects that may fire an edit."""
_AT_ONCE = 32  # texts of a pass, each of which may have an edit of its own
_MADE = 64  # edits that are kept of those that are made when they are needed
_MARK = "\N{OBJECT REPLACEMENT CHARACTER}"


class EditMaker(Protocol):
    """Makes edits, as :class:`emendo.Editor` does."""

    def edit(self, lm: LM, prompt: Sequence[Request]) -> BaseEdit:
        """Make one edit from the clean model."""


@dataclass(frozen=True, slots=True)
class Remembered:
    """An edit of a memory, loaded when a prompt first needs it.

    Attributes:
        load: gives the edit.
        prompts: of its requests.
        subject: of its fact, as a prompt names it; None guesses it.
        paraphrases: further prompts that ask for it.
        aliases: other names of the subject.
        mark: identifies the edit with all of this in an index that is kept in a folder.
    """

    load: Callable[[], Edit]
    prompts: Sequence[str]
    subject: str | None = None
    paraphrases: Sequence[str] = ()
    aliases: Sequence[str] = ()
    mark: int = 0

    def wordings(self) -> list[Prompt]:
        """The prompts and paraphrases, and the first prompt with each other name of the subject.

        Raises:
            RequestError: there is no prompt.
        """
        if not self.prompts:
            raise RequestError(
                "This edit names no prompt (an imported adapter has none), so no prompt can be in its scope. Apply "
                "it to the weights instead."
            )
        texts = (*self.prompts, *self.paraphrases)
        found = [Prompt.read(text, self.subject) for text in texts]
        first = self.prompts[0]
        name = self.subject if self.subject and self.subject in first else find_subject(first)
        return found + [Prompt.read(first.replace(name, alias), alias) for alias in self.aliases]


@dataclass(frozen=True, slots=True)
class Choice:
    """The edit that a prompt is answered with, and why.

    Attributes:
        prompt: the prompt; of a conversation, the part of it that decided.
        edit: the number of the edit in force; None where the base model answers.
        best: the number of the edit with the highest score; None if none was compared.
        score: its score, from 0 to 1.
        runner_up: the number of the edit with the second highest score.
        runner_up_score: its score.
        threshold: an edit is in force from this score on.
    """

    prompt: str
    edit: int | None
    best: int | None
    score: float
    runner_up: int | None
    runner_up_score: float
    threshold: float


class EditMemory:
    """Edits with their scopes.

    Args:
        lm: the model; its weights are never changed.
        router: by default the one that ships for the model, or the lexical one.
        false_fires: the share of the prompts about other subjects that may fire an edit.
        keys: a folder that keeps the keys of the edits' prompts, so that they are computed once; None keeps none.
        index: a folder that keeps the index of many edits, memory-mapped; None keeps none. It is for one list of edits,
            such as a ledger's, and :meth:`restore` puts those in force that it holds.
    """

    def __init__(
        self,
        lm: LM,
        router: Router | None = None,
        *,
        false_fires: float = FALSE_FIRES,
        keys: Path | None = None,
        index: Path | None = None,
    ) -> None:
        self.lm = lm
        self.router = router or Router.shipped_for(lm)
        self.threshold = self.router.judge.threshold(false_fires)
        self.index = Index(self.router.key_size, None if index is None else index / self.router.name)
        self._edits: dict[int, Callable[[], Edit]] = {}
        self._load: Callable[[int], Edit] | None = None
        self._keys = None if keys is None else self.router.key_file(keys)

    def __len__(self) -> int:
        return len(self.index)

    def add(
        self,
        edit: BaseEdit,
        *,
        number: int | None = None,
        subject: str | None = None,
        paraphrases: Sequence[str] = (),
        aliases: Sequence[str] = (),
    ) -> int:
        """Add an edit; returns its number.

        Args:
            edit: a change of weights with at least one request.
            number: of the edit; by default the next one.
            subject: of its fact, as the prompt names it; by default it is guessed.
            paraphrases: further prompts that ask for it.
            aliases: other names of the subject.

        Raises:
            RequestError: the edit has no prompt, so no prompt can be in its scope; it changes no weights; or the number
                is taken.
            MismatchError: it was made for another model.
        """
        change = as_weights(edit, "A memory holds changes of weights")
        change.check(self.lm)
        prompts = [request.prompt for request in change.origin.requests]
        number = max(self.index.numbers, default=0) + 1 if number is None else number
        self.add_all({number: Remembered(lambda: change, prompts, subject, paraphrases, aliases)})
        return number

    def add_facts(
        self, editor: EditMaker, facts: Sequence[Request], subjects: Sequence[str | None] | None = None
    ) -> list[int]:
        """Add facts whose edits are made when a prompt first needs them, and made again after others were needed.

        A fact is then a line of text instead of the factors of its edit. On one machine an editor makes the same edit
        every time, from the clean model; on another processor it differs by rounding.

        Args:
            editor: makes the edits.
            facts: the facts, each of which becomes an edit of its own.
            subjects: of the facts, as their prompts name them; by default they are guessed.

        Returns:
            Their numbers.

        Raises:
            MismatchError: the editor was made for another model (raised when an edit is needed, where the editor cannot
                tell before).
        """
        first = max(self.index.numbers, default=0) + 1
        numbers = range(first, first + len(facts))
        names = [None] * len(facts) if subjects is None else subjects

        @lru_cache(_MADE)
        def made(number: int) -> Edit:
            with torch.enable_grad():
                edit = editor.edit(self.lm, [facts[number - first]])
            return as_weights(edit, "A memory holds changes of weights")

        self.add_all(
            {
                number: Remembered(partial(made, number), [fact.prompt], name)
                for number, fact, name in zip(numbers, facts, names, strict=True)
            }
        )
        return list(numbers)

    def add_all(self, edits: Mapping[int, Remembered]) -> None:
        """Add many edits by their numbers.

        Raises:
            RequestError: an edit has no prompt, or a number is taken.
        """
        if taken := edits.keys() & self.index.numbers:
            raise RequestError(f"The memory has an edit {min(taken)} already.")
        scopes = [
            Scope(number, prompt, edit.mark) for number, edit in edits.items() for prompt in edit.wordings()
        ]
        texts = [scope.prompt.text for scope in scopes]
        self.index.add(scopes, self.router.keys(self.lm, texts, self._keys))
        self._edits |= {number: edit.load for number, edit in edits.items()}
        self.index.write()

    def restore(self, marks: Mapping[int, int], load: Callable[[int], Edit]) -> list[int]:
        """Put the edits in force that the kept index holds; for a memory to which nothing was added.

        Args:
            marks: number -> mark of each edit that is wanted.
            load: gives an edit by its number.

        Returns:
            The wanted edits that are not in the index, which :meth:`add_all` adds.
        """
        self._load = load
        self.index.keep(marks)
        return [number for number in marks if number not in self.index.numbers]

    def remove(self, number: int) -> None:
        """Take an edit out; all other prompts are answered as before, bit for bit.

        Raises:
            RequestError: there is no such edit.
        """
        if number not in self.index.numbers:
            raise RequestError(f"The memory has no edit {number}.")
        self._edits.pop(number, None)
        self.index.remove(number)

    def edit(self, number: int) -> Edit:
        """An edit by its number."""
        if number in self._edits or self._load is None:
            return self._edits[number]()
        return self._load(number)

    def route(self, prompts: Sequence[str | Sequence[str]]) -> list[Choice]:
        """Choose an edit, or none, for each prompt.

        Args:
            prompts: prompts, or conversations as what the user said in each turn. Of a conversation the last turn
                decides; if it finds no edit and has a pronoun, it is read with the name that a turn before has.
        """
        texts = [[each] if isinstance(each, str) else questions(each) for each in prompts]
        found = [
            Choice(each[0] if each else "", None, None, 0.0, None, 0.0, self.threshold) for each in texts
        ]
        left = [place for place, each in enumerate(texts) if each and len(self)]
        turn = 0
        while left:
            asked = [texts[place][turn] for place in left]
            for place, text, query in zip(left, asked, self.router.read(self.lm, asked), strict=True):
                choice = replace(self.choose(query), prompt=text)
                if turn == 0 or choice.edit is not None:
                    found[place] = choice
            turn += 1
            left = [place for place in left if found[place].edit is None and turn < len(texts[place])]
        return found

    def read_own(self, prompts: Sequence[str]) -> list[Query]:
        """Read prompts of edits, whose keys are kept."""
        return self.router.read(self.lm, prompts, self._keys)

    def choose(self, query: Query) -> Choice:
        """Choose an edit, or none, for a prompt that was read. Of two edits with one score the later one wins."""
        scores = self.router.scores(query, self.index)
        ranked = sorted(((score, number) for number, score in scores.items()), reverse=True)
        (first, best), (second, runner_up) = (*ranked[:2], *[(0.0, None)] * 2)[:2]
        return Choice(
            query.prompt.text,
            best if first >= self.threshold else None,
            best,
            first,
            runner_up,
            second,
            self.threshold,
        )

    def why(self, prompt: str | Sequence[str]) -> Choice:
        """The edit that answers a prompt or a conversation, its score, the runner-up, and the threshold."""
        return self.route([prompt])[0]

    @contextmanager
    def applied(self) -> Iterator[LM]:
        """The model whose every prompt is answered with the edit in whose scope it is, for the length of a block."""
        lm = self.lm
        yield RoutedLM(lm.model, lm.tokenizer, lm.name, lm.chat, files=lm.files, memory=self)


@dataclass(frozen=True, eq=False)
class RoutedLM(LM):
    """A model with a memory; every row of a batch runs under the edit that its prompt chooses."""

    memory: EditMemory = field(kw_only=True)

    @contextmanager
    def _routed(self, prompts: Sequence[str]) -> Iterator[LM]:
        choices = self.memory.route(prompts)
        sets = [[] if choice.edit is None else [self.memory.edit(choice.edit)] for choice in choices]
        plain = self.memory.lm.reading(chat=self.chat)  # which knows its fingerprint
        if any(sets):
            with applied_to_rows(plain, sets) as rows:
                yield rows
        else:
            yield plain

    @torch.no_grad()
    def generate(self, prompts: str | list[str], max_new_tokens: int = 20) -> Any:
        """See :meth:`emendo.models.lm.LM.generate`."""
        several = [prompts] if isinstance(prompts, str) else prompts
        with self._routed(several) as lm:
            return lm.generate(prompts, max_new_tokens)

    @torch.no_grad()
    def logits(self, texts: Sequence[Text]) -> list[Tensor]:
        """See :meth:`emendo.models.lm.LM.logits`; a text is routed by the prompt before its answer."""
        found: list[Tensor] = []
        for start in range(0, len(texts), _AT_ONCE):
            part = texts[start : start + _AT_ONCE]
            with self._routed([self.prompt_of(text) for text in part]) as lm:
                found += lm.logits(part)
        return found

    def prompt_of(self, text: Text) -> str:
        """The prompt of a text, without a chat template."""
        said: str = self.tokenizer.decode(text.source or text.ids[: text.start])
        before, after = self._template
        return said.removeprefix(before).removesuffix(after)

    @cached_property
    def _template(self) -> tuple[str, str]:
        """The text before a prompt in the chat template, and the text after it."""
        before, _, after = self.framing.frame(_MARK).partition(_MARK)
        return before, after
