"""Edits over HTTP: judged by the guard, live when the call returns, gone when it says so."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import httpx2
import pytest
from fastapi import FastAPI

from emendo.ledger.health import Limits
from emendo.ledger.workspace import Workspace
from emendo.models.lm import LM
from memory.test_bank import FACTS, an_edit
from serve.samples import FACT, OTHER, a_workspace, ask, completed

Serve = Callable[..., FastAPI]


def test_an_edit_is_live_and_taken_off(work: Workspace, serve: Serve) -> None:
    prompt = FACT["prompt"]
    base = work.lm.generate(prompt, 6)

    async def calls(http: httpx2.AsyncClient) -> None:
        assert (await completed(http, prompt))["choices"][0]["text"] == base
        made = (await http.post("/v1/edits", json=FACT)).json()
        assert made["id"] == 1 and made["active"] == 1
        edited = (await completed(http, prompt))["choices"][0]["text"]
        assert edited.startswith(" Oslo")
        assert (await completed(http, prompt, edits="off"))["choices"][0]["text"] == base
        why = (await http.post("/v1/why", json={"prompt": prompt})).json()
        assert why["edit"] == 1 and why["score"] >= why["threshold"]
        assert (await http.post("/v1/tags", json={"name": "with"})).json()["operation"] == 1
        assert (await http.delete("/v1/edits/1", params={"note": "wrong"})).json()["active"] == 0
        assert (await completed(http, prompt))["choices"][0]["text"] == base
        assert (await completed(http, prompt, model="tiny-llama@with"))["choices"][0]["text"] == edited
        assert (await http.delete("/v1/edits/1")).status_code == 400  # is not active any more
        assert (await http.delete("/v1/edits/7")).status_code == 404
        assert [tag["name"] for tag in (await http.get("/v1/tags")).json()] == ["with"]

    ask(serve(work), calls)
    assert [step.kind for step in work.ledger.log()] == ["revert", "apply", "begin"]
    assert work.ledger.head.note == "wrong"


def test_the_ledger_says_who_did_it_and_from_where(work: Workspace, serve: Serve) -> None:
    ask(serve(work), lambda http: http.post("/v1/edits", json=FACT | {"by": "Ada", "note": "typo"}))
    step = work.ledger.head
    assert (step.by, step.note, step.forced) == ("Ada from 127.0.0.1", "typo", False)


def test_a_refusal_is_409_with_the_figures_and_force_is_recorded(lm: LM, serve: Serve) -> None:
    work = a_workspace(lm, Limits(norm=0.0))

    async def calls(http: httpx2.AsyncClient) -> None:
        refused = await http.post("/v1/edits", json=FACT)
        error = refused.json()["error"]
        assert (refused.status_code, error["code"]) == (409, "edit_refused")
        assert error["health"]["norm"] > 0 and len(error["problems"]) == 1
        assert (await http.get("/v1/edits")).json()["total"] == 0
        assert (await http.post("/v1/edits", json=FACT | {"force": True})).json()["forced"] is True
        assert (await http.get("/v1/edits/1")).json()["forced"] is True

    ask(serve(work), calls)


def test_edits_are_listed_searched_and_shown(work: Workspace, serve: Serve) -> None:
    async def calls(http: httpx2.AsyncClient) -> None:
        paraphrase = "The town that rules Fosoba is"
        await http.post("/v1/edits", json=FACT | {"paraphrases": [paraphrase], "aliases": ["Foso"]})
        await http.post("/v1/edits", json=OTHER)
        await http.post("/v1/undo", json={})

        async def listed(**query: object) -> list[int]:
            found = (await http.get("/v1/edits", params=query)).json()
            return [found["total"], *(edit["id"] for edit in found["data"])]

        assert await listed() == [2, 2, 1]
        assert await listed(limit=1) == [2, 2] and await listed(limit=1, offset=1) == [2, 1]
        assert await listed(active=True) == [1, 1] and await listed(active=False) == [1, 2]
        assert await listed(search="rome MADRUN") == [1, 2] and await listed(search="nothing") == [0]
        shown = (await http.get("/v1/edits/1")).json()
        assert shown["scope"] == {"paraphrases": [paraphrase], "aliases": ["Foso"]}
        assert shown["requests"][0]["target"] == "Oslo" and shown["health"]["reached"] == 1
        kinds = [row["kind"] for row in shown["before_after"]]
        assert kinds == ["edit", "paraphrase"] and shown["before_after"][0]["after"][0]["text"] == "Oslo"
        assert [step["kind"] for step in (await http.get("/v1/edits/2")).json()["operations"]] == [
            "apply",
            "undo",
        ]
        assert (await http.get("/v1/edits/3")).status_code == 404
        assert (await http.post("/v1/undo", json={"n": 5})).status_code == 400

    ask(serve(work), calls)


def test_a_step_of_another_process_is_seen_by_the_next_request(work: Workspace, serve: Serve) -> None:
    prompt = FACTS[0][0]
    other = Workspace.open(work.lm, recheck_every=0)  # as another process would have it

    async def calls(http: httpx2.AsyncClient) -> None:
        assert (await completed(http, prompt))["emendo"]["operation"] == 0
        for seed, fact in enumerate(FACTS[:2]):
            other.apply(an_edit(work.lm, fact, seed=seed), scope={}, force=True)
        found = await completed(http, prompt)
        assert [edit["id"] for edit in found["emendo"]["edits"]] == [1]
        other.revert(1)
        assert (await completed(http, prompt))["emendo"]["edits"] == []
        other.apply(an_edit(work.lm, ("x", "y"), seed=7), force=True)  # into the weights
        for each in (prompt, FACTS[1][0]):
            found = await completed(http, each)
            with other.applied() as routed:
                assert found["choices"][0]["text"] == routed.generate(each, 6)
        assert [edit["id"] for edit in found["emendo"]["edits"]] == [3, 2]
        base = await completed(http, prompt, edits="off")
        assert base["choices"][0]["text"] == work.lm.generate(prompt, 6)

    ask(serve(work), calls)


def test_a_restart_loses_nothing(work: Workspace, serve: Serve, lm: LM) -> None:
    ask(serve(work), lambda http: http.post("/v1/edits", json=FACT))
    found = ask(serve(a_workspace(lm)), lambda http: completed(http, FACT["prompt"]))
    assert found["choices"][0]["text"].startswith(" Oslo")


def test_edits_at_once_are_all_applied(work: Workspace, serve: Serve) -> None:
    async def calls(http: httpx2.AsyncClient) -> None:
        bodies = [{"prompt": prompt, "target": target} for prompt, target in FACTS]
        replies = await asyncio.gather(
            *(http.post("/v1/edits", json=body) for body in bodies),
            *(completed(http, prompt) for prompt, _ in FACTS),
        )
        assert sorted(reply.json()["id"] for reply in replies[:3]) == [1, 2, 3]
        for prompt, target in FACTS:
            assert (await completed(http, prompt))["choices"][0]["text"].startswith(f" {target}")

    ask(serve(work), calls)


@pytest.mark.parametrize(
    "body", [{"prompt": "x"}, FACT | {"target": ""}, FACT | {"path": "/etc"}, FACT | {"note": "\0"}]
)
def test_a_bad_edit_is_refused_and_changes_nothing(work: Workspace, serve: Serve, body: object) -> None:
    assert ask(serve(work), lambda http: http.post("/v1/edits", json=body)).status_code in (400, 422)
    assert work.ledger.head.id == 0
