"""The same router with the faster client: FastAPI in front, one shared aiohttp session behind.

    UPSTREAMS=http://a:8000,http://b:8000 uvicorn --app-dir bench/forwarders fastapi_aiohttp:app

This is the make of today's vLLM production-stack router, without its features.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse

replicas = itertools.cycle(os.environ["UPSTREAMS"].split(","))


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        app.state.session = session
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/v1/chat/completions")
async def chat_completions(request: Request) -> Response:
    payload = await request.json()
    reply = await app.state.session.post(
        next(replicas) + "/v1/chat/completions",
        data=await request.body(),
        headers={"content-type": "application/json"},
    )
    media_type = reply.headers.get("content-type")
    if not payload.get("stream"):
        return Response(await reply.read(), reply.status, media_type=media_type)

    async def relay() -> AsyncIterator[bytes]:
        async with reply:
            async for chunk in reply.content.iter_any():
                yield chunk

    return StreamingResponse(relay(), reply.status, media_type=media_type)
