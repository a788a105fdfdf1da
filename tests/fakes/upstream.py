"""A model server on a real socket: vLLM's dialect without a model, and faults on demand.

What comes in: a gateway's HTTP, and from the test a script of faults. What goes out: vLLM's
answers, plus a record of every request as it was on the wire. Public methods may be called
from any thread; the server runs on a loop of its own.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
import struct
import threading
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

from tests.fakes import http1
from tests.fakes.dialect import Refusal
from tests.fakes.engine import ENGINE_DEAD, Answer, FakeEngine
from tests.fakes.faults import (
    Break,
    EndlessHead,
    EngineDead,
    Fault,
    Flood,
    Raw,
    Slow,
    Stall,
    Status,
)
from tests.fakes.http1 import LAST_CHUNK, Request, chunk, head, read_request
from tests.fakes.loops import LoopThread

SSE = ("content-type", "text/event-stream; charset=utf-8")


class _Cut(Exception):
    """A scripted fault ends the connection here."""


class FakeUpstream:
    """One replica. `served` is what it calls its base model."""

    def __init__(
        self, served: str = "tiny", *, max_lora_rank: int = 16, api_key: str | None = None
    ) -> None:
        self.engine = FakeEngine(served, max_lora_rank, api_key)
        self.seen: list[Request] = []
        self.problems: list[str] = []
        self.announce_close = False
        self.drop_idle = False
        self.connections = 0
        self.open_connections = 0
        self._scripts: dict[str, deque[Fault]] = defaultdict(deque)
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._lock = threading.Lock()
        self._thread = LoopThread(f"upstream {served}")
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    # What a test does to it

    def script(self, path: str, *faults: Fault) -> None:
        """Let each of the next requests to `path` meet one of these."""
        with self._lock:
            self._scripts[path].extend(faults)

    def behave(self) -> None:
        """Forget what is scripted and not played yet."""
        with self._lock:
            self._scripts.clear()

    def requests(self, path: str | None = None) -> list[Request]:
        """What came in so far; without a path, everything but health checks and discovery."""
        quiet = {"/health", "/v1/models", "/metrics", "/loragate/features"}
        return [
            request
            for request in list(self.seen)
            if (request.path not in quiet if path is None else request.path == path)
        ]

    def loads(self, name: str | None = None) -> list[Request]:
        found = self.requests("/v1/load_lora_adapter")
        return [request for request in found if name in (None, request.json["lora_name"])]

    def cancels(self) -> list[Request]:
        return [request for request in list(self.seen) if request.cancelled]

    def forget(self, name: str) -> None:
        """Lose an adapter without a word, as a restart too quick to be seen does."""
        self._thread.call(self.engine.adapters.pop, name)

    def start(self) -> None:
        """Listen; after `stop`, on the same port."""
        self._thread.run(self._start())

    def stop(self) -> None:
        """Be refused from here on: the port is known and nobody listens; connections reset."""
        self._thread.run(self._stop())

    def restart(self) -> None:
        """Come back on the same port with nothing loaded."""
        self.stop()
        self.engine.adapters.clear()
        self.engine.dead = False
        self.start()

    def close(self) -> None:
        self.stop()
        self._thread.close()

    # The server

    async def _start(self) -> None:
        self._server = await asyncio.start_server(
            self._serve, "127.0.0.1", self.port, limit=1 << 20, reuse_address=True
        )
        self.port = self._server.sockets[0].getsockname()[1]

    async def _stop(self) -> None:
        self._server.close()
        for writer in list(self._writers):
            _reset(writer)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=5)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        self.connections += 1
        self.open_connections += 1
        number = self.connections
        try:
            while (request := await read_request(reader)) is not None:
                request.connection = number
                self.seen.append(request)
                if not await self._until_gone(reader, self._handle(request, writer), request):
                    break
        except (_Cut, ConnectionError):
            pass
        except (http1.BadRequest, asyncio.IncompleteReadError, ValueError) as exc:
            self.problems.append(f"{type(exc).__name__}: {exc}")
        finally:
            self.open_connections -= 1
            self._writers.discard(writer)
            self._tasks.discard(task)
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    async def _until_gone(
        self, reader: asyncio.StreamReader, handling: Any, request: Request
    ) -> bool:
        """Run a handler until it ends or its client leaves, as vLLM does. False: hang up."""
        handler = asyncio.get_running_loop().create_task(handling)
        gone = asyncio.get_running_loop().create_task(reader.read(1))
        try:
            await asyncio.wait({handler, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not handler.done():
                if gone.exception() is None and gone.result():
                    self.problems.append("the next request came before this one's answer")
                request.cancelled = True
                return False
            keep = bool(handler.result())
            request.finished = True
            return keep
        except ConnectionError:
            request.cancelled = True
            return False
        finally:
            for task in (handler, gone):
                task.cancel()
            await asyncio.gather(handler, gone, return_exceptions=True)

    async def _handle(self, request: Request, writer: asyncio.StreamWriter) -> bool:
        """Answer one request, faults included. False: hang up afterwards."""
        fault = self._next_fault(request.path)
        if isinstance(fault, EngineDead):
            self.engine.dead = True
        pieces = _scripted(fault)
        if pieces is None:
            pieces = self._on_wire(await self._answer(request), whole=fault is None)
        await _play(request, writer, pieces, fault)
        hang_up = isinstance(fault, Raw) and fault.close
        return not (hang_up or self.announce_close or self.drop_idle)

    async def _answer(self, request: Request) -> Answer:
        try:
            return await self.engine.answer(request)
        except Refusal as refusal:
            return refusal.status, refusal.body

    def _on_wire(self, answer: Answer, *, whole: bool) -> Iterable[bytes]:
        closing = [("connection", "close")] if self.announce_close else []
        if not isinstance(answer, tuple):
            return _events(answer, closing)
        plain = _plain(*answer, extra=closing)
        return [plain] if whole else _pieces(plain)

    def _next_fault(self, path: str) -> Fault | None:
        with self._lock:
            script = self._scripts[path]
            return script.popleft() if script else None


def refused_url() -> str:
    """An address where nobody listens: bound, noted, closed."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{sock.getsockname()[1]}"


