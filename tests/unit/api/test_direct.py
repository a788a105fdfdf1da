"""The inference paths on real sockets: straight on the socket, and under plain ASGI, the same."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from app.backends.base import Reply
from app.errors import UpstreamBroke
from app.serving.request import InferenceRequest
from tests.unit.api.door import LIMIT, Client, Door, echo, head, request
from tests.unit.serving.made import StreamedBody, stream, whole
from tests.waiting import until

BODY = b'{"model":"x","prompt":"hello"}'
EVENTS = (b"data: 1\n\n", b"data: 2\n\n", b"data: [DONE]\n\n")
Open = Callable[..., Awaitable[Door]]


@pytest.fixture(params=["direct", "asgi"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def open_door(kind: str) -> AsyncIterator[Open]:
    doors: list[Door] = []

    async def start(answer: Any = echo, **config: Any) -> Door:
        doors.append(Door(kind, answer, **config))
        await doors[-1].start()
        return doors[-1]

    yield start
    for door in doors:
        await door.stop()
        assert all(reply._callbacks is None for reply in door.replies), "a reply was left open"
        assert not door.server.server_state.tasks
        assert not door.server.server_state.connections


@pytest.fixture
async def clients() -> AsyncIterator[Callable[..., Awaitable[Client]]]:
    opened: list[Client] = []

    async def connect(door: Door, **options: Any) -> Client:
        opened.append(await door.client(**options))
        return opened[-1]

    yield connect
    for client in opened:
        client.close()


async def streamed(_: InferenceRequest) -> Reply:
    return stream(*EVENTS)


def gated(gate: asyncio.Event, *pieces: bytes, status: int = 200) -> Any:
    """Answers with pieces of which the last waits for the gate."""

    class Gated(StreamedBody):
        async def next(self) -> bytes:
            if len(self.pieces) == 1:
                await gate.wait()
            return await super().next()

    async def answer(_: InferenceRequest) -> Reply:
        return Reply(status, [(b"content-type", b"text/event-stream")], Gated(*pieces))

    return answer


async def test_many_requests_on_one_connection(open_door: Open, clients: Any) -> None:
    door = await open_door()
    client = await clients(door)
    for number in range(20):
        body = b'{"model":"x","n":%d}' % number
        status, headers, answer = await client.post(body)
        assert (status, answer) == (200, body)
        assert headers["content-type"] == "application/json"
        assert headers["x-request-id"].startswith("req_")
    assert door.connections == 1
    assert door.server.server_state.total_requests == 20


async def test_other_paths_on_the_same_connection(open_door: Open, clients: Any) -> None:
    client = await clients(await open_door())
    for _ in range(2):
        assert (await client.post(BODY))[2] == BODY
        await client.send(request(b"", method="GET", target="/healthz"))
        assert (await client.answer())[2] == b"GET /healthz 0"
        await client.send(request(b"x" * 1000, target="/admin/x"))
        assert (await client.answer())[2] == b"POST /admin/x 1000"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ({"method": "GET"}, 405),
        ({"target": "/v1/completions?a=b"}, 200),
        ({"target": "/v1/completions/"}, 200),
        ({"target": "/v1/chat/completions"}, 200),
    ],
)
async def test_the_shapes_of_a_request_line(
    open_door: Open, clients: Any, line: dict[str, str], expected: int
) -> None:
    client = await clients(await open_door())
    await client.send(request(BODY, **line))
    assert (await client.answer())[0] == expected
    assert (await client.post(BODY))[0] == 200


@pytest.mark.parametrize("size", [1, 7])
async def test_a_request_split_over_many_packets(open_door: Open, clients: Any, size: int) -> None:
    client = await clients(await open_door())
    for data in (request(BODY), head(target="/healthz", method="GET"), request(BODY)):
        await client.send(*(data[at : at + size] for at in range(0, len(data), size)))
        assert (await client.answer())[0] == 200


async def test_a_chunked_request(open_door: Open, clients: Any) -> None:
    client = await clients(await open_door())
    for _ in range(2):
        await client.send(head(b"transfer-encoding: chunked"))
        await client.send(b"5\r\n" + BODY[:5] + b"\r\n", b"%x;a=b\r\n" % len(BODY[5:]))
        await client.send(BODY[5:] + b"\r\n0\r\nx-trailer: 1\r\n\r\n")
        assert (await client.answer())[2] == BODY


async def test_a_large_body(open_door: Open, clients: Any) -> None:
    client = await clients(await open_door())
    body = b'{"model":"x","prompt":"%b"}' % (b"y" * (LIMIT - 100))
    for _ in range(2):
        assert (await client.post(body))[2] == body


async def test_a_stream(open_door: Open, clients: Any) -> None:
    gate = asyncio.Event()
    client = await clients(await open_door(gated(gate, *EVENTS)))
    for _ in range(2):
        gate.clear()
        await client.send(request(BODY))
        status, headers = await client.head()
        assert (status, headers["content-type"]) == (200, "text/event-stream")
        assert [await client.chunk(), await client.chunk()] == list(EVENTS[:2])
        gate.set()
        assert [part async for part in client.chunks()] == [EVENTS[2]]


async def test_a_stream_that_breaks_ends_in_its_own_format(open_door: Open, clients: Any) -> None:
    async def answer(_: InferenceRequest) -> Reply:
        return stream(EVENTS[0], broken=True)

    client = await clients(await open_door(answer))
    status, _, body = await client.post(BODY)
    assert status == 200
    assert body.startswith(EVENTS[0] + b'data: {"error":')
    assert (await client.post(BODY))[0] == 200


async def test_a_body_that_breaks_does_not_look_whole(open_door: Open, clients: Any) -> None:
    async def answer(_: InferenceRequest) -> Reply:
        body = StreamedBody(b'{"choices":', error=UpstreamBroke("it died"))
        return Reply(200, [(b"content-type", b"application/json")], body)

    door = await open_door(answer)
    client = await clients(door)
    await client.send(request(BODY))
    with pytest.raises((asyncio.IncompleteReadError, ConnectionError, ValueError)):
        await client.answer()
    assert await client.ended()
    await until(lambda: door.connections == 0)


async def test_connection_close(open_door: Open, clients: Any) -> None:
    door = await open_door()
    client = await clients(door)
    status, headers, _ = await client.post(BODY, b"connection: close")
    assert (status, headers["connection"]) == (200, "close")
    assert await client.ended()
    door.answer = streamed
    client = await clients(door)
    _, headers, body = await client.post(BODY, b"connection: close")
    assert headers["connection"] == "close"
    assert body == b"".join(EVENTS)
    assert await client.ended()


@pytest.mark.parametrize("headers", [[], [b"connection: keep-alive"]])
async def test_http_1_0(open_door: Open, clients: Any, kind: str, headers: list[bytes]) -> None:
    """Its clients know no chunks: the end of the connection ends a stream."""
    door = await open_door()
    client = await clients(door)
    await client.send(request(BODY, *headers, version="1.0"))
    assert (await client.answer())[2] == BODY
    assert await client.ended()
    door.answer = streamed
    client = await clients(door)
    await client.send(request(BODY, *headers, version="1.0"))
    status, said, body = await client.answer()
    assert status == 200
    assert body == b"".join(EVENTS)
    if kind == "direct":  # uvicorn sends chunks to such a client, too
        assert "transfer-encoding" not in said
        assert said["connection"] == "close"
    assert await client.ended()


async def test_a_client_that_waits_to_be_asked_for_its_body(open_door: Open, clients: Any) -> None:
    client = await clients(await open_door())
    for _ in range(2):
        await client.send(head(b"content-length: %d" % len(BODY), b"expect: 100-continue"))
        assert await client.head() == (100, {})
        await client.send(BODY)
        assert (await client.answer())[::2] == (200, BODY)


async def test_a_client_that_waits_is_told_of_a_refusal_instead(
    open_door: Open, clients: Any
) -> None:
    """Nobody should have to send gigabytes to hear that they are too many."""
    client = await clients(await open_door())
    await client.send(head(b"content-length: %d" % (LIMIT + 1), b"expect: 100-continue"))
    assert (await client.answer())[0] == 413


@pytest.mark.parametrize("split", [False, True])
async def test_an_upgrade_is_declined(
    open_door: Open, clients: Any, kind: str, split: bool
) -> None:
    """As some HTTP clients offer HTTP/2 with their first request."""
    if kind == "asgi":
        pytest.skip("uvicorn takes the body for the other protocol's")
    client = await clients(await open_door())
    offer = (b"connection: upgrade, http2-settings", b"upgrade: h2c", b"http2-settings: AAMAAABk")
    data = request(BODY, *offer)
    for _ in range(2):
        await client.send(*(data[at : at + 1] for at in range(len(data))) if split else (data,))
        status, _, body = await client.answer()
        assert (status, body) == (200, BODY)


async def test_a_body_over_the_limit_that_was_announced(open_door: Open, clients: Any) -> None:
    door = await open_door()
    client, other = await clients(door), await clients(door)
    await client.send(head(b"content-length: %d" % (LIMIT + 1)), b"x" * 1000)
    status, _, body = await client.answer()
    assert status == 413
    assert b'"code":"body_too_large"' in body
    assert (await other.post(BODY))[0] == 200
    assert door.requests[0].body == BODY


@pytest.mark.parametrize("announced", [False, True])
async def test_who_sends_far_too_much_still_reads_why(
    open_door: Open, clients: Any, announced: bool
) -> None:
    """A connection closed with bytes unread is reset, and that can overtake the answer."""
    door = await open_door()
    client = await clients(door)
    size = 40 * LIMIT
    how = b"content-length: %d" % size if announced else b"transfer-encoding: chunked"
    await client.send(head(how))
    piece = b"x" * 60_000 if announced else b"ea60\r\n" + b"x" * 60_000 + b"\r\n"
    for _ in range(size // 60_000):
        await client.send(piece)
        try:
            await client.drain()
        except ConnectionError:
            break
    status, _, body = await client.answer()
    assert status == 413
    assert b"over the limit" in body
    assert (await (await clients(door)).post(BODY))[0] == 200


GARBAGE = {
    "no http": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "no method": b"NONSENSE / HTTP/1.1\r\n\r\n",
    "an odd header": b"POST /v1/completions HTTP/1.1\r\nno colon\r\n\r\n",
    "a zero byte": b"POST /v1/completions HTTP/1.1\r\na: b\x00\r\n\r\n",
    "a length and chunks": head(b"content-length: 5", b"transfer-encoding: chunked") + b"0\r\n\r\n",
    "chunks and a length": head(b"transfer-encoding: chunked", b"content-length: 5") + b"0\r\n\r\n",
    "two lengths": head(b"content-length: 5", b"content-length: 6") + b"12345",
    "the same length twice": head(b"content-length: 5", b"content-length: 5") + b"12345",
    "a list of lengths": head(b"content-length: 5, 5") + b"12345",
    "a signed length": head(b"content-length: +5") + b"12345",
    "a negative length": head(b"content-length: -5") + b"12345",
    "a length in hex": head(b"content-length: 0x5") + b"12345",
    "an empty length": head(b"content-length: ") + b"12345",
    "a length beyond all bounds": head(b"content-length: 99999999999999999999999") + b"12345",
    "a space before the colon": head(b"content-length : 5") + b"12345",
    "a folded header": head(b"x-a: b", b" content-length: 5") + b"12345",
    "chunked, and then not": head(b"transfer-encoding: chunked, identity") + b"0\r\n\r\n",
    "chunks misspelled": head(b"transfer-encoding: xchunked") + b"0\r\n\r\n",
    "a line feed alone": b"POST /v1/completions HTTP/1.1\nhost: localhost\n\n",
}


@pytest.mark.parametrize("bad", GARBAGE)
async def test_what_is_not_quite_http_is_refused(open_door: Open, clients: Any, bad: str) -> None:
    """Two readings of one message are how requests are smuggled past a proxy."""
    door = await open_door()
    for after_a_request in (False, True):
        client = await clients(door)
        if after_a_request:
            assert (await client.post(BODY))[0] == 200
        await client.send(GARBAGE[bad] + request(b'{"model":"smuggled"}'))
        status, _, _ = await client.answer()
        assert status == 400
        assert await client.ended()
    assert all(b"smuggled" not in found.body for found in door.requests)
    assert (await (await clients(door)).post(BODY))[0] == 200


async def test_garbage_between_the_chunks_of_a_request(open_door: Open, clients: Any) -> None:
    door = await open_door()
    client = await clients(door)
    await client.send(head(b"transfer-encoding: chunked"), b"5\r\n12345\r\n", b"zz\r\n")
    assert (await client.answer())[0] == 400
    assert await client.ended()
    assert door.requests == []


async def test_connect_is_no_request_of_ours(open_door: Open, clients: Any) -> None:
    door = await open_door()
    client = await clients(door)
    await client.send(request(BODY, method="CONNECT"))
    assert (await client.head())[0] >= 400
    assert door.requests == []


async def test_a_head_beyond_the_limit(open_door: Open, clients: Any, kind: str) -> None:
    if kind == "asgi":
        pytest.skip("uvicorn has no limit of its own")
    door = await open_door()
    client = await clients(door)
    await client.send(b"POST /v1/completions HTTP/1.1\r\n", *[b"x-a: %b\r\n" % (b"y" * 1000)] * 80)
    assert (await client.answer())[0] == 431
    assert await client.ended()


@pytest.mark.parametrize("size", [3, 10_000])
async def test_requests_ahead_of_their_answers(open_door: Open, clients: Any, size: int) -> None:
    door = await open_door()
    client = await clients(door)
    bodies = [b'{"model":"x","n":%d}' % number for number in range(20)]
    data = b"".join(map(request, bodies))
    await client.send(*(data[at : at + size] for at in range(0, len(data), size)))
    assert [(await client.answer())[2] for _ in bodies] == bodies
    assert [found.body for found in door.requests] == bodies


async def test_a_request_inside_the_answer_of_another(open_door: Open, clients: Any) -> None:
    gate = asyncio.Event()
    door = await open_door(gated(gate, *EVENTS))
    client = await clients(door)
    await client.send(request(BODY))
    await client.head()
    await client.send(request(BODY))
    gate.set()
    assert [part async for part in client.chunks()] == list(EVENTS)
    assert (await client.answer())[2] == b"".join(EVENTS)


async def test_another_path_ahead_of_an_answer(open_door: Open, clients: Any, kind: str) -> None:
    """Its bytes are not apart from the others': the client has to ask again."""
    client = await clients(await open_door())
    await client.send(request(BODY) + head(target="/healthz", method="GET"))
    status, headers, body = await client.answer()
    assert (status, body) == (200, BODY)
    if kind == "asgi":
        assert (await client.answer())[2] == b"GET /healthz 0"
    else:
        assert headers["connection"] == "close"
        assert await client.ended()


