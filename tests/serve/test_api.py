"""Whatever fits the OpenAPI description, and whatever does not, is answered without an error of the server."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import Case, GenerationMode
from schemathesis.schemas import BaseSchema

from emendo.ledger.workspace import Workspace
from serve.samples import FACT, OTHER, ask

pytestmark = pytest.mark.slow  # some hundred requests


@pytest.fixture
def described(work: Workspace, serve: Callable[..., FastAPI]) -> BaseSchema:
    app = serve(work)
    for fact in (FACT, OTHER):
        ask(app, lambda http, fact=fact: http.post("/v1/edits", json=fact))
    return schemathesis.openapi.from_asgi("/openapi.json", app, headers={"Host": "127.0.0.1"})


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_no_request_is_an_error_of_the_server(described: BaseSchema, mode: GenerationMode) -> None:
    asked = 0
    for result in described.get_all_operations():

        @settings(max_examples=10, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
        @given(result.ok().as_strategy(generation_mode=mode))
        def send(case: Case) -> None:
            nonlocal asked
            asked += 1
            reply = case.call(headers={"Host": "127.0.0.1"})
            assert reply.status_code < 500, case.as_curl_command()

        with suppress(Unsatisfiable):  # a route without arguments has no wrong ones
            send()
    assert asked > 50
