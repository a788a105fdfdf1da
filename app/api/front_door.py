"""The ASGI app a server runs: inference paths go straight to serving, the rest to FastAPI.

What comes in: every request of an ASGI server. What goes out: nothing of its own.
"""

from __future__ import annotations

import traceback
from collections.abc import Awaitable, Callable
from typing import Any

from app.api.asgi import AsgiExchange
from app.api.inference import PATHS, Inference
from app.errors import ConfigurationError

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
        elif scope["type"] == "lifespan":
            await self._live(scope, receive, send)
        else:
            await self.rest(scope, receive, send)

    async def _live(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """The lifespan of `rest`. A setting that is wrong is said in one line, not a traceback."""

        async def unless_failed(message: dict[str, Any]) -> None:
            if message["type"] != "lifespan.startup.failed":
                await send(message)

        try:
            await self.rest(scope, receive, unless_failed)
        except ConfigurationError as exc:
            await send({"type": "lifespan.startup.failed", "message": str(exc)})
        except BaseException:
            await send({"type": "lifespan.startup.failed", "message": traceback.format_exc()})
            raise
