"""The page at ``/``: ask, correct, look at the ledger and take edits off, in a browser.

The server renders all HTML; the script sends the forms and puts the answers in their places. Pages and scripts come
from this server alone, and the policy of the page forbids anything else. What changes the ledger goes through the same
endpoints that other clients use.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Path, Query, Request, Response
from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import BaseModel, ConfigDict, Field

from emendo.errors import RequestError
from emendo.serve.backend import Ask, InForce, Piece
from emendo.serve.edit_routes import one_edit, some_edits
from emendo.serve.editing import NewEdit
from emendo.serve.health_curve import curves
from emendo.serve.openai_routes import GONE, header, unless_gone
from emendo.serve.routing import Question
from emendo.serve.schemas import Line, Name, Text
from emendo.serve.security import Access, Editing, asking
from emendo.serve.service import Found, Service

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_STATIC = {"page.css": "text/css", "page.js": "text/javascript", "icon.svg": "image/svg+xml"}
_STEPS = 200  # operations on the health curves

Static = Literal["page.css", "page.js", "icon.svg"]
pages = APIRouter(include_in_schema=False)
fragments = APIRouter(prefix="/page", include_in_schema=False)


class AskBody(BaseModel):
    """``POST /page/ask``."""

    prompt: Text
    model: Name
    chat: bool = False
    max_tokens: Annotated[int, Field(ge=1, le=512)] = 24


class TryBody(BaseModel):
    """``POST /page/try``."""

    model_config = ConfigDict(extra="ignore")
    prompt: Line
    target: Line
    paraphrases: Annotated[list[Line], Field(max_length=16)] = []
    neighbours: Annotated[list[Line], Field(max_length=16)] = []
    subject: Name | None = None
    aliases: Annotated[list[Name], Field(max_length=64)] = []


@dataclass(slots=True)
class _Answer:
    force: InForce
    text: str = ""

    async def read(self, found: Service, asked: Ask) -> None:
        pieces = found.backend.answer(asked, self.force)
        last: Piece | None = None
        try:
            async with asyncio.timeout(found.settings.timeout), aclosing(pieces):
                async for last in pieces:
                    self.text += last.text
        finally:
            tokens = (0, 0) if last is None else (last.prompt_tokens, last.generated)
            found.metrics.answered([self.force], *tokens)


def add_page(app: FastAPI) -> None:
    """Add the page to an application."""
    app.include_router(pages)
    app.include_router(fragments, dependencies=[Depends(asking)])


@pages.get("/")
async def index(request: Request, found: Found) -> Response:
    """The page; without a token it holds no data."""
    access: Access = request.app.state.access
    values: dict[str, Any] = {"name": found.router.name, "open": access.open, "edits": None, "state": None}
    values["chat"] = bool(getattr(found.router.lm.tokenizer, "chat_template", None))
    values["models"] = [found.router.name]
    if access.open:
        values["edits"] = await found.router.worker.run(_edits, found, "", None, 50)
        values["state"] = await found.router.worker.run(_state, found)
        values["models"] = await found.models()
    return _page("page.html", **values)


@pages.get("/static/{name}")
async def static(name: Static) -> Response:
    """The page's style, script and icon."""
    headers = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}
    return Response(_file(name), media_type=_STATIC[name], headers=headers)


@fragments.post("/ask")
async def ask(body: AskBody, request: Request, found: Found) -> Response:
    """The answers of the base model and of the model with its edits, side by side."""
    if not body.prompt.strip():
        raise RequestError("Type a prompt first.")
    messages = [{"role": "user", "content": body.prompt}] if body.chat else ()
    asked = Ask("" if body.chat else body.prompt, messages, max_tokens=body.max_tokens)
    text = (body.prompt,) if body.chat else body.prompt
    question = Question(text, "auto", found.router.state(body.model))
    force = await found.router.route(question)
    request.scope["emendo"]["edits"] = header([force])
    base, edited = _Answer(InForce(force.operation)), _Answer(force)

    async def both() -> None:
        await asyncio.gather(base.read(found, asked), edited.read(found, asked))

    if not await unless_gone(request, both()):
        return Response(status_code=GONE)
    ids = {id for part in force.parts for id in part.ids}
    if force.best is not None:
        ids.add(force.best)
    entries = await found.router.worker.run(_entries, found, sorted(ids))
    return _page("answers.html", prompt=body.prompt, base=base, edited=edited, entries=entries)


