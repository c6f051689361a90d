"""The page: what the server renders, and what a real browser makes of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx2
import pytest
import uvicorn
from fastapi import FastAPI
from scripts.browser import BROWSER, Tab, browser

from emendo.ledger import Operation
from emendo.ledger.workspace import Workspace
from emendo.serve import Access, Settings
from emendo.serve.health_curve import HEIGHT, curves
from serve.samples import FACT, OTHER, an_app, ask

MODEL = "tiny-llama"
NASTY = "\"><script>window.hit=1</script>'&"
TOKEN = "a-token-for-editing"


class Strict(HTMLParser):
    """Finds what the policy of the page forbids."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.forbidden: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name.startswith("on") or name == "style":
                self.forbidden.append(f"<{tag} {name}>")
            if name in {"src", "href", "action"}:
                self.addresses.append(value or "")
        if tag in {"style", "iframe", "img"} or (tag == "script" and not dict(attrs).get("src")):
            self.forbidden.append(f"<{tag}>")


async def fragments(http: httpx2.AsyncClient, prompt: str) -> dict[str, httpx2.Response]:
    question = {"prompt": prompt, "model": MODEL, "max_tokens": 4}
    trial = {**OTHER, "prompt": prompt, "neighbours": [NASTY]}
    return {
        "/": await http.get("/"),
        "ask": await http.post("/page/ask", json=question),
        "try": await http.post("/page/try", json=trial),
        "edits": await http.get("/page/edits"),
        "edit": await http.get("/page/edits/1"),
        "state": await http.get("/page/state"),
        "models": await http.get("/page/models"),
    }


def test_all_data_is_escaped_and_the_policy_is_strict(work: Workspace) -> None:
    async def calls(http: httpx2.AsyncClient) -> None:
        body = {"prompt": NASTY, "target": "<b>Oslo</b>", "note": NASTY, "by": NASTY[:100], "force": True}
        made = await http.post("/v1/edits", json=body)
        assert made.status_code == 200, made.text
        assert (await http.post("/v1/tags", json={"name": NASTY})).status_code == 200
        for name, reply in (await fragments(http, NASTY)).items():
            assert reply.status_code == 200, reply.text
            policy = reply.headers["Content-Security-Policy"]
            assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
            assert "unsafe" not in policy and reply.headers["X-Content-Type-Options"] == "nosniff"
            found = Strict(reply.text)
            assert found.forbidden == [], name
            assert not [address for address in found.addresses if "//" in address or address.startswith("/")]
            assert "window.hit" in reply.text or name == "models"

    ask(an_app(work), calls)


def test_answers_stand_side_by_side_with_the_edit_that_fired(work: Workspace) -> None:
    base = work.lm.generate(FACT["prompt"], 4)

    async def calls(http: httpx2.AsyncClient) -> None:
        await http.post("/v1/edits", json=FACT)
        replies = await fragments(http, FACT["prompt"])
        answers = replies["ask"].text
        assert (
            f">{html(base.strip())}<" in answers and ">Oslo" in answers and "edit 1 · score 1.00" in answers
        )
        assert "The capital of Fosoba is" in replies["edits"].text and "in force" in replies["edits"].text
        assert "Probability of the target" in replies["edit"].text
        assert "<b>1</b> edit in force after operation <b>1</b>" in replies["state"].text
        chat = {"prompt": FACT["prompt"], "model": MODEL, "max_tokens": 2, "chat": True}
        assert "edit 1 · score" in (await http.post("/page/ask", json=chat)).text
        asked = {"prompt": "Hello", "model": f"{MODEL}@base", "max_tokens": 2}
        assert "no edit in scope" in (await http.post("/page/ask", json=asked)).text
        assert (await http.post("/page/ask", json={**asked, "prompt": " "})).status_code == 400
        searched = await http.get("/page/edits", params={"search": "fosoba oslo", "show": "active"})
        assert "1 of 1 edits" in searched.text
        assert "No edit has" in (await http.get("/page/edits", params={"search": "Lima"})).text
        assert (await http.get("/page/edits/9")).status_code == 404

    ask(an_app(work), calls)