async def test_garbage_ahead_of_an_answer(open_door: Open, clients: Any, kind: str) -> None:
    gate = asyncio.Event()
    door = await open_door(gated(gate, *EVENTS))
    client = await clients(door)
    await client.send(request(BODY))
    await client.head()
    await client.send(b"X" * 100_000 + b"\r\n\r\n")
    gate.set()
    if kind == "direct":  # uvicorn writes its 400 into the middle of the answer
        assert [part async for part in client.chunks()] == list(EVENTS)
        assert await client.ended()
    await until(lambda: door.connections == 0)
    assert len(door.requests) == 1


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("sent", [b"", request(BODY)[:20], request(BODY)[:-5]])
async def test_leaving_before_the_request_is_whole(
    open_door: Open, clients: Any, how: str, sent: bytes
) -> None:
    door = await open_door()
    client = await clients(door)
    await client.send(sent)
    await until(lambda: door.connections == 1)
    getattr(client, how)()
    await until(lambda: door.connections == 0)
    assert door.requests == []
    assert not door.server.server_state.tasks


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_leaving_before_the_answer(open_door: Open, clients: Any, how: str) -> None:
    async def never(_: InferenceRequest) -> Reply:
        await asyncio.Event().wait()
        raise AssertionError

    door = await open_door(never)
    client = await clients(door)
    await client.send(request(BODY))
    await until(lambda: door.requests)
    getattr(client, how)()
    await until(lambda: door.cancelled == 1)
    await until(lambda: door.statuses == [499])
    await until(lambda: door.connections == 0)


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_leaving_inside_a_stream(open_door: Open, clients: Any, how: str) -> None:
    gate = asyncio.Event()
    door = await open_door(gated(gate, *EVENTS))
    client = await clients(door)
    await client.send(request(BODY))
    await client.head()
    assert await client.chunk() == EVENTS[0]
    getattr(client, how)()
    await until(lambda: door.statuses == [499])
    (reply,) = door.replies
    assert reply._body.closed == 1  # type: ignore[attr-defined]
    gate.set()


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_leaving_after_the_answer(open_door: Open, clients: Any, how: str) -> None:
    door = await open_door()
    client = await clients(door)
    assert (await client.post(BODY))[0] == 200
    getattr(client, how)()
    await until(lambda: door.connections == 0)
    assert door.statuses == [200]


