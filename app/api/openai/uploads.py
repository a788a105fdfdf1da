"""/v1/uploads: a file that arrives in parts, in any order and several at once.

What comes in: what the file is to be, then its parts, then their order. What goes out: OpenAI's
upload objects; the last one has the file.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Request
from pydantic import Field

from app.api.admin.shapes import Answer, Body, InRooms, refusals
from app.api.openai.files import FileObject, file_json
from app.api.openai.forms import read_form
from app.api.openai.shapes import ExpiresAfter, OpenAiRoute, Trainer, owner_of, unix
from app.api.rooms import Rooms
from app.control import files, uploads
from app.control.interruptible import in_thread
from app.control.uploads import Upload, UploadStatus
from app.errors import BodyTooLarge, Conflict, InvalidRequest

router = APIRouter(prefix="/v1/uploads", tags=["Uploads"], route_class=OpenAiRoute)

_UPLOAD_ID = "upload-2cf24dba5fb0a30e26e83b2a"
_PART_ID = "part-486ea46224d1bb4fb680f34f"


class UploadObject(Answer):
    """A file that arrives in parts."""

    id: str = Field(examples=[_UPLOAD_ID])
    object: Literal["upload"] = "upload"
    bytes: int = Field(description="How long the whole is to be.", examples=[140])
    created_at: int = Field(examples=[1762300800])
    expires_at: int = Field(examples=[1762304400])
    filename: str = Field(examples=["pirate.jsonl"])
    purpose: str = Field(examples=["fine-tune"])
    status: UploadStatus
    file: FileObject | None = Field(description="The file, once the upload is completed.")


class PartObject(Answer):
    """A part of an upload."""

    id: str = Field(examples=[_PART_ID])
    object: Literal["upload.part"] = "upload.part"
    created_at: int = Field(examples=[1762300800])
    upload_id: str = Field(examples=[_UPLOAD_ID])


class NewUpload(Body):
    """What the file is to be."""

    bytes: int = Field(ge=1, description="How long the whole is.", examples=[140])
    filename: str = Field(description="What to call it.", examples=["pirate.jsonl"])
    mime_type: str = Field(max_length=128, description="Its type.", examples=["text/jsonl"])
    purpose: str = Field(
        description=f"What it is for: {', '.join(files.PURPOSES)}.", examples=["fine-tune"]
    )
    expires_after: ExpiresAfter | None = Field(None, description="How long the file is to live.")


class Order(Body):
    """Which parts make the file."""

    part_ids: list[str] = Field(
        min_length=1,
        max_length=uploads.MAX_PARTS,
        description="The parts in their order.",
        examples=[[_PART_ID]],
    )
    md5: str | None = Field(
        None,
        description="The md5 of the whole in hexadecimal, to be compared.",
        examples=["098f6bcd4621d373cade4e832627b4f6"],
    )


UploadId = Annotated[str, Path(description="The upload's id.", examples=[_UPLOAD_ID])]

_PART: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["data"],
                    "properties": {"data": {"type": "string", "format": "binary"}},
                },
                "example": {"data": "pirate.jsonl.part"},
            }
        },
    }
}


@router.post(
    "", summary="Begin an upload", response_model=UploadObject, responses=refusals(400, 413)
)
async def create(body: NewUpload, rooms: InRooms, caller: Trainer) -> UploadObject:
    """Say what file will come. Its parts must come within an hour."""
    expires_after_s = None if body.expires_after is None else body.expires_after.seconds
    files.check_upload(body.filename, body.purpose, expires_after_s)
    most = rooms.settings.max_file_bytes
    if body.bytes > most:
        raise BodyTooLarge(
            f"{body.bytes} bytes are over {most}; LORAGATE_MAX_FILE_BYTES is the limit.",
            param="bytes",
        )
    async with rooms.db.begin() as session:
        upload = await uploads.create(
            session,
            rooms.clock,
            key_id=caller.key_id,
            filename=body.filename,
            purpose=body.purpose,
            mime_type=body.mime_type,
            size=body.bytes,
            file_expires_after_s=expires_after_s,
        )
    return _upload_json(upload)


@router.post(
    "/{upload_id}/parts",
    summary="Add a part",
    response_model=PartObject,
    openapi_extra=_PART,
    responses=refusals(400, 404, 409, 413),
)
async def add_part(
    upload_id: UploadId, request: Request, rooms: InRooms, caller: Trainer
) -> PartObject:
    """Send a part of at most 64 MiB. Parts may come in any order, and several at once."""
    owner = owner_of(caller)
    async with rooms.db.read() as session:
        uploads.check_pending(await uploads.show(session, rooms.clock, upload_id, owner))
    part_id = files.new_id("part")
    most = min(uploads.MAX_PART_BYTES, rooms.settings.max_file_bytes)
    with rooms.files.incoming(most) as incoming:
        await read_form(request, "data", (), incoming, most)
        keep = partial(rooms.files.keep_part, incoming, upload_id, part_id)
        await in_thread(lambda _: keep())
        try:
            async with rooms.db.begin() as session:
                part = await uploads.add_part(
                    session, rooms.clock, upload_id, owner, part_id=part_id, size=incoming.bytes
                )
        except BaseException:
            rooms.files.drop_part(upload_id, part_id)
            raise
    return PartObject(id=part.id, created_at=unix(part.created_at), upload_id=upload_id)


@router.post(
    "/{upload_id}/complete",
    summary="Complete an upload",
    response_model=UploadObject,
    responses=refusals(400, 404, 409),
)
async def complete(
    upload_id: UploadId, body: Order, rooms: InRooms, caller: Trainer
) -> UploadObject:
    """Join the parts to a file. Completing it again answers the same."""
    owner = owner_of(caller)
    async with rooms.db.read() as session:
        upload = await uploads.show(session, rooms.clock, upload_id, owner)
        if upload.status is UploadStatus.COMPLETED:
            return _upload_json(upload)
        uploads.check_pending(upload)
        await uploads.check_parts(session, upload, body.part_ids)
    try:
        done = await _joined(rooms, upload, owner, body)
    except FileNotFoundError:
        done = await _ended_meanwhile(rooms, upload_id, owner)
    await _drop_parts(rooms, upload_id)
    return _upload_json(done)


@router.post(
    "/{upload_id}/cancel",
    summary="Cancel an upload",
    response_model=UploadObject,
    responses=refusals(404, 409),
)
async def cancel(upload_id: UploadId, rooms: InRooms, caller: Trainer) -> UploadObject:
    """End an upload without a file, and forget its parts."""
    async with rooms.db.begin() as session:
        upload = await uploads.cancel(session, rooms.clock, upload_id, owner_of(caller))
    await _drop_parts(rooms, upload_id)
    return _upload_json(upload)


async def _joined(rooms: Rooms, upload: Upload, owner: str | None, body: Order) -> Upload:
    with rooms.files.incoming(upload.bytes) as incoming:
        md5 = await in_thread(partial(rooms.files.join_parts, upload.id, body.part_ids, incoming))
        if body.md5 is not None and body.md5.lower() != md5:
            raise InvalidRequest(f"The md5 is {md5}, not {body.md5[:64]!r}.", param="md5")
        digest = await in_thread(lambda _: rooms.files.commit(incoming))
        async with rooms.db.begin() as session:
            return await uploads.complete(session, rooms.clock, upload.id, owner, digest=digest)


async def _ended_meanwhile(rooms: Rooms, upload_id: str, owner: str | None) -> Upload:
    """The upload, if what took its parts away was that somebody else completed it."""
    async with rooms.db.read() as session:
        upload = await uploads.show(session, rooms.clock, upload_id, owner)
    if upload.status is not UploadStatus.COMPLETED:
        raise Conflict(f"Upload {upload_id!r} ended meanwhile.")
    return upload


async def _drop_parts(rooms: Rooms, upload_id: str) -> None:
    await in_thread(lambda _: rooms.files.drop_parts(upload_id))


def _upload_json(upload: Upload) -> UploadObject:
    return UploadObject(
        id=upload.id,
        bytes=upload.bytes,
        created_at=unix(upload.created_at),
        expires_at=unix(upload.expires_at),
        filename=upload.filename,
        purpose=upload.purpose,
        status=upload.status,
        file=None if upload.file is None else file_json(upload.file),
    )
