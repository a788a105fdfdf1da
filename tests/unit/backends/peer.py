"""The server's side of a connection, byte for byte as a test wants it.

What comes in: a script, run once for each connection. What goes out: whatever bytes it sends.
"""

from __future__ import annotations

import asyncio
import re
import socket
import struct
from collections.abc import Awaitable, Callable

_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)

POST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b"


def post(body: bytes = b"{}") -> bytes:
    return POST % (len(body), body)


def ok(body: bytes, *headers: bytes) -> bytes:
    lines = b"".join(header + b"\r\n" for header in headers)
    return b"HTTP/1.1 200 OK\r\n%bcontent-length: %d\r\n\r\n%b" % (lines, len(body), body)


CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
LAST = b"0\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class Peer:
    """One connection, the `number`th of its server, counted from 0."""

    def __init__(
        self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.number = number
        self.served = 0
        self._reader = reader
        self._writer = writer
        sock: socket.socket = writer.get_extra_info("socket")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    async def request(self) -> bytes | None:
        """The body of the next request; None once the client has hung up."""
        try:
            head = await self._reader.readuntil(b"\r\n\r\n")
            found = _LENGTH.search(head)
            body = await self._reader.readexactly(int(found[1]) if found else 0)
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        self.served += 1
        return body

    async def send(self, *pieces: bytes) -> None:
        """Each piece in a packet of its own, which the client has had time to read."""
        for piece in pieces:
            self._writer.write(piece)
            await self._writer.drain()
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    async def hung_up(self) -> None:
        """Wait until the client has closed the connection, however it did."""
        try:
            while await self._reader.read(1 << 16):
                pass
        except ConnectionError:
            return

    def close(self) -> None:
        self._writer.close()

    def reset(self) -> None:
        sock: socket.socket = self._writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()


Script = Callable[[Peer], Awaitable[None]]


class Server:
    """Runs `script` for every connection, and closes the connection after it."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.peers: list[Peer] = []
        self.open = 0
        self.most_open = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def stop_listening(self) -> None:
        self._server.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        peer = Peer(len(self.peers), reader, writer)
        self.peers.append(peer)
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            await self.script(peer)
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self.open -= 1
            self._tasks.discard(task)
            writer.close()


def always(*pieces: bytes) -> Script:
    """Answer every request of a connection with the same pieces."""

    async def script(peer: Peer) -> None:
        while await peer.request() is not None:
            await peer.send(*pieces)

    return script


async def echo(peer: Peer) -> None:
    """Answer every request with its own body, in a chunk for each 7 bytes."""
    while (body := await peer.request()) is not None:
        parts = [chunk(body[at : at + 7]) for at in range(0, len(body), 7)]
        await peer.send(CHUNKED, *parts, LAST)
