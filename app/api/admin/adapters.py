"""/admin/adapters: register weights, list them, delete them.

What comes in: JSON or an archive. What goes out: adapters and versions as JSON. A change is
committed first and then waited for until this gateway serves it, so that the next request with
the new name finds it. What it must not know: tables, archives, the data plane.
"""

from __future__ import annotations

import logging
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request, Response

from app.api.admin.adapter_json import (
    Adapter,
    Adapters,
    Registered,
    Version,
    adapter_json,
    registered_json,
    version_json,
)
from app.api.admin.shapes import Admin, Deleted, InRooms, refusals
from app.api.admin.uploads import (
    ARCHIVES,
    NewAdapter,
    NewVersion,
    archive_of,
    is_archive,
    metadata_of,
    read_json,
)
from app.api.rooms import Rooms
from app.control import adapters
from app.control.registration import Registration, register
from app.domain import Principal
from app.errors import InvalidRequest
from app.telemetry import Event, log

logger = logging.getLogger(__name__)
router = APIRouter(prefix="/adapters", tags=["Adapters"])


Name = Annotated[str, Path(description="The adapter's name.", examples=["support-bot"])]
Number = Annotated[int, Path(ge=1, description="The version's number.", examples=[3])]
OfBase = Annotated[
    str | None, Query(description="With an archive: the base the weights were trained on.")
]
ToAlias = Annotated[str | None, Query(description="With an archive: an alias to point at it too.")]
WithMetadata = Annotated[
    str | None,
    Query(
        description="With an archive: a JSON object worth keeping with it.",
        examples=['{"team": "support"}'],
    ),
]


def _takes(model: str) -> dict[str, Any]:
    """The request body of a registration, which FastAPI must not read into memory itself."""
    archive = {"schema": {"type": "string", "format": "binary"}}
    schema = {"$ref": f"#/components/schemas/{model}"}
    examples = {
        "folder": {
            "summary": "A folder on the gateway's machine",
            "value": {"name": "support-bot", "source": {"path": "/adapters/support-bot"}},
        },
        "hub": {
            "summary": "A Hugging Face repository",
            "value": {
                "name": "support-bot",
                "source": {"hf_repo": "acme/support-bot-lora", "revision": "main"},
                "alias": "prod",
            },
        },
    }
    if model == NewVersion.__name__:
        for example in examples.values():
            del example["value"]["name"]  # type: ignore[attr-defined]
    return {
        "requestBody": {
            "required": True,
            "description": "JSON, or a tar, tar.gz or zip of adapter_config.json and "
            "adapter_model.safetensors.",
            "content": {
                "application/json": {"schema": schema, "examples": examples},
                **dict.fromkeys(dict.fromkeys(ARCHIVES.values()), archive),
            },
        }
    }


@router.post(
    "",
    summary="Register an adapter",
    status_code=201,
    response_model=Registered,
    openapi_extra=_takes("NewAdapter"),
    responses=refusals(400, 404, 409, 413, 422, 502),
)
async def create(
    request: Request,
    rooms: InRooms,
    admin: Admin,
    name: Annotated[str | None, Query(description="With an archive: the adapter's name.")] = None,
    base_model: OfBase = None,
    alias: ToAlias = None,
    metadata: WithMetadata = None,
) -> Registered:
    """Create an adapter from weights, which become its version 1.

    The weights are checked against the base and the pool's limits before any server sees them;
    what is wrong is said in one 422 with the field, what was found, and what is allowed.
    """
    if is_archive(request):
        if name is None:
            raise InvalidRequest("An archive needs ?name= in the URL.", param="name")
        source = archive_of(request, rooms.settings.max_adapter_bytes)
        wanted = Registration(
            name,
            source,
            base_model=base_model,
            alias=alias,
            metadata=metadata_of(metadata),
            create=True,
            by=admin.key_id,
        )
    else:
        given = await read_json(request, NewAdapter)
        wanted = _from_json(given.name, given, admin, create=True)
    return registered_json(await register(rooms, wanted))


