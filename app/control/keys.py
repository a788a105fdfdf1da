"""The verbs on API keys.

What comes in: a session and plain values. What goes out: frozen views, and a new key's secret,
once. Only the secret's sha-256 is stored: it has 240 random bits, so there is nothing to guess
and a slow hash would only tax every request.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from app.clock import Clock
from app.control.views import Page
from app.db.engine import touch
from app.db.tables import KeyRow
from app.domain import Principal, Scope
from app.errors import InvalidRequest, NotFound

PREFIX = "lg-"
MAX_MODELS = 1000
MAX_PAGE = 1000


@dataclass(frozen=True, slots=True)
class KeyView:
    """A key without its secret. `models` is an allow-list of globs; None allows all."""

    id: str
    name: str
    scopes: tuple[Scope, ...]
    models: tuple[str, ...] | None
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None


async def create(
    session: AsyncSession,
    clock: Clock,
    *,
    name: str,
    scopes: Sequence[Scope],
    models: Sequence[str] | None = None,
    expires_at: datetime | None = None,
) -> tuple[KeyView, str]:
    """Make a key. The secret is in the answer and nowhere else."""
    if not 1 <= len(name) <= 128 or not name.isprintable():
        raise InvalidRequest("A key's name is 1 to 128 printable characters.", param="name")
    if not scopes:
        raise InvalidRequest("A key needs a scope: inference, training or admin.", param="scopes")
    if expires_at is not None and (expires_at.tzinfo is None or expires_at <= clock.now()):
        raise InvalidRequest(
            "expires_at is a time in the future, with its offset.", param="expires_at"
        )
    secret = PREFIX + secrets.token_urlsafe(30)  # 40 characters
    row = KeyRow(
        id=f"key-{secrets.token_hex(6)}",
        name=name,
        digest=digest(secret).hex(),
        scopes=sorted({scope.value for scope in scopes}),
        models=_checked_models(models),
        created_at=clock.now(),
        expires_at=expires_at,
        revision=0,
    )
    session.add(row)
    await touch(session, row)
    return _view(row), secret


async def list_(
    session: AsyncSession, *, limit: int = 100, after: str | None = None, revoked: bool = True
) -> Page[KeyView]:
    """A page of keys by id, revoked ones included unless told otherwise."""
    if not 1 <= limit <= MAX_PAGE:
        raise InvalidRequest(f"limit must be 1 to {MAX_PAGE}, not {limit}.", param="limit")
    query = select(KeyRow).order_by(KeyRow.id).limit(limit + 1)
    if after is not None:
        query = query.where(KeyRow.id > after)
    if not revoked:
        query = query.where(KeyRow.revoked_at.is_(None))
    rows = (await session.scalars(query)).all()
    page = rows[:limit]
    return Page(tuple(map(_view, page)), page[-1].id if len(rows) > limit else None)


async def revoke(session: AsyncSession, clock: Clock, key_id: str) -> KeyView:
    """End a key for good. Revoking it again changes nothing."""
    row = await session.get(KeyRow, key_id, with_for_update=True)
    if row is None:
        raise NotFound(f"There is no key {key_id!r}.", param="key")
    if row.revoked_at is None:
        row.revoked_at = clock.now()
        await touch(session, row)
    return _view(row)


def digest(secret: str) -> bytes:
    """What is stored of a secret, and what the keyring is searched by."""
    return hashlib.sha256(secret.encode()).digest()


def principal_of(row: KeyRow) -> Principal:
    return Principal(
        key_id=row.id,
        name=row.name,
        scopes=frozenset(map(Scope, row.scopes)),
        models=None if row.models is None else tuple(row.models),
        expires_at=row.expires_at,
    )


def _checked_models(models: Sequence[str] | None) -> list[str] | None:
    if models is None:
        return None
    globs = list(models)
    if not 1 <= len(globs) <= MAX_MODELS or not all(1 <= len(glob) <= 300 for glob in globs):
        raise InvalidRequest(
            f"models is left out, or 1 to {MAX_MODELS} globs of up to 300 characters.",
            param="models",
        )
    return globs


def _view(row: KeyRow) -> KeyView:
    return KeyView(
        id=row.id,
        name=row.name,
        scopes=tuple(map(Scope, row.scopes)),
        models=None if row.models is None else tuple(row.models),
        created_at=row.created_at,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
    )