async def test_an_error_for_a_client_that_left_is_no_crash(
    open_door: Open, clients: Any, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It left at the very moment its request failed: there is nobody to tell, and that is all."""

    async def fails_as_it_leaves(_: InferenceRequest) -> Reply:
        client.reset()
        for connection in door.server.server_state.connections:
            connection.transport.close()  # as the loop does on reading its end
        raise UpstreamBroke("it died")

    door = await open_door(fails_as_it_leaves)
    client = await clients(door)
    await client.send(request(BODY))
    await until(lambda: door.statuses != [])
    await until(lambda: not door.server.server_state.tasks)
    gc.collect()  # a task that nobody asked for its exception says so when it goes
    assert caplog.text == ""
    assert door.statuses == [499 if kind == "direct" else 502]  # uvicorn does not tell


async def test_a_slow_client_is_waited_for_and_costs_little(open_door: Open, clients: Any) -> None:
    produced = 0

    class Flood(StreamedBody):
        async def next(self) -> bytes:
            nonlocal produced
            await asyncio.sleep(0)
            produced += 1
            return b"x" * 10_000 if produced <= 3000 else b""

        async def pipe(self, push: Any, push_chunk: Any = None) -> None:
            while data := await self.next():
                if (blocked := push(data)) is not None:
                    await blocked

    async def answer(_: InferenceRequest) -> Reply:
        return Reply(200, [(b"content-type", b"text/plain")], Flood())

    door = await open_door(answer)
    client = await clients(door, receive_buffer=4096)
    await client.send(request(BODY))
    await client.head()
    seen = -1
    while produced != seen:
        seen = produced
        await asyncio.sleep(0.05)
    assert produced < 1500, "the kernel takes a few megabytes; the rest has to wait"
    size = 0
    async for part in client.chunks():
        size += len(part)
    assert size == 3000 * 10_000


async def test_an_idle_connection_is_closed(open_door: Open, clients: Any) -> None:
    door = await open_door(timeout_keep_alive=1)
    client = await clients(door)
    assert (await client.post(BODY))[0] == 200
    assert door.connections == 1
    assert await client.ended()
    await until(lambda: door.connections == 0)


async def test_a_connection_that_asks_nothing_is_closed(
    open_door: Open, clients: Any, kind: str
) -> None:
    if kind == "asgi":
        pytest.skip("uvicorn waits for a first request for ever")
    door = await open_door(timeout_keep_alive=1)
    assert await (await clients(door)).ended()


async def test_a_request_that_drips_is_cut(
    open_door: Open, clients: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "asgi":
        pytest.skip("uvicorn waits for the rest of a request for ever")
    monkeypatch.setattr("app.api.direct.REQUEST_S", 0.5)
    door = await open_door(timeout_keep_alive=1)
    inside_head, inside_body = await clients(door), await clients(door)
    await inside_head.send(request(BODY)[:30])
    await inside_body.send(request(BODY)[:-5])
    assert await inside_head.ended()
    assert await inside_body.ended()
    assert door.requests == []


async def test_a_shutdown_closes_the_idle_and_lets_a_stream_finish(
    open_door: Open, clients: Any
) -> None:
    gate = asyncio.Event()
    door = await open_door()
    idle, half, busy = await clients(door), await clients(door), await clients(door)
    assert (await idle.post(BODY))[0] == 200
    await half.send(request(BODY)[:20])
    door.answer = gated(gate, *EVENTS)
    await busy.send(request(BODY))
    await busy.head()
    assert await busy.chunk() == EVENTS[0]
    stopping = asyncio.get_running_loop().create_task(door.stop())
    assert await idle.ended()
    assert await half.ended()
    assert not stopping.done()
    gate.set()
    assert [part async for part in busy.chunks()] == list(EVENTS[1:])
    assert await busy.ended()
    await asyncio.wait_for(stopping, 5)


async def test_an_answer_under_shutdown_says_that_the_connection_closes(
    open_door: Open, clients: Any
) -> None:
    async def answer(found: InferenceRequest) -> Reply:
        await gate.wait()
        return whole(200, found.body)

    gate = asyncio.Event()
    door = await open_door(answer)
    client = await clients(door)
    await client.send(request(BODY))
    await until(lambda: door.requests)
    stopping = asyncio.get_running_loop().create_task(door.stop())
    await until(lambda: not door.server.servers[0].is_serving())
    await asyncio.sleep(0)
    gate.set()
    status, headers, _ = await client.answer()
    assert (status, headers["connection"]) == (200, "close")
    assert await client.ended()
    await asyncio.wait_for(stopping, 5)
