"""The front door on a real socket under uvicorn, with an upstream of memory, and a raw client.

What comes in: which of the two protocols carries it, and what answers. What goes out: bytes.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import uvicorn

from app.api.direct import DirectProtocol
from app.api.front_door import FrontDoor
from app.api.inference import Inference
from app.backends.base import Reply
from app.clock import SystemClock
from app.domain import Principal, Scope
from app.serving.meter import Meter
from app.serving.request import InferenceRequest
from app.serving.snapshot import Snapshot, Snapshots
from tests.unit.serving.made import whole

PATH = "/v1/completions"
LIMIT = 300_000
Answer = Callable[[InferenceRequest], Awaitable[Reply]]


async def echo(request: InferenceRequest) -> Reply:
    """Answer with the request's body."""
    return whole(200, request.body)


class Door:
    """One running server. `answer` is what stands for everything behind the door."""

    def __init__(self, kind: str, answer: Answer = echo, **config: Any) -> None:
        self.answer = answer
        self.requests: list[InferenceRequest] = []
        self.replies: list[Reply] = []
        self.cancelled = 0
        self.meter = Meter()
        snapshots = Snapshots()
        anyone = Principal("anonymous", "anonymous", frozenset(Scope))
        snapshots.publish(Snapshot(anonymous=anyone))
        self.rooms = SimpleNamespace(
            clock=SystemClock(),
            snapshots=snapshots,
            settings=SimpleNamespace(max_body_bytes=LIMIT, access_log="off"),
            meter=self.meter,
            request_path=self,
        )
        protocol: Any = DirectProtocol if kind == "direct" else "httptools"
        self.config = uvicorn.Config(
            FrontDoor(self._rest, Inference()),
            http=protocol,
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            **{"timeout_keep_alive": 5, "timeout_graceful_shutdown": 3, **config},
        )
        self.server = uvicorn.Server(self.config)

    async def serve(self, request: InferenceRequest, *_: object) -> Reply:
        self.requests.append(request)
        try:
            self.replies.append(await self.answer(request))
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return self.replies[-1]

    async def start(self) -> None:
        self.config.load()
        self.server.lifespan = self.config.lifespan_class(self.config)
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        await self.server.startup(sockets=[self._socket])

    async def stop(self) -> None:
        await self.server.shutdown(sockets=[self._socket])
        self._socket.close()
        for _ in range(3):  # uvicorn leaves its lifespan's task to end by itself
            await asyncio.sleep(0)

    @property
    def connections(self) -> int:
        return len(self.server.server_state.connections)

    @property
    def statuses(self) -> list[int]:
        return [status for (_, status), n in self.meter.requests.items() for _ in range(n)]

    async def client(self, *, receive_buffer: int | None = None) -> Client:
        sock = socket.socket()
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self.port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        reader, writer = await asyncio.open_connection(sock=sock, limit=4096)
        return Client(reader, writer)

    async def _rest(self, scope: Any, receive: Any, send: Any) -> None:
        """What stands for FastAPI: it opens the rooms, and says which path it was asked for."""
        if scope["type"] == "lifespan":
            await receive()
            scope["state"]["rooms"] = self.rooms
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        body = b""
        while (message := await receive()).get("more_body"):
            body += message["body"]
        text = f"{scope['method']} {scope['path']} {len(body + message['body'])}".encode()
        headers = [(b"content-length", b"%d" % len(text))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": text})


class Client:
    """A client that sends what a test says, byte for byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def send(self, *pieces: bytes) -> None:
        """Each piece in a packet of its own, which the server has had time to read."""
        for piece in pieces:
            self._writer.write(piece)
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    async def drain(self) -> None:
        await self._writer.drain()

    async def head(self) -> tuple[int, dict[str, str]]:
        async with asyncio.timeout(5):
            lines = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        version, status = lines[0].split(" ")[:2]
        assert version == "HTTP/1.1"
        pairs = [line.split(": ", 1) for line in lines[1:] if line]
        assert len({name for name, _ in pairs}) == len(pairs), f"a header twice: {pairs}"
        return int(status), dict(pairs)  # type: ignore[arg-type]

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        """One whole response; a body that ends with the connection, too."""
        status, headers = await self.head()
        async with asyncio.timeout(5):
            if headers.get("transfer-encoding") == "chunked":
                return status, headers, b"".join([part async for part in self.chunks()])
            if "content-length" in headers:
                length = int(headers["content-length"])
                return status, headers, await self._reader.readexactly(length)
            return status, headers, await self._reader.read()

    async def chunk(self) -> bytes:
        async with asyncio.timeout(5):
            size = int(await self._reader.readuntil(b"\r\n"), 16)
            data = await self._reader.readexactly(size)
            assert await self._reader.readexactly(2) == b"\r\n"
        return data

    async def chunks(self) -> Any:
        while data := await self.chunk():
            yield data

    async def post(self, body: bytes, *headers: bytes) -> tuple[int, dict[str, str], bytes]:
        await self.send(request(body, *headers))
        return await self.answer()

    async def ended(self) -> bool:
        """Whether the server closes the connection, with nothing more to say."""
        async with asyncio.timeout(5):
            try:
                return await self._reader.read(1) == b""
            except ConnectionError:
                return True

    async def read(self, size: int) -> bytes:
        async with asyncio.timeout(5):
            return await self._reader.readexactly(size)

    def close(self) -> None:
        self._writer.close()

    def reset(self) -> None:
        sock: socket.socket = self._writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()


def head(*headers: bytes, target: str = PATH, method: str = "POST", version: str = "1.1") -> bytes:
    lines = b"".join(header + b"\r\n" for header in headers)
    return f"{method} {target} HTTP/{version}\r\nhost: localhost\r\n".encode() + lines + b"\r\n"


def request(body: bytes, *headers: bytes, **line: str) -> bytes:
    return head(b"content-length: %d" % len(body), *headers, **line) + body