def _scripted(fault: Fault | None) -> Iterable[bytes] | None:
    """What goes out for a fault that leaves the engine unasked."""
    match fault:
        case Status():
            return [_plain(fault.status, fault.body, fault.headers)]
        case Raw():
            return [fault.data]
        case EngineDead():
            return [_plain(500, ENGINE_DEAD)]
        case EndlessHead():
            lines = (b"x-%d: %b\r\n" % (i, b"a" * 1000) for i in itertools.count())
            return itertools.chain([b"HTTP/1.1 200 OK\r\n"], lines)
        case Flood():
            event = fault.event or b"data: " + b"x" * (fault.event_bytes - 8) + b"\n\n"
            return _events(itertools.repeat(event, fault.total_bytes // len(event)))
    return None


def _plain(
    status: int,
    body: bytes,
    headers: Iterable[tuple[str, str]] | None = None,
    extra: Iterable[tuple[str, str]] = (),
) -> bytes:
    """A whole answer. As with vLLM, what is not JSON (a load's success) has no content type."""
    if headers is None:
        headers = [("content-type", "application/json")] if body.startswith(b"{") else []
    length = ("content-length", str(len(body)))
    return head(status, [("server", "uvicorn"), length, *headers, *extra]) + body


def _events(events: Iterable[bytes], extra: Iterable[tuple[str, str]] = ()) -> Iterator[bytes]:
    yield head(200, [("server", "uvicorn"), SSE, ("transfer-encoding", "chunked"), *extra])
    yield from map(chunk, events)
    yield LAST_CHUNK


def _pieces(answer: bytes) -> list[bytes]:
    """A plain answer as its head and two halves, so that a fault can come between."""
    start = answer.index(b"\r\n\r\n") + 4
    middle = start + (len(answer) - start) // 2
    return [answer[:start], answer[start:middle], answer[middle:]]


async def _play(
    request: Request, writer: asyncio.StreamWriter, pieces: Iterable[bytes], fault: Fault | None
) -> None:
    """Write the head (piece 0) and the events, with the fault where it says."""
    for number, piece in enumerate(pieces):
        match fault:
            case Slow():
                await asyncio.sleep(fault.per_event_s)
            case Stall(after=after) if number == after + bool(after):
                await fault.hold()
            case Break(after=after) if number == after + bool(after):
                if not fault.politely:
                    _reset(writer)
                raise _Cut
        await _send(request, writer, piece)
        request.events_sent = number


async def _send(request: Request, writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(data)
    await writer.drain()
    request.bytes_sent += len(data)


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST: what is unsent is dropped and the peer sees a reset, not an end."""
    sock = writer.get_extra_info("socket")
    with suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
