"""/admin/adapters/{name}/aliases: movable pointers and weighted splits over versions.

What comes in: where an alias should point. What goes out: the adapter as it is now, once this
gateway serves it so.
"""

from __future__ import annotations

import logging
from typing import Annotated, Self

from fastapi import APIRouter, Path
from pydantic import Field, model_validator

from app.api.admin.adapter_json import Adapter, Target, adapter_json
from app.api.admin.adapters import Name
from app.api.admin.shapes import Admin, Body, Deleted, InRooms, refusals
from app.api.rooms import Rooms
from app.control import adapters, rollout
from app.control.views import AdapterView, Targets
from app.domain import LATEST, Principal, Sticky
from app.telemetry import Event, log

logger = logging.getLogger(__name__)
router = APIRouter(prefix="/adapters/{name}", tags=["Adapters"])


class NewAlias(Body):
    """Where an alias points: one version, or several with weights."""

    version: int | None = Field(None, ge=1, description="The one version.", examples=[3])
    targets: list[Target] | None = Field(
        None,
        description="Or several, for a canary.",
        examples=[[{"version": 2, "weight": 9}, {"version": 3, "weight": 1}]],
    )

    sticky: Sticky | None = Field(
        None,
        description="What keeps a client on one version while there are several: `user`, the "
        "session or the `user` that a request names; `key`, its API key; `none`, nothing. Left "
        "out, it stays as it is: `user` for a new alias.",
        examples=["user"],
    )

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if (self.version is None) == (self.targets is None):
            raise ValueError("give `version` or `targets`")
        return self

    def pairs(self) -> Targets:
        if self.version is not None:
            return ((self.version, 1),)
        return tuple((target.version, target.weight) for target in self.targets or ())


class Rollback(Body):
    """Which alias to move back."""

    alias: str = Field(LATEST, description="The alias.", examples=["prod"])


AliasName = Annotated[str, Path(description="The alias's name.", examples=["prod"])]


@router.put(
    "/aliases/{alias}",
    summary="Set an alias",
    response_model=Adapter,
    responses=refusals(404, 422, 502),
)
async def set_alias(
    name: Name, alias: AliasName, body: NewAlias, rooms: InRooms, admin: Admin
) -> Adapter:
    """Point an alias at a version, or split it over several by weight.

    Clients write `name:alias`. If the adapter is being used, the versions are loaded where it is,
    and verified if they carry a probe, before the alias moves; it stays where it was if they
    cannot be. Then the change takes effect for the next request; those under way are finished by
    the version they began with.
    """
    await rollout.prepare(rooms, name, [number for number, _ in body.pairs()])
    async with rooms.db.begin() as session:
        view = await adapters.set_alias(
            session,
            rooms.clock,
            adapter=name,
            alias=alias,
            targets=body.pairs(),
            sticky=body.sticky,
        )
    return await _moved(rooms, admin, alias, view)


@router.delete(
    "/aliases/{alias}",
    summary="Delete an alias",
    response_model=Deleted,
    responses=refusals(404, 409),
)
async def delete_alias(name: Name, alias: AliasName, rooms: InRooms, admin: Admin) -> Deleted:
    """Remove an alias; the versions stay. `latest` is kept by the gateway and stays too."""
    async with rooms.db.begin() as session:
        view = await adapters.delete_alias(session, adapter=name, alias=alias)
    await _moved(rooms, admin, alias, view)
    return Deleted(id=f"{name}:{alias}", object="adapter.alias")


@router.post(
    "/rollback",
    summary="Roll an alias back",
    response_model=Adapter,
    responses=refusals(404, 409, 422),
)
async def rollback(
    name: Name, rooms: InRooms, admin: Admin, body: Rollback | None = None
) -> Adapter:
    """Undo an alias's newest move; of `latest` without a body. Again goes further back.

    At once: nothing is loaded before, so the first request may wait for a version that was
    unloaded meanwhile.
    """
    alias = (body or Rollback()).alias
    async with rooms.db.begin() as session:
        view = await adapters.rollback(session, adapter=name, alias=alias)
    return await _moved(rooms, admin, alias, view)


async def _moved(rooms: Rooms, admin: Principal, alias: str, view: AdapterView) -> Adapter:
    targets = view.aliases.get(alias, ())
    fields = {"adapter": view.name, "alias": alias, "targets": targets, "by": admin.key_id}
    log(logger, logging.INFO, Event.ALIAS_MOVED, **fields)
    await rooms.publish.settle()
    return adapter_json(view)
