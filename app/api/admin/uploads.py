"""The two bodies of a registration: JSON that says where the weights are, or the weights.

What comes in: a request whose body is still unread. What goes out: a `Registration` whose source
is read as it arrives, so that an archive is never whole in memory. Knows nothing of archives.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Self, TypeVar

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import Field, TypeAdapter, ValidationError, model_validator

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
_OBJECT = TypeAdapter(dict[str, Any])
#: What an archive may add to the weights in it: headers, padding, a directory.
_PACKING = 1 << 20


class Origin(Body):
    """Where weights are: a folder on the gateway's machine, or a Hugging Face repository."""

    path: Path | None = Field(
        None,
        description="A folder on the gateway's machine, under one of LORAGATE_IMPORT_DIRS.",
        examples=["/adapters/support-bot"],
    )
    hf_repo: str | None = Field(
        None, description="Or a Hugging Face repo id.", examples=["acme/support-bot-lora"]
    )
    revision: str | None = Field(
        None, description="Its branch, tag or commit; the default branch when left out."
    )

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if (self.path is None) == (self.hf_repo is None):
            raise ValueError("give `path` or `hf_repo`")
        if self.path is not None and self.revision is not None:
            raise ValueError("`revision` goes with `hf_repo`")
        return self

    def source(self) -> Source:
        if self.hf_repo is not None:
            return HubSource(self.hf_repo, self.revision)
        assert self.path is not None
        return PathSource(self.path)


class NewVersion(Body):
    """Weights to register as the next version of an adapter."""

    source: Origin = Field(description="Where the weights are.")
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


def archive_of(request: Request, max_bytes: int) -> ArchiveSource:
    """The body as a source, read as it arrives and no further than the limit."""
    limit: BodyLimit = request.scope[BODY_LIMIT]
    limit.max_bytes = max_bytes + _PACKING
    limit.setting = "LORAGATE_MAX_ADAPTER_BYTES"
    return ArchiveSource(_chunks(request), ARCHIVES[_media_type(request)])


def metadata_of(query: str | None) -> dict[str, Any]:
    """The metadata that came in the URL, because the body is the archive.

    Raises:
        InvalidRequest: it is not a JSON object.
    """
    if query is None:
        return {}
    try:
        return _OBJECT.validate_json(query)
    except ValidationError as exc:
        message = f"metadata is a JSON object, URL-encoded: {exc.errors()[0]['msg']}."
        raise InvalidRequest(message, param="metadata") from exc


async def _chunks(request: Request) -> AsyncIterator[bytes]:
    async for chunk in request.stream():
        if chunk:  # the last one is empty
            yield chunk


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()
