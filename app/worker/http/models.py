"""/v1/models and the adapters behind it; /tokenize and /detokenize."""

from __future__ import annotations

import uuid
from typing import Any

from pydantic import TypeAdapter
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from app.clock import SystemClock
from app.worker.dialect.prompts import template
from app.worker.dialect.requests import (
    DetokenizeRequest,
    LoadAdapter,
    TokenizeChat,
    TokenizeText,
    UnloadAdapter,
)
from app.worker.http.bodies import read
from app.worker.http.served import served

TOKENIZE: TypeAdapter[TokenizeText | TokenizeChat] = TypeAdapter(TokenizeText | TokenizeChat)


async def models(request: Request) -> Response:
    """GET /v1/models: the base, then every registered adapter, in memory or not."""
    world = served(request)
    created = int(SystemClock().now().timestamp())
    cards = [_card(world.name, created, str(world.path), None, world.engine.limits.max_model_len)]
    cards += [
        _card(adapter.name, created, adapter.path, world.name, None)
        for adapter in world.adapters.values()
    ]
    return JSONResponse({"object": "list", "data": cards})


async def load_adapter(request: Request) -> Response:
    """POST /v1/load_lora_adapter."""
    world = served(request)
    body = await read(request, LoadAdapter, world.settings.max_body_bytes)
    return PlainTextResponse(
        await world.load(body.lora_name, body.lora_path, inplace=body.load_inplace)
    )


async def unload_adapter(request: Request) -> Response:
    """POST /v1/unload_lora_adapter."""
    world = served(request)
    body = await read(request, UnloadAdapter, world.settings.max_body_bytes)
    return PlainTextResponse(await world.unload(body.lora_name))


async def tokenize(request: Request) -> Response:
    """POST /tokenize."""
    world = served(request)
    body = await read(request, TOKENIZE, world.settings.max_body_bytes)
    world.find(body.model)
    tokens = world.engine.tokens
    text = template(body, tokens) if isinstance(body, TokenizeChat) else body.prompt
    ids = tokens.encode(text, add_special_tokens=body.add_special_tokens)
    return JSONResponse(
        {
            "count": len(ids),
            "max_model_len": world.engine.limits.max_model_len,
            "tokens": ids,
            "token_strs": tokens.pieces(ids) if body.return_token_strs else None,
        }
    )


async def detokenize(request: Request) -> Response:
    """POST /detokenize."""
    world = served(request)
    body = await read(request, DetokenizeRequest, world.settings.max_body_bytes)
    world.find(body.model)
    known = [token for token in body.tokens if token < world.engine.limits.vocab_size]
    return JSONResponse({"prompt": world.engine.tokens.decode(known)})


def _card(
    name: str, created: int, root: str, parent: str | None, max_model_len: int | None
) -> dict[str, Any]:
    permission = {
        "id": f"modelperm-{uuid.uuid4().hex[:16]}",
        "object": "model_permission",
        "created": created,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "loragate",
        "root": root,
        "parent": parent,
        "max_model_len": max_model_len,
        "permission": [permission],
    }
