"""Hand-written HTTP/1.1 for the fake upstream: every byte is ours, so every fault can be made.

What comes in: a StreamReader. What goes out: requests as they were on the wire, and answers as
bytes. It knows nothing of models; it is strict about what a gateway sends and fails loudly.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

REASONS = {
    200: "OK",
    400: "Bad Request",
    401: "Unauthorized",
    404: "Not Found",
    405: "Method Not Allowed",
    422: "Unprocessable Content",
    429: "Too Many Requests",
    500: "Internal Server Error",
    503: "Service Unavailable",
}


class BadRequest(Exception):
    """The client of the fake (the gateway) spoke HTTP that no server should accept."""


@dataclass
class Request:
    """One request as it came, and what became of it."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes = b""
    connection: int = 0
    events_sent: int = 0
    bytes_sent: int = 0
    cancelled: bool = False
    finished: bool = False
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def header(self, name: str) -> str | None:
        """The value of a header; a header sent twice fails the test that looks at it."""
        found = [value for key, value in self.headers if key.lower() == name.lower()]
        assert len(found) <= 1, f"{name} was sent {len(found)} times: {found}"
        return found[0] if found else None


async def read_request(reader: asyncio.StreamReader) -> Request | None:
    """The next request of a keep-alive connection; None when the client is done."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as exc:
        if exc.partial:
            raise BadRequest(f"connection closed inside a head: {exc.partial!r}") from exc
        return None
    start, *lines = head[:-4].decode("latin-1").split("\r\n")
    method, target, version = start.split(" ")
    if version != "HTTP/1.1":
        raise BadRequest(f"not HTTP/1.1: {start!r}")
    headers = []
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or name != name.strip():
            raise BadRequest(f"not a header: {line!r}")
        headers.append((name, value.strip()))
    request = Request(method, target, headers)
    if request.header("host") is None:
        raise BadRequest("no Host header")
    request.body = await _read_body(reader, request)
    return request


async def _read_body(reader: asyncio.StreamReader, request: Request) -> bytes:
    length, coding = request.header("content-length"), request.header("transfer-encoding")
    if length is not None and coding is not None:
        raise BadRequest("both Content-Length and Transfer-Encoding")
    if length is not None:
        return await reader.readexactly(int(length))
    if coding is None:
        return b""
    if coding.lower() != "chunked":
        raise BadRequest(f"unknown transfer coding {coding!r}")
    body = bytearray()
    while size := int((await reader.readuntil(b"\r\n")).partition(b";")[0], 16):
        body += await reader.readexactly(size)
        if await reader.readexactly(2) != b"\r\n":
            raise BadRequest("chunk without its end")
    while await reader.readuntil(b"\r\n") != b"\r\n":
        pass
    return bytes(body)


def head(status: int, headers: list[tuple[str, str]]) -> bytes:
    lines = [f"HTTP/1.1 {status} {REASONS.get(status, 'Unknown')}"]
    lines += [f"{name}: {value}" for name, value in headers]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


LAST_CHUNK = b"0\r\n\r\n"
