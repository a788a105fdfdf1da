"""A router as most people would write it first: FastAPI in front, one shared httpx client behind.

    UPSTREAMS=http://a:8000,http://b:8000 uvicorn --app-dir bench/forwarders fastapi_httpx:app

Like the Python routers of this field it parses the request to learn the model and whether to
stream, picks a replica in turn, and passes the reply on as it comes. Fair to its peers: one
pooled client without limits for all requests, no logging, no metrics, no authentication.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse

replicas = itertools.cycle(os.environ["UPSTREAMS"].split(","))


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(timeout=None, limits=limits) as client:
        app.state.client = client
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/v1/chat/completions")
async def chat_completions(request: Request) -> Response:
    payload = await request.json()
    upstream = app.state.client.build_request(
        "POST",
        next(replicas) + "/v1/chat/completions",
        content=await request.body(),
        headers={"content-type": "application/json"},
    )
    reply = await app.state.client.send(upstream, stream=True)
    media_type = reply.headers.get("content-type")
    if not payload.get("stream"):
        return Response(await reply.aread(), reply.status_code, media_type=media_type)

    async def relay() -> AsyncIterator[bytes]:
        try:
            async for chunk in reply.aiter_raw():
                yield chunk
        finally:
            await reply.aclose()

    return StreamingResponse(relay(), reply.status_code, media_type=media_type)
