"""Who may ask and who may edit: tokens, the addresses that are served without them, and the rate of edits."""

from __future__ import annotations

import hashlib
import ipaddress
import math
import secrets
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, HTTPException, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from emendo.errors import RequestError

LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
"""Names by which a client reaches this machine. Any other name may be a web page's that points here."""
_SHORTEST = 16  # characters of a token
_MINUTE = 60.0


class TooManyEditsError(RequestError):
    """A caller takes more steps than the rate limit allows.

    Attributes:
        seconds: until the next one is allowed.
    """

    def __init__(self, limit: int, seconds: float) -> None:
        super().__init__(f"At most {limit} edits a minute; try again in {math.ceil(seconds)} s.")
        self.seconds = seconds


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request.

    Attributes:
        name: of the token, if it has one.
        address: where the request came from.
    """

    name: str | None
    address: str

    def signature(self, by: str | None = None) -> str:
        """How the ledger records them; the name of a token counts more than one that the request gives."""
        return f"{self.name or by or 'anonymous'} from {self.address}"


@dataclass(frozen=True)
class Access:
    """The tokens.

    Attributes:
        ask: allow asking; by SHA-256, with their names.
        edit: allow editing, and asking too.
    """

    ask: Mapping[bytes, str | None] = field(default_factory=dict)
    edit: Mapping[bytes, str | None] = field(default_factory=dict)

    @classmethod
    def of(cls, ask: Iterable[str] = (), edit: Iterable[str] = ()) -> Access:
        """From texts of the form ``TOKEN`` or ``NAME=TOKEN``.

        Raises:
            RequestError: a token is short enough to be guessed.
        """
        return cls(dict(map(_read, ask)), dict(map(_read, edit)))

    @property
    def open(self) -> bool:
        """Whether no token is needed at all."""
        return not self.ask and not self.edit

    def check_host(self, host: str) -> None:
        """Make sure that an address may be listened at.

        Raises:
            RequestError: other machines reach it, and tokens are missing.
        """
        if not is_local(host) and not (self.ask and self.edit):
            raise RequestError(
                f"Other machines can reach {host}, so tokens for asking and for editing are required: set "
                "EMENDO_ASK_TOKEN and EMENDO_EDIT_TOKEN, or give --ask-token and --edit-token."
            )

    def caller(self, token: str | None, address: str, *, editing: bool) -> Caller:
        """Who sends a request with a token.

        Raises:
            HTTPException: the token is missing or wrong (401), or does not allow editing (403).
        """
        if self.open:
            return Caller(None, address)
        editor, found = _find(token, self.edit)
        asker, known = _find(token, self.ask)
        if editor:
            return Caller(found, address)
        if editing and asker:
            raise HTTPException(403, "This token allows asking, not editing.")
        if asker or (not editing and not self.ask):
            return Caller(known, address)
        if editing and not self.edit:
            raise HTTPException(403, "Editing is off: the server has no token for it.")
        raise HTTPException(
            401,
            "Give a token: Authorization: Bearer TOKEN.",
            {"WWW-Authenticate": "Bearer"},
        )


def is_local(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _read(text: str) -> tuple[bytes, str | None]:
    name, sign, token = text.strip().partition("=")
    if not sign:
        name, token = "", name
    if len(token) < _SHORTEST:
        raise RequestError(
            f"A token has at least {_SHORTEST} characters; make one with: openssl rand -hex 24"
        )
    return _digest(token), name or None


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode(errors="surrogateescape")).digest()


def _find(token: str | None, known: Mapping[bytes, str | None]) -> tuple[bool, str | None]:
    """Whether a token is known, and its name. Every known one is compared, each in constant time."""
    given, found, name = _digest(token or ""), False, None
    for digest, own in known.items():
        if secrets.compare_digest(given, digest):
            found, name = True, own
    return found and token is not None, name


class RateLimit:
    """At most so many steps of each caller in any minute.

    Args:
        limit: the number.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._times: dict[str, deque[float]] = {}

    def check(self, caller: str, now: float | None = None) -> None:
        """Count a step.

        Raises:
            TooManyEditsError: it is one too many.
        """
        now = time.monotonic() if now is None else now
        for other in [each for each, times in self._times.items() if times[-1] <= now - _MINUTE]:
            del self._times[other]
        times = self._times.setdefault(caller, deque())
        while times and times[0] <= now - _MINUTE:
            times.popleft()
        if len(times) >= self.limit:
            raise TooManyEditsError(self.limit, times[0] + _MINUTE - now)
        times.append(now)


_bearer = Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]


def asking(request: Request, token: _bearer) -> Caller:
    """The caller of a route that asks."""
    return _caller(request, token, editing=False)


def editing(request: Request, token: _bearer) -> Caller:
    """The caller of a route that edits; the call counts for the rate limit."""
    caller = _caller(request, token, editing=True)
    request.app.state.rate.check(caller.name or caller.address)
    return caller


def _caller(request: Request, token: HTTPAuthorizationCredentials | None, *, editing: bool) -> Caller:
    access: Access = request.app.state.access
    address = request.client.host if request.client else "unknown"
    return access.caller(None if token is None else token.credentials, address, editing=editing)


Editing = Annotated[Caller, Depends(editing)]
"""The caller as an argument of a route that edits."""
