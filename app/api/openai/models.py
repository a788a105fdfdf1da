"""/v1/models and /v1/models/{id}: what this key may put in `model`; DELETE for what it trained.

What comes in: the snapshot and who is asking. What goes out: OpenAI model objects for bases,
adapters, their versions and aliases; `parent` is the base, as in vLLM. Paths, digests and
replicas stay inside.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import islice
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Depends, Path, Request
from fastapi.responses import Response

from app.api.admin.adapters import delete_adapter
from app.api.admin.shapes import Deleted, InRooms, refusals
from app.api.auth import require
from app.api.openai.shapes import Trainer
from app.control.fine_tune_jobs import maker_of
from app.domain import Principal, Scope
from app.errors import Conflict, Forbidden, ModelNotFound, NotFound
from app.serving.resolve import allowed, names_of, resolve
from app.serving.snapshot import Snapshot

#: How much is kept ready of the newest snapshot's lists, of which each allow-list has its own.
_KEPT_BYTES = 64 << 20
_BATCH = 1000
_JSON = "application/json"

Caller = Annotated[Principal, Depends(require(Scope.INFERENCE))]


class Model(msgspec.Struct, gc=False):
    """OpenAI's model object, and the base an adapter belongs to."""

    id: str
    created: int
    parent: str | None
    object: str = "model"
    owned_by: str = "loragate"


class Catalogue:
    """The list as finished JSON, made once per snapshot and allow-list.

    With 100,000 adapters it is tens of megabytes: it is made on a thread, and not twice.
    """

    def __init__(self) -> None:
        self._number = -1
        self._lists: dict[tuple[str, ...] | None, bytes] = {}
        self._making = asyncio.Lock()

    async def listing(self, snapshot: Snapshot, principal: Principal) -> bytes:
        async with self._making:
            if snapshot.number != self._number:
                self._number = snapshot.number
                self._lists.clear()
            found = self._lists.get(principal.models)
            if found is None:
                found = await asyncio.to_thread(_listed, snapshot, principal)
                if sum(map(len, self._lists.values())) + len(found) > _KEPT_BYTES:
                    self._lists.clear()
                self._lists[principal.models] = found
            return found


router = APIRouter(prefix="/v1/models", tags=["Models"])

_TUNED = "ft:Llama-3.1-8B-Instruct:pirate:k3v9x2ab"
_MODEL = {
    "id": "support-bot",
    "created": 1762300800,
    "parent": "meta-llama/Llama-3.1-8B-Instruct",
    "object": "model",
    "owned_by": "loragate",
}
_LIST: dict[str, Any] = {
    "data": [
        {**_MODEL, "id": "meta-llama/Llama-3.1-8B-Instruct", "created": 0, "parent": None},
        *({**_MODEL, "id": f"support-bot{which}"} for which in ("", "@1", "@2", ":prod")),
    ],
    "object": "list",
}


async def _catalogue(request: Request) -> Catalogue:
    """The catalogue of this app: another gateway in the same process has its own."""
    state = request.app.state
    if not hasattr(state, "catalogue"):
        state.catalogue = Catalogue()
    kept: Catalogue = state.catalogue
    return kept


Kept = Annotated[Catalogue, Depends(_catalogue)]


@router.get(
    "",
    summary="List models",
    responses={**refusals(), 200: {"content": {_JSON: {"example": _LIST}}}},
    response_class=Response,
)
async def list_models(request: Request, caller: Caller, catalogue: Kept) -> Response:
    """Every name this key may put in `model`.

    Bases, adapters, each version (`name@3`) and each alias (`name:prod`). `parent` is the
    base model of an adapter and null for a base.
    """
    snapshot = request.state.rooms.snapshots.current
    return Response(await catalogue.listing(snapshot, caller), media_type=_JSON)


@router.delete(
    "/{model:path}",
    summary="Delete a fine-tuned model",
    response_model=Deleted,
    responses=refusals(400, 404, 409),
)
async def delete_model(
    model: Annotated[str, Path(description="Its name, as the job says.", examples=[_TUNED])],
    rooms: InRooms,
    caller: Trainer,
) -> Deleted:
    """Delete a model that a fine-tuning job of this key made, with its checkpoints.

    An admin may delete anyone's, and any adapter. Requests under way finish.
    """
    async with rooms.db.read() as session:
        job = await maker_of(session, model)
    if job is not None and not job.status.terminal:
        raise Conflict(
            f"Job {job.id!r}, which makes {model!r}, is {job.status}: cancel it first.",
            param="model",
        )
    if Scope.ADMIN not in caller.scopes and (job is None or job.key_id != caller.key_id):
        resolve(rooms.snapshots.current, model, caller)
        raise Forbidden(
            f"{model!r} was not made by a fine-tuning job of the key {caller.name!r}.",
            param="model",
        )
    try:
        await delete_adapter(rooms, caller, model)
    except NotFound as exc:
        raise ModelNotFound(f"There is no fine-tuned model {model!r}.") from exc
    return Deleted(id=model, object="model")


@router.get(
    "/{model:path}",
    summary="Retrieve a model",
    responses={**refusals(404), 200: {"content": {_JSON: {"example": _MODEL}}}},
    response_class=Response,
)
async def retrieve_model(model: str, request: Request, caller: Caller) -> Response:
    """One model, by any name that inference would accept."""
    snapshot: Snapshot = request.state.rooms.snapshots.current
    route = resolve(snapshot, model, caller)
    if route.version is None:
        found = Model(model, 0, None)
    else:
        created_at = snapshot.adapters[route.version.adapter].created_at
        found = Model(model, int(created_at.timestamp()), route.base_model)
    return Response(msgspec.json.encode(found), media_type=_JSON)


def _listed(snapshot: Snapshot, principal: Principal) -> bytes:
    models = _models(snapshot, principal)
    # Piece by piece: encoding all of it at once would hold the interpreter from the event loop.
    pieces = []
    while batch := list(islice(models, _BATCH)):
        pieces.append(msgspec.json.encode(batch)[1:-1])
    return b'{"object":"list","data":[%b]}' % b",".join(pieces)


def _models(snapshot: Snapshot, principal: Principal) -> Iterator[Model]:
    for base in snapshot.base_pools:
        if allowed(principal, base):
            # When a base was made is not known here, and OpenAI's field is not optional.
            yield Model(base, 0, None)
    for adapter in snapshot.adapters.values():
        created = int(adapter.created_at.timestamp())
        # A glob that covers the adapter covers all its names; the usual case, asked once.
        whole = allowed(principal, adapter.name)
        for name in names_of(adapter):
            if whole or allowed(principal, name):
                yield Model(name, created, adapter.base_model)
