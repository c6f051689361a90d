"""A larger engine behind the router: requests and answers as vLLM, SGLang and llama.cpp document them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from cases import build_lm
from edits.test_peft import an_edit
from emendo._adapter_names import NAME, adapter_name
from emendo.edits import from_peft
from emendo.errors import RequestError
from emendo.models.lm import LM
from emendo.serve.adapters import AdapterFolder
from emendo.serve.backend import Ask, BusyError, InForce, Part, Piece, UpstreamError
from emendo.serve.upstream import Upstream
from emendo.serve.upstream_engines import ENGINES

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # PEFT

DIGEST = "0123456789abcdef" * 4
NAMED = "emendo-0123456789abcdef0123456789abcdef"
BASE = "meta-llama/Llama-3.1-8B"


def sse(*events: Any) -> httpx2.Response:
    lines = [f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n" for event in events]
    return httpx2.Response(200, text="".join(lines), headers={"Content-Type": "text/event-stream"})


def completion(*texts: str, finish: str = "length") -> httpx2.Response:
    chunks = [{"choices": [{"index": 0, "text": text, "finish_reason": None}]} for text in texts[:-1]]
    last = {"choices": [{"index": 0, "text": texts[-1], "finish_reason": finish}]}
    usage = {"choices": [], "usage": {"prompt_tokens": 6, "completion_tokens": 3, "total_tokens": 9}}
    return sse(*chunks, last, usage, "[DONE]")


class Recorded:
    """An engine that answers as recorded, and keeps the requests."""

    def __init__(self, answers: dict[str, Callable[[Any], httpx2.Response]]) -> None:
        self.answers, self.asked = answers, []  # type: ignore[var-annotated]

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        body = json.loads(request.content) if request.content else None
        self.asked.append((f"{request.method} {request.url.path}", body))
        return self.answers[f"{request.method} {request.url.path}"](body)

    def sent(self, call: str) -> list[Any]:
        return [body for known, body in self.asked if known == call]


def models(*adapters: str) -> dict[str, Any]:
    base = {"id": BASE, "object": "model", "parent": None}
    return {"data": [*({"id": each, "parent": BASE} for each in adapters), base]}


def vllm(**more: Callable[[Any], httpx2.Response]) -> Recorded:
    return Recorded(
        {
            "GET /v1/models": lambda _: httpx2.Response(200, json=models()),
            "POST /v1/load_lora_adapter": lambda body: httpx2.Response(
                200, text=f"Success: LoRA adapter '{body['lora_name']}' added successfully."
            ),
            "POST /v1/unload_lora_adapter": lambda _: httpx2.Response(200, text="Success"),
            "POST /v1/completions": lambda _: completion(" Can", "berra", "."),
            **{key.replace("__", " /v1/"): value for key, value in more.items()},
        }
    )


@pytest.fixture(scope="module")
def lm() -> LM:
    return build_lm("llama")


@pytest.fixture
def part(lm: LM) -> Part:
    return Part(DIGEST, an_edit(lm), (3,), 0.9)


@pytest.fixture
def asked(lm: LM, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Ask an engine once or several times, each under some changes."""

    def ask(
        server: Recorded,
        *forces: tuple[Part, ...],
        engine: str = "vllm",
        ask: Ask | None = None,
        **options: Any,
    ) -> list[list[Piece]]:
        kind = ENGINES[engine]()

        async def work() -> list[list[Piece]]:
            folder = AdapterFolder(tmp_path / "adapters", kind.form, **options)
            transport = httpx2.MockTransport(server)
            upstream = Upstream("http://engine:8000/v1/", kind, folder, lm, transport=transport)
            try:
                return [
                    [piece async for piece in upstream.answer(ask or Ask("It is"), InForce(1, parts))]
                    for parts in forces
                ]
            finally:
                await upstream.close()

        return asyncio.run(work())

    return ask


