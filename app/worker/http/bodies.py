"""Request bodies: bytes in, a typed request out."""

from __future__ import annotations

import asyncio
from typing import TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError
from starlette.requests import Request

from app.errors import BodyTooLarge
from app.worker.errors import Malformed
from app.worker.http.faults import malformed

# Parsing this much takes a few milliseconds; more is done beside the event loop.
INLINE_BYTES = 64 << 10

M = TypeVar("M", bound=BaseModel)


async def read(request: Request, shape: type[M] | TypeAdapter[M], limit: int) -> M:
    """The body as `shape`. Only JSON is read."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise Malformed("Unsupported Media Type: Only 'application/json' is allowed")
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise BodyTooLarge(f"The body is larger than {limit} bytes.")
        chunks.append(chunk)
    body = b"".join(chunks)
    adapter = shape if isinstance(shape, TypeAdapter) else TypeAdapter(shape)
    try:
        if len(body) <= INLINE_BYTES:
            return adapter.validate_json(body)
        return await asyncio.to_thread(adapter.validate_json, body)
    except ValidationError as exc:
        raise malformed(exc) from exc
