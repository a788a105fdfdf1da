"""What every admin route shares: the caller it lets in, its error answers, small shapes.

What comes in: nothing. What goes out: pydantic bases and OpenAPI fragments. No verbs.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from fastapi import Depends, Request
from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field

from app.api.auth import require
from app.api.rooms import Rooms
from app.domain import Principal, Scope


class Body(BaseModel):
    """A request body: a field nobody knows is a mistake worth telling."""

    model_config = ConfigDict(extra="forbid", str_max_length=4096)


class Answer(BaseModel):
    """A response body."""

    model_config = ConfigDict(from_attributes=True)


def _in_utc(moment: datetime) -> datetime:
    try:
        return moment.astimezone(UTC)
    except OverflowError as exc:
        raise ValueError("a time that UTC has no date for") from exc


#: A time with its offset, as UTC.
Moment = Annotated[AwareDatetime, AfterValidator(_in_utc)]


class Deleted(Answer):
    """What was deleted."""

    id: str = Field(examples=["support-bot"])
    object: str = Field(examples=["adapter"])
    deleted: Literal[True] = True


class Error(Answer):
    """OpenAI's error object."""

    message: str = Field(examples=["There is no adapter 'support-bot'."])
    type: str = Field(examples=["invalid_request_error"])
    param: str | None = Field(examples=["name"])
    code: str | None = Field(examples=["not_found"])


class ErrorEnvelope(Answer):
    """How every error is answered; `code` is stable, `message` says the way out."""

    error: Error


async def rooms_of(request: Request) -> Rooms:
    rooms: Rooms = request.state.rooms
    return rooms


InRooms = Annotated[Rooms, Depends(rooms_of)]
Admin = Annotated[Principal, Depends(require(Scope.ADMIN))]


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The error answers of a route: these and every admin route's. `openapi` fills them in."""
    return {status: {"model": ErrorEnvelope} for status in sorted({401, 403, *statuses})}