@router.post(
    "/{name}/versions",
    summary="Register a new version",
    status_code=201,
    response_model=Registered,
    openapi_extra=_takes("NewVersion"),
    responses={
        200: {"model": Registered, "description": "The newest version has these weights."},
        **refusals(400, 404, 409, 413, 422, 502),
    },
)
async def create_version(
    name: Name,
    request: Request,
    response: Response,
    rooms: InRooms,
    admin: Admin,
    base_model: OfBase = None,
    alias: ToAlias = None,
    metadata: WithMetadata = None,
) -> Registered:
    """Add weights to an adapter as its next version, and move `latest` to it.

    Requests under way keep the version they began with. The same weights as the newest version
    answer 200 with that version.
    """
    if is_archive(request):
        source = archive_of(request, rooms.settings.max_adapter_bytes)
        wanted = Registration(
            name,
            source,
            base_model=base_model,
            alias=alias,
            metadata=metadata_of(metadata),
            create=False,
            by=admin.key_id,
        )
    else:
        given = await read_json(request, NewVersion)
        wanted = _from_json(name, given, admin, create=False)
    found = await register(rooms, wanted)
    if not found.created:
        response.status_code = 200
    return registered_json(found)


@router.get("", summary="List adapters", response_model=Adapters, responses=refusals(422))
async def list_adapters(
    rooms: InRooms,
    admin: Admin,
    limit: Annotated[int, Query(ge=1, le=adapters.MAX_PAGE, description="At most so many.")] = 100,
    after: Annotated[
        str | None, Query(description="Names after this one: `next_after` of the page before.")
    ] = None,
    base_model: Annotated[str | None, Query(description="Only adapters of this base.")] = None,
    prefix: Annotated[str | None, Query(description="Only names that begin so.")] = None,
) -> Adapters:
    """Adapters by name, a page at a time."""
    async with rooms.db.read() as session:
        page = await adapters.list_(
            session, limit=limit, after=after, base_model=base_model, prefix=prefix
        )
    return Adapters(
        data=[adapter_json(view) for view in page.data],
        has_more=page.has_more,
        next_after=page.next_after,
    )


@router.get("/{name}", summary="Show an adapter", response_model=Adapter, responses=refusals(404))
async def show(name: Name, rooms: InRooms, admin: Admin) -> Adapter:
    """One adapter with all its versions and aliases."""
    async with rooms.db.read() as session:
        return adapter_json(await adapters.show(session, name))


@router.get(
    "/{name}/versions/{number}",
    summary="Show a version",
    response_model=Version,
    responses=refusals(404),
)
async def show_version(name: Name, number: Number, rooms: InRooms, admin: Admin) -> Version:
    """One version: what the weights are and where they came from."""
    async with rooms.db.read() as session:
        return version_json(await adapters.show_version(session, name, number))


@router.delete(
    "/{name}", summary="Delete an adapter", response_model=Deleted, responses=refusals(404)
)
async def delete(name: Name, rooms: InRooms, admin: Admin) -> Deleted:
    """Delete an adapter with every version and alias.

    New requests get 404; those under way finish. Its files go once no replica can re-read them.
    Version numbers are never used again, not even by a new adapter of the same name.
    """
    await delete_adapter(rooms, admin, name)
    return Deleted(id=name, object="adapter")


@router.delete(
    "/{name}/versions/{number}",
    summary="Delete a version",
    response_model=Deleted,
    responses=refusals(404, 409),
)
async def delete_version(name: Name, number: Number, rooms: InRooms, admin: Admin) -> Deleted:
    """Delete one version. `latest` moves to the newest one left.

    409 while another alias points at it, or when it is the only version.
    """
    async with rooms.db.begin() as session:
        await adapters.delete_version(session, rooms.clock, adapter=name, number=number)
    await _deleted(rooms, admin, f"{name}@{number}")
    return Deleted(id=f"{name}@{number}", object="adapter.version")


async def delete_adapter(rooms: Rooms, admin: Principal, name: str) -> None:
    """Delete an adapter, and return when this gateway no longer serves it."""
    async with rooms.db.begin() as session:
        await adapters.delete(session, rooms.clock, name)
    await _deleted(rooms, admin, name)


async def _deleted(rooms: Rooms, admin: Principal, what: str) -> None:
    log(logger, logging.INFO, Event.ADAPTER_DELETED, adapter=what, by=admin.key_id)
    await rooms.publish.settle()
    rooms.reap.wake()


def _from_json(name: str, given: NewVersion, admin: Principal, *, create: bool) -> Registration:
    return Registration(
        name,
        given.source.source(),
        base_model=given.base_model,
        alias=given.alias,
        metadata=given.metadata or {},
        create=create,
        by=admin.key_id,
    )
