"""The ASGI app a server runs: inference paths go straight to serving, the rest to FastAPI.

What comes in: every request of an ASGI server. What goes out: nothing of its own.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from app.api.asgi import AsgiExchange
from app.api.inference import PATHS, Inference

Asgi = Callable[
    [dict[str, Any], Callable[[], Awaitable[Any]], Callable[[Any], Awaitable[None]]],
    Awaitable[None],
]


class FrontDoor:
    """Wraps the FastAPI app `rest`; its lifespan opens the rooms for both."""

    def __init__(self, rest: Asgi, inference: Inference) -> None:
        self.rest = rest
        self.inference = inference

    async def __call__(
        self,
        scope: dict[str, Any],
        receive: Callable[[], Awaitable[Any]],
        send: Callable[[Any], Awaitable[None]],
    ) -> None:
        if scope["type"] == "http" and scope["path"] in PATHS:
            async with AsgiExchange(scope, receive, send) as exchange:
                await self.inference.answer(exchange, scope["state"]["rooms"])
        else:
            await self.rest(scope, receive, send)
