"""The two bodies of a registration: JSON that says where the weights are, or the weights.

What comes in: a request whose body is still unread. What goes out: a `Registration` whose source
is read as it arrives, so that an archive is never whole in memory. Knows nothing of archives.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, TypeVar

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import Field, ValidationError

from app.api.admin.shapes import Body
from app.api.edge import BODY_LIMIT, BodyLimit
from app.control.intake import ArchiveSource, HubSource, PathSource, Source
from app.errors import InvalidRequest

B = TypeVar("B", bound=Body)

#: Content-Type of an archive -> the name we use for it.
ARCHIVES = {
    "application/x-tar": "application/x-tar",
    "application/gzip": "application/gzip",
    "application/x-gzip": "application/gzip",
    "application/zip": "application/zip",
}
#: What an archive may add to the weights in it: headers, padding, a directory.
_PACKING = 1 << 20


class FromPath(Body):
    """A folder on the gateway's machine, under one of `LORAGATE_IMPORT_DIRS`."""

    path: Path = Field(description="The folder.", examples=["/adapters/support-bot"])


class FromHub(Body):
    """A Hugging Face repository."""

    hf_repo: str = Field(description="The repo id.", examples=["acme/support-bot-lora"])
    revision: str | None = Field(
        None, description="A branch, tag or commit; the default branch when left out."
    )


class NewVersion(Body):
    """Weights to register as the next version of an adapter."""

    source: FromPath | FromHub = Field(description="Where the weights are.")
    base_model: str | None = Field(
        None,
        description="The base they were trained on. May be left out when there is one pool, or "
        "when adapter_config.json names a base that a pool serves.",
        examples=["meta-llama/Llama-3.1-8B-Instruct"],
    )
    alias: str | None = Field(
        None, description="Also point this alias at the version.", examples=["prod"]
    )
    metadata: dict[str, Any] | None = Field(
        None, description="Anything worth keeping with it.", examples=[{"team": "support"}]
    )


class NewAdapter(NewVersion):
    """An adapter to create, with its first version."""

    name: str = Field(
        description="What clients will ask for: letters, digits, `.`, `_`, `-`.",
        examples=["support-bot"],
    )


def is_archive(request: Request) -> bool:
    """Whether the body is the weights themselves.

    Raises:
        InvalidRequest: it is neither an archive nor JSON.
    """
    media_type = _media_type(request)
    if media_type in ARCHIVES:
        return True
    if media_type in ("", "application/json"):
        return False
    raise InvalidRequest(
        f"A body of type {media_type!r} is not taken. Send JSON, or an archive with the header "
        f"Content-Type: {', '.join(dict.fromkeys(ARCHIVES.values()))}.",
        param="content-type",
        code="unsupported_media_type",
    )


async def read_json(request: Request, model: type[B]) -> B:
    """The JSON body, checked.

    Raises:
        RequestValidationError: it does not fit, just as FastAPI would say it.
    """
    try:
        return model.model_validate_json(await request.body())
    except ValidationError as exc:
        faults = [{**fault, "loc": ("body", *fault["loc"])} for fault in exc.errors()]
        raise RequestValidationError(faults) from exc


def source_of(given: FromPath | FromHub) -> Source:
    if isinstance(given, FromPath):
        return PathSource(given.path)
    return HubSource(given.hf_repo, given.revision)


def archive_of(request: Request, max_bytes: int) -> ArchiveSource:
    """The body as a source, read as it arrives and no further than the limit."""
    limit: BodyLimit = request.scope[BODY_LIMIT]
    limit.max_bytes = max_bytes + _PACKING
    limit.setting = "LORAGATE_MAX_ADAPTER_BYTES"
    return ArchiveSource(_chunks(request), ARCHIVES[_media_type(request)])


async def _chunks(request: Request) -> AsyncIterator[bytes]:
    async for chunk in request.stream():
        if chunk:  # the last one is empty
            yield chunk


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()
