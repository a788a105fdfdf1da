"""What the routes of files, uploads and fine-tuning share.

What comes in: nothing. What goes out: who may call them and what they see, how they answer a
request that does not fit, how OpenAI writes a time. No verbs.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import Depends, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import Field

from app.api.admin.shapes import Body
from app.api.auth import require
from app.api.errors import invalid
from app.domain import Principal, Scope

Trainer = Annotated[Principal, Depends(require(Scope.TRAINING, Scope.ADMIN))]


def owner_of(caller: Principal) -> str | None:
    """Whose files and jobs the caller sees: its own, or everybody's (None) for an admin."""
    return None if Scope.ADMIN in caller.scopes else caller.key_id


class OpenAiRoute(APIRoute):
    """A route that answers 400 where FastAPI has 422: `openai.BadRequestError`, as at OpenAI."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                return await handle(request)
            except RequestValidationError as exc:
                raise invalid(exc) from exc

        return answer


class ExpiresAfter(Body):
    """How long a file is to live."""

    anchor: Literal["created_at"] = Field(description="From when the time counts.")
    seconds: int = Field(description="An hour to 30 days.", examples=[86400])


def unix(moment: datetime) -> int:
    """Seconds since 1970, whole, as OpenAI writes times."""
    return int(moment.timestamp())


def unix_or_none(moment: datetime | None) -> int | None:
    return None if moment is None else unix(moment)
