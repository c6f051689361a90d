"""Who may ask and who may edit, and what is refused before anything is done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI

from emendo.errors import RequestError
from emendo.ledger.workspace import Workspace
from emendo.serve import Access, Settings
from emendo.serve.security import RateLimit, TooManyEditsError, is_local
from serve.samples import FACT, MODEL, PLAIN, ask

Serve = Callable[..., FastAPI]
ASK, EDIT = "a" * 20, "e" * 20
JSON = {"Content-Type": "application/json"}
BODY = {"model": MODEL, "prompt": PLAIN, "max_tokens": 1}


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@pytest.mark.parametrize(
    ("access", "token", "asks", "edits"),
    [
        (Access.of([ASK], [f"Ada={EDIT}"]), None, 401, 401),
        (Access.of([ASK], [f"Ada={EDIT}"]), "wrong", 401, 401),
        (Access.of([ASK], [f"Ada={EDIT}"]), ASK, 200, 403),
        (Access.of([ASK], [f"Ada={EDIT}"]), EDIT, 200, 200),
        (Access.of([], [EDIT]), None, 200, 401),
        (Access.of([ASK], []), ASK, 200, 403),
        (Access.of([ASK], []), None, 401, 401),
        (Access.of(), None, 200, 200),
    ],
)
def test_tokens(
    work: Workspace, serve: Serve, access: Access, token: str | None, asks: int, edits: int
) -> None:
    async def calls(http: httpx2.AsyncClient) -> None:
        assert (await http.get("/health")).status_code == 200
        assert (await http.post("/v1/completions", json=BODY)).status_code == asks
        for path in ("/v1/models", "/v1/edits", "/metrics"):
            assert (await http.get(path)).status_code == asks
        found = await http.post("/v1/edits", json=FACT)
        assert found.status_code == edits
        assert (await http.post("/v1/tags", json={"name": "t"})).status_code == edits
        assert (await http.post("/v1/undo", json={})).status_code == edits
        if edits == 200 and token:
            named = "Ada" if asks == 200 and access.ask else "anonymous"
            assert found.json()["by"] == f"{named} from 127.0.0.1"

    app = serve(work, settings=Settings(access=access))
    ask(app, calls, headers=bearer(token) if token else {})


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org"])
def test_another_host_needs_both_tokens(host: str) -> None:
    assert not is_local(host)
    for access in (Access.of(), Access.of([ASK]), Access.of([], [EDIT])):
        with pytest.raises(RequestError, match="tokens"):
            access.check_host(host)
    Access.of([ASK], [EDIT]).check_host(host)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_needs_none(host: str) -> None:
    Access.of().check_host(host)


def test_a_short_token_is_refused() -> None:
    with pytest.raises(RequestError, match="16 characters"):
        Access.of(["short"])


def test_the_rate_of_edits_is_limited(work: Workspace, serve: Serve) -> None:
    async def calls(http: httpx2.AsyncClient) -> list[httpx2.Response]:
        return [await http.post("/v1/tags", json={"name": f"t{i}"}) for i in range(3)]

    found = ask(serve(work, settings=Settings(edits_per_minute=2)), calls)
    assert [each.status_code for each in found] == [200, 200, 429]
    assert 0 < int(found[-1].headers["retry-after"]) <= 60


def test_a_minute_later_edits_are_allowed_again() -> None:
    limit = RateLimit(2)
    limit.check("a", 0.0)
    limit.check("a", 30.0)
    limit.check("b", 31.0)
    with pytest.raises(TooManyEditsError) as refused:
        limit.check("a", 59.0)
    assert refused.value.seconds == pytest.approx(1.0)
    limit.check("a", 60.5)
    with pytest.raises(TooManyEditsError):
        limit.check("a", 61.0)


@pytest.mark.parametrize(
    ("options", "status", "says"),
    [
        # a web page's own name for this machine
        ({"headers": {"Host": "evil.example:8000"}, "json": BODY}, 400, "Invalid host"),
        # sent without asking
        (
            {"headers": {"Content-Type": "text/plain"}, "content": b"{}"},
            422,
            "header content-type: application/json",
        ),
        ({"headers": JSON, "content": b"{" + b" " * 1_100_000 + b"}"}, 413, ""),
        ({"headers": JSON, "content": b"{"}, 422, "JSON"),
    ],
)
def test_what_a_web_page_or_a_flood_could_send_is_refused(
    work: Workspace, serve: Serve, options: Any, status: int, says: str
) -> None:
    app = serve(work)
    found = ask(app, lambda http: http.post("/v1/completions", **options))
    assert found.status_code == status and says in found.text


def test_no_other_origin_is_allowed(work: Workspace, serve: Serve) -> None:
    headers = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    app = serve(work)
    found = ask(app, lambda http: http.options("/v1/edits", headers=headers))
    assert found.status_code == 405 and "access-control-allow-origin" not in found.headers
    found = ask(app, lambda http: http.get("/v1/models", headers=headers))
    assert "access-control-allow-origin" not in found.headers
