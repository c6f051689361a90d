"""OpenAI's endpoints: ``/v1/models``, ``/v1/completions`` and ``/v1/chat/completions``."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from fastapi.sse import EventSourceResponse, format_sse_event

from emendo._storage import finite_values
from emendo.serve.backend import Ask, InForce, Piece
from emendo.serve.errors import described
from emendo.serve.routing import Question
from emendo.serve.schemas import ChatRequest, CompletionRequest, ModelBody, ModelList, Sampling
from emendo.serve.service import Found, Service

HEADER = "X-Emendo-Edits"
GONE = 499  # nobody reads it; the log shows it

router = APIRouter(tags=["OpenAI"])


@router.get("/v1/models")
async def models(found: Found) -> ModelList:
    """List the working model, the base model, and the state at each tag."""
    return ModelList(data=[ModelBody(id=name, created=found.started) for name in await found.models()])


@router.post("/v1/completions")
async def complete(body: CompletionRequest, request: Request, found: Found) -> Response:
    """Continue one or more prompts."""
    prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    shared = _parameters(body, body.max_tokens, body.logprobs)
    asks = [replace(shared, prompt=prompt) for prompt in prompts]
    return await _answer(found, request, body, asks, _Completion)


@router.post("/v1/chat/completions")
async def chat(body: ChatRequest, request: Request, found: Found) -> Response:
    """Answer a conversation."""
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    shared = _parameters(body, body.max_completion_tokens or body.max_tokens, logprobs)
    ask = replace(shared, messages=tuple(message.plain() for message in body.messages))
    return await _answer(found, request, body, [ask], _Chat)


def _parameters(body: Sampling, max_tokens: int | None, logprobs: int | None) -> Ask:
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    return Ask(
        max_tokens=max_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        seed=body.seed,
        stop=tuple(stop),
        logprobs=logprobs,
        stream=body.stream,
    )


async def _answer(
    found: Service, request: Request, body: Sampling, asks: Sequence[Ask], form: type[_Form]
) -> Response:
    state = found.router.state(body.model)
    edits = body.edits if isinstance(body.edits, str) else tuple(body.edits)
    forces = await asyncio.gather(*(found.router.route(Question(ask.asked, edits, state)) for ask in asks))
    several = [
        (ask if ask.seed is None else replace(ask, seed=ask.seed + i), force)
        for ask, force in zip(asks, forces, strict=True)
        for i in range(body.n)
    ]
    reply = form(body.model, [force for _, force in several])
    headers = {HEADER: header(reply.forces)}
    request.scope["emendo"]["edits"] = headers[HEADER]
    pieces = _counted(found, reply, _all_pieces(found, several))
    if not body.stream:
        if not await unless_gone(request, _drained(pieces)):
            return Response(status_code=GONE)
        return JSONResponse(finite_values(reply.whole()), headers=headers)
    first = await anext(pieces)  # what is refused is refused with a status of its own
    usage = body.stream_options is not None and body.stream_options.include_usage
    return EventSourceResponse(_events(first, pieces, reply, usage=usage), headers=headers)


async def _counted(
    found: Service, reply: _Form, pieces: AsyncGenerator[tuple[int, Piece]]
) -> AsyncGenerator[tuple[int, Piece]]:
    """The same pieces, added to the answer; in the end the answer is counted."""
    try:
        async with aclosing(pieces):
            async for index, piece in pieces:
                reply.add(index, piece)
                yield index, piece
    finally:
        found.metrics.answered(reply.forces, **reply.usage())


async def _drained(pieces: AsyncGenerator[tuple[int, Piece]]) -> None:
    async with aclosing(pieces):
        async for _ in pieces:
            pass


async def unless_gone(request: Request, work: Coroutine[Any, Any, None]) -> bool:
    """Do some work, unless the client hangs up before it is done; returns whether it was done."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            return False
        working.result()
        return True
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _events(
    first: tuple[int, Piece], rest: AsyncGenerator[tuple[int, Piece]], reply: _Form, *, usage: bool
) -> AsyncGenerator[bytes]:
    """The answer as server-sent events; an error in the middle becomes an event, too."""
    try:
        async with aclosing(rest):
            yield _event(reply.chunk(*first))
            async for index, piece in rest:
                yield _event(reply.chunk(index, piece))
        if usage:
            yield _event(reply.last_chunk())
    except Exception as error:  # noqa: BLE001 - the status was sent already
        yield _event(described(error)[1])
    yield format_sse_event(data_str="[DONE]")


def _event(values: Mapping[str, Any]) -> bytes:
    return format_sse_event(data_str=json.dumps(finite_values(values), ensure_ascii=False))


