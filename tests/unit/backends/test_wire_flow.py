"""Deadlines, and how much is read ahead of a reader that is slow."""

from __future__ import annotations

import asyncio
from asyncio import Future
from typing import Any

import pytest

from app.backends.base import Reply
from app.backends.wire import TICK_S
from app.errors import UpstreamBroke, UpstreamTimeout
from tests.unit.backends.peer import CHUNKED, LAST, Peer, chunk, ok, post
from tests.waiting import until

MIB = 1 << 20


class Sink:
    """Takes bytes; blocks after each push while `blocking`."""

    def __init__(self, *, blocking: bool = False) -> None:
        self.data = bytearray()
        self.pushes = 0
        self.blocking = blocking
        self.blocked: Future[None] | None = None

    def push(self, data: bytes) -> Future[None] | None:
        assert data, "an empty piece would end a chunked body"
        self.data += data
        self.pushes += 1
        if not self.blocking:
            return None
        if self.blocked is None or self.blocked.done():
            self.blocked = asyncio.get_running_loop().create_future()
        return self.blocked

    def unblock(self) -> None:
        self.blocking = False
        if self.blocked is not None and not self.blocked.done():
            self.blocked.set_result(None)


class Flood:
    """Sends a body as fast as it is taken, and knows how much was."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.sent = 0
        self.over = False

    async def __call__(self, peer: Peer) -> None:
        peer._writer.transport.set_write_buffer_limits(high=64 << 10)
        while await peer.request() is not None:
            self.sent = 0
            await peer.send(CHUNKED)
            piece = chunk(bytes(range(256)) * 256)
            while self.sent < self.total:
                peer._writer.write(piece)
                await peer._writer.drain()
                self.sent += 64 << 10
            await peer.send(LAST)
            self.over = True


async def settled(flood: Flood) -> int:
    """What was sent, once nothing more is."""
    seen, same = -1, 0
    while same < 10:
        await asyncio.sleep(0.01)
        same = same + 1 if flood.sent == seen else 0
        seen = flood.sent
    return seen


async def silent(peer: Peer) -> None:
    await peer.request()
    await peer.hung_up()


async def test_no_first_byte_in_time(serve: Any) -> None:
    server = await serve(silent)
    client = serve.client(first_byte_s=0.2)
    started = asyncio.get_running_loop().time()
    with pytest.raises(UpstreamTimeout, match="replica:1 did not begin its answer in time"):
        await client.request(post())
    assert 0.2 <= asyncio.get_running_loop().time() - started < 1
    await until(lambda: server.open == 0)


async def test_a_head_that_drips_does_not_put_the_deadline_off(serve: Any) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        while True:
            await peer.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            await asyncio.sleep(0.05)

    await serve(script)
    with pytest.raises(UpstreamTimeout, match="begin"):
        await asyncio.wait_for(serve.client(first_byte_s=0.3).request(post()), 3)


@pytest.mark.parametrize("head", [CHUNKED, b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n"])
async def test_silence_inside_a_body(serve: Any, head: bytes) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(head, chunk(b"one"))
        await peer.hung_up()

    server = await serve(script)
    client = serve.client(idle_s=0.2)
    with pytest.raises(UpstreamTimeout, match="did not go on with its answer in time"):
        await _read(client)
    await until(lambda: server.open == 0)


async def _read(client: Any) -> bytes:
    response = await client.request(post())
    return await Reply(response.status, response.headers, response).read(MIB)


async def test_a_body_that_goes_on_is_never_idle(serve: Any) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(CHUNKED)
        for _ in range(8):
            await asyncio.sleep(TICK_S)
            await peer.send(chunk(b"x"))
        await peer.send(LAST)

    await serve(script)
    assert await _read(serve.client(idle_s=0.3, first_byte_s=0.3)) == b"x" * 8


async def test_a_slow_reader_is_not_a_silent_replica(serve: Any) -> None:
    flood = Flood(32 * MIB)
    await serve(flood)
    client = serve.client(idle_s=0.1, first_byte_s=0.1)
    response = await client.request(post())
    tick = client.tick
    await until(lambda: client.tick > tick + 5)
    total = 0
    while data := await response.next():
        total += len(data)
    assert total == flood.total


async def test_read_ahead_is_bounded(serve: Any) -> None:
    flood = Flood(400 * MIB)
    await serve(flood)
    client = serve.client(read_ahead_bytes=256 << 10)
    response = await client.request(post())
    sent = await settled(flood)
    assert sent < 64 * MIB, "the kernel's buffers hold no more than that"
    assert response._connection is not None
    assert response._connection._paused
    assert response._size <= MIB  # the bound, and one read of the socket
    response.close()
    await until(lambda: not client._busy)


async def test_a_read_ahead_smaller_than_a_body_that_is_waited_for(serve: Any) -> None:
    body = b"x" * 60_000
    await serve(_once(ok(body)[:20_000], ok(body)[20_000:40_000], ok(body)[40_000:]))
    assert await asyncio.wait_for(_read(serve.client(read_ahead_bytes=1000)), 5) == body


def _once(*pieces: bytes) -> Any:
    async def script(peer: Peer) -> None:
        while await peer.request() is not None:
            await peer.send(*pieces)

    return script


@pytest.mark.parametrize("read_before", [False, True])
async def test_a_pipe_stops_the_server_while_its_sink_is_blocked(
    serve: Any, read_before: bool
) -> None:
    flood = Flood(200 * MIB)
    await serve(flood)
    client = serve.client()
    response = await client.request(post())
    if not read_before:
        await settled(flood)
    sink = Sink(blocking=True)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(response.pipe(sink.push))
        sent = await settled(flood)
        assert sent < 64 * MIB
        assert len(sink.data) < 2 * MIB
        sink.unblock()
    assert len(sink.data) == flood.total
    assert flood.over


async def test_a_pipe_goes_on_after_its_sink_was_blocked_from_the_start(serve: Any) -> None:
    """While the first push is blocked, read-ahead fills up: it must be drained afterwards."""
    flood = Flood(8 * MIB)
    await serve(flood)
    client = serve.client(read_ahead_bytes=100_000)
    response = await client.request(post())
    await until(lambda: response._size > 0)
    sink = Sink(blocking=True)
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(response.pipe(sink.push))
        await settled(flood)
        sink.unblock()  # and from now on it takes everything
        await asyncio.wait_for(task, 5)
    assert len(sink.data) == flood.total


async def test_a_pipe_takes_what_came_with_the_end(serve: Any) -> None:
    async def script(peer: Peer) -> None:
        while await peer.request() is not None:
            await peer.send(CHUNKED, chunk(b"a"))
            await go_on.wait()
            await peer.send(chunk(b"b") + chunk(b"c") + LAST)

    go_on = asyncio.Event()
    await serve(script)
    client = serve.client()
    for _ in range(2):
        go_on.clear()
        response = await client.request(post())
        sink = Sink()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(response.pipe(sink.push))
            await until(lambda sink=sink: sink.data == b"a")
            go_on.set()
        assert sink.data == b"abc"
    assert client._busy == set()


async def test_a_pipe_of_a_whole_body(serve: Any) -> None:
    await serve(_once(ok(b"hello")))
    response = await serve.client().request(post())
    sink = Sink(blocking=True)
    task = asyncio.get_running_loop().create_task(response.pipe(sink.push))
    await until(lambda: sink.blocked is not None)
    sink.unblock()
    await task
    assert (bytes(sink.data), sink.pushes) == (b"hello", 1)


@pytest.mark.parametrize("blocked", [False, True])
async def test_a_pipe_delivers_what_came_before_the_garbage(serve: Any, blocked: bool) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(CHUNKED, chunk(b"a"))
        await go_on.wait()
        await peer.send(chunk(b"b") + b"nonsense\r\n")

    go_on = asyncio.Event()
    await serve(script)
    response = await serve.client().request(post())
    await until(lambda: response._size > 0)
    sink = Sink(blocking=blocked)
    task = asyncio.get_running_loop().create_task(response.pipe(sink.push))
    await until(lambda: sink.data == b"a")
    go_on.set()
    if blocked:
        await until(lambda: response._error is not None)
        sink.unblock()
    with pytest.raises(UpstreamBroke):
        await task
    assert sink.data == b"ab"


async def test_a_pipe_that_times_out(serve: Any) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(CHUNKED, chunk(b"a"))
        await peer.hung_up()

    await serve(script)
    response = await serve.client(idle_s=0.1).request(post())
    sink = Sink()
    with pytest.raises(UpstreamTimeout):
        await response.pipe(sink.push)
    assert sink.data == b"a"


async def test_closing_a_paused_response_frees_its_place(serve: Any) -> None:
    flood = Flood(100 * MIB)
    server = await serve(flood)
    client = serve.client(connections=1)
    for _ in range(3):
        response = await asyncio.wait_for(client.request(post()), 5)
        await until(lambda response=response: response._size > 0)
        response.close()
        with pytest.raises(UpstreamBroke, match="cut"):
            await Reply(200, [], response).read(1 << 30)
    await until(lambda: server.open == 0)
