"""Exchanges on real sockets: bodies of every kind, connections reused, closed and replaced."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from app.backends.base import Reply
from app.backends.wire import Client, Limits
from app.errors import UpstreamBroke, UpstreamRefused
from tests.unit.backends.peer import CHUNKED, LAST, Peer, always, chunk, echo, ok, post
from tests.waiting import until


async def read(client: Client, message: bytes | None = None) -> tuple[int, bytes]:
    response = await client.request(message or post())
    parts = []
    while data := await response.next():
        parts.append(data)
    assert response.complete
    response.close()
    return response.status, b"".join(parts)


def bytewise(data: bytes) -> list[bytes]:
    return [data[at : at + 1] for at in range(len(data))]


BIG = bytes(range(256)) * 2000  # over the size that is waited for as a whole

BODIES = {
    "content-length": ([ok(b"hello")], 200, b"hello"),
    "content-length 0": ([ok(b"")], 200, b""),
    "head and body apart": ([ok(b"hello")[:-5], b"hel", b"lo"], 200, b"hello"),
    "big": ([ok(BIG)], 200, BIG),
    "big in pieces": ([ok(BIG)[:100], ok(BIG)[100:70_000], ok(BIG)[70_000:]], 200, BIG),
    "chunked": ([CHUNKED, chunk(b"hel"), chunk(b"lo"), LAST], 200, b"hello"),
    "chunked in one piece": ([CHUNKED + chunk(b"hel") + chunk(b"lo") + LAST], 200, b"hello"),
    "chunked and empty": ([CHUNKED + LAST], 200, b""),
    "chunk extensions": ([CHUNKED, b"5;a=b\r\nhello\r\n", LAST], 200, b"hello"),
    "trailers": ([CHUNKED, chunk(b"hello"), b"0\r\nx-sum: 1\r\nx-b: 2\r\n\r\n"], 200, b"hello"),
    "an interim answer": ([b"HTTP/1.1 100 Continue\r\n\r\n", ok(b"hello")], 200, b"hello"),
    "interim answers in one piece": (
        [b"HTTP/1.1 102 Processing\r\nx: y\r\n\r\nHTTP/1.1 103 Hints\r\n\r\n" + ok(b"hello")],
        200,
        b"hello",
    ),
    "no content": ([b"HTTP/1.1 204 No Content\r\n\r\n"], 204, b""),
    "not modified": ([b"HTTP/1.1 304 Not Modified\r\ncontent-length: 5\r\n\r\n"], 304, b""),
    "an error": ([b"HTTP/1.1 503 Busy\r\ncontent-length: 4\r\n\r\nbusy"], 503, b"busy"),
    "an empty line before": ([b"\r\n" + ok(b"hello")], 200, b"hello"),
    "a byte at a time": (bytewise(ok(b"hello", b"x-a: b")), 200, b"hello"),
    "chunks a byte at a time": (bytewise(CHUNKED + chunk(b"hello") + LAST), 200, b"hello"),
}


@pytest.mark.parametrize("kind", BODIES)
async def test_a_body_arrives_and_its_connection_is_kept(serve: Any, kind: str) -> None:
    pieces, status, body = BODIES[kind]
    server = await serve(always(*pieces))
    client = serve.client()
    for _ in range(3):
        assert await read(client) == (status, body)
    assert [peer.served for peer in server.peers] == [3]


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.0 200 OK\r\n\r\n",
        b"HTTP/1.0 200 OK\r\ncontent-length: 5\r\n\r\n",
    ],
)
async def test_a_body_that_ends_with_its_connection(serve: Any, head: bytes) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(head, b"hel", b"lo")

    server = await serve(script)
    client = serve.client()
    assert await read(client) == (200, b"hello")
    assert await read(client) == (200, b"hello")
    assert len(server.peers) == 2


async def test_a_reset_does_not_end_a_body_without_a_length(serve: Any) -> None:
    """A close would: but a reset is a replica that died, and half an answer is not an answer."""

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\n\r\nhalf")
        await read_it.wait()
        peer.reset()

    read_it = asyncio.Event()
    await serve(script)
    response = await serve.client().request(post())
    assert await response.next() == b"half"
    read_it.set()
    with pytest.raises(UpstreamBroke, match="reset"):
        await response.next()
    assert not response.complete


async def test_headers_are_lower_case_and_none_of_an_interim_answer_s(serve: Any) -> None:
    interim = b"HTTP/1.1 103 Hints\r\nLink: <x>\r\nTransfer-Encoding: chunked\r\n\r\n"
    await serve(always(interim + ok(b"", b"Content-Type: a/B", b"X-Two: 1", b"x-two: 2")))
    response = await serve.client().request(post())
    assert response.headers == [
        (b"content-type", b"a/B"),
        (b"x-two", b"1"),
        (b"x-two", b"2"),
        (b"content-length", b"0"),
    ]


async def test_a_small_whole_body_is_there_with_its_head(serve: Any) -> None:
    await serve(always(*bytewise(ok(b"hello"))))
    response = await serve.client().request(post())
    assert response.complete
    assert response.take() == b"hello"
    assert await response.next() == b""


async def test_a_stream_s_pieces_are_there_as_they_are_sent(serve: Any) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(CHUNKED)
        for number in range(5):
            await go_on.get()
            await peer.send(chunk(b"%d" % number))
        await peer.send(LAST)

    go_on: asyncio.Queue[None] = asyncio.Queue()
    await serve(script)
    response = await serve.client().request(post())
    for number in range(5):
        assert not response.complete
        go_on.put_nowait(None)
        assert await response.next() == b"%d" % number
    assert await response.next() == b""


GARBAGE = {
    "no http": b"SSH-2.0-OpenSSH_9.6\r\n",
    "http/2": b"\x00\x00\x12\x04\x00\x00\x00\x00\x00",
    "a broken status": b"HTTP/1.1 abc OK\r\n\r\n",
    "a status of no kind": b"HTTP/1.1 099 Odd\r\ncontent-length: 2\r\n\r\nhi",
    "a status past all kinds": b"HTTP/1.1 999 Odd\r\ncontent-length: 0\r\n\r\n",
    "a length that is none": b"HTTP/1.1 200 OK\r\ncontent-length: five\r\n\r\nhello",
    "a negative length": b"HTTP/1.1 200 OK\r\ncontent-length: -5\r\n\r\nhello",
    "two lengths": b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello!",
    "a length and chunks": (
        b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"
    ),
    "a broken header": b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
    "a zero byte in a header": b"HTTP/1.1 200 OK\r\na: b\x00c\r\ncontent-length: 0\r\n\r\n",
    "another protocol": b"HTTP/1.1 101 Switching\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n",
    "a head beyond the limit": b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 20_000,
    "no end of interim answers": b"HTTP/1.1 100 Continue\r\n\r\n" * 10_000,
}


@pytest.mark.parametrize("kind", GARBAGE)
async def test_garbage_is_a_broken_replica_and_harms_no_other_request(
    serve: Any, kind: str
) -> None:
    async def script(peer: Peer) -> None:
        while await peer.request() is not None:
            await peer.send(GARBAGE[kind] if peer.number == 0 else ok(b"fine"))

    server = await serve(script)
    client = serve.client()
    with pytest.raises(UpstreamBroke, match="replica:1"):
        await client.request(post())
    assert await read(client) == (200, b"fine")
    assert len(server.peers) == 2


@pytest.mark.parametrize("bad", [b"zz\r\n", b"5\r\nhelloXX", b"-1\r\n", b"ffffffffffffffffff\r\n"])
async def test_garbage_between_chunks_breaks_the_body(serve: Any, bad: bytes) -> None:
    await serve(always(CHUNKED, chunk(b"hel"), bad))
    client = serve.client()
    response = await client.request(post())
    body = Reply(200, [], response)
    with pytest.raises(UpstreamBroke):
        await body.read(1000)
    assert not response.complete


@pytest.mark.parametrize("after", [b"X", b"HTTP/1.1 200 OK\r\n\r\n", ok(b"of somebody else")])
@pytest.mark.parametrize("first", [ok(b"mine"), CHUNKED + chunk(b"mine") + LAST])
async def test_bytes_after_the_end_never_reach_the_next_exchange(
    serve: Any, first: bytes, after: bytes
) -> None:
    async def script(peer: Peer) -> None:
        while await peer.request() is not None:
            await peer.send(first + after if peer.number == 0 else first)

    server = await serve(script)
    client = serve.client()
    assert await read(client) == (200, b"mine")
    assert await read(client) == (200, b"mine")
    assert [peer.served for peer in server.peers] == [1, 1]


async def test_unsolicited_bytes_close_an_idle_connection(serve: Any) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(ok(b"mine"))
        if peer.number == 0:
            await answered.wait()
            await peer.send(ok(b"of somebody else"))
        await peer.hung_up()
        gone.set()

    answered, gone = asyncio.Event(), asyncio.Event()
    server = await serve(script)
    client = serve.client()
    assert await read(client) == (200, b"mine")
    answered.set()
    await asyncio.wait_for(gone.wait(), 5)
    assert await read(client) == (200, b"mine")
    assert len(server.peers) == 2


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_a_kept_connection_that_was_closed_is_replaced_once_each(
    serve: Any, how: str
) -> None:
    """Each of three kept connections is found closed; the request arrives exactly once."""

    async def script(peer: Peer) -> None:
        if peer.number >= 3:
            await echo(peer)
            return
        await peer.request()
        await all_busy.wait()
        await peer.send(ok(b"first"))
        await peer.request()  # read, and never answered
        getattr(peer, how)()

    all_busy = asyncio.Event()
    server = await serve(script)
    client = serve.client()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(3):
            tasks.create_task(read(client))
        await until(lambda: len(server.peers) == 3)
        all_busy.set()
    assert await read(client, post(b"again")) == (200, b"again")
    assert [peer.served for peer in server.peers] == [2, 2, 2, 1]


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_a_fresh_connection_that_closes_unanswered_is_not_tried_again(
    serve: Any, how: str
) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        getattr(peer, how)()

    server = await serve(script)
    with pytest.raises(UpstreamBroke):
        await serve.client().request(post())
    assert len(server.peers) == 1


async def test_a_kept_connection_that_closes_inside_an_answer_is_not_tried_again(
    serve: Any,
) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(ok(b"first"))
        await peer.request()
        await peer.send(b"H")

    server = await serve(script)
    client = serve.client()
    await read(client)
    with pytest.raises(UpstreamBroke, match="before its answer ended"):
        await client.request(post())
    assert len(server.peers) == 1


async def test_a_server_that_speaks_before_it_is_asked_is_refused(serve: Any) -> None:
    async def script(peer: Peer) -> None:
        await peer.send(b"220 smtp.example\r\n")
        await peer.hung_up()

    await serve(script)
    with pytest.raises((UpstreamBroke, UpstreamRefused)):
        await asyncio.wait_for(serve.client().request(post()), 5)


async def test_a_server_that_hangs_up_at_once(serve: Any) -> None:
    async def script(peer: Peer) -> None:
        peer.reset()

    await serve(script)
    client = serve.client()
    for _ in range(20):
        with pytest.raises((UpstreamBroke, UpstreamRefused)):
            await asyncio.wait_for(client.request(post()), 5)


async def test_a_port_where_nobody_listens_refuses(serve: Any) -> None:
    server = await serve(echo)
    await server.close()
    with pytest.raises(UpstreamRefused, match="cannot be reached"):
        await serve.client().request(post())


@pytest.mark.parametrize("host", ["a..b", "x" * 70])
async def test_a_host_that_no_name_can_be(host: str) -> None:
    client = Client(host, 80, name="odd", limits=Limits())
    with pytest.raises(UpstreamRefused, match="odd cannot be reached"):
        await client.request(post())


async def test_a_server_that_does_not_accept_refuses_in_time() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):  # the backlog is full now
            client = Client("127.0.0.1", port, name="full", limits=Limits(connect_s=0.1))
            with pytest.raises(UpstreamRefused, match="in time"):
                await client.request(post())
            client.close()


async def test_a_connection_is_not_kept_beyond_its_time(serve: Any) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(ok(b""))
        await peer.hung_up()
        gone.set()

    gone = asyncio.Event()
    await serve(script)
    await read(serve.client(keep_alive_s=0.1))
    await asyncio.wait_for(gone.wait(), 5)


async def test_closing_lets_the_busy_finish_and_cuts_the_idle(serve: Any) -> None:
    async def script(peer: Peer) -> None:
        while await peer.request() is not None:
            if peer.number == 0:
                await peer.send(CHUNKED, chunk(b"a"))
                await go_on.wait()
                await peer.send(chunk(b"b"), LAST)
            else:
                await peer.send(ok(b"idle"))
        hung_up.append(peer.number)

    go_on = asyncio.Event()
    hung_up: list[int] = []
    await serve(script)
    client = serve.client()
    busy = await client.request(post())
    assert await busy.next() == b"a"
    await read(client)
    client.close()
    await until(lambda: hung_up == [1])
    go_on.set()
    assert await busy.next() == b"b"
    assert await busy.next() == b""
    await until(lambda: hung_up == [1, 0])


async def test_deadlines_hold_after_closing(serve: Any) -> None:
    """A request that was on its way when its replica departed must not hang for ever."""

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.hung_up()

    await serve(script)
    client = serve.client(first_byte_s=0.1)
    client.close()
    with pytest.raises(Exception, match="did not begin"):
        await asyncio.wait_for(client.request(post()), 5)
