"""/admin/pools: interchangeable servers of one base model.

What comes in: a pool's settings. What goes out: pools with their replicas, and what the fleet
sees of each replica now.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path
from pydantic import Field

from app.api.admin.replicas import NewReplica, Replica, Replicas, replica_json
from app.api.admin.shapes import Admin, Answer, Body, Deleted, InRooms, refusals
from app.api.rooms import Rooms
from app.control import pools
from app.domain import BaseModel, Dialect

router = APIRouter(prefix="/pools", tags=["Pools and replicas"])

_MOUNT = "Folder under which the replicas see the adapter store, if not at the gateway's path."
_CONFIG = "The base's Hugging Face config.json. Without it adapters' shapes are not checked."
_LORAS = "The replicas' --max-loras: how many adapters one step of a replica can hold."
_CPU_LORAS = "The replicas' --max-cpu-loras; null: as many as `max_loras`, which is vLLM's default."
_INFLIGHT = "Most requests that one replica is given at once."
_QUEUE = "Most requests that wait while every replica has that many; 0 refuses them at once."
_DIALECT = (
    "What the replicas speak: `vllm`, or `megatron` for one of Megatron's own servers, which "
    "serve the base and no adapter."
)
_ALIASES = "Other names adapter_config.json files call the base by."


_ENDED_BY_NULL = ("store_mount", "max_cpu_loras")


class Pool(Answer):
    """Interchangeable servers of one base model."""

    name: str = Field(examples=["llama"])
    base_model: str = Field(examples=["meta-llama/Llama-3.1-8B-Instruct"])
    base_model_aliases: list[str] = Field(examples=[["/models/llama"]])
    base_model_known: bool = Field(description="Whether its config.json was given.")
    served_name: str = Field(examples=["meta-llama/Llama-3.1-8B-Instruct"])
    max_lora_rank: int = Field(examples=[64])
    max_loras: int = Field(examples=[8])
    max_cpu_loras: int | None = Field(examples=[32])
    max_inflight: int = Field(examples=[256])
    max_queue: int = Field(examples=[1024])
    store_mount: str | None
    dialect: Dialect = Field(description=_DIALECT)
    declared: bool = Field(description="Whether it comes from LORAGATE_POOLS.")
    created_at: datetime
    replicas: list[Replica]


class Pools(Answer):
    """Every pool."""

    object: Literal["list"] = "list"
    data: list[Pool]


class NewPool(Body):
    """A pool to add."""

    name: str = Field(description="The pool's name.", examples=["llama"])
    base_model: str = Field(
        description="The base model's name, as clients write it.",
        examples=["meta-llama/Llama-3.1-8B-Instruct"],
    )
    base_model_config: dict[str, Any] | None = Field(None, description=_CONFIG)
    base_model_aliases: list[str] = Field([], description=_ALIASES, examples=[["/models/llama"]])
    served_name: str | None = Field(
        None, description="What the replicas call the base; `base_model` when left out."
    )
    max_lora_rank: int = Field(64, ge=1, description="The replicas' --max-lora-rank.")
    max_loras: int = Field(8, ge=1, description=_LORAS)
    max_cpu_loras: int | None = Field(None, ge=1, description=_CPU_LORAS)
    max_inflight: int = Field(256, ge=1, description=_INFLIGHT)
    max_queue: int = Field(1024, ge=0, description=_QUEUE)
    store_mount: str | None = Field(None, description=_MOUNT)
    dialect: Dialect = Field(Dialect.VLLM, description=_DIALECT)
    replicas: list[NewReplica] = Field([], description="Replicas to add with it.")


class PoolChange(Body):
    """What to change of a pool; what is left out stays."""

    base_model_config: dict[str, Any] | None = Field(None, description=_CONFIG)
    base_model_aliases: list[str] | None = Field(None, description=_ALIASES)
    served_name: str | None = Field(None, description="What the replicas call the base.")
    max_lora_rank: int | None = Field(
        None,
        ge=1,
        description="The replicas' --max-lora-rank; adapters registered before keep theirs.",
        examples=[128],
    )
    max_loras: int | None = Field(None, ge=1, description=_LORAS)
    max_cpu_loras: int | None = Field(None, ge=1, description=_CPU_LORAS)
    max_inflight: int | None = Field(None, ge=1, description=_INFLIGHT)
    max_queue: int | None = Field(None, ge=0, description=_QUEUE)
    store_mount: str | None = Field(None, description=_MOUNT)
    dialect: Dialect | None = Field(None, description=_DIALECT)


Name = Annotated[str, Path(description="The pool's name.", examples=["llama"])]


@router.get("", summary="List pools", response_model=Pools, responses=refusals())
async def list_pools(rooms: InRooms, admin: Admin) -> Pools:
    """Every pool with its replicas."""
    async with rooms.db.read() as session:
        views = await pools.list_(session)
    return Pools(data=[_pool(rooms, view) for view in views])


@router.post(
    "", summary="Add a pool", status_code=201, response_model=Pool, responses=refusals(409, 422)
)
async def create(body: NewPool, rooms: InRooms, admin: Admin) -> Pool:
    """Add a pool for a base model, with or without its replicas. A base has one pool."""
    base = BaseModel(body.base_model, body.base_model_config, tuple(body.base_model_aliases))
    async with rooms.db.begin() as session:
        await pools.create(
            session,
            rooms.clock,
            name=body.name,
            base=base,
            served_name=body.served_name,
            max_lora_rank=body.max_lora_rank,
            max_loras=body.max_loras,
            store_mount=body.store_mount,
            max_cpu_loras=body.max_cpu_loras,
            max_inflight=body.max_inflight,
            max_queue=body.max_queue,
            dialect=body.dialect,
        )
        for new in body.replicas:
            await pools.add_replica(
                session, rooms.clock, pool=body.name, url=new.url, api_key=new.secret()
            )
        view = await pools.show(session, body.name)
    await rooms.publish.settle()
    return _pool(rooms, view)


@router.get("/{name}", summary="Show a pool", response_model=Pool, responses=refusals(404))
async def show(name: Name, rooms: InRooms, admin: Admin) -> Pool:
    """One pool with its replicas and what they are doing now."""
    async with rooms.db.read() as session:
        return _pool(rooms, await pools.show(session, name))


@router.patch("/{name}", summary="Change a pool", response_model=Pool, responses=refusals(404, 422))
async def change(name: Name, body: PoolChange, rooms: InRooms, admin: Admin) -> Pool:
    """Change what a pool accepts. Its base model stays: add another pool for another base.

    A null changes nothing, but for `store_mount` and `max_cpu_loras`, which it ends.
    """
    given = body.model_dump(exclude_unset=True)
    config = given.pop("base_model_config", None)
    aliases = given.pop("base_model_aliases", None)
    changes = {k: v for k, v in given.items() if v is not None or k in _ENDED_BY_NULL}
    async with rooms.db.begin() as session:
        base = (await pools.show(session, name)).base
        if config is not None or aliases is not None:
            known = base.config if config is None else config
            also = base.aliases if aliases is None else tuple(aliases)
            await pools.put_base(session, BaseModel(base.name, known, also))
        view = await pools.update(session, name, **changes)
    await rooms.publish.settle()
    return _pool(rooms, view)


@router.delete(
    "/{name}", summary="Delete a pool", response_model=Deleted, responses=refusals(404, 409)
)
async def delete(name: Name, rooms: InRooms, admin: Admin) -> Deleted:
    """Remove a pool and forget its replicas. 409 while adapters need it."""
    async with rooms.db.begin() as session:
        await pools.delete(session, name)
    await rooms.publish.settle()
    return Deleted(id=name, object="pool")


@router.get(
    "/{name}/replicas",
    summary="List a pool's replicas",
    response_model=Replicas,
    responses=refusals(404),
)
async def list_replicas(name: Name, rooms: InRooms, admin: Admin) -> Replicas:
    """The replicas of one pool and what they are doing now."""
    async with rooms.db.read() as session:
        views = await pools.list_replicas(session, name)
    return Replicas(data=[replica_json(rooms, view) for view in views])


@router.post(
    "/{name}/replicas",
    summary="Add a replica",
    status_code=201,
    response_model=Replica,
    responses=refusals(404, 409, 422),
)
async def add_replica(name: Name, body: NewReplica, rooms: InRooms, admin: Admin) -> Replica:
    """Add a server to a pool. It takes requests once its first health probe succeeds."""
    async with rooms.db.begin() as session:
        view = await pools.add_replica(
            session, rooms.clock, pool=name, url=body.url, api_key=body.secret()
        )
    await rooms.publish.settle()
    return replica_json(rooms, view)


def _pool(rooms: Rooms, view: pools.PoolView) -> Pool:
    pool = view.pool
    return Pool(
        name=pool.name,
        base_model=pool.base_model,
        base_model_aliases=list(view.base.aliases),
        base_model_known=view.base.config is not None,
        served_name=pool.served_name,
        max_lora_rank=pool.max_lora_rank,
        max_loras=pool.max_loras,
        max_cpu_loras=pool.max_cpu_loras,
        max_inflight=pool.max_inflight,
        max_queue=pool.max_queue,
        store_mount=pool.store_mount,
        dialect=pool.dialect,
        declared=view.declared,
        created_at=view.created_at,
        replicas=[replica_json(rooms, replica) for replica in view.replicas],
    )