async def _all_pieces(
    found: Service, asks: Sequence[tuple[Ask, InForce]]
) -> AsyncGenerator[tuple[int, Piece]]:
    """The pieces of several answers as they come, each with the number of its answer."""
    queue: asyncio.Queue[tuple[int, Piece] | BaseException | None] = asyncio.Queue()

    async def read(index: int, ask: Ask, force: InForce) -> None:
        async with aclosing(found.backend.answer(ask, force)) as pieces:
            async for piece in pieces:
                queue.put_nowait((index, piece))

    async def read_all() -> None:
        try:
            async with asyncio.timeout(found.settings.timeout), asyncio.TaskGroup() as group:
                for index, (ask, force) in enumerate(asks):
                    group.create_task(read(index, ask, force))
            queue.put_nowait(None)
        except ExceptionGroup as errors:
            queue.put_nowait(errors.exceptions[0])
        except BaseException as error:
            queue.put_nowait(error)
            raise

    task = asyncio.create_task(read_all())
    try:
        while (item := await queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


# ------------------------------------------------------------------------------------------ edits in force


def header(forces: Sequence[InForce]) -> str:
    """The edits in force for each choice: ``3;score=0.981``, ``3+5``, or ``none``."""
    return ", ".join(_listed(force) for force in forces)


def _listed(force: InForce) -> str:
    named = [
        f"{id}" + ("" if part.score is None else f";score={part.score:.3f}")
        for part in force.parts
        for id in part.ids
    ]
    return "+".join(named) or "none"


def _in_force(force: InForce) -> dict[str, Any]:
    return {
        "operation": force.operation,
        "edits": [
            {"id": id, "score": part.score, "digest": part.digest} for part in force.parts for id in part.ids
        ],
        "best": force.best,
        "score": force.score,
        "threshold": force.threshold,
    }


# ------------------------------------------------------------------------------------------ forms of answers


@dataclass
class _Choice:
    text: str = ""
    generated: int = 0
    prompt_tokens: int = 0
    finish: str | None = None
    begun: bool = False


class _Form:
    """An answer of one endpoint, whole or in chunks.

    Args:
        model: its name.
        forces: the edits in force, for each choice.
    """

    prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, model: str, forces: Sequence[InForce]) -> None:
        self.forces = forces
        self._head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "emendo": _in_force(forces[0]),
        }
        self._choices = [_Choice() for _ in forces]
        self._tokens: list[list[Any]] = [[] for _ in forces]

    def add(self, index: int, piece: Piece) -> None:
        """Add a piece of a choice."""
        choice = self._choices[index]
        choice.text += piece.text
        choice.generated, choice.prompt_tokens = piece.generated, piece.prompt_tokens
        choice.finish = piece.finish
        self._tokens[index] += piece.tokens

    def whole(self) -> dict[str, Any]:
        """The whole answer."""
        choices = [self._whole_choice(i, choice, self._tokens[i]) for i, choice in enumerate(self._choices)]
        for choice, force in zip(choices, self.forces, strict=True):
            choice["emendo"] = _in_force(force)
        return {**self._head, "object": self.whole_object, "choices": choices, "usage": self.usage()}

    def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        """A piece as a chunk."""
        choice = self._choices[index]
        values = self._chunk_choice(index, piece, first=not choice.begun)
        if not choice.begun:
            values["emendo"] = _in_force(self.forces[index])
        choice.begun = True
        return {**self._head, "object": self.chunk_object, "choices": [values]}

    def last_chunk(self) -> dict[str, Any]:
        """The chunk with the numbers of tokens."""
        return {**self._head, "object": self.chunk_object, "choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        """Numbers of tokens."""
        prompt = sum(choice.prompt_tokens for choice in self._choices)
        generated = sum(choice.generated for choice in self._choices)
        return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}

    def _whole_choice(self, index: int, choice: _Choice, tokens: Sequence[Any]) -> dict[str, Any]:
        raise NotImplementedError

    def _chunk_choice(self, index: int, piece: Piece, *, first: bool) -> dict[str, Any]:
        raise NotImplementedError


class _Completion(_Form):
    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def _whole_choice(self, index: int, choice: _Choice, tokens: Sequence[Any]) -> dict[str, Any]:
        return {
            "index": index,
            "text": choice.text,
            "finish_reason": choice.finish,
            "logprobs": _completion_logprobs(tokens),
        }

    def _chunk_choice(self, index: int, piece: Piece, *, first: bool) -> dict[str, Any]:
        return {
            "index": index,
            "text": piece.text,
            "finish_reason": piece.finish,
            "logprobs": _completion_logprobs(piece.tokens),
        }


class _Chat(_Form):
    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def _whole_choice(self, index: int, choice: _Choice, tokens: Sequence[Any]) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "finish_reason": choice.finish,
            "logprobs": _chat_logprobs(tokens),
        }

    def _chunk_choice(self, index: int, piece: Piece, *, first: bool) -> dict[str, Any]:
        delta = {"role": "assistant"} if first else {}
        return {
            "index": index,
            "delta": {**delta, "content": piece.text},
            "finish_reason": piece.finish,
            "logprobs": _chat_logprobs(piece.tokens),
        }


def _completion_logprobs(tokens: Sequence[Any]) -> dict[str, Any] | None:
    if not tokens:
        return None
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [dict(token.top) for token in tokens],
        "text_offset": _offsets([token.text for token in tokens]),
    }


def _offsets(texts: Sequence[str]) -> list[int]:
    starts, at = [], 0
    for text in texts:
        starts.append(at)
        at += len(text)
    return starts


def _chat_logprobs(tokens: Sequence[Any]) -> dict[str, Any] | None:
    if not tokens:
        return None

    def one(text: str, logprob: float) -> dict[str, Any]:
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    return {
        "content": [
            {**one(token.text, token.logprob), "top_logprobs": [one(*each) for each in token.top]}
            for token in tokens
        ],
        "refusal": None,
    }
