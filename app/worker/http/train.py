"""/train/v1: docs/training-protocol.md over HTTP.

What comes in: msgpack bodies. What goes out: msgpack, or an error as JSON. It must not know: how
ops are ordered, how an engine trains.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
from collections.abc import Callable
from typing import TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from app.errors import (
    BodyTooLarge,
    Conflict,
    Fenced,
    InvalidRequest,
    LoragateError,
    NotFound,
    RequestError,
    RunLost,
    StorageUnavailable,
    TrainerBusy,
    Unauthenticated,
)
from app.ops import (
    MAX_WAIT_S,
    MEDIA_TYPE,
    PREFIX,
    Exchange,
    Op,
    OpenRun,
    RenderReply,
    RenderRequest,
    Submit,
)
from app.worker.dialect.render import render
from app.worker.http.bodies import INLINE_BYTES
from app.worker.http.presence import CLIENT_CLOSED_REQUEST, ClientGone, while_present
from app.worker.http.training import training
from app.worker.trainers.oplog import Waiting

logger = logging.getLogger(__name__)
T = TypeVar("T")

#: Largest body of a training request. One op may hold a whole batch, so it is not max_body_bytes.
MAX_BODY_BYTES = 256 << 20

METHODS = ["GET", "PUT", "POST", "DELETE"]
STATUS: dict[type[LoragateError], int] = {
    LoragateError: 500,
    RequestError: 400,
    Unauthenticated: 401,
    NotFound: 404,
    RunLost: 404,
    Conflict: 409,
    Fenced: 409,
    BodyTooLarge: 413,
    TrainerBusy: 429,
    StorageUnavailable: 507,
}

_encode = msgspec.msgpack.Encoder().encode
_submit = msgspec.msgpack.Decoder(Submit)
_exchange = msgspec.msgpack.Decoder(Exchange)
_open = msgspec.msgpack.Decoder(OpenRun)
_render = msgspec.msgpack.Decoder(RenderRequest)


def training_routes(api_key: str | None, *, on: bool) -> Mount:
    """The routes below /train/v1. With a key every request must show it; without a trainer every
    one is told so.
    """
    routes = [
        Route("/info", _info, methods=["GET"]),
        Route("/render", _rendering, methods=["POST"]),
        Route("/runs/{run}", _opening, methods=["PUT"]),
        Route("/runs/{run}", _deleting, methods=["DELETE"]),
        Route("/runs/{run}/ops", _exchanging, methods=["POST"]),
        Route("/runs/{run}/ops", _cancelling, methods=["DELETE"]),
        Route("/runs/{run}/ops/{seq:int}", _submitting, methods=["PUT"]),
        Route("/runs/{run}/ops/{seq:int}", _outcome, methods=["GET"]),
        Route("/runs/{run}/unload", _unloading, methods=["POST"]),
        Route("/runs/{run}/files/{name}/{file}", _file, methods=["GET"]),
    ]
    app = Starlette(
        routes=routes if on else [Route("/{path:path}", _off, methods=METHODS)],
        middleware=[Middleware(KeyCheck, api_key=api_key)],
        exception_handlers={
            LoragateError: answer,
            HTTPException: _no_route,
            ClientGone: _gone,
            Exception: answer,
        },
    )
    return Mount(PREFIX, app=app)


class LargePieces(FileResponse):
    """A file in few pieces: each is a change of threads, and an adapter has some megabytes."""

    chunk_size = 1 << 20


class KeyCheck:
    """Lets in who shows the key, if there is one."""

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self._app = app
        self._wanted = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._wanted is not None and not hmac.compare_digest(_shown(scope), self._wanted):
            missing = Unauthenticated("This worker wants its key (LORAGATE_WORKER_API_KEY).")
            await _response(missing)(scope, receive, send)
            return
        await self._app(scope, receive, send)


async def answer(request: Request, exc: Exception) -> Response:
    """Starlette's handler for every exception a route lets out."""
    if not isinstance(exc, LoragateError):
        logger.error("training request failed", exc_info=exc)
        exc = LoragateError("The worker failed on this request; its log says why.")
    return _response(exc)


async def _info(request: Request) -> Response:
    return _packed(await training(request).runs.info())


async def _rendering(request: Request) -> Response:
    world = training(request)
    asked = await _read(request, _render.decode)
    conversations = await world.aside(lambda: render(asked, world.tokens))
    return _packed(RenderReply(conversations))


async def _opening(request: Request) -> Response:
    asked = await _read(request, _open.decode)
    return _packed(await training(request).runs.open(_run(request), asked))


async def _deleting(request: Request) -> Response:
    await training(request).runs.delete(_run(request), fence=_number(request, "fence", int))
    return Response(status_code=204)


async def _cancelling(request: Request) -> Response:
    fence = _number(request, "fence", int)
    return _packed(await training(request).runs.cancel(_run(request), fence=fence))


