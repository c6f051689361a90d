"""How vLLM, SGLang and llama.cpp load an adapter, and how a request names it."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any, ClassVar, Protocol

import httpx2

from emendo.serve.adapters import Form
from emendo.serve.backend import UpstreamError


class UpstreamEngine(Protocol):
    """The calls of one engine.

    Attributes:
        form: of the adapters that it reads.
        loads: whether it loads adapters while it runs.
    """

    form: ClassVar[Form]
    loads: ClassVar[bool]

    async def load(self, client: httpx2.AsyncClient, name: str, path: str) -> None:
        """Load an adapter; one that is loaded already stays.

        Raises:
            UpstreamError: the engine does not load it.
        """
        ...

    async def unload(self, client: httpx2.AsyncClient, name: str) -> None:
        """Let the engine forget an adapter."""
        ...

    async def fields(self, client: httpx2.AsyncClient, model: str, name: str | None) -> dict[str, Any]:
        """The fields of a request's body that choose the model and the adapter, or none.

        Raises:
            UpstreamError: the adapter is not loaded.
        """
        ...


class Vllm:
    """vLLM with ``--enable-lora`` and ``VLLM_ALLOW_RUNTIME_LORA_UPDATING=1``; an adapter is a model."""

    form: ClassVar[Form] = "peft"
    loads: ClassVar[bool] = True

    async def load(self, client: httpx2.AsyncClient, name: str, path: str) -> None:
        """``POST /v1/load_lora_adapter``."""
        answer = await client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path})
        if answer.is_success or name in await model_names(client):
            return
        if answer.status_code == 404 and "lora" not in answer.text.lower():
            raise UpstreamError(
                "vLLM loads no adapters while it runs: start it with --enable-lora, and with "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment."
            )
        raise UpstreamError(f"vLLM does not load the adapter {name}: {message(answer)}")

    async def unload(self, client: httpx2.AsyncClient, name: str) -> None:
        """``POST /v1/unload_lora_adapter``."""
        await client.post("/v1/unload_lora_adapter", json={"lora_name": name})

    async def fields(self, client: httpx2.AsyncClient, model: str, name: str | None) -> dict[str, Any]:
        """The adapter's name is the model's."""
        return {"model": name or model}


class SGLang:
    """SGLang with ``--enable-lora``; an adapter is named by ``lora_path``."""

    form: ClassVar[Form] = "peft"
    loads: ClassVar[bool] = True

    async def load(self, client: httpx2.AsyncClient, name: str, path: str) -> None:
        """``POST /load_lora_adapter``."""
        answer = await client.post("/load_lora_adapter", json={"lora_name": name, "lora_path": path})
        if (answer.is_success and json_of(answer).get("success", True)) or name in await model_names(client):
            return
        raise UpstreamError(f"SGLang does not load the adapter {name}: {message(answer)}")

    async def unload(self, client: httpx2.AsyncClient, name: str) -> None:
        """``POST /unload_lora_adapter``."""
        await client.post("/unload_lora_adapter", json={"lora_name": name})

    async def fields(self, client: httpx2.AsyncClient, model: str, name: str | None) -> dict[str, Any]:
        """``lora_path`` is the adapter's name."""
        return {"model": model} if name is None else {"model": model, "lora_path": name}


class LlamaCpp:
    """llama.cpp's server, which loads adapters at its start (``--lora``) and numbers them.

    The numbers are read before each request, since a server that was started again may number them anew. Each request
    gives the scale of every adapter: one without a list would be answered with all that the server was started with.
    """

    form: ClassVar[Form] = "gguf"
    loads: ClassVar[bool] = False

    async def load(self, client: httpx2.AsyncClient, name: str, path: str) -> None:
        """Nothing: see :meth:`fields`."""

    async def unload(self, client: httpx2.AsyncClient, name: str) -> None:
        """Nothing: it stays until the server ends."""

    async def fields(self, client: httpx2.AsyncClient, model: str, name: str | None) -> dict[str, Any]:
        """``lora`` lists the scale of every adapter: 1 for that of the edit, 0 for the others."""
        answer = await client.get("/lora-adapters")
        if not answer.is_success:
            raise UpstreamError(f"llama.cpp does not list its adapters: {message(answer)}")
        names = {int(each["id"]): PurePath(str(each["path"])).stem for each in answer.json()}
        if name is not None and name not in names.values():
            raise UpstreamError(
                f"The adapter {name} is not loaded, and llama.cpp loads adapters only at its start: start it again "
                f"with --lora and the path of {name}.gguf."
            )
        scales = [{"id": id, "scale": float(known == name)} for id, known in names.items()]
        return {"model": model, "lora": scales} if scales else {"model": model}


ENGINES: dict[str, type[Vllm] | type[SGLang] | type[LlamaCpp]] = {
    "vllm": Vllm,
    "sglang": SGLang,
    "llama.cpp": LlamaCpp,
}


async def model_names(client: httpx2.AsyncClient) -> list[str]:
    """The names of an engine's models, the base model first.

    Raises:
        UpstreamError: it does not list them.
    """
    answer = await client.get("/v1/models")
    listed = json_of(answer).get("data")
    if not answer.is_success or not isinstance(listed, list):
        raise UpstreamError(f"{client.base_url} does not list its models: {message(answer)}")
    ordered = sorted(listed, key=lambda each: each.get("parent") is not None)
    return [str(each["id"]) for each in ordered]


def json_of(answer: httpx2.Response) -> dict[str, Any]:
    """The JSON object of an answer that was read; an empty one for anything else."""
    try:
        found = answer.json()
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def message(answer: httpx2.Response) -> str:
    """What an engine says of an error, at most 500 characters."""
    body = json_of(answer)
    error = body.get("error", body)
    said = error.get("message") or error.get("error_message") if isinstance(error, dict) else error
    return f"{said or answer.text or answer.reason_phrase}"[:500] + f" (HTTP {answer.status_code})"
