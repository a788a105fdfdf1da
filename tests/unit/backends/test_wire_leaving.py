"""Requests that are cancelled anywhere, and the places they leave to others."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from app.backends.base import Reply
from app.errors import UpstreamError, UpstreamTimeout
from tests.unit.backends.peer import CHUNKED, LAST, Peer, chunk, echo, ok, post
from tests.waiting import until


async def read(client: Any, body: bytes) -> bytes:
    response = await client.request(post(body))
    reply = Reply(response.status, response.headers, response)
    try:
        return await reply.read(1 << 30)
    finally:
        reply.close()


async def cancelled(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_cancelled_while_connecting(serve: Any) -> None:
    server = await serve(echo)
    client = serve.client(connections=1)
    for steps in range(6):
        task = asyncio.get_running_loop().create_task(read(client, b"x"))
        for _ in range(steps):
            await asyncio.sleep(0)
        if not task.done():
            await cancelled(task)
        assert await asyncio.wait_for(read(client, b"y"), 5) == b"y"
    client.close()
    await until(lambda: server.open == 0)


@pytest.mark.parametrize("sent", [[], [b"HTTP/1.1 20"], [ok(b"hello")[:-2]]])
async def test_cancelled_before_the_head(serve: Any, sent: list[bytes]) -> None:
    async def script(peer: Peer) -> None:
        if peer.number:
            await echo(peer)
            return
        await peer.request()
        await peer.send(*sent)
        await peer.hung_up()

    server = await serve(script)
    client = serve.client(connections=1)
    task = asyncio.get_running_loop().create_task(client.request(post()))
    await until(lambda: server.peers and server.peers[0].served)
    await asyncio.sleep(0.01)
    await cancelled(task)
    assert await asyncio.wait_for(read(client, b"y"), 5) == b"y"
    await until(lambda: server.open == 1)


@pytest.mark.parametrize("how", ["next", "pipe"])
async def test_cancelled_inside_the_body(serve: Any, how: str) -> None:
    async def script(peer: Peer) -> None:
        if peer.number:
            await echo(peer)
            return
        await peer.request()
        await peer.send(CHUNKED, chunk(b"a"))
        await peer.hung_up()

    class Sink:
        def push(self, data: bytes) -> None:
            pushed.append(data)

    async def exchange() -> None:
        response = await client.request(post())
        reply = Reply(response.status, response.headers, response)
        try:
            if how == "pipe":
                await reply.pipe(Sink().push)
            while data := await reply.next():
                pushed.append(data)
        finally:
            reply.close()

    pushed: list[bytes] = []
    server = await serve(script)
    client = serve.client(connections=1)
    task = asyncio.get_running_loop().create_task(exchange())
    await until(lambda: pushed == [b"a"])
    await cancelled(task)
    assert await asyncio.wait_for(read(client, b"y"), 5) == b"y"
    await until(lambda: server.open == 1)


async def test_places_are_given_in_the_order_they_were_asked_for(serve: Any) -> None:
    async def slow_echo(peer: Peer) -> None:
        while (body := await peer.request()) is not None:
            arrived.append(int(body))
            await asyncio.sleep(0)
            await peer.send(ok(body))

    async def ask(number: int) -> None:
        assert await read(client, b"%d" % number) == b"%d" % number
        if number < 20:  # a newcomer, at the very moment a place becomes free
            await read(client, b"%d" % (number + 100))

    arrived: list[int] = []
    server = await serve(slow_echo)
    client = serve.client(connections=1)
    async with asyncio.TaskGroup() as tasks:
        for number in range(40):
            tasks.create_task(ask(number))
    assert arrived == [*range(40), *range(100, 120)]
    assert server.most_open == 1


@pytest.mark.parametrize("woken", [False, True])
async def test_a_waiter_that_leaves_passes_its_place_on(serve: Any, woken: bool) -> None:
    """The second leaves while it waits, or just as it is its turn; the third must get in."""

    async def script(peer: Peer) -> None:
        while await peer.request() is not None:
            await go_on.wait()
            await peer.send(ok(b"x"))

    go_on = asyncio.Event()
    await serve(script)
    client = serve.client(connections=1, keep_alive_s=60)
    create = asyncio.get_running_loop().create_task
    first = create(client.request(post()))
    await until(lambda: client._busy)
    second, third = create(read(client, b"2")), create(read(client, b"3"))
    await until(lambda: len(client._waiting) == 2)
    place = client._waiting[0]
    if woken:
        place.add_done_callback(lambda _: second.cancel())
    else:
        second.cancel()
    go_on.set()
    assert (await first).take() == b"x"
    with pytest.raises(asyncio.CancelledError):
        await second
    assert await asyncio.wait_for(third, 2) == b"x"
    assert client._free == 1


async def test_no_more_connections_than_allowed(serve: Any) -> None:
    server = await serve(echo)
    client = serve.client(connections=5)
    async with asyncio.TaskGroup() as tasks:
        found = [tasks.create_task(read(client, b"%d" % n)) for n in range(100)]
    assert [task.result() for task in found] == [b"%d" % n for n in range(100)]
    assert server.most_open == 5


async def test_a_place_is_free_again_after_any_failure(serve: Any) -> None:
    async def script(peer: Peer) -> None:
        body = await peer.request()
        if body == b"silence":
            await peer.hung_up()
        elif body == b"garbage":
            await peer.send(b"garbage")
        elif body == b"answer":
            await peer.send(ok(b""))
            await peer.hung_up()

    server = await serve(script)
    client = serve.client(connections=2, first_byte_s=0.1)
    for body in (b"silence", b"garbage", b"hang up", b"answer") * 2:
        try:
            await asyncio.wait_for(read(client, body), 2)
        except UpstreamError:
            assert body != b"answer"
    await server.close()
    for _ in range(3):
        with pytest.raises(UpstreamError):
            await asyncio.wait_for(read(client, b"nobody listens"), 2)
    assert client._free == 2
    assert not client._waiting


async def test_waiters_outlive_a_replica_that_went(serve: Any) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.hung_up()

    server = await serve(script)
    client = serve.client(connections=1, first_byte_s=0.1, connect_s=0.5)
    tasks = [asyncio.get_running_loop().create_task(read(client, b"x")) for _ in range(4)]
    await until(lambda: len(client._waiting) == 3)
    await server.stop_listening()
    ends = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)
    assert isinstance(ends[0], UpstreamTimeout)
    assert all(isinstance(end, UpstreamError) for end in ends)


async def misbehaving(peer: Peer) -> None:
    """Echo, in one way or another; sometimes hang up where that is allowed or forbidden."""
    chance = random.Random(peer.number)
    while (body := await peer.request()) is not None:
        kind = chance.randrange(8)
        if kind == 0:
            return  # nothing was sent: a kept connection is replaced, a fresh one is an error
        if kind == 1:
            await peer.send(ok(body)[: chance.randrange(1, len(ok(body)))])
            return
        if kind == 2:
            await peer.send(b"HTTP/1.1 200 OK\r\n\r\n", body)
            return
        if kind == 3:
            await peer.send(ok(body) + b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nwrong")
            return
        if kind < 6:
            await peer.send(ok(body))
        else:
            cut = chance.randrange(1, len(body))
            await peer.send(CHUNKED, chunk(body[:cut]), chunk(body[cut:]), LAST)


@pytest.mark.parametrize("seed", range(4))
async def test_every_answer_is_that_of_its_own_request(serve: Any, seed: int) -> None:
    """Hundreds of requests over few connections, cancelled anywhere, on a server that fails."""
    chance = random.Random(seed)
    server = await serve(misbehaving)
    client = serve.client(connections=4, first_byte_s=5)
    counts = {"answered": 0, "cancelled": 0, "failed": 0}

    async def ask(number: int) -> None:
        body = b"request %d " % number * chance.randrange(1, 40)
        try:
            assert await read(client, body) == body
        except UpstreamError:
            counts["failed"] += 1
        except asyncio.CancelledError:
            counts["cancelled"] += 1
            raise
        else:
            counts["answered"] += 1

    create = asyncio.get_running_loop().create_task
    running: list[asyncio.Task[None]] = []
    for number in range(400):
        running.append(create(ask(number)))
        for _ in range(chance.randrange(4)):
            await asyncio.sleep(0)
        if chance.random() < 0.3:
            chance.choice(running).cancel()
    ends = await asyncio.wait_for(asyncio.gather(*running, return_exceptions=True), 20)
    wrong = [e for e in ends if e is not None and not isinstance(e, asyncio.CancelledError)]
    assert not wrong
    assert min(counts.values()) > 10, counts
    assert (client._free, len(client._busy), len(client._waiting)) == (4, 0, 0)
    assert server.most_open <= 4 + 4  # a connection we cut is open there until it is seen
