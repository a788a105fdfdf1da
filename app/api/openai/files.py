"""/v1/files: what jobs read and what they wrote.

What comes in: a file in a form, which goes to disk as it arrives. What goes out: OpenAI's file
objects, and bytes. A key sees its own files; an admin sees everybody's.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import FileResponse
from pydantic import Field

from app.api.admin.shapes import Answer, Deleted, InRooms, refusals
from app.api.openai.forms import Form, read_form
from app.api.openai.shapes import OpenAiRoute, Trainer, owner_of, unix, unix_or_none
from app.control import files
from app.control.interruptible import in_thread
from app.domain import File
from app.errors import InvalidRequest, StorageUnavailable

router = APIRouter(prefix="/v1/files", tags=["Files"], route_class=OpenAiRoute)

_ANCHOR, _SECONDS = "expires_after[anchor]", "expires_after[seconds]"
_FIELDS = ("purpose", _ANCHOR, _SECONDS)
_BYTES = {"schema": {"type": "string", "format": "binary"}}


class FileObject(Answer):
    """A file."""

    id: str = Field(examples=["file-9f86d081884c7d659a2feaa0"])
    object: Literal["file"] = "file"
    bytes: int = Field(examples=[140])
    created_at: int = Field(examples=[1762300800])
    expires_at: int | None = None
    filename: str = Field(examples=["pirate.jsonl"])
    purpose: str = Field(examples=["fine-tune"])
    status: Literal["processed"] = "processed"
    status_details: None = None


class FileObjects(Answer):
    """A page of files."""

    object: Literal["list"] = "list"
    data: list[FileObject]
    has_more: bool
    first_id: str | None = Field(examples=["file-9f86d081884c7d659a2feaa0"])
    last_id: str | None = Field(examples=["file-9f86d081884c7d659a2feaa0"])


FileId = Annotated[
    str, Path(description="The file's id.", examples=["file-9f86d081884c7d659a2feaa0"])
]

_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": list(files.PURPOSES)},
                        _ANCHOR: {"type": "string", "enum": ["created_at"]},
                        _SECONDS: {"type": "integer", "minimum": 3600, "maximum": 2592000},
                    },
                },
                "example": {"file": "pirate.jsonl", "purpose": "fine-tune"},
            }
        },
    }
}


@router.post(
    "",
    summary="Upload a file",
    response_model=FileObject,
    openapi_extra=_FORM,
    responses=refusals(400, 413),
)
async def create(request: Request, rooms: InRooms, caller: Trainer) -> FileObject:
    """Upload a file in a form. It is written to disk as it arrives.

    LORAGATE_MAX_FILE_BYTES is the limit. Files for batches expire after 30 days, others never,
    unless `expires_after` says so.
    """
    most = rooms.settings.max_file_bytes
    with rooms.files.incoming(most) as incoming:
        form = await read_form(request, "file", _FIELDS, incoming, most)
        purpose = form.fields.get("purpose", "")
        filename = form.filename or "file"
        expires_after_s = _expires_after_s(form)
        files.check_upload(filename, purpose, expires_after_s)
        digest = await in_thread(lambda _: rooms.files.commit(incoming))
        async with rooms.db.begin() as session:
            file = await files.create(
                session,
                rooms.clock,
                key_id=caller.key_id,
                filename=filename,
                purpose=purpose,
                size=incoming.bytes,
                digest=digest,
                expires_after_s=expires_after_s,
            )
    return file_json(file)


@router.get("", summary="List files", response_model=FileObjects, responses=refusals(400))
async def list_files(
    rooms: InRooms,
    caller: Trainer,
    limit: Annotated[
        int, Query(ge=1, le=files.MAX_PAGE, description="At most so many.")
    ] = files.MAX_PAGE,
    after: Annotated[
        str | None, Query(description="Files after this one: `last_id` of the page before.")
    ] = None,
    order: Annotated[
        Literal["asc", "desc"], Query(description="The oldest first, or the newest.")
    ] = "desc",
    purpose: Annotated[str | None, Query(description="Only files for this.")] = None,
) -> FileObjects:
    """The key's files by age, a page at a time."""
    async with rooms.db.read() as session:
        page = await files.list_(
            session,
            rooms.clock,
            owner_of(caller),
            limit=limit,
            after=after,
            ascending=order == "asc",
            purpose=purpose,
        )
    data = [file_json(file) for file in page.data]
    return FileObjects(
        data=data,
        has_more=page.has_more,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
    )


@router.get(
    "/{file_id}", summary="Retrieve a file", response_model=FileObject, responses=refusals(404)
)
async def retrieve(file_id: FileId, rooms: InRooms, caller: Trainer) -> FileObject:
    """What is known of a file, without its bytes."""
    async with rooms.db.read() as session:
        return file_json(await files.get(session, rooms.clock, file_id, owner_of(caller)))


@router.get(
    "/{file_id}/content",
    summary="Retrieve a file's content",
    response_class=FileResponse,
    responses={
        **refusals(404),
        200: {
            "description": "The bytes; a Range header asks for some of them.",
            "content": {"application/octet-stream": _BYTES},
        },
    },
)
async def content(file_id: FileId, rooms: InRooms, caller: Trainer) -> FileResponse:
    """The file's bytes, as they were sent."""
    async with rooms.db.read() as session:
        file = await files.get(session, rooms.clock, file_id, owner_of(caller))
    # Renewed, it cannot be collected before the answer has opened it.
    if not rooms.files.renew(file.digest):
        raise StorageUnavailable(f"The bytes of file {file_id!r} are not in the file store.")
    return FileResponse(
        rooms.files.path(file.digest),
        media_type="application/octet-stream",
        filename=file.filename,
    )


@router.delete(
    "/{file_id}", summary="Delete a file", response_model=Deleted, responses=refusals(404)
)
async def delete(file_id: FileId, rooms: InRooms, caller: Trainer) -> Deleted:
    """Delete a file. Jobs that were made with it go on; its bytes stay until they end."""
    async with rooms.db.begin() as session:
        await files.delete(session, rooms.clock, file_id, owner_of(caller))
    return Deleted(id=file_id, object="file")


def file_json(file: File) -> FileObject:
    """OpenAI's file object."""
    return FileObject(
        id=file.id,
        bytes=file.bytes,
        created_at=unix(file.created_at),
        expires_at=unix_or_none(file.expires_at),
        filename=file.filename,
        purpose=file.purpose,
    )


def _expires_after_s(form: Form) -> int | None:
    """Seconds, of the two fields in which OpenAI's clients send them."""
    anchor, seconds = form.fields.get(_ANCHOR), form.fields.get(_SECONDS)
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at" or seconds is None or not (seconds.isascii() and seconds.isdigit()):
        raise InvalidRequest(
            f"{_ANCHOR} is created_at, and {_SECONDS} a whole number.", param="expires_after"
        )
    return int(seconds[:10])