def test_vllm_is_given_the_adapter_once_and_asked_for_it_by_name(
    asked: Any, lm: LM, part: Part, tmp_path: Path
) -> None:
    server = vllm()
    pieces = asked(server, (part,), (part,), ())
    assert "".join(piece.text for piece in pieces[0]) == " Canberra."
    assert pieces[0][-1] == Piece(".", 3, 6, (), "length")
    assert [piece.generated for piece in pieces[0]] == [1, 2, 3]
    (load,) = server.sent("POST /v1/load_lora_adapter")
    assert load == {"lora_name": NAMED, "lora_path": str(tmp_path / "adapters" / NAMED)}
    bodies = server.sent("POST /v1/completions")
    assert [body["model"] for body in bodies] == [NAMED, NAMED, BASE]
    assert bodies[0]["prompt"] == "It is" and bodies[0]["stream_options"] == {"include_usage": True}
    back = from_peft(load["lora_path"], lm)
    assert back.deltas.keys() == part.edit.deltas.keys()


def test_sglang_names_the_adapter_beside_the_model(asked: Any, part: Part) -> None:
    server = vllm()
    server.answers["POST /load_lora_adapter"] = lambda body: httpx2.Response(
        200, json={"success": True, "loaded_adapters": {body["lora_name"]: body["lora_path"]}}
    )
    asked(server, (part,), (), engine="sglang")
    with_edit, without = server.sent("POST /v1/completions")
    assert (with_edit["model"], with_edit["lora_path"]) == (BASE, NAMED)
    assert without["model"] == BASE and "lora_path" not in without


def llama_cpp(*paths: str) -> Recorded:
    listed = [{"id": id, "path": path, "scale": 0.0} for id, path in enumerate(paths)]
    server = vllm()
    server.answers["GET /lora-adapters"] = lambda _: httpx2.Response(200, json=listed)
    return server


def test_llama_cpp_is_given_the_scale_of_every_adapter(asked: Any, part: Part) -> None:
    server = llama_cpp("/there/other.gguf", f"/there/{NAMED}.gguf")
    asked(server, (part,), (), engine="llama.cpp")
    with_edit, without = server.sent("POST /v1/completions")
    assert with_edit["lora"] == [{"id": 0, "scale": 0.0}, {"id": 1, "scale": 1.0}]
    assert without["lora"] == [{"id": 0, "scale": 0.0}, {"id": 1, "scale": 0.0}]


def test_an_adapter_that_is_not_loaded_is_an_error_and_never_the_base_model(asked: Any, part: Part) -> None:
    server = llama_cpp("/there/other.gguf")
    with pytest.raises(UpstreamError, match=f"{NAMED} is not loaded"):
        asked(server, (part,), engine="llama.cpp")
    assert not server.sent("POST /v1/completions")


def test_an_engine_that_was_started_again_is_given_the_adapter_again(asked: Any, part: Part) -> None:
    unknown = {"error": {"message": f"The model `{NAMED}` does not exist.", "code": 404}}
    answers = iter([completion("a", "b"), httpx2.Response(404, json=unknown), completion("a", "b")])
    server = vllm(POST__completions=lambda _: next(answers))
    pieces = asked(server, (part,), (part,))
    assert [len(each) for each in pieces] == [2, 2]
    assert len(server.sent("POST /v1/load_lora_adapter")) == 2


def test_an_adapter_that_another_process_has_loaded_is_used(asked: Any, part: Part) -> None:
    known = {"error": {"message": f"The lora adapter '{NAMED}' has already been loaded.", "code": 400}}
    server = vllm(
        POST__load_lora_adapter=lambda _: httpx2.Response(400, json=known),
        GET__models=lambda _: httpx2.Response(200, json=models(NAMED)),
    )
    asked(server, (part,))
    assert server.sent("POST /v1/completions")[0]["model"] == NAMED


def test_two_changes_together_are_one_adapter(asked: Any, lm: LM, part: Part, tmp_path: Path) -> None:
    other = Part("f" * 64, an_edit(lm, rank=2), (5,))
    server = vllm()
    asked(server, (part, other), max_rank=4)
    (load,) = server.sent("POST /v1/load_lora_adapter")
    assert load["lora_name"] == adapter_name([DIGEST, "f" * 64], 4) != NAMED
    assert from_peft(load["lora_path"], lm).rank == 4


def test_the_engine_may_see_the_folder_elsewhere(asked: Any, part: Part) -> None:
    server = vllm()
    asked(server, (part,), seen_as=Path("/adapters"))
    assert server.sent("POST /v1/load_lora_adapter")[0]["lora_path"] == f"/adapters/{NAMED}"


