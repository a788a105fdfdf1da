"""What can go wrong with the parts of a batch, and what the client then sees."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.backends.base import Reply
from app.errors import AdapterLoadFailed, InvalidJson, LoragateError, UpstreamBroke
from app.serving.batches import Batches
from app.serving.forward import Forwarder
from app.serving.meter import Meter
from app.serving.offender import Refusal, Refused, find
from app.serving.request import parse
from app.serving.resolve import resolve
from app.serving.streams import MergedBody, Stream
from tests.fakes import dialect
from tests.unit.serving.made import ANYONE, FleetOfMemory, StreamedBody, snapshot, stream, whole
from tests.waiting import until

WORLD = snapshot(replicas=2)
PROMPTS = [f"p{n:02}" for n in range(32)]
NO_PARAM = b'{"error":{"message":"no","type":"BadRequestError","param":null,"code":400}}'


class Fleet:
    """Two replicas of memory that take from one script, then speak vLLM's dialect."""

    def __init__(self, made: FleetOfMemory) -> None:
        self.made = made
        self.meter = Meter()
        self.batches = Batches(Forwarder(made.fleet, made.clock), made.fleet, self.meter)
        self.script: list[Reply | LoragateError | None] = []
        self.sent: list[dict[str, Any]] = []
        for backend in made.connected:
            backend.send = self._send  # type: ignore[method-assign]

    async def _send(self, path: str, body: bytes, headers: bytes) -> Reply:
        payload = json.loads(body)
        self.sent.append(payload)
        await asyncio.sleep(0)
        answer = self.script.pop(0) if self.script else None
        if isinstance(answer, LoragateError):
            raise answer
        if answer is not None:
            return answer
        try:
            if payload.get("stream"):
                return stream(*dialect.completion_events("tiny", payload, "1"))
            return whole(200, dialect.completion_body("tiny", payload, "1"))
        except dialect.Refusal as refusal:
            return whole(refusal.status, refusal.body)

    async def post(self, prompts: Any = PROMPTS, *, name: bool = True, **fields: Any) -> Reply:
        request = parse(
            "/v1/completions", json.dumps({"model": "tiny", "prompt": prompts} | fields).encode()
        )
        route = resolve(WORLD, "tiny", ANYONE)
        return await self.batches.forward(request, route, name=name)

    def idle(self) -> bool:
        return all(replica.inflight == 0 for replica in self.made.fleet.live())


@pytest.fixture
async def fleet(made: FleetOfMemory) -> AsyncIterator[Fleet]:
    await made.sync(WORLD)
    fleet = Fleet(made)
    yield fleet
    assert fleet.idle()


async def read(reply: Reply) -> bytes:
    try:
        return await reply.read(1 << 22)
    finally:
        reply.close()


@pytest.mark.parametrize("streams", [False, True])
async def test_a_part_that_is_lost_before_its_answer_is_sent_once_more(
    fleet: Fleet, streams: bool
) -> None:
    fleet.script = [UpstreamBroke("it died")]
    assert (await read(await fleet.post(stream=streams))).count(b'"index":31,') >= 1
    assert len(fleet.sent) == 3
    fleet.script = [UpstreamBroke("it died")] * 9
    with pytest.raises(UpstreamBroke):
        await fleet.post(stream=streams)
    assert len(fleet.sent) <= 3 + 4
    assert fleet.idle()


async def test_a_body_cut_short_is_asked_for_again(fleet: Fleet) -> None:
    fleet.script = [stream(b'{"choices":', broken=True)]
    choices = json.loads(await read(await fleet.post()))["choices"]
    assert [choice["index"] for choice in choices] == list(range(32))
    assert len(fleet.sent) == 3
    assert fleet.idle()


async def test_an_engine_that_fails_on_a_part_fails_the_batch(fleet: Fleet) -> None:
    fleet.script = [whole(500, b"a bug")]
    reply = await fleet.post()
    assert (reply.status, await read(reply)) == (500, b"a bug")
    assert fleet.idle()


