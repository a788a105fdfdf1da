"""/admin/tasks and /admin/usage: what the background does, and what was used.

What comes in: the driver's statuses and the registry's hourly sums. What goes out: the same, as
JSON.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import Field

from app.api.admin.shapes import Admin, Answer, InRooms, Moment, refusals
from app.control import usage

router = APIRouter(tags=["Status"])


class Task(Answer):
    """One background task."""

    name: str = Field(examples=["publish"])
    period_s: float = Field(description="How often it runs by itself.", examples=[0.25])
    running: bool
    runs: int = Field(examples=[120])
    failures: int = Field(description="Runs that failed.", examples=[0])
    last_started_at: datetime | None
    last_duration_s: float | None = Field(examples=[0.0021])
    last_error: str | None = Field(description="Why the last run failed, if it did.")
    details: dict[str, Any] = Field(
        description="What the last good run reported.", examples=[{"revision": 42}]
    )


class Tasks(Answer):
    """Every background task."""

    object: Literal["list"] = "list"
    data: list[Task]


class UsageHour(Answer):
    """What one key asked of one model in one hour."""

    hour: datetime = Field(description="When the hour began.")
    key_id: str = Field(examples=["key-2f61b90c4d1e"])
    model: str = Field(description="The version that answered.", examples=["support-bot@3"])
    requests: int = Field(examples=[310])
    prompt_tokens: int = Field(examples=[91023])
    completion_tokens: int = Field(examples=[12044])


class UsageHours(Answer):
    """Hourly sums, the newest hour first."""

    object: Literal["list"] = "list"
    data: list[UsageHour]


@router.get("/tasks", summary="Background tasks", response_model=Tasks, responses=refusals())
async def tasks(rooms: InRooms, admin: Admin) -> Tasks:
    """What each background task of this gateway last did, and what went wrong."""
    return Tasks(data=[Task.model_validate(status) for status in rooms.driver.statuses()])


@router.get("/usage", summary="Usage", response_model=UsageHours, responses=refusals(422))
async def used(
    rooms: InRooms,
    admin: Admin,
    since: Annotated[
        Moment | None, Query(description="From this time on, with its offset.")
    ] = None,
    until: Annotated[Moment | None, Query(description="Before this time.")] = None,
    key_id: Annotated[str | None, Query(description="Only this key.")] = None,
    model: Annotated[str | None, Query(description="Only this model, such as `bot@3`.")] = None,
    limit: Annotated[int, Query(ge=1, le=usage.MAX_PAGE, description="At most so many.")] = 1000,
) -> UsageHours:
    """Requests and tokens by hour, key and model; up to a few seconds old."""
    async with rooms.db.read() as session:
        views = await usage.list_(
            session, since=since, until=until, key_id=key_id, model=model, limit=limit
        )
    return UsageHours(
        data=[
            UsageHour(
                hour=view.hour,
                key_id=view.key_id,
                model=view.model,
                requests=view.requests,
                prompt_tokens=view.usage.prompt_tokens,
                completion_tokens=view.usage.completion_tokens,
            )
            for view in views
        ]
    )
