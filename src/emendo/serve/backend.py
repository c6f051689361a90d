"""The border between the service and the engine that answers: requests, the edits in force, pieces of answers.

The routes know nothing of the engine. The local engine (:mod:`emendo.serve.engine`) and a larger one behind
``--upstream`` are interchangeable: each is given a request and the edits that are in force for it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from emendo.edits.edit import Edit
from emendo.errors import EmendoError

Finish = Literal["stop", "length"]


class BusyError(EmendoError, RuntimeError):
    """The queue is full."""


class UpstreamError(EmendoError, RuntimeError):
    """The engine cannot answer, or does so with an error of its own."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A request for one text.

    Attributes:
        prompt: the text to continue; empty for a conversation.
        messages: a conversation, as objects with ``role`` and ``content``; empty for a prompt.
        max_tokens: the largest number of tokens to generate; None for as many as the context has room for.
        temperature: 0 takes the most likely token each time.
        top_p: samples from the most likely tokens that together have this probability.
        seed: of the samples; None for another one each time.
        stop: texts that end the answer and are not part of it.
        logprobs: number of alternatives given for each token, with their log-probabilities; None for none at all.
        stream: whether each piece is wanted as soon as it is there; otherwise they may come all at the end.
    """

    prompt: str = ""
    messages: Sequence[Mapping[str, Any]] = ()
    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()
    logprobs: int | None = None
    stream: bool = False

    @property
    def asked(self) -> str | tuple[str, ...]:
        """What an edit is found by: a prompt as it stands, or what the user said in each turn of a conversation."""
        if not self.messages:
            return self.prompt
        return tuple(
            str(each["content"]) for each in self.messages if each["role"] == "user" and each["content"]
        )


@dataclass(frozen=True, slots=True)
class Part:
    """A change of the weights that is in force.

    Attributes:
        digest: SHA-256 of its content, in hex; equal parts have equal digests, and others do not.
        edit: the change.
        ids: numbers of the ledger's edits that it consists of.
        score: of the router, from 0 to 1; None where the request named the edit, or it is in the weights.
    """

    digest: str
    edit: Edit
    ids: tuple[int, ...]
    score: float | None = None


@dataclass(frozen=True, slots=True)
class InForce:
    """The edits in force for a request.

    Attributes:
        operation: number of the ledger's operation after which this holds.
        parts: the changes, which add up; none for the base model.
        best: number of the edit with the highest score; None where the router was not asked.
        score: its score.
        threshold: the score from which on an edit is in force.
    """

    operation: int
    parts: tuple[Part, ...] = ()
    best: int | None = None
    score: float | None = None
    threshold: float | None = None


@dataclass(frozen=True, slots=True)
class Token:
    """A generated token with log-probabilities of the distribution before temperature.

    Attributes:
        text: the token as text.
        logprob: its own.
        top: the most likely tokens, each with its own.
    """

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of an answer.

    Attributes:
        text: the text that it adds.
        tokens: the tokens that it adds, where log-probabilities are asked for.
        generated: number of tokens generated so far.
        prompt_tokens: number of tokens of the prompt.
        finish: why the answer ended; None for all pieces but the last.
    """

    text: str
    generated: int
    prompt_tokens: int
    tokens: tuple[Token, ...] = ()
    finish: Finish | None = None


class Backend(Protocol):
    """An engine that answers requests under edits."""

    def answer(self, ask: Ask, force: InForce) -> AsyncGenerator[Piece]:
        """The pieces of an answer, the last one with the reason why it ended.

        What can be refused is refused before the first piece. Closing the iterator ends the work.

        Args:
            ask: the request.
            force: the edits in force.

        Raises:
            RequestError: the request does not fit the model.
            BusyError: the queue is full.
            UpstreamError: the engine cannot answer.
        """
        ...

    async def ready(self) -> bool:
        """Whether requests are answered now."""
        ...

    def figures(self) -> Mapping[str, float]:
        """Gauges for ``/metrics``, by name: rows that run, requests that wait, and the like."""
        ...

    async def close(self) -> None:
        """End all work and free what is held."""
        ...
