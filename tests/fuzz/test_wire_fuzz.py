"""Whatever a replica sends, the wire ends in time, in an answer or in one of three errors.

`LORAGATE_TEST_FUZZ_EXAMPLES` makes the run longer.
"""

from __future__ import annotations

import asyncio
import os
from itertools import pairwise

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.backends.base import Reply
from app.backends.wire import Client, Limits
from app.errors import UpstreamBroke, UpstreamRefused, UpstreamTimeout
from tests.unit.backends.peer import CHUNKED, LAST, Peer, Server, chunk, ok, post

EXAMPLES = int(os.environ.get("LORAGATE_TEST_FUZZ_EXAMPLES", "100"))
fuzz = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])

VALID = [
    ok(b"hello"),
    ok(b"", b"content-type: text/plain"),
    CHUNKED + chunk(b"hel") + chunk(b"lo") + LAST,
    CHUNKED + chunk(b"hello") + b"0\r\nx-sum: 1\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\n" + ok(b"hello"),
    b"HTTP/1.1 204 No Content\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nhello",
    b"HTTP/1.0 200 OK\r\n\r\nhello",
    b"HTTP/1.1 503 Busy\r\nretry-after: 1\r\ncontent-length: 2\r\n\r\n{}",
]
TOKENS = [
    *(
        b"HTTP/1.1 ",
        b"HTTP/1.1 200 OK\r\n",
        b"\r\n",
        b"\r\n\r\n",
        b"\n",
        b"\r",
        b" ",
        b"\t",
        b"\x00",
    ),
    *(
        b"content-length: ",
        b"content-length: 5\r\n",
        b"transfer-encoding: chunked\r\n",
        b"0\r\n\r\n",
    ),
    *(b"connection: close\r\n", b"connection: upgrade\r\nupgrade: x\r\n", b"5\r\nhello\r\n", b":"),
    *(b"ffffffffffffffff\r\n", b"-1", b"99999999999999999999", b"\xff", b"a: b\r\n c\r\n", b"101"),
]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    data = bytearray(draw(st.sampled_from(VALID)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        end = min(len(data), at + draw(st.integers(0, 12)))
        data[at:end] = draw(st.binary(max_size=4) | st.sampled_from(TOKENS))
    return bytes(data)


ANSWERS = (
    st.sampled_from(VALID)
    | mutated()
    | st.lists(st.sampled_from(TOKENS), max_size=12).map(b"".join)
    | st.lists(st.sampled_from(VALID) | mutated(), min_size=2, max_size=3).map(b"".join)
    | st.binary(max_size=80)
)
CUTS = st.lists(st.integers(0, 400), max_size=8)
Outcome = tuple[str, int, tuple[tuple[bytes, bytes], ...], bytes]


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    at = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[a:b] for a, b in pairwise(at) if a < b]


async def exchanged(answer: list[bytes], *, hang_up: bool) -> Outcome:
    """One exchange, and a second on the same client, which must work whatever the first did."""

    async def script(peer: Peer) -> None:
        if peer.number == 0:
            await peer.request()
            try:
                await peer.send(*answer)
            finally:
                sent.set()
            if not hang_up:
                await peer.hung_up()
        else:
            while await peer.request() is not None:
                await peer.send(ok(b"fine"))

    sent = asyncio.Event()
    server = Server(script)
    await server.start()
    limits = Limits(first_byte_s=0.1, idle_s=0.1, keep_alive_s=60)
    client = Client("127.0.0.1", server.port, name="fuzzed", limits=limits)
    try:
        outcome = await _one(client)
        # Bytes nobody asked for are found on an idle connection. Had the next request crossed
        # them on the wire, nothing in HTTP/1.1 could tell them from its answer.
        await sent.wait()
        for _ in range(4):
            await asyncio.sleep(0)
        second = await _one(client)
        if second[0] != "answered":  # the first connection was kept, and hung up or said no more
            second = await _one(client)
        assert second[0] == "answered"
        assert second[3] == b"fine"
        assert client._free == limits.connections
    finally:
        client.close()
        await server.close()
    return outcome


async def _one(client: Client) -> Outcome:
    body = bytearray()
    try:
        async with asyncio.timeout(5):
            response = await client.request(post())
            reply = Reply(response.status, response.headers, response)
            try:
                while data := await reply.next():
                    body += data
            finally:
                reply.close()
    except (UpstreamBroke, UpstreamRefused, UpstreamTimeout) as exc:
        return type(exc).__name__, 0, (), b""
    assert 200 <= response.status < 600
    for name, value in response.headers:
        assert name == name.lower()
        assert not set(b"\r\n\0") & set(name + value), "it could split our own answer"
    return "answered", response.status, tuple(response.headers), bytes(body)


@given(answer=ANSWERS, cuts=CUTS)
@fuzz
async def test_any_answer_ends_and_means_the_same_however_it_is_cut(
    answer: bytes, cuts: list[int]
) -> None:
    whole = await exchanged(pieces(answer, []), hang_up=True)
    cut = await exchanged(pieces(answer, cuts), hang_up=True)
    assert cut == whole


@given(answer=ANSWERS, cuts=CUTS)
@settings(fuzz, max_examples=EXAMPLES // 5)
async def test_an_answer_that_never_ends_does_not_hold_its_request(
    answer: bytes, cuts: list[int]
) -> None:
    await exchanged(pieces(answer, cuts), hang_up=False)