@fragments.post("/try")
async def try_edit(body: TryBody, found: Found, caller: Editing) -> Response:
    """The answers before and after an edit that is not applied."""
    new = NewEdit(body.prompt, body.target, body.paraphrases, body.subject, body.aliases)
    return _page("preview.html", preview=await found.desk.preview(new, body.neighbours), target=body.target)


@fragments.get("/edits")
async def edits(
    found: Found,
    search: Annotated[str, Query(max_length=1000)] = "",
    show: Literal["all", "active", "off"] = "all",
    limit: Annotated[int, Query(ge=1, le=1000)] = 50,
) -> Response:
    """The ledger's edits as a table."""
    active = None if show == "all" else show == "active"
    listed = await found.router.worker.run(_edits, found, search, active, limit)
    return _page("edits.html", edits=listed)


@fragments.get("/edits/{id}")
async def edit(id: Annotated[int, Path(ge=1, lt=2**31)], found: Found) -> Response:
    """What the ledger knows of one edit."""
    shown = await found.router.worker.run(one_edit, found, id)
    return _page("edit.html", edit=shown, rows=_rows(shown.before_after))


@fragments.get("/state")
async def state(found: Found) -> Response:
    """The state of the ledger: its size, its tags, its health."""
    return _page("state.html", state=await found.router.worker.run(_state, found))


@fragments.get("/models")
async def models(found: Found) -> Response:
    """The names of the states that can be asked, as options."""
    return _page("models.html", models=await found.models())


# -------------------------------------------------------------------------------------------------- values


def _edits(found: Service, search: str, active: bool | None, limit: int) -> dict[str, Any]:
    listed = some_edits(found, search, active, 0, limit)
    return {"data": listed.data, "total": listed.total, "limit": limit, "searched": bool(search.strip())}


def _rows(stored: Iterable[Any]) -> list[dict[str, Any]]:
    """The rows of a table in an edit's card, which may come from anywhere; those of another form are left out."""
    found = []
    for row in stored:
        values = row if isinstance(row, Mapping) else {}
        prompt, numbers = (
            values.get("prompt"),
            [values.get(name) for name in ("target_before", "target_after")],
        )
        if isinstance(prompt, str) and all(isinstance(number, int | float) for number in numbers):
            shown = {"kind": str(values.get("kind", "")), "prompt": prompt, "target": numbers}
            found.append(shown | {side: _likeliest(values.get(side)) for side in ("before", "after")})
    return found


def _likeliest(answers: Any) -> str:
    first = answers[0] if isinstance(answers, list | tuple) and answers else None
    return str(first.get("text", "")) if isinstance(first, Mapping) else ""


def _entries(found: Service, ids: list[int]) -> dict[int, Any]:
    return {entry.id: entry for entry in found.ledger.entries(ids)} if ids else {}


def _state(found: Service) -> dict[str, Any]:
    head = found.ledger.head
    return {
        "head": head,
        "tags": found.ledger.tags(),
        "name": found.router.name,
        "curves": curves(found.ledger.log(_STEPS)),
    }


# ----------------------------------------------------------------------------------------------- rendering


def _page(template: str, **values: Any) -> Response:
    text = _environment().get_template(template).render(**values)
    return Response(text.encode(errors="replace"), media_type="text/html", headers=_HEADERS)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("emendo.serve", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["line"] = lambda text: " ⏎ ".join(
        each for each in text.strip().splitlines() if each.strip()
    )
    environment.filters["score"] = "{:.2f}".format
    environment.filters["share"] = lambda value: "–" if value is None else f"{value:.1%}"
    environment.filters["times"] = lambda value: "–" if value is None else f"{value:.3f}"
    environment.filters["day"] = lambda text: str(text)[:16].replace("T", " ")
    return environment


@cache
def _file(name: str) -> bytes:
    try:
        return files("emendo.serve").joinpath("static", name).read_bytes()
    except OSError as error:
        raise HTTPException(404, "There is no such file.") from error