async def _submitting(request: Request) -> Response:
    seq: int = request.path_params["seq"]
    asked, new = await _read(request, lambda body: _received(seq, body))
    training(request).runs.submit(_run(request), new, fence=asked.fence, acked=asked.acked)
    return Response(status_code=202)


async def _exchanging(request: Request) -> Response:
    asked, new = await _read(request, _exchanged)
    run, runs = _run(request), training(request).runs
    for each in new:
        runs.submit(run, each, fence=asked.fence, acked=asked.acked)
    if asked.wanted is None:
        return Response(_outcomes([]), media_type=MEDIA_TYPE)
    found = await _found(request, *asked.wanted, fence=asked.fence, wait_s=asked.wait_s)
    return Response(_outcomes(found), media_type=MEDIA_TYPE)


async def _outcome(request: Request) -> Response:
    wait_s = _number(request, "wait_s", float) or 0.0
    fence = _number(request, "fence", int)
    seq: int = request.path_params["seq"]
    found = await _found(request, seq, seq, fence=fence, wait_s=wait_s)
    if not found:
        return Response(status_code=204)
    return Response(found[0], media_type=MEDIA_TYPE)


async def _found(
    request: Request, first: int, last: int, *, fence: int | None, wait_s: float
) -> list[bytes]:
    """The outcomes of some ops; whoever waits for the last one may leave."""
    run, runs = _run(request), training(request).runs
    found = await runs.outcomes(run, first, last, fence=fence, wait_s=0)
    wait_s = min(wait_s, MAX_WAIT_S)
    if len(found) > last - first or wait_s <= 0:
        return found
    waiting = runs.outcomes(run, first, last, fence=fence, wait_s=wait_s)
    return await while_present(request.receive, waiting)


async def _unloading(request: Request) -> Response:
    await training(request).runs.unload(_run(request), fence=_number(request, "fence", int))
    return Response(status_code=204)


async def _file(request: Request) -> Response:
    name, file = request.path_params["name"], request.path_params["file"]
    return LargePieces(
        await training(request).runs.file(_run(request), name, file),
        media_type="application/octet-stream",
    )


async def _off(request: Request) -> Response:
    raise NotFound("This worker does not train: LORAGATE_WORKER_TRAINER is off.")


async def _no_route(request: Request, exc: Exception) -> Response:
    if not isinstance(exc, HTTPException):
        raise exc
    body = _envelope("not_found", f"{request.method} {request.url.path}: {exc.detail}")
    return JSONResponse(body, exc.status_code, headers=exc.headers)


async def _gone(request: Request, exc: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _read(request: Request, parse: Callable[[bytes], T]) -> T:
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > MAX_BODY_BYTES:
            raise BodyTooLarge(f"The body is larger than {MAX_BODY_BYTES} bytes.")
        chunks.append(chunk)
    body = b"".join(chunks)
    try:
        if size <= INLINE_BYTES:
            return parse(body)
        return await asyncio.to_thread(parse, body)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise InvalidRequest(
            f"The body is not the msgpack map that {PREFIX} wants here: {exc}"
        ) from exc


def _received(seq: int, body: bytes) -> tuple[Submit, Waiting]:
    asked = _submit.decode(body)
    return asked, _waiting(seq, asked.op)


def _exchanged(body: bytes) -> tuple[Exchange, list[Waiting]]:
    asked = _exchange.decode(body)
    return asked, [_waiting(each.seq, each.op) for each in asked.ops]


def _waiting(seq: int, op: Op) -> Waiting:
    # Fence and acked differ between two deliveries of one op; the digest is of the op alone.
    packed = _encode(op)
    return Waiting(seq, op, hashlib.sha256(packed).digest(), len(packed))


def _outcomes(found: list[bytes]) -> bytes:
    """An `ops.Outcomes` of outcomes that are packed already."""
    return _encode({"outcomes": [msgspec.Raw(each) for each in found]})


def _run(request: Request) -> str:
    run: str = request.path_params["run"]
    return run


def _number(request: Request, name: str, kind: Callable[[str], T]) -> T | None:
    given = request.query_params.get(name)
    try:
        return None if given is None else kind(given)
    except ValueError as exc:
        raise InvalidRequest(f"{name}={given!r} is not a number") from exc


def _shown(scope: Scope) -> bytes:
    headers: list[tuple[bytes, bytes]] = scope["headers"]
    return dict(headers).get(b"authorization", b"")


def _packed(answered: msgspec.Struct) -> Response:
    return Response(_encode(answered), media_type=MEDIA_TYPE)


def _response(exc: LoragateError) -> Response:
    status = next(STATUS[kind] for kind in type(exc).__mro__ if kind in STATUS)
    return JSONResponse(_envelope(exc.code, str(exc)), status)


def _envelope(code: str, message: str) -> dict[str, dict[str, str]]:
    return {"error": {"code": code, "message": message}}
