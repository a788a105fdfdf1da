"""The straight line: what is billed, exactly once, in every way a reply can end."""

from __future__ import annotations

import asyncio

import pytest

from app.backends.base import Reply
from app.domain import Usage, UsageRecord
from app.errors import ModelNotFound, NoReplicaAvailable, UpstreamBroke
from app.serving.batches import Batches
from app.serving.forward import Forwarder
from app.serving.meter import Meter
from app.serving.request import parse
from app.serving.request_path import RequestPath
from app.serving.snapshot import Snapshot
from tests.unit.serving.made import ANYONE, FleetOfMemory, adapter, snapshot, stream, whole

WORLD = snapshot(adapter("pirate"))
EVENT = b'data: {"choices":[{"text":"a"}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":4}}\n\n'
DONE = b"data: [DONE]\n\n"


class Line:
    """A request path over one replica of memory."""

    def __init__(self, made: FleetOfMemory) -> None:
        self.made = made
        self.meter = Meter()
        forwarder = Forwarder(made.fleet, made.clock)
        batches = Batches(forwarder, made.fleet, self.meter)
        self.path = RequestPath(forwarder, batches, None, self.meter)

    async def serve(self, body: bytes = b'{"model":"pirate"}', at: Snapshot = WORLD) -> Reply:
        return await self.path.serve(parse("/v1/completions", body), ANYONE, at)

    def billed(self) -> list[UsageRecord]:
        return self.meter.drain()


@pytest.fixture
def line(made: FleetOfMemory) -> Line:
    return Line(made)


def record(prompt: int, completion: int, requests: int = 1) -> list[UsageRecord]:
    return [UsageRecord("key-1", "pirate@1", requests, Usage(prompt, completion))]


async def test_read_to_the_end(line: Line) -> None:
    await line.made.sync(WORLD)
    reply = await line.serve()
    data = await reply.read(1000)
    assert data == b'{"usage":{"prompt_tokens":3,"completion_tokens":4}}'
    assert line.billed() == []
    reply.close()
    reply.close()
    assert line.billed() == record(3, 4)


async def test_taken_whole(line: Line) -> None:
    await line.made.sync(WORLD)
    reply = await line.serve()
    assert reply.complete
    assert reply.take().startswith(b'{"usage"')
    assert await reply.next() == b""
    reply.close()
    assert line.billed() == record(3, 4)


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("how", ["read", "pipe"])
async def test_a_stream_is_billed_and_its_usage_shown_to_who_asked(
    line: Line, asked: bool, how: str
) -> None:
    class Sink:
        def push(self, data: bytes) -> None:
            pushed.append(data)

    await line.made.sync(WORLD)
    line.made.connected[0].answers = [lambda: stream(EVENT, USAGE[:30], USAGE[30:], DONE)]
    options = b',"stream_options":{"include_usage":true}' if asked else b""
    reply = await line.serve(b'{"model":"pirate","stream":true%b}' % options)
    assert b'"include_usage":true' in line.made.connected[0].sent[0][1]
    pushed: list[bytes] = []
    if how == "pipe":
        await reply.pipe(Sink().push)
    else:
        pushed.append(await reply.read(10_000))
    reply.close()
    assert all(pushed)
    assert b"".join(pushed) == (EVENT + USAGE + DONE if asked else EVENT + DONE)
    assert line.billed() == record(3, 4)


async def test_a_pipe_delivers_what_the_tap_held_back(line: Line) -> None:
    class Sink:
        def push(self, data: bytes) -> None:
            pushed.append(data)

    pushed: list[bytes] = []
    await line.made.sync(WORLD)
    line.made.connected[0].answers = [lambda: stream(EVENT, b"data: unfinished")]
    reply = await line.serve(b'{"model":"pirate","stream":true}')
    await reply.pipe(Sink().push)
    assert b"".join(pushed) == EVENT + b"data: unfinished"
    reply.close()


async def test_closed_early(line: Line) -> None:
    await line.made.sync(WORLD)
    line.made.connected[0].answers = [lambda: stream(EVENT, EVENT, USAGE, DONE)]
    reply = await line.serve()
    assert await reply.next() == EVENT
    reply.close()
    assert line.billed() == record(0, 0)


async def test_never_read(line: Line) -> None:
    await line.made.sync(WORLD)
    (await line.serve()).close()
    assert line.billed() == record(0, 0)


async def test_broken_inside(line: Line) -> None:
    await line.made.sync(WORLD)
    line.made.connected[0].answers = [lambda: stream(EVENT, broken=True)]
    reply = await line.serve()
    with pytest.raises(UpstreamBroke):
        await reply.read(1000)
    reply.close()
    assert line.billed() == record(0, 0)


@pytest.mark.parametrize("status", [400, 500])
async def test_an_error_of_the_replica_is_not_billed(line: Line, status: int) -> None:
    await line.made.sync(WORLD)
    line.made.connected[0].answers = [lambda: whole(status, b'{"usage":{"prompt_tokens":3}}')]
    reply = await line.serve()
    assert reply.status == status
    await reply.read(1000)
    reply.close()
    assert line.billed() == []


async def test_what_was_not_served_is_not_billed(line: Line) -> None:
    with pytest.raises(ModelNotFound):
        await line.serve(b'{"model":"nobody"}')
    with pytest.raises(NoReplicaAvailable):
        await line.serve()
    assert line.billed() == []


async def test_cancelled_before_the_answer_is_not_billed(line: Line) -> None:
    await line.made.sync(WORLD)
    line.made.connected[0].answering = asyncio.Event()
    task = asyncio.get_running_loop().create_task(line.serve())
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert line.billed() == []


async def test_a_callback_after_the_end_runs_at_once(line: Line) -> None:
    ran: list[str] = []
    reply = whole(200).on_close(lambda: ran.append("first"))
    reply.close()
    reply.on_close(lambda: ran.append("late"))
    assert ran == ["first", "late"]


async def test_requests_of_one_key_and_model_add_up(line: Line) -> None:
    await line.made.sync(WORLD)
    for _ in range(3):
        reply = await line.serve()
        reply.take()
        reply.close()
    assert line.billed() == record(9, 12, requests=3)
