"""Streams: every event at once, no more memory than promised, nothing left when a client goes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.fakes.faults import Flood, Slow, Stall
from tests.fakes.upstream import FakeUpstream
from tests.integration.gateway import BASE, DOORS, Gateway
from tests.integration.test_faults import inflight
from tests.integration.wire import Wire
from tests.waiting import until, wait_until

pytestmark = pytest.mark.parametrize("door", DOORS)

CHAT = "/v1/chat/completions"
ASK: Any = [{"role": "user", "content": "one two three four five six"}]
PAYLOAD = {"model": BASE, "messages": ASK}
STREAM = PAYLOAD | {"stream": True}
MIB = 1 << 20


@pytest.mark.parametrize("held", range(1, 6))
def test_an_event_is_there_before_the_next_is_made(
    client: openai.OpenAI, upstream: FakeUpstream, held: int
) -> None:
    """The replica withholds event N+1 until the client has read event N."""
    stall = Stall(after=held)
    upstream.script(CHAT, stall)
    with client.chat.completions.create(model=BASE, messages=ASK, stream=True) as stream:
        read = [next(stream) for _ in range(held)]
        assert stall.reached.wait(5)
        assert upstream.requests(CHAT)[0].events_sent == held
        stall.release()
        read += list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in read) == f"{BASE} heard: " + (
        "one two three four five six"
    )


def test_the_head_of_a_stream_does_not_wait_for_its_first_event(
    gateway: Gateway, upstream: FakeUpstream
) -> None:
    """Event for event on the wire: each arrives alone, as its own chunk or more, none merged."""
    upstream.script(CHAT, Slow(0.02))
    with Wire(gateway) as wire:
        wire.start(CHAT, STREAM)
        assert wire.head()[0] == 200
        chunks = list(iter(wire.chunk, b""))
    assert len(chunks) >= 8
    assert all(chunk.endswith(b"\n\n") for chunk in chunks)


async def test_many_streams_at_once(
    gateway: Gateway, async_client: openai.AsyncOpenAI, upstream: FakeUpstream
) -> None:
    count = 64
    stalls = [Stall(after=2) for _ in range(count)]
    upstream.script(CHAT, *stalls)

    async def read(number: int) -> str:
        ask: Any = [{"role": "user", "content": f"number {number}"}]
        stream = await async_client.chat.completions.create(model=BASE, messages=ask, stream=True)
        async with stream:
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(read(number)) for number in range(count)]
        await until(lambda: all(stall.reached.is_set() for stall in stalls), within_s=15)
        assert await asyncio.to_thread(inflight, gateway) == count
        for stall in stalls:
            stall.release()
    assert [t.result() for t in tasks] == [f"{BASE} heard: number {n}" for n in range(count)]
    await asyncio.to_thread(wait_until, lambda: inflight(gateway) == 0)


@pytest.mark.parametrize("how", ["close", "reset"])
def test_leaving_inside_a_stream_cancels_the_replica_s_work(
    gateway: Gateway, upstream: FakeUpstream, how: str
) -> None:
    stall = Stall(after=2)
    upstream.script(CHAT, stall)
    wire = Wire(gateway)
    wire.start(CHAT, STREAM)
    assert stall.reached.wait(5)
    getattr(wire, how)()
    (seen,) = upstream.requests(CHAT)
    wait_until(lambda: seen.cancelled)
    wait_until(lambda: inflight(gateway) == 0)
    assert gateway.ready(), "the replica is not to blame"


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("payload", [PAYLOAD, STREAM])
def test_leaving_before_the_first_byte_cancels_the_replica_s_work(
    gateway: Gateway, upstream: FakeUpstream, payload: dict[str, Any], how: str
) -> None:
    stall = Stall()
    upstream.script(CHAT, stall)
    wire = Wire(gateway)
    wire.start(CHAT, payload)
    assert stall.reached.wait(5)
    getattr(wire, how)()
    (seen,) = upstream.requests(CHAT)
    wait_until(lambda: seen.cancelled)
    wait_until(lambda: inflight(gateway) == 0)


def test_the_client_s_own_way_to_leave(
    client: openai.OpenAI, gateway: Gateway, upstream: FakeUpstream
) -> None:
    upstream.script(CHAT, Stall(after=2))
    with client.chat.completions.create(model=BASE, messages=ASK, stream=True) as stream:
        next(stream)
    (seen,) = upstream.requests(CHAT)
    wait_until(lambda: seen.cancelled)
    wait_until(lambda: inflight(gateway) == 0)


async def test_a_client_that_times_out(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.script(CHAT, Stall())
    async with gateway.async_openai_client(timeout=0.3) as client:
        with pytest.raises(openai.APITimeoutError):
            await client.chat.completions.create(model=BASE, messages=ASK)
    (seen,) = upstream.requests(CHAT)
    await until(lambda: seen.cancelled)


def test_leaving_is_counted_as_499(gateway: Gateway, upstream: FakeUpstream) -> None:
    stall = Stall(after=2)
    upstream.script(CHAT, stall)
    wire = Wire(gateway)
    wire.start(CHAT, STREAM)
    assert stall.reached.wait(5)
    wire.close()
    wait_until(lambda: 'status="499"' in gateway.client.get("/metrics").text)


def test_a_client_that_stops_reading_stops_the_replica(
    gateway: Gateway, upstream: FakeUpstream
) -> None:
    """Of 200 MB the replica gets rid of what the kernel's buffers take, and 1 MiB."""
    upstream.script(CHAT, Flood(200 * 10**6))
    with Wire(gateway, receive_buffer=4096) as wire:
        wire.start(CHAT, STREAM)
        assert wire.head()[0] == 200
        assert wire.read(4096)
        (seen,) = upstream.requests(CHAT)
        pushed = _settled(seen)
        assert pushed < 2 * _kernel_buffers() + MIB
        assert not seen.finished


