"""A larger engine that answers, with the adapter of the edits that are in force.

::

    client --> emendo serve --upstream URL --> vLLM, SGLang or llama.cpp
               routes, makes edits,            answers, with the adapter that
               writes adapters                 the request names

The engine's own prompt template and tokenizer are used. An edit whose adapter the engine does not have is an error:
the base model never answers in its place.
"""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any

import httpx2

from emendo.errors import EmendoError, RequestError
from emendo.models.lm import LM
from emendo.serve._worker import Worker
from emendo.serve.adapters import AdapterFolder
from emendo.serve.backend import Ask, BusyError, Finish, InForce, Part, Piece, Token, UpstreamError
from emendo.serve.upstream_engines import UpstreamEngine, json_of, message, model_names

_KEPT = 64  # adapters that the engine keeps without a request that needs them


class _GoneError(EmendoError, RuntimeError):
    """The engine does not know the adapter any more, for example because it was started again."""


class Upstream:
    """Answers requests with another engine.

    Args:
        url: the engine's address, without ``/v1``.
        engine: its kind.
        adapters: where its adapters are.
        lm: the model, which nothing else runs, to write adapters with.
        model: the engine's name of the model; None asks it.
        key: the engine's bearer token.
        timeout: seconds that the engine may be silent.
        transport: in place of the network, for tests.

    Raises:
        RequestError: the address is none.
    """

    def __init__(
        self,
        url: str,
        engine: UpstreamEngine,
        adapters: AdapterFolder,
        lm: LM,
        *,
        model: str | None = None,
        key: str | None = None,
        timeout: float = 300.0,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        self.engine, self.adapters, self.lm, self.model = engine, adapters, lm, model
        self._client = httpx2.AsyncClient(
            base_url=address(url),
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx2.Timeout(timeout, connect=5.0, pool=5.0),
            limits=httpx2.Limits(max_connections=256),
            transport=transport,
            trust_env=False,
        )
        self._worker = Worker("emendo-adapters")
        self._users: OrderedDict[str, int] = (
            OrderedDict()
        )  # requests that run, for each adapter that is loaded
        self._loading = asyncio.Lock()
        self._running = 0

    async def answer(self, ask: Ask, force: InForce) -> AsyncGenerator[Piece, None]:
        """See :meth:`emendo.serve.backend.Backend.answer`."""
        self._running += 1
        try:
            async with self._adapter(force.parts) as name:
                try:
                    async with aclosing(self._pieces(ask, name)) as pieces:
                        async for piece in pieces:
                            yield piece
                except _GoneError:
                    assert name is not None
                    await self._load(name)
                    async with aclosing(self._pieces(ask, name)) as pieces:
                        async for piece in pieces:
                            yield piece
        except _GoneError as error:
            raise UpstreamError(str(error)) from error
        except httpx2.PoolTimeout as error:
            raise BusyError("The engine's queue is full; try again.") from error
        except httpx2.TimeoutException as error:
            raise TimeoutError("The engine took too long.") from error
        except httpx2.HTTPError as error:
            raise UpstreamError(
                f"The engine cannot be reached: {str(error) or type(error).__name__}"
            ) from error
        finally:
            self._running -= 1

    async def ready(self) -> bool:
        """Whether the engine says that it is healthy."""
        try:
            return (await self._client.get("/health", timeout=5.0)).is_success
        except httpx2.HTTPError:
            return False

    def figures(self) -> Mapping[str, float]:
        """Requests that run, and adapters that the engine was given."""
        return {"running": float(self._running), "adapters": float(len(self._users))}

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()
        self._worker.close()

    # ---------------------------------------------------------------------------------------------- adapters

    @asynccontextmanager
    async def _adapter(self, parts: Sequence[Part]) -> AsyncIterator[str | None]:
        """The name of the adapter of some changes, which stays loaded for the length of the block."""
        if not parts:
            yield None
            return
        name = self.adapters.name(parts)
        if name not in self._users:
            async with self._loading:
                if name not in self._users:
                    await self._worker.run(self.adapters.write, self.lm, parts)
                    await self._load(name)
                    self._users[name] = 0
        self._users[name] += 1
        self._users.move_to_end(name)
        try:
            yield name
        finally:
            self._users[name] -= 1
            await self._shrink()

    async def _load(self, name: str) -> None:
        await self.engine.load(self._client, name, self.adapters.path(name))

    async def _shrink(self) -> None:
        """Unload the adapters that were not used for the longest time."""
        idle = [name for name, users in self._users.items() if not users]
        for name in idle[: max(0, len(self._users) - _KEPT)] if self.engine.loads else ():
            del self._users[name]
            with suppress(httpx2.HTTPError):
                await self.engine.unload(self._client, name)

    # ----------------------------------------------------------------------------------------------- answers

    async def _pieces(self, ask: Ask, name: str | None) -> AsyncGenerator[Piece, None]:
        if self.model is None:
            self.model = (await model_names(self._client))[0]
        body = {**_body(ask), **await self.engine.fields(self._client, self.model, name)}
        path = "/v1/chat/completions" if ask.messages else "/v1/completions"
        async with self._client.stream("POST", path, json=body) as answer:
            if not answer.is_success:
                await answer.aread()
                raise _refusal(answer, name)
            async with aclosing(_events(answer)) as events:
                async for piece in _read(events):
                    yield piece


def address(url: str) -> str:
    """The address of an engine, without ``/v1`` or a slash at its end.

    Raises:
        RequestError: it is none.
    """
    try:
        read = httpx2.URL(url)
    except (httpx2.InvalidURL, ValueError) as error:
        raise RequestError(f"{url!r} is not an address: {error}") from error
    if read.scheme not in {"http", "https"} or not read.host or read.userinfo or read.query:
        raise RequestError(
            f"{url!r} is not the address of an engine, such as http://127.0.0.1:8000. A token for it is read from the "
            "environment, never from an address."
        )
    return url.rstrip("/").removesuffix("/v1")


def _body(ask: Ask) -> dict[str, Any]:
    """What all engines understand of a request."""
    body: dict[str, Any] = {
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": ask.temperature,
        "top_p": ask.top_p,
    }
    if ask.messages:
        body["messages"] = [dict(each) for each in ask.messages]
    else:
        body |= {"prompt": ask.prompt, "max_tokens": ask.max_tokens}
    if ask.max_tokens is not None:
        body["max_tokens"] = ask.max_tokens
    if ask.seed is not None:
        body["seed"] = ask.seed
    if ask.stop:
        body["stop"] = list(ask.stop)
    if ask.logprobs is not None:
        body |= (
            {"logprobs": True, "top_logprobs": ask.logprobs} if ask.messages else {"logprobs": ask.logprobs}
        )
    return body


def _refusal(answer: httpx2.Response, name: str | None) -> Exception:
    """The error that an engine's refusal stands for."""
    said = message(answer)
    if name is not None and answer.status_code in {400, 404} and name in answer.text:
        return _GoneError(said)
    if answer.status_code in {429, 503}:
        return BusyError(f"The engine is busy: {said}")
    if answer.status_code in {400, 413, 422}:
        return RequestError(f"The engine refuses the request: {said}")
    return UpstreamError(f"The engine cannot answer: {said}")


async def _events(answer: httpx2.Response) -> AsyncGenerator[dict[str, Any], None]:
    """The JSON objects of a stream of server-sent events.

    Raises:
        UpstreamError: one of them is an error, or is no JSON object.
    """
    async for line in answer.aiter_lines():
        kind, _, data = line.partition(":")
        if kind == "error" or (kind == "data" and '"error"' in data):
            said = json_of(httpx2.Response(200, text=data))
            if error := said.get("error", said if kind == "error" else None):
                raise UpstreamError(f"The engine ended with an error: {str(error)[:500]}")
        if kind != "data" or data.strip() == "[DONE]":
            continue
        try:
            found = json.loads(data)
        except ValueError as error:
            raise UpstreamError(f"The engine sent what is no JSON: {data[:100]!r}") from error
        if isinstance(found, dict):
            yield found


async def _read(events: AsyncIterator[dict[str, Any]]) -> AsyncGenerator[Piece, None]:
    """The pieces of an answer; the last one has the engine's own numbers of tokens.

    Raises:
        UpstreamError: the answer has no end.
    """
    generated, prompt_tokens = 0, 0
    finish: Finish | None = None
    text, held = "", False  # a piece is held back until the next event
    tokens: tuple[Token, ...] = ()
    async for event in events:
        for choice in event.get("choices") or ():
            if held:
                yield Piece(text, generated, prompt_tokens, tokens)
            found = choice.get("text") or (choice.get("delta") or {}).get("content")
            text, tokens, held = found or "", _tokens(choice.get("logprobs")), True
            generated += bool(text)
            if (why := choice.get("finish_reason")) is not None:
                finish = "length" if why == "length" else "stop"
        if usage := event.get("usage"):
            prompt_tokens = int(usage.get("prompt_tokens") or 0)
            generated = int(usage.get("completion_tokens") or 0)
    if finish is None:
        raise UpstreamError("The engine ended in the middle of its answer.")
    yield Piece(text, generated, prompt_tokens, tokens, finish)


def _tokens(logprobs: Mapping[str, Any] | None) -> tuple[Token, ...]:
    """Log-probabilities in the form of either endpoint."""
    if not logprobs:
        return ()
    if (content := logprobs.get("content")) is not None:
        return tuple(
            Token(
                str(each["token"]),
                float(each["logprob"]),
                tuple((str(one["token"]), float(one["logprob"])) for one in each.get("top_logprobs") or ()),
            )
            for each in content
        )
    tops = logprobs.get("top_logprobs") or [None] * len(logprobs["tokens"])
    return tuple(
        Token(str(text), float(own or 0.0), tuple((top or {}).items()))
        for text, own, top in zip(logprobs["tokens"], logprobs["token_logprobs"], tops, strict=False)
    )
