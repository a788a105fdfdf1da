"""/admin/replicas: one server of a pool: what it is doing, cordon, drain, remove.

What comes in: a replica's id. What goes out: what the registry says of it, beside what this
gateway's fleet sees of it now.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Path, Query
from pydantic import Field, SecretStr

from app.api.admin.shapes import Admin, Answer, Body, Deleted, InRooms, refusals
from app.api.rooms import Rooms
from app.control import pools
from app.domain import ReplicaState
from app.errors import Conflict
from app.serving.replica import LiveReplica

router = APIRouter(prefix="/replicas", tags=["Pools and replicas"])


class Replica(Answer):
    """One server of a pool, as this gateway sees it."""

    id: str = Field(examples=["llama-5f3c9a11"])
    pool: str = Field(examples=["llama"])
    url: str = Field(examples=["http://10.0.0.5:8000"])
    state: ReplicaState = Field(description="adding, healthy, unhealthy or draining.")
    cordoned: bool = Field(description="Takes no new requests until uncordoned.")
    draining: bool = Field(description="Takes no new requests; to be removed.")
    declared: bool = Field(description="Whether it comes from LORAGATE_POOLS.")
    inflight: int = Field(description="Requests of this gateway on it now.", examples=[4])
    waiting: int = Field(description="Requests that wait here for a place on it.", examples=[0])
    resident: list[str] = Field(
        description="Adapter versions believed to be loaded.", examples=[["support-bot@3"]]
    )
    quarantined: dict[str, str] = Field(
        description="Versions it serves wrongly, by the probe they were registered with, and the "
        "numbers.",
        examples=[{}],
    )
    created_at: datetime


class Replicas(Answer):
    """Replicas by id."""

    object: Literal["list"] = "list"
    data: list[Replica]


class NewReplica(Body):
    """A server to add to a pool."""

    url: str = Field(description="Its base URL, without a path.", examples=["http://10.0.0.5:8000"])
    api_key: SecretStr | None = Field(
        None, description="Its --api-key, sent to it as a bearer token; never shown again."
    )

    def secret(self) -> str | None:
        return self.api_key.get_secret_value() if self.api_key else None


class ReplicaChange(Body):
    """What to change of a replica; what is left out stays."""

    cordoned: bool | None = Field(None, description="Keep new requests away, or stop doing so.")
    draining: bool | None = Field(
        None, description="Let it finish what it has, to remove it then.", examples=[True]
    )


Id = Annotated[str, Path(description="The replica's id.", examples=["llama-5f3c9a11"])]


@router.get("", summary="List replicas", response_model=Replicas, responses=refusals())
async def list_replicas(rooms: InRooms, admin: Admin) -> Replicas:
    """Every replica of every pool and what it is doing now."""
    async with rooms.db.read() as session:
        views = await pools.list_replicas(session)
    return Replicas(data=[replica_json(rooms, view) for view in views])


@router.patch(
    "/{id}",
    summary="Cordon or drain a replica",
    response_model=Replica,
    responses=refusals(404, 422),
)
async def change(id: Id, body: ReplicaChange, rooms: InRooms, admin: Admin) -> Replica:
    """Keep new requests away from a replica; those under way finish.

    `inflight` in the answer, and in later ones, says how many are left on it.
    """
    async with rooms.db.begin() as session:
        view = await pools.update_replica(
            session, id, cordoned=body.cordoned, draining=body.draining
        )
    await rooms.publish.settle()
    return replica_json(rooms, view)


@router.delete(
    "/{id}", summary="Remove a replica", response_model=Deleted, responses=refusals(404, 409)
)
async def remove(
    id: Id,
    rooms: InRooms,
    admin: Admin,
    force: Annotated[bool, Query(description="Even if it is busy or was not drained.")] = False,
) -> Deleted:
    """Forget a replica that was drained. 409 while it is not draining or is still answering."""
    live = _live(rooms, id)
    if live is not None and live.inflight and not force:
        raise Conflict(
            f"Replica {id!r} is answering {live.inflight} requests: wait for them, or force.",
            param="force",
        )
    async with rooms.db.begin() as session:
        await pools.remove_replica(session, id, force=force)
    await rooms.publish.settle()
    return Deleted(id=id, object="replica")


def replica_json(rooms: Rooms, view: pools.ReplicaView) -> Replica:
    replica = view.replica
    live = _live(rooms, replica.id)
    state = ReplicaState.ADDING if live is None else live.state
    return Replica(
        id=replica.id,
        pool=replica.pool,
        url=replica.url,
        state=ReplicaState.DRAINING if replica.draining else state,
        cordoned=replica.cordoned,
        draining=replica.draining,
        declared=view.declared,
        inflight=0 if live is None else live.inflight,
        waiting=0 if live is None else live.line.length,
        resident=[] if live is None else sorted(live.residency.known),
        quarantined={} if live is None else dict(live.quarantined),
        created_at=view.created_at,
    )


def _live(rooms: Rooms, id: str) -> LiveReplica | None:
    return next((live for live in rooms.fleet.live() if live.id == id), None)
