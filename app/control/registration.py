"""Registration: the one way weights enter the registry.

What comes in: a request and the rooms it needs. What goes out: `Registered`. In three steps, of
which only the last holds a transaction: look (is this allowed at all?), admit (bytes into the
store, checked), write. A crash between the last two leaves files no row knows, which `sweep`
collects; the other way round cannot happen. Where the adapter is being used a fourth follows,
release: its aliases move on once the new version is loaded there.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from sqlalchemy import select

from app.clock import Clock
from app.control import adapters, rollout
from app.control.driver import Activator
from app.control.intake import Admitted, Candidate, Source, admit
from app.control.pools import base_of, pool_of
from app.control.views import Registered
from app.db.blobs import AdapterStore
from app.db.engine import Database
from app.db.tables import BaseModelRow, PoolRow
from app.errors import AdapterLoadFailed, InvalidRequest, NotFound
from app.settings import Settings
from app.telemetry import Event, log

logger = logging.getLogger(__name__)


class Rooms(rollout.Rooms, Protocol):
    """What registration needs of the running gateway."""

    @property
    def settings(self) -> Settings: ...
    @property
    def clock(self) -> Clock: ...
    @property
    def db(self) -> Database: ...
    @property
    def store(self) -> AdapterStore: ...
    @property
    def publish(self) -> Activator: ...


@dataclass(frozen=True, slots=True)
class Registration:
    """What to register. `create`: True a new adapter, False a new version, None whichever.

    `base_model` may be left out when there is one pool, or when adapter_config.json names one.
    `by` is the id of the key that asks, for the log; None is the gateway itself.
    """

    name: str
    source: Source
    base_model: str | None = None
    alias: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    create: bool | None = None
    by: str | None = None


async def register(rooms: Rooms, request: Registration) -> Registered:
    """Register weights, and return once this gateway serves them.

    Asking again with the weights of the newest version answers that version, `created` False.
    """
    candidates = await _look(rooms, request)
    admitted = await admit(
        request.source, candidates=candidates, store=rooms.store, settings=rooms.settings
    )
    # One that is being used is moved on only when its next version is where it is used.
    used = rollout.in_use(rooms, request.name)
    registered = await _write(rooms, request, admitted, move_aliases=not used)
    await rooms.publish.settle()
    log(
        logger,
        logging.INFO,
        Event.ADAPTER_REGISTERED,
        adapter=request.name,
        version=registered.version.number,
        created=registered.created,
        digest=admitted.digest,
        base_model=admitted.base_model,
        by=request.by,
    )
    return await _release(rooms, request, registered) if registered.pending else registered


async def _release(rooms: Rooms, request: Registration, registered: Registered) -> Registered:
    """Move the aliases to a version once it is loaded, and verified, where they are used."""
    number = registered.version.number
    try:
        await rollout.prepare(rooms, request.name, [number])
    except AdapterLoadFailed as exc:
        raise type(exc)(
            f"{request.name}@{number} is registered, but its aliases stay where they were. {exc}"
        ) from exc
    async with rooms.db.begin() as session:
        view = await adapters.release(
            session, rooms.clock, name=request.name, number=number, alias=request.alias
        )
    await rooms.publish.settle()
    return replace(registered, adapter=view, pending=False)


async def _look(rooms: Rooms, request: Registration) -> list[Candidate]:
    """Refuse what needs no bytes to be refused; say which bases the weights may be for."""
    adapters.check_name(request.name)
    adapters.check_metadata(request.metadata)
    if request.alias is not None:
        adapters.check_alias(request.alias)
    async with rooms.db.read() as session:
        found = await adapters.base_of(session, request.name)
        adapters.check_existence(request.name, found is not None, request.create)
        wanted = request.base_model or found
        query = select(PoolRow, BaseModelRow).join(
            BaseModelRow, BaseModelRow.name == PoolRow.base_model
        )
        if wanted is not None:
            query = query.where(PoolRow.base_model == wanted)
        rows = (await session.execute(query.order_by(PoolRow.name))).all()
        candidates = [Candidate(base_of(base), pool_of(pool)) for pool, base in rows]
    if candidates:
        return candidates
    if wanted is not None:
        raise NotFound(f"No pool serves the base model {wanted!r}.", param="base_model")
    raise InvalidRequest("There is no pool yet: add one first.", param="base_model")


async def _write(
    rooms: Rooms, request: Registration, admitted: Admitted, *, move_aliases: bool
) -> Registered:
    async with rooms.db.begin() as session:
        return await adapters.register(
            session,
            rooms.clock,
            name=request.name,
            base_model=admitted.base_model,
            digest=admitted.digest,
            facts=admitted.facts,
            source=admitted.source,
            alias=request.alias,
            metadata=request.metadata,
            probe=admitted.probe,
            create=request.create,
            move_aliases=move_aliases,
        )