def test_a_slow_reader_gets_everything(gateway: Gateway, upstream: FakeUpstream) -> None:
    total = 24 * MIB
    upstream.script(CHAT, Flood(total))
    with Wire(gateway, receive_buffer=4096) as wire:
        wire.start(CHAT, STREAM)
        assert wire.head()[0] == 200
        first = wire.chunk()
        (seen,) = upstream.requests(CHAT)
        _settled(seen)
        rest = sum(map(len, iter(wire.chunk, b"")))
    assert len(first) + rest == total


def test_a_slow_reader_does_not_slow_the_others(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.script(CHAT, Flood(200 * 10**6))
    with Wire(gateway, receive_buffer=4096) as slow, Wire(gateway) as quick:
        slow.start(CHAT, STREAM)
        assert slow.head()[0] == 200
        _settled(upstream.requests(CHAT)[0])
        for _ in range(20):
            assert quick.post(CHAT, PAYLOAD)[0] == 200


def test_a_slow_reader_that_leaves_frees_its_slot(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.script(CHAT, Flood(200 * 10**6))
    wire = Wire(gateway, receive_buffer=4096)
    wire.start(CHAT, STREAM)
    assert wire.head()[0] == 200
    (seen,) = upstream.requests(CHAT)
    _settled(seen)
    wire.reset()
    wait_until(lambda: seen.cancelled)
    wait_until(lambda: inflight(gateway) == 0)


def _settled(seen: Any) -> int:
    """Bytes pushed once pushing has stopped: the same for a tenth of a second."""
    last = [0, 0]

    def still() -> bool:
        last[0], last[1] = (last[0] + 1, last[1]) if last[1] == seen.bytes_sent else (0, 0)
        last[1] = seen.bytes_sent
        return last[0] >= 10 and last[1] > 0

    wait_until(still, within_s=15)
    return last[1]


def _kernel_buffers() -> int:
    """The most the kernel holds for one connection, both ends."""
    found = 0
    for name in ("tcp_rmem", "tcp_wmem"):
        found += int(Path("/proc/sys/net/ipv4", name).read_text().split()[2])
    return found