def html(text: str) -> str:
    for sign, name in {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&#34;", "'": "&#39;"}.items():
        text = text.replace(sign, name)
    return text


def test_a_trial_changes_nothing(work: Workspace) -> None:
    async def calls(http: httpx2.AsyncClient) -> None:
        trial = {**FACT, "paraphrases": ["Fosoba's capital is"], "neighbours": ["A river in"]}
        shown = (await http.post("/page/try", json=trial)).text
        assert "The guard accepts this edit" in shown
        assert shown.count('class="mark yes">yes') == 2 and shown.count('class="mark yes">no') == 1
        assert ">Oslo" in shown
        assert (await http.get("/v1/edits")).json()["total"] == 0

    ask(an_app(work), calls)
    assert work.ledger.head.id == 0


def test_without_a_token_the_page_has_no_data(work: Workspace) -> None:
    settings = Settings(access=Access.of(["a-token-for-asking"], [TOKEN]))

    async def calls(http: httpx2.AsyncClient) -> None:
        key = {"Authorization": f"Bearer {TOKEN}"}
        assert (await http.post("/v1/edits", json=FACT, headers=key)).status_code == 200
        page = (await http.get("/")).text
        assert "Fosoba" not in page and 'type="password"' in page
        assert (await http.get("/page/edits")).status_code == 401
        assert "Fosoba" in (await http.get("/page/edits", headers=key)).text
        asking = {"Authorization": "Bearer a-token-for-asking"}
        assert (await http.post("/page/try", json=FACT, headers=asking)).status_code == 403
        assert (await http.get("/static/page.js")).status_code == 200
        for name in ("..%2fpage.py", "page.html", "nothing"):
            assert (await http.get(f"/static/{name}")).status_code in {404, 422}

    ask(an_app(work, settings=settings), calls)


def test_health_curves() -> None:
    def step(id: int, health: dict[str, Any] | None) -> Operation:
        return Operation(id, id - 1, "apply", (id,), id, "2026-01-01", "me", "", False, health)

    limits = {"total_perplexity": 1.5}
    steps = [
        step(3, {"total_perplexity": 2.0, "limits": limits}),
        step(1, {"total_perplexity": 1.0, "limits": limits}),
        step(2, None),
        step(4, {"total_perplexity": float("nan"), "limits": limits}),
    ]
    (perplexity,) = curves(steps)
    assert perplexity.points == ((0.0, HEIGHT), (320.0, 0.0))
    assert perplexity.labels == ("operation 1: 1.000", "operation 3: 2.000")
    assert perplexity.limit == pytest.approx(HEIGHT / 2)
    (low,) = curves([step(1, {"total_perplexity": 1.2, "limits": limits})])
    assert low.limit is None and low.points == ((0.0, 0.0),)
    assert curves([step(1, None)]) == []


# ------------------------------------------------------------------------------------------------ in a browser

in_a_browser = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed"),
]


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """The address of an application on a port of this machine."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.05)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join()


def fill(tab: Tab, field: str, text: str) -> None:
    tab.run(f"document.querySelector('{field}').focus()")
    tab.write(text)


def said(tab: Tab, form: str) -> str:
    tab.wait(f"document.querySelector('{form} .message').className.match(/good|bad/)")
    return str(tab.run(f"document.querySelector('{form} .message').textContent"))


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (390, False)])
@pytest.mark.parametrize("marks", [pytest.param("", marks=in_a_browser)])
def test_a_correction_is_typed_and_taken_back(
    work: Workspace, tmp_path: Path, width: int, dark: bool, marks: str
) -> None:
    with serving(an_app(work)) as address, browser() as tab:
        tab.show(width, dark=dark)
        tab.open(address)
        fill(tab, "#edit-prompt", FACT["prompt"])
        fill(tab, "#target", FACT["target"])
        fill(tab, "#neighbours", f"A river in\n{NASTY}")
        tab.run("document.querySelector('[data-try]').click()")
        tab.wait("document.querySelectorAll('#preview tbody tr').length === 3")
        tab.run("document.querySelector('#target').focus()")
        tab.key("Enter", 13, "\r", modifiers=2)
        assert said(tab, "#correct-form") == "Edit 1 is in force."
        assert tab.run("document.activeElement.id") == "target"
        fill(tab, "#prompt", FACT["prompt"])
        tab.key("Enter", 13, "\r", modifiers=2)
        tab.wait("document.querySelector('#answers .edited')")
        assert "edit 1" in tab.run("document.querySelector('#answers .edited').innerText")
        assert tab.run("document.querySelectorAll('#edits tbody tr').length") == 1
        tab.run("document.querySelector('#edits details').open = true")
        tab.wait("document.querySelector('#edits details table')")
        fill(tab, "#tag", "v1")
        tab.key("Enter", 13, "\r")
        tab.wait("[...document.querySelectorAll('#model option')].some((one) => one.value.endsWith('@v1'))")
        fill(tab, "#search", "nobody")
        tab.wait("document.querySelector('#edits').textContent.includes('No edit has')")
        tab.run(
            "document.querySelector('#search').value = ''; document.querySelector('#search').form.requestSubmit()"
        )
        tab.wait("document.querySelector('#edits [data-call]')")
        assert tab.run("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
        tab.picture(tmp_path / "page.png")
        tab.run("document.querySelector('#edits [data-call]').click()")
        assert said(tab, "#ledger .tools") == "Edit 1 is off."
        assert tab.run("document.querySelector('#correct-form .message').textContent") == ""
        assert tab.run("window.hit") is None and tab.problems == []
    assert work.ledger.head.kind == "revert"
    assert (tmp_path / "page.png").stat().st_size > 10_000


@pytest.mark.parametrize("marks", [pytest.param("", marks=in_a_browser)])
def test_a_refused_edit_can_be_forced_and_the_page_says_why(work: Workspace, marks: str) -> None:
    from emendo.ledger.health import Limits

    strict = Workspace(work.lm, work.ledger, limits=Limits(), probes=work._probes, recheck_every=0)
    with serving(an_app(strict)) as address, browser() as tab:
        tab.open(address)
        fill(tab, "#edit-prompt", FACT["prompt"])
        fill(tab, "#target", FACT["target"])
        tab.run("document.querySelector('#correct-form .primary').focus()")
        tab.key("Enter", 13, "\r")
        assert said(tab, "#correct-form").startswith("The guard refuses this edit:")
        assert tab.run("document.activeElement.classList.contains('primary')")
        tab.run("document.querySelector('[data-force]').click()")
        tab.wait("document.querySelector('#edits .mark.no')")
        assert "forced" in tab.run("document.querySelector('#edits').innerText")
    assert work.ledger.head.forced


@pytest.mark.parametrize("marks", [pytest.param("", marks=in_a_browser)])
def test_a_token_is_typed_and_kept_for_the_tab(work: Workspace, marks: str) -> None:
    settings = Settings(access=Access.of(["a-token-for-asking"], [TOKEN]))
    with serving(an_app(work, settings=settings)) as address, browser() as tab:
        tab.open(address)
        assert tab.run("document.querySelector('#edits').innerText") == "A token is needed."
        fill(tab, "#token", TOKEN)
        tab.key("Enter", 13, "\r")
        assert "until this tab is closed" in said(tab, "#token-form")
        tab.open(f"{address}?again")
        tab.wait("document.querySelector('#edits').innerText.includes('No edit yet')")
        assert tab.problems == []
