"""multipart/form-data, read as it arrives: a few short fields, and one file that goes to disk.

What comes in: a request whose body is still unread, and an `Incoming` for the file. What goes
out: the fields. However long the file is, a piece of it at a time is in memory.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from app.api.edge import BODY_LIMIT, BodyLimit
from app.control.interruptible import in_thread
from app.db.file_store import Incoming
from app.errors import InvalidRequest

_PIECE = 1 << 20
#: What a form may hold beside the file: its fields, their headers, the boundaries.
_PACKING = 64 << 10
_MAX_FIELD = 4096
_MAX_PARTS = 16
_BROKEN = "The body is not the multipart form that its Content-Type announces."


@dataclass(slots=True)
class Form:
    """The fields beside the file, and what the client calls the file (empty: nothing)."""

    fields: dict[str, str] = field(default_factory=dict)
    filename: str = ""


async def read_form(
    request: Request, file_field: str, fields: Collection[str], incoming: Incoming, max_bytes: int
) -> Form:
    """Write the file of `file_field` to `incoming`; answer the form without it.

    Raises:
        InvalidRequest: it is no such form, has no file, or has a field that is not one of `fields`.
        BodyTooLarge: the file is longer than `incoming` takes.
        StorageUnavailable: the disk does not take it.
    """
    limit: BodyLimit = request.scope[BODY_LIMIT]
    limit.max_bytes = max_bytes + _PACKING
    limit.setting = "LORAGATE_MAX_FILE_BYTES"
    reader = _Reader(file_field, fields)
    parser = _parser(request, reader)
    async for chunk in request.stream():
        try:
            parser.write(chunk)
        except FormParserError as exc:
            raise InvalidRequest(_BROKEN) from exc
        if len(reader.waiting) >= _PIECE:
            await _pass_on(reader, incoming)
    await _pass_on(reader, incoming)
    if not reader.ended:
        raise InvalidRequest("The form ends before its last boundary: it did not arrive whole.")
    if not reader.has_file:
        raise InvalidRequest(f"The form has no file {file_field!r}.", param=file_field)
    return reader.form


def _parser(request: Request, reader: _Reader) -> MultipartParser:
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not boundary:
        raise InvalidRequest(
            "Send multipart/form-data, with a boundary.",
            param="content-type",
            code="unsupported_media_type",
        )
    try:
        return MultipartParser(
            boundary,
            {
                "on_part_begin": reader.begin,
                "on_header_field": reader.header_name,
                "on_header_value": reader.header_value,
                "on_header_end": reader.header_end,
                "on_headers_finished": reader.headers_end,
                "on_part_data": reader.data,
                "on_part_end": reader.end,
                "on_end": reader.finish,
            },
        )
    except FormParserError as exc:
        raise InvalidRequest(_BROKEN) from exc


async def _pass_on(reader: _Reader, incoming: Incoming) -> None:
    piece = bytes(reader.waiting)
    reader.waiting.clear()
    await in_thread(lambda _: incoming.write(piece))


class _Reader:
    """What the parser calls back. Keeps the fields, and the file's bytes until they are taken."""

    def __init__(self, file_field: str, fields: Collection[str]) -> None:
        self.form = Form()
        self.waiting = bytearray()
        self.has_file = False
        self.ended = False
        self._file_field = file_field
        self._fields = fields
        self._parts = 0
        self._header = (bytearray(), bytearray())
        self._disposition = b""
        self._name = ""
        self._value = bytearray()

    def begin(self) -> None:
        self._parts += 1
        if self._parts > _MAX_PARTS:
            raise InvalidRequest(f"The form has over {_MAX_PARTS} parts.")
        self._disposition = b""
        self._value.clear()

    def header_name(self, data: bytes, start: int, end: int) -> None:
        self._header[0].extend(data[start:end])

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self._header[1].extend(data[start:end])

    def header_end(self) -> None:
        name, value = self._header
        if name.lower() == b"content-disposition":
            self._disposition = bytes(value)
        name.clear()
        value.clear()

    def headers_end(self) -> None:
        _, options = parse_options_header(self._disposition)
        name = self._name = options.get(b"name", b"").decode(errors="replace")
        if name == self._file_field:
            if self.has_file:
                raise InvalidRequest(f"The form has two files {name!r}.", param=name)
            self.has_file = True
            self.form.filename = _last(options.get(b"filename", b"").decode(errors="replace"))
        elif name not in self._fields:
            known = ", ".join([self._file_field, *self._fields])
            raise InvalidRequest(f"The form has the field {name[:100]!r}; there are {known}.")
        elif name in self.form.fields:
            raise InvalidRequest(f"The form has the field {name!r} twice.", param=name)

    def data(self, data: bytes, start: int, end: int) -> None:
        if self._name == self._file_field:
            self.waiting += memoryview(data)[start:end]
            return
        self._value += data[start:end]
        if len(self._value) > _MAX_FIELD:
            raise InvalidRequest(f"{self._name} is over {_MAX_FIELD} bytes.", param=self._name)

    def end(self) -> None:
        if self._name != self._file_field:
            self.form.fields[self._name] = self._value.decode(errors="replace")

    def finish(self) -> None:
        self.ended = True


def _last(path: str) -> str:
    """A file's name without the folders that some clients send with it."""
    return path.replace("\\", "/").rpartition("/")[2]
