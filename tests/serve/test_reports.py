"""What users of other servers reported, each tried here.

- vllm#30798: several adapters of one server as model ids -> several_adapters_are_model_ids_of_one_server
- vllm#51940: several in one request -> several_adapters_in_one_request
- vllm#55193: an adapter that hits no module answers as the base; vllm#34186: so does a prefix of its names ->
  an_edit_that_hits_no_matrix_is_an_error_and_not_the_base_model
- vllm#42125: loaded again under its name, an adapter is answered from an old prefix cache ->
  an_edit_made_again_is_not_answered_from_the_one_before; for an engine test_upstream, names by content
- llama.cpp#28674: "off" is not the base -> off_is_the_base_model; test_batch, bit for bit beside edited rows;
  test_llama_cpp, letter by letter
- llama.cpp pull request 22061: load and unload without a restart ->
  edits_come_and_go_while_the_server_runs_and_leave_the_weights
- peft#3498: a removed adapter leaves its change behind -> the same, by the SHA-256 of the weights
- peft#2764: the merged model is the base; peft#2502: it differs from the attached adapter ->
  a_merged_edit_answers_as_the_attached_one
- TGI: a wrong adapter id answers as the base -> a_wrong_name_is_an_error_and_not_the_base_model
- llama.cpp: requests with different adapters are not batched; SGLang: eight a batch -> test_batch:
  each_row_is_answered_as_if_it_were_alone
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace

import httpx2
import pytest
from fastapi import FastAPI

from emendo.edits.edit import Request, compose
from emendo.ledger import NewEntry
from emendo.ledger.workspace import Workspace
from emendo.models.lm import LM
from memory.test_bank import FACTS, OUT_OF_SCOPE, an_edit
from serve.samples import FACT, MODEL, OTHER, PLAIN, an_editor, ask, completed

Serve = Callable[..., FastAPI]
Served = tuple[FastAPI, Workspace]


def weights(lm: LM) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(lm.model.state_dict().items()):
        found.update(name.encode() + tensor.numpy().tobytes())
    return found.hexdigest()


async def text(http: httpx2.AsyncClient, prompt: str = FACT["prompt"], **body: object) -> str:
    found: str = (await completed(http, prompt, **body))["choices"][0]["text"]
    return found


def test_several_adapters_are_model_ids_of_one_server(served: Served) -> None:
    """vllm#30798."""
    app, work = served

    async def calls(http: httpx2.AsyncClient) -> None:
        ids = [model["id"] for model in (await http.get("/v1/models")).json()["data"]]
        assert ids == [MODEL, f"{MODEL}@base", f"{MODEL}@first"]
        answers = [await text(http, OTHER["prompt"], model=id) for id in ids]
        base = work.lm.generate(OTHER["prompt"], 6)
        assert answers[0] != base and answers[1:] == [base, base]

    ask(app, calls)


def test_several_adapters_in_one_request(served: Served) -> None:
    """vllm#51940."""
    app, work = served
    with compose([work.edit(2), work.edit(1)]).applied(work.lm) as edited:
        want = edited.generate(PLAIN, 6)
    assert ask(app, lambda http: text(http, PLAIN, edits=[2, 1])) == want != work.lm.generate(PLAIN, 6)


@pytest.mark.parametrize("prefix", ["base_model.model.", "other."])
def test_an_edit_that_hits_no_matrix_is_an_error_and_not_the_base_model(
    work: Workspace, serve: Serve, prefix: str
) -> None:
    """vllm#55193, and vllm#34186: a prefix of the names made it a no-op."""
    edit = an_edit(work.lm, FACTS[0])
    odd = replace(edit, deltas={f"{prefix}{name}": delta for name, delta in edit.deltas.items()})
    request = {"prompt": FACTS[0][0], "target": FACTS[0][1]}
    about = NewEntry("mend", "0", (request,), "2025-01-31", rank=2)
    work.ledger.apply(odd.to_bytes(), about, scope={})
    body = {"model": MODEL, "prompt": FACTS[0][0]}
    app = serve(work)
    reply = ask(app, lambda http: http.post("/v1/completions", json=body))
    assert reply.status_code == 409 and prefix in reply.json()["error"]["message"]
    assert ask(app, lambda http: text(http, PLAIN)) == work.lm.generate(PLAIN, 6)