async def test_an_answer_too_large_to_hold(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.serving.batches._ANSWER_BYTES", 100)
    with pytest.raises(UpstreamBroke, match="smaller batches"):
        await fleet.post()


async def test_a_deeply_nested_batch_is_the_caller_s_mistake(fleet: Fleet) -> None:
    request = parse("/v1/completions", b'{"model":"tiny","prompt":["a","b"],"x":1}')
    request.body = b'{"model":"tiny","prompt":["a","b"],"x":' + b"[" * 9999 + b"]" * 9999 + b"}"
    with pytest.raises(InvalidJson):
        request.members()


# Who is to blame


async def test_without_naming_the_refusal_is_as_it_came(fleet: Fleet) -> None:
    for prompts in (PROMPTS[:2], PROMPTS):
        fleet.sent.clear()
        reply = await fleet.post([*prompts, "word " * 2000], name=False, max_tokens=1)
        assert (reply.status, json.loads(await read(reply))["error"]["param"]) == (
            400,
            "input_tokens",
        )
        assert len(fleet.sent) <= 2


@pytest.mark.parametrize(
    "after", [None, UpstreamBroke("it died"), AdapterLoadFailed("gone"), whole(404, b"{}")]
)
async def test_a_refusal_that_does_not_come_again_names_nobody(
    fleet: Fleet, after: Reply | LoragateError | None
) -> None:
    fleet.script = [whole(400, NO_PARAM), after]
    reply = await fleet.post(PROMPTS[:4])
    assert (reply.status, await read(reply)) == (400, NO_PARAM)
    assert fleet.idle()


async def test_the_same_words_about_every_prompt_are_about_none(fleet: Fleet) -> None:
    fleet.script = [whole(400, NO_PARAM) for _ in range(20)]
    reply = await fleet.post(PROMPTS[:4])
    assert (reply.status, await read(reply)) == (400, NO_PARAM)
    assert len(fleet.sent) == 3


async def test_it_is_looked_for_without_what_is_dear(fleet: Fleet) -> None:
    prompts = [*PROMPTS[:3], "word " * 2000]
    reply = await fleet.post(prompts, echo=True, max_tokens=0, logprobs=1, prompt_logprobs=1, n=2)
    assert json.loads(await read(reply))["error"]["param"] == "prompt[3]"
    assert fleet.sent[1] == {
        "model": "served-tiny",
        "prompt": ["word " * 2000],
        "max_tokens": 1,
        "n": 2,
        "stream": True,
    }


@given(
    places=st.lists(st.integers(0, 5000), min_size=1, max_size=1024, unique=True),
    data=st.data(),
)
def test_the_one_that_is_refused_is_found_in_few_calls(places: list[int], data: Any) -> None:
    bad = data.draw(st.sampled_from(places))
    longest = data.draw(st.sampled_from(places))
    calls = 0

    async def ask(some: Sequence[int]) -> Refusal | None:
        nonlocal calls
        calls += 1
        return Refusal(400, [], b"no") if bad in some else None

    found = asyncio.run(find(places, longest, ask))
    assert found == (bad, Refusal(400, [], b"no"))
    assert calls <= 2 + len(places).bit_length()


# Streams


def event(index: int, text: str = "a") -> bytes:
    choice = {"index": index, "text": text}
    return b"data: " + dialect.dumps({"id": "cmpl-1", "choices": [choice]}) + b"\n\n"


USAGE = b'data: {"id":"cmpl-1","choices":[],"usage":{"prompt_tokens":1}}\n\n'
DONE = b"data: [DONE]\n\n"


def merged(*parts: list[Reply | Exception]) -> MergedBody:
    """Each part has one prompt, and these answers when it is sent."""

    def part(place: int, answers: list[Reply | Exception]) -> Stream:
        async def send(attempt: int) -> Reply:
            answer = answers[attempt]
            if isinstance(answer, Exception):
                raise answer
            return answer

        return Stream([place], send)

    return MergedBody([part(place, answers) for place, answers in enumerate(parts)], 1)


async def piped(body: MergedBody) -> bytes:
    pushed: list[bytes] = []

    def push(data: bytes) -> None:
        pushed.append(data)

    for one in body._streams:
        await one.open()
    try:
        await body.pipe(push)
    finally:
        body.close()
    return b"".join(pushed)


async def asked(body: MergedBody) -> bytes:
    found = b""
    for one in body._streams:
        await one.open()
    try:
        while data := await body.next():
            found += data
    finally:
        body.close()
        await asyncio.sleep(0)
    return found


BOTH = pytest.mark.parametrize("how", [piped, asked])


@BOTH
async def test_events_in_any_pieces(how: Any) -> None:
    data = event(0, "x") + event(0, "y") + USAGE + DONE
    for size in (1, 7, 50, 1000):
        pieces = [data[at : at + size] for at in range(0, len(data), size)]
        windows = [piece.replace(b"\n", b"\r\n") for piece in pieces]
        found = await how(merged([stream(*pieces)], [stream(*windows)]))
        events = found.split(b"\n\n")
        assert sorted(events[:4]) == sorted(
            event(n, text).strip() for n in (0, 1) for text in ("x", "y")
        )
        assert json.loads(events[4][6:])["usage"] == {"prompt_tokens": 2}
        assert events[5:] == [b"data: [DONE]", b""]


@BOTH
async def test_a_part_lost_before_its_first_event_is_sent_again(how: Any) -> None:
    half = event(0)[:20]
    again: list[Reply | Exception] = [
        stream(half, broken=True),
        stream(half, broken=True),
        stream(event(0), DONE),
    ]
    assert await how(merged(again)) == event(0) + DONE


@BOTH
async def test_a_part_lost_after_it_ends_the_stream(how: Any) -> None:
    lost = stream(event(0), broken=True)
    other = StreamedBody(*[event(0)] * 1000)
    body = merged([lost, stream(event(0))], [Reply(200, [], other)])
    with pytest.raises(UpstreamBroke):
        await how(body)
    assert other.closed


@BOTH
async def test_a_part_refused_when_it_is_sent_again(how: Any) -> None:
    refused = Refused([0], Refusal(400, [], NO_PARAM), "r1")
    found = await how(merged([stream(broken=True), refused]))
    assert found == b"data: " + NO_PARAM + b"\n\n" + DONE


@BOTH
async def test_an_error_of_a_part_is_the_end_of_all(how: Any) -> None:
    error = b'data: {"error":{"message":"out of memory","code":500}}\n\n'
    other = StreamedBody(*[event(0)] * 1000)
    found = await how(merged([stream(event(0), error, event(0), DONE)], [Reply(200, [], other)]))
    assert found.endswith(error + DONE)
    assert found.count(event(0)) == 1
    assert other.closed


@BOTH
@pytest.mark.parametrize("odd", [b"data: nonsense\n\n", event(5), b"x" * 200])
async def test_what_is_no_event_ends_the_stream(
    how: Any, odd: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.serving.streams._EVENT_BYTES", 100)
    body = merged([stream(event(0), odd, event(0), DONE)], [stream(event(0), DONE)])
    with pytest.raises(UpstreamBroke):
        await how(body)


async def test_a_reader_that_does_not_ask_holds_the_parts_back() -> None:
    upstream = StreamedBody(*[event(0, "x" * 1000)] * 1000, DONE)

    class Patient(StreamedBody):
        async def pipe(self, push: Any, push_chunk: Any = None) -> None:
            while data := await upstream.next():
                if (blocked := push(data)) is not None:
                    await blocked

    body = merged([Reply(200, [], Patient())])
    await body._streams[0].open()
    first = await body.next()
    for _ in range(2000):
        await asyncio.sleep(0)
    assert len(upstream.pieces) > 900
    size = len(first)
    while data := await body.next():
        size += len(data)
    assert size > 1000 * 1000
    body.close()


async def test_a_reader_that_leaves_ends_every_part() -> None:
    bodies = [StreamedBody(*[event(0)] * 1000) for _ in range(3)]
    body = merged(*[[Reply(200, [], one)] for one in bodies])
    for one in body._streams:
        await one.open()
    assert await body.next()
    body.close()
    assert all(one.closed for one in bodies)
    assert body._task is not None
    await until(body._task.done)


async def test_a_stream_whose_beginning_fails_ends_the_others(fleet: Fleet) -> None:
    begun = StreamedBody(event(0))
    fleet.script = [Reply(200, [], begun), whole(400, NO_PARAM)]
    reply = await fleet.post(stream=True)
    assert (reply.status, begun.closed) == (400, 1)
    reply.close()
    assert fleet.idle()


@pytest.mark.parametrize(("n", "choices"), [(None, 1), (2, 2), (2.0, 2)])
async def test_how_many_choices_a_prompt_gets(fleet: Fleet, n: Any, choices: int) -> None:
    fleet.script = [
        stream(*[event(16 * choices - 1)], DONE),
        stream(*[event(16 * choices - 1)], DONE),
    ]
    found = await read(await fleet.post(stream=True, n=n))
    assert found.count(b'"index":%d,' % (32 * choices - 1)) == 1
