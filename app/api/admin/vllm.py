"""vLLM's own load and unload routes, meaning "register for the whole pool".

What comes in: what tools that talk to a vLLM server already send. What goes out: vLLM's plain
text and its statuses where it has one for the case; a refused adapter is a 422 that says why,
where vLLM answers 500.
"""

from __future__ import annotations

import re
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field

from app.api.admin.adapters import delete_adapter, delete_version
from app.api.admin.shapes import Admin, InRooms, refusals
from app.control.intake import HubSource, PathSource, Source
from app.control.registration import Registration, register
from app.errors import Conflict, InvalidRequest, NotFound

router = APIRouter(prefix="/v1", tags=["Adapters, the way vLLM does it"])

_REPO_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_VERSION = re.compile(r"(?P<name>[^@]+)@(?P<number>[0-9]{1,9})")


class Load(BaseModel):
    """vLLM's request; fields of newer versions are let through unread, as vLLM does."""

    model_config = ConfigDict(extra="ignore")

    lora_name: str = Field(description="The adapter's name.", examples=["support-bot"])
    lora_path: str = Field(
        description="A folder on the gateway's machine under one of LORAGATE_IMPORT_DIRS, or a "
        "Hugging Face repo id.",
        examples=["/adapters/support-bot"],
    )
    load_inplace: bool = Field(
        False, description="If the name exists, register a new version of it instead of failing."
    )


class Unload(BaseModel):
    """vLLM's request."""

    model_config = ConfigDict(extra="ignore")

    lora_name: str = Field(
        description="The adapter's name, or `name@3` for one version.", examples=["support-bot"]
    )


def _plain(example: str) -> dict[str, object]:
    return {"content": {"text/plain": {"example": example}}}


@router.post(
    "/load_lora_adapter",
    summary="Load an adapter",
    response_class=PlainTextResponse,
    responses={
        **refusals(400, 404, 422, 502),
        200: _plain("Success: LoRA adapter 'support-bot' added successfully."),
    },
)
async def load(body: Load, rooms: InRooms, admin: Admin) -> PlainTextResponse:
    """Register an adapter for the whole pool, with vLLM's request and answer.

    The replicas load it with the first request for it.
    """
    if not body.lora_name or not body.lora_path:
        raise InvalidRequest("Both 'lora_name' and 'lora_path' must be provided.")
    create = None if body.load_inplace else True
    source = _source(body.lora_path)
    wanted = Registration(body.lora_name, source, create=create, by=admin.key_id)
    try:
        await register(rooms, wanted)
    except Conflict as exc:
        raise InvalidRequest(f"{exc} Or set 'load_inplace' to true.", param="lora_name") from exc
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post(
    "/unload_lora_adapter",
    summary="Unload an adapter",
    response_class=PlainTextResponse,
    responses={
        **refusals(404, 409, 422),
        200: _plain("Success: LoRA adapter 'support-bot' removed successfully."),
    },
)
async def unload(body: Unload, rooms: InRooms, admin: Admin) -> PlainTextResponse:
    """Unregister an adapter, or one version of it, from the whole pool."""
    found = _VERSION.fullmatch(body.lora_name)
    try:
        if found is None:
            await delete_adapter(rooms, admin, body.lora_name)
        else:
            await delete_version(found["name"], int(found["number"]), rooms, admin)
    except NotFound as exc:
        message = f"The lora adapter '{body.lora_name}' cannot be found."
        raise NotFound(message, param="lora_name") from exc
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _source(lora_path: str) -> Source:
    """vLLM takes both in one field; only what looks like a repo id is one."""
    if _REPO_ID.fullmatch(lora_path):
        return HubSource(lora_path)
    return PathSource(Path(lora_path))
