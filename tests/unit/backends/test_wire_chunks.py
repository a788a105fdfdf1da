"""Whole chunks are passed on as they came; what is not one goes through the parser. Same bytes."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from app.backends.connection import _is_one_chunk
from app.serving.usage import UsageTap
from tests.unit.backends.peer import CHUNKED, LAST, Peer, chunk, post
from tests.waiting import until


class Sink:
    """What a client would have read: pieces, and chunks with their framing taken off."""

    def __init__(self) -> None:
        self.data = b""
        self.framed = 0

    def push(self, data: bytes) -> None:
        self.data += data

    def push_chunk(self, framed: bytes) -> None:
        assert _is_one_chunk(framed)
        self.framed += 1
        self.data += framed[framed.index(b"\r\n") + 2 : -2]


@pytest.mark.parametrize(
    ("data", "whole"),
    [
        (b"5\r\nhello\r\n", True),
        (b"0005\r\nhello\r\n", True),
        (b"A\r\n0123456789\r\n", True),
        (b"5\r\nhel\r\n\r\n", True),
        (b"0\r\n\r\n", False),
        (b"5\r\nhello\r\n5\r\nhello\r\n", False),
        (b"5\r\nhello", False),
        (b"5;x=1\r\nhello\r\n", False),
        (b"+5\r\nhello\r\n", False),
        (b"0x5\r\nhello\r\n", False),
        (b"1_0\r\n0123456789abcdef\r\n", False),
        (b" 5\r\nhello\r\n", False),
        (b"\r\n", False),
        (b"", False),
        (b"hello", False),
    ],
)
def test_what_a_whole_chunk_is(data: bytes, whole: bool) -> None:
    assert _is_one_chunk(data) is whole


@settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40
)
@given(
    pieces=st.lists(st.binary(min_size=1, max_size=40), max_size=8),
    cuts=st.lists(st.integers(0, 400), max_size=4),
)
@example(pieces=[b"a", b"b"], cuts=[])
async def test_however_it_is_cut_the_body_is_the_same(
    serve: Any, pieces: list[bytes], cuts: list[int]
) -> None:
    stream = b"".join(map(chunk, pieces)) + LAST
    edges = [0, *sorted({cut for cut in cuts if 0 < cut < len(stream)}), len(stream)]

    async def script(peer: Peer) -> None:
        while await peer.request() is not None:
            await peer.send(CHUNKED, chunk(b"first"))
            await begun.wait()
            for start, end in pairwise(edges):
                await peer.send(stream[start:end])
                await asyncio.sleep(0)

    begun = asyncio.Event()
    await serve(script)
    client = serve.client()
    for _ in range(2):  # the connection is as good as new for the next request
        begun.clear()
        response = await client.request(post())
        sink = Sink()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(response.pipe(sink.push, sink.push_chunk))
            begun.set()
        assert sink.data == b"first" + b"".join(pieces)
    assert client._busy == set()


async def test_a_chunk_by_itself_is_passed_on_as_it_came(serve: Any) -> None:
    sink = Sink()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(CHUNKED, chunk(b"first"))
        for number in range(5):
            await until(lambda number=number: len(sink.data) == 5 + number)
            await peer.send(chunk(b"%d" % number))
        await until(lambda: len(sink.data) == 10)
        await peer.send(LAST)

    await serve(script)
    response = await serve.client().request(post())
    await response.pipe(sink.push, sink.push_chunk)
    assert (sink.data, sink.framed) == (b"first01234", 5)


EVENTS = [
    b'data: {"choices":[{"text":"a"}]}\n\n',
    b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":4}}\n\n',
    b'data: {"choices":[{"text":"b"}],"usage":null}\n\n',
    b"data: [DONE]\n\n",
    b'data: {"cho',
    b'ices":[{"text":"c"}]}\n\n',
]


@given(events=st.lists(st.sampled_from(EVENTS), max_size=8), hide=st.booleans())
def test_the_tap_withholds_the_same_from_chunks(events: list[bytes], hide: bool) -> None:
    pieces, chunks = UsageTap(hide=hide), UsageTap(hide=hide)
    expected = b"".join(map(pieces.feed, events)) + pieces.finish()
    sink = Sink()
    tapped = chunks.around_chunks(sink.push, sink.push_chunk)
    for event in events:
        tapped(chunk(event))
    assert sink.data + chunks.finish() == expected
    assert chunks.counts() == pieces.counts()