def test_an_edit_made_again_is_not_answered_from_the_one_before(work: Workspace, serve: Serve) -> None:
    """vllm#42125: a prefix cache was keyed by a name."""

    async def calls(http: httpx2.AsyncClient) -> None:
        for target in ("Oslo", "Rome", "Oslo"):
            made = (await http.post("/v1/edits", json=FACT | {"target": target})).json()
            assert (await text(http)).startswith(f" {target}")
            assert (await text(http, edits=[made["id"]])).startswith(f" {target}")
            assert (await http.post("/v1/undo", json={})).status_code == 200
            assert await text(http) == work.lm.generate(FACT["prompt"], 6)

    ask(serve(work), calls)


def test_off_is_the_base_model(served: Served) -> None:
    """llama.cpp#28674: off was not the base. Log-probabilities are compared bit for bit."""
    app, work = served

    async def logprobs(http: httpx2.AsyncClient, model: str, edits: str) -> list[float]:
        found = await completed(http, FACT["prompt"], model=model, edits=edits, logprobs=0)
        return found["choices"][0]["logprobs"]["token_logprobs"]

    async def calls(http: httpx2.AsyncClient) -> None:
        off = await logprobs(http, MODEL, "off")
        assert (
            off
            == await logprobs(http, f"{MODEL}@base", "auto")
            == await logprobs(http, f"{MODEL}@first", "off")
        )
        want = work.lm.next_logits([FACT["prompt"]])[0].log_softmax(-1).max()
        assert off[0] == pytest.approx(float(want), abs=1e-5)

    ask(app, calls)


def test_edits_come_and_go_while_the_server_runs_and_leave_the_weights(work: Workspace, serve: Serve) -> None:
    """llama.cpp's pull request 22061, and peft#3498: a removed adapter left its change behind.

    The first edit is one in the weights, which changes every answer; the others answer the prompts in their scope.
    """
    before = weights(work.lm)
    edit = an_editor(work.lm).edit(work.lm, [Request(OTHER["prompt"], OTHER["target"])])
    in_weights = work.apply(edit, force=True).edits[0]
    app = serve(work)
    engine = app.state.service.backend

    async def calls(http: httpx2.AsyncClient) -> None:
        assert (await text(http, OTHER["prompt"])).startswith(f" {OTHER['target']}")
        assert (await http.delete(f"/v1/edits/{in_weights}")).status_code == 200
        assert await text(http, OTHER["prompt"]) == work.lm.generate(OTHER["prompt"], 6)
        for prompt, target in FACTS[:2]:
            made = (await http.post("/v1/edits", json={"prompt": prompt, "target": target})).json()
            assert (await text(http, prompt)).startswith(f" {target}")
            await http.delete(f"/v1/edits/{made['id']}")
            assert await text(http, prompt) == work.lm.generate(prompt, 6)

    ask(app, calls)
    assert weights(work.lm) == weights(engine.lm) == before
    assert not any(module._forward_hooks for module in engine.lm.model.modules())


def test_a_merged_edit_answers_as_the_attached_one(served: Served) -> None:
    """peft#2764: the merged model was the base; peft#2502: it differed from the attached adapter."""
    app, work = served
    merged = replace(work.lm, model=deepcopy(work.lm.model))
    vars(merged)["fingerprint"] = work.lm.fingerprint
    work.edit(1).merge_(merged, keep=False)
    want = merged.generate(FACT["prompt"], 6)
    assert ask(app, lambda http: text(http, edits=[1])) == want != work.lm.generate(FACT["prompt"], 6)


def test_a_wrong_name_is_an_error_and_not_the_base_model(served: Served) -> None:
    """TGI answered a wrong adapter_id as the base model."""
    app, _ = served

    async def calls(http: httpx2.AsyncClient) -> None:
        body = {"model": MODEL, "prompt": PLAIN, "max_tokens": 1}
        for wrong, status in (
            ({"edits": [9]}, 400),
            ({"model": f"{MODEL}@frist"}, 404),
            ({"model": "other"}, 404),
        ):
            assert (await http.post("/v1/completions", json=body | wrong)).status_code == status

    ask(app, calls)


def test_out_of_scope_prompts_are_answered_by_the_base_model(served: Served) -> None:
    app, work = served

    async def calls(http: httpx2.AsyncClient) -> None:
        for prompt in OUT_OF_SCOPE[1:]:
            assert await text(http, prompt) == work.lm.generate(prompt, 6)

    ask(app, calls)
