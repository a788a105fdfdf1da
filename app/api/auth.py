"""Who is calling: a key in a header, or anyone on loopback while no key was ever created.

What comes in: the ends of a connection and the request's headers. What goes out: a `Principal`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Mapping
from typing import NamedTuple, Protocol

from fastapi import Request, Security
from fastapi.security import APIKeyHeader, HTTPBearer

from app.api.exchange import Address
from app.clock import Clock
from app.domain import Principal, Scope
from app.errors import Forbidden, Unauthenticated
from app.serving.snapshot import Snapshot

_LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})
#: What a reverse proxy adds: behind one, a loopback peer says nothing about the caller.
_PROXIED = frozenset({b"forwarded", b"x-forwarded-for", b"x-real-ip", b"via"})
_HINT = "Send it as `Authorization: Bearer …` or `X-API-Key: …`."


class Caller(Protocol):
    """The two ends of a connection, as (address, port)."""

    @property
    def server(self) -> Address: ...

    @property
    def client(self) -> Address: ...


def authenticate(
    caller: Caller, headers: Mapping[bytes, bytes], snapshot: Snapshot, clock: Clock
) -> Principal:
    """Find out who is calling.

    Args:
        caller: the two ends of the connection.
        headers: lower-case names to values.

    Raises:
        Unauthenticated: the key is missing, unknown, revoked or expired.
    """
    secret = headers.get(b"authorization")
    if secret is None:
        secret = headers.get(b"x-api-key")
    elif secret[:7].lower() == b"bearer ":
        secret = secret[7:].strip()
    else:
        raise Unauthenticated(f"The Authorization header is not a bearer token. {_HINT}")
    if snapshot.anonymous is not None and on_loopback(caller, headers):
        return snapshot.anonymous
    if not secret:
        raise Unauthenticated(f"This gateway needs an API key. {_HINT}")
    principal = snapshot.keys.get(hashlib.sha256(secret).digest())
    if principal is None:
        raise Unauthenticated("The API key is not known, or was revoked.")
    if principal.expires_at is not None and principal.expires_at <= clock.now():
        raise Unauthenticated(f"The API key {principal.name!r} expired at {principal.expires_at}.")
    return principal


def on_loopback(caller: Caller, headers: Mapping[bytes, bytes]) -> bool:
    """Whether both ends are this machine, with no proxy between, and the Host header says so too.

    The header matters: a page in a browser on this machine can be made to connect to 127.0.0.1
    under a name of its own (DNS rebinding), but it cannot change the Host it sends.
    """
    if not _PROXIED.isdisjoint(headers):
        return False
    ends = (caller.server, caller.client)
    host = headers.get(b"host", b"").decode("latin-1").lower()
    name = host[1 : host.find("]")] if host.startswith("[") else host.partition(":")[0]
    return name in _LOOPBACK and all(end is not None and _is_loopback(end[0]) for end in ends)


def _is_loopback(address: str) -> bool:
    return address in _LOOPBACK or address.startswith("127.")


def permit(principal: Principal, *scopes: Scope) -> Principal:
    """Let the principal through if it has one of the scopes.

    Raises:
        Forbidden: it does not.
    """
    if principal.scopes.isdisjoint(scopes):
        wanted = " or ".join(repr(scope.value) for scope in scopes)
        raise Forbidden(
            f"The key {principal.name!r} does not have the scope {wanted}. Use a key that has it."
        )
    return principal


class _Ends(NamedTuple):
    server: Address
    client: Address


_bearer = HTTPBearer(auto_error=False, description="An API key, as OpenAI's clients send it.")
_api_key = APIKeyHeader(name="X-API-Key", auto_error=False, description="The same key.")


def require(*scopes: Scope) -> Callable[..., Awaitable[Principal]]:
    """A FastAPI dependency that lets only principals with one of `scopes` in."""

    # Async, or FastAPI would send each look at a dictionary through a thread pool.
    async def dependency(
        request: Request, _b: object = Security(_bearer), _k: object = Security(_api_key)
    ) -> Principal:
        rooms = request.state.rooms
        asgi = request.scope
        caller = _Ends(asgi.get("server"), asgi.get("client"))
        headers = dict(asgi["headers"])
        principal = authenticate(caller, headers, rooms.snapshots.current, rooms.clock)
        return permit(principal, *scopes)

    return dependency