def test_idle_adapters_are_unloaded(asked: Any, lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emendo.serve.upstream._KEPT", 2)
    edit = an_edit(lm)
    parts = [Part(f"{i:064x}"[::-1], edit, (i,)) for i in range(4)]
    server = vllm()
    asked(server, *[(each,) for each in parts], (parts[0],))
    unloaded = [body["lora_name"] for body in server.sent("POST /v1/unload_lora_adapter")]
    assert unloaded == [adapter_name([each.digest]) for each in parts[:3]]
    assert len(server.sent("POST /v1/load_lora_adapter")) == 5


def test_a_conversation_and_its_options(asked: Any) -> None:
    chunk = {
        "choices": [
            {
                "delta": {"role": "assistant", "content": "Lima"},
                "finish_reason": "stop",
                "logprobs": {"content": [{"token": "Lima", "logprob": -0.5, "top_logprobs": []}]},
            }
        ]
    }
    server = vllm(POST__chat__completions=lambda _: sse(chunk, "[DONE]"))
    server.answers["POST /v1/chat/completions"] = server.answers.pop("POST /v1/chat /v1/completions")
    messages = ({"role": "user", "content": "Where?"},)
    ask = Ask(messages=messages, max_tokens=4, seed=7, stop=("\n",), logprobs=2, temperature=0.5)
    ((piece,),) = asked(server, (), ask=ask)
    assert piece.finish == "stop" and piece.tokens[0].logprob == -0.5
    (body,) = server.sent("POST /v1/chat/completions")
    assert body["messages"] == [{"role": "user", "content": "Where?"}] and "prompt" not in body
    assert (body["max_tokens"], body["seed"], body["stop"], body["temperature"]) == (4, 7, ["\n"], 0.5)
    assert body["logprobs"] is True and body["top_logprobs"] == 2


def test_log_probabilities_of_a_completion(asked: Any) -> None:
    logprobs = {"tokens": [" a", "b"], "token_logprobs": [-0.1, -0.2], "top_logprobs": [{" a": -0.1}, None]}
    chunk = {"choices": [{"text": " ab", "finish_reason": "stop", "logprobs": logprobs}]}
    ((piece,),) = asked(vllm(POST__completions=lambda _: sse(chunk, "[DONE]")), (), ask=Ask("x", logprobs=1))
    assert [(token.text, token.logprob, token.top) for token in piece.tokens] == [
        (" a", -0.1, ((" a", -0.1),)),
        ("b", -0.2, ()),
    ]


@pytest.mark.parametrize(
    ("answer", "error", "says"),
    [
        (httpx2.Response(400, json={"message": "too long"}), RequestError, "too long"),
        (httpx2.Response(503, json={"error": "loading"}), BusyError, "loading"),
        (httpx2.Response(500, text="<h1>oops</h1>"), UpstreamError, "oops"),
        (sse({"choices": [{"text": "a", "finish_reason": None}]}), UpstreamError, "in the middle"),
        (sse({"error": {"message": "out of memory"}}), UpstreamError, "out of memory"),
        (sse("not JSON"), UpstreamError, "no JSON"),
    ],
)
def test_an_engine_in_trouble(asked: Any, answer: httpx2.Response, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        asked(vllm(POST__completions=lambda _: answer), ())


def test_an_engine_that_is_not_there(asked: Any) -> None:
    def fails(_: Any) -> httpx2.Response:
        raise httpx2.ConnectError("connection refused")

    with pytest.raises(UpstreamError, match="connection refused"):
        asked(vllm(POST__completions=fails), ())


def test_vllm_without_loading_says_how_to_start_it(asked: Any, part: Part) -> None:
    server = vllm(POST__load_lora_adapter=lambda _: httpx2.Response(404, json={"detail": "Not Found"}))
    with pytest.raises(UpstreamError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"):
        asked(server, (part,))


@pytest.mark.parametrize(
    "url", ["ftp://engine", "engine:8000", "http://user:secret@engine", "file:///etc/passwd", ""]
)
def test_an_address_that_is_none(url: str, lm: LM, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="address"):
        Upstream(url, ENGINES["vllm"](), AdapterFolder(tmp_path), lm)


def test_a_name_is_made_of_digits_alone() -> None:
    assert adapter_name([DIGEST]) == NAMED and NAME.fullmatch(adapter_name([DIGEST, DIGEST], 16))
    for digest in ("../../etc/passwd", "0" * 31, "A" * 64, ""):
        with pytest.raises(ValueError, match="no digest"):
            adapter_name([digest])
