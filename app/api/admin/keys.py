"""/admin/keys: who may call, with which scopes, for which models, until when.

What comes in: what a key may do. What goes out: keys without their secrets; a new one's secret,
once.
"""

from __future__ import annotations

import logging
from datetime import datetime, timedelta
from typing import Annotated, Literal, Self

from fastapi import APIRouter, Path, Query
from pydantic import Field, model_validator

from app.api.admin.shapes import Admin, Answer, Body, Deleted, InRooms, Moment, refusals
from app.control import keys
from app.domain import Scope
from app.errors import Conflict
from app.telemetry import Event, log

logger = logging.getLogger(__name__)
router = APIRouter(prefix="/keys", tags=["Keys"])

#: A thousand years: beyond it a date does not fit.
_LONGEST_S = 86_400 * 365_000


class Key(Answer):
    """A key, without its secret."""

    id: str = Field(examples=["key-2f61b90c4d1e"])
    name: str = Field(examples=["support-team"])
    scopes: list[Scope] = Field(examples=[["inference"]])
    models: list[str] | None = Field(
        description="Globs of the models it may use; null: all.", examples=[["support-*"]]
    )
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None


class CreatedKey(Key):
    """A new key, and its secret."""

    secret: str = Field(
        description="What clients send. Shown here and never again.", examples=["lg-7Qd1…"]
    )


class Keys(Answer):
    """A page of keys by id."""

    object: Literal["list"] = "list"
    data: list[Key]
    has_more: bool
    next_after: str | None = Field(description="`after` for the next page.")


class NewKey(Body):
    """What a new key may do."""

    name: str = Field(description="Whose it is, for people.", examples=["support-team"])
    scopes: list[Scope] = Field(
        [Scope.INFERENCE],
        min_length=1,
        description="`inference` to use models, `training` to make them, `admin` to change the "
        "gateway and to see everybody's files and jobs.",
    )
    models: list[str] | None = Field(
        None,
        min_length=1,
        description="Globs of the models it may use; all when left out. One that covers an "
        "adapter's name covers its versions and aliases.",
        examples=[["support-*"]],
    )
    expires_in_s: int | None = Field(
        None, gt=0, le=_LONGEST_S, description="How long it works, in seconds.", examples=[86400]
    )
    expires_at: Moment | None = Field(None, description="Or until when.")

    @model_validator(mode="after")
    def _one_expiry(self) -> Self:
        if self.expires_in_s is not None and self.expires_at is not None:
            raise ValueError("give `expires_in_s` or `expires_at`")
        return self

    def expiry(self, now: datetime) -> datetime | None:
        if self.expires_in_s is None:
            return self.expires_at
        return now + timedelta(seconds=self.expires_in_s)


@router.post(
    "",
    summary="Create a key",
    status_code=201,
    response_model=CreatedKey,
    responses=refusals(409, 422),
)
async def create(body: NewKey, rooms: InRooms, admin: Admin) -> CreatedKey:
    """Create a key. Its `secret` is in this answer only; the gateway keeps a hash of it.

    The first key ends anonymous use on loopback, so it must have the scope `admin`.
    """
    anonymous = rooms.snapshots.current.anonymous is admin
    if anonymous and Scope.ADMIN not in body.scopes:
        raise Conflict(
            "The first key ends anonymous use, so nobody could administer this gateway: "
            "create one with the scope 'admin' first.",
            param="scopes",
        )
    async with rooms.db.begin() as session:
        view, secret = await keys.create(
            session,
            rooms.clock,
            name=body.name,
            scopes=body.scopes,
            models=body.models,
            expires_at=body.expiry(rooms.clock.now()),
        )
    fields = {"key": view.id, "scopes": view.scopes, "by": admin.key_id}
    log(logger, logging.INFO, Event.KEY_CREATED, **fields)
    await rooms.publish.settle()
    return CreatedKey(**Key.model_validate(view).model_dump(), secret=secret)


@router.get("", summary="List keys", response_model=Keys, responses=refusals(422))
async def list_keys(
    rooms: InRooms,
    admin: Admin,
    limit: Annotated[int, Query(ge=1, le=keys.MAX_PAGE, description="At most so many.")] = 100,
    after: Annotated[
        str | None, Query(description="Ids after this one: `next_after` of the page before.")
    ] = None,
    revoked: Annotated[bool, Query(description="Revoked ones too.")] = True,
) -> Keys:
    """Keys by id, without their secrets."""
    async with rooms.db.read() as session:
        page = await keys.list_(session, limit=limit, after=after, revoked=revoked)
    return Keys(
        data=[Key.model_validate(view) for view in page.data],
        has_more=page.has_more,
        next_after=page.next_after,
    )


@router.delete("/{id}", summary="Revoke a key", response_model=Deleted, responses=refusals(404))
async def revoke(
    id: Annotated[str, Path(description="The key's id.", examples=["key-2f61b90c4d1e"])],
    rooms: InRooms,
    admin: Admin,
) -> Deleted:
    """End a key for good, from the next request on. It stays in the list as revoked."""
    async with rooms.db.begin() as session:
        await keys.revoke(session, rooms.clock, id)
    log(logger, logging.INFO, Event.KEY_REVOKED, key=id, by=admin.key_id)
    await rooms.publish.settle()
    return Deleted(id=id, object="key")
