"""Coalesced is as alone: the same answers, everyone's own bill, and nobody harmed by another."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.backends.base import Reply
from app.domain import Principal, Scope
from app.errors import LoragateError, NoReplicaAvailable, UpstreamBroke
from app.serving.batches import Batches
from app.serving.coalesce import Coalescer
from app.serving.forward import Forwarder
from app.serving.meter import Meter
from app.serving.request import parse
from app.serving.request_path import RequestPath
from tests.fakes import dialect
from tests.unit.serving.made import ANYONE, FakeBackend, FleetOfMemory, snapshot, whole
from tests.waiting import until

WORLD = snapshot()
Answer = Callable[[bytes, bytes], Reply]
PATH = "/v1/completions"


class Line:
    """A request path over replicas of memory that speak vLLM's dialect."""

    def __init__(self, made: FleetOfMemory, coalescer: Coalescer | None, meter: Meter) -> None:
        self.meter = meter
        self.made = made
        forwarder = Forwarder(made.fleet, made.clock)
        self.path = RequestPath(forwarder, Batches(forwarder, made.fleet, meter), coalescer, meter)
        self.answers: list[Answer | LoragateError] = []
        for backend in made.connected:
            backend.send = partial(self._send, backend)  # type: ignore[method-assign]

    @property
    def replica(self) -> FakeBackend:
        return self.made.connected[0]

    async def _send(self, backend: FakeBackend, path: str, body: bytes, headers: bytes) -> Reply:
        backend.sent.append((path, body, headers))
        if backend.answering is not None:
            await backend.answering.wait()
        answer = self.answers.pop(0) if self.answers else speak
        if isinstance(answer, LoragateError):
            raise answer
        return answer(body, headers)

    async def post(self, payload: Any, rid: str = "r", who: Principal = ANYONE) -> tuple[int, Any]:
        request = parse(PATH, json.dumps({"model": "tiny", "max_tokens": 1} | payload).encode())
        request.headers = f"x-request-id: {rid}\r\n".encode()
        reply = await self.path.serve(request, who, WORLD)
        try:
            return reply.status, json.loads(await reply.read(1 << 20))
        finally:
            reply.close()

    def begin(self, *payloads: Any) -> list[asyncio.Task[tuple[int, Any]]]:
        loop = asyncio.get_running_loop()
        return [loop.create_task(self.post(p, f"r{n}")) for n, p in enumerate(payloads)]

    def sent(self) -> list[Any]:
        return [json.loads(body)["prompt"] for _, body, _ in self.replica.sent]


def speak(body: bytes, headers: bytes) -> Reply:
    rid = headers.split(b": ")[1].split(b"\r\n")[0].decode()
    try:
        return whole(200, dialect.completion_body("tiny", json.loads(body), rid))
    except dialect.Refusal as refusal:
        return whole(refusal.status, refusal.body)


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than the test takes to send what is to gather."""
    monkeypatch.setattr("app.serving.coalesce.PATIENCE_S", 0.2)


@pytest.fixture
async def line(made: FleetOfMemory) -> AsyncIterator[Line]:
    await made.sync(WORLD)
    meter, forwarder = Meter(), Forwarder(made.fleet, made.clock)
    async with Coalescer(forwarder, Batches(forwarder, made.fleet, meter), meter) as coalescer:
        yield Line(made, coalescer, meter)
    assert not coalescer._kinds
    assert all(replica.inflight == 0 for replica in made.fleet.live())


async def gathered(line: Line, first: Any, *payloads: Any) -> list[asyncio.Task[tuple[int, Any]]]:
    """Tasks of requests that all came while the first was under way."""
    line.replica.answering = asyncio.Event()
    tasks = line.begin(first)
    await until(lambda: len(line.replica.sent) == 1)
    tasks += line.begin(*payloads)
    await asyncio.sleep(0)
    return tasks


def release(line: Line) -> None:
    assert line.replica.answering is not None
    line.replica.answering.set()


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
prompts = st.lists(texts, min_size=1, max_size=12) | st.lists(
    st.lists(st.integers(3, 200), min_size=1, max_size=9), min_size=1, max_size=12
)
fields = st.fixed_dictionaries(
    {"max_tokens": st.sampled_from([0, 1])},
    optional={
        "n": st.integers(1, 3),
        "logprobs": st.none() | st.integers(0, 5),
        "prompt_logprobs": st.none() | st.integers(0, 2),
        "echo": st.booleans(),
        "temperature": st.sampled_from([0, 0.0, 1]),
        "return_token_ids": st.booleans(),
        "logprob_token_ids": st.just([5, 6]),
        "user": texts,
    },
)


@settings(max_examples=60, deadline=None)
@given(prompts=prompts, fields=fields)
def test_coalesced_is_as_alone(prompts: list[Any], fields: dict[str, Any]) -> None:
    asyncio.run(_coalesced_is_as_alone([{"prompt": p} | fields for p in prompts]))


async def _coalesced_is_as_alone(payloads: list[Any]) -> None:
    made = FleetOfMemory()
    async with made.fleet:
        await made.sync(WORLD)
        meter, forwarder = Meter(), Forwarder(made.fleet, made.clock)
        async with Coalescer(forwarder, Batches(forwarder, made.fleet, meter), meter) as coalescer:
            line = Line(made, coalescer, meter)
            tasks = await gathered(line, payloads[0], *payloads)
            release(line)
            shared = [await task for task in tasks[1:]]
        billed = meter.drain()
        alone = Line(made, None, meter)
        expected = [await alone.post(payload, f"r{n}") for n, payload in enumerate(payloads)]
        await alone.post(payloads[0])
        assert shared == expected
        assert billed == meter.drain()


async def test_the_first_goes_at_once_and_the_rest_together(line: Line) -> None:
    tasks = await gathered(line, {"prompt": "a"}, *({"prompt": f"p{n}"} for n in range(50)))
    assert line.sent() == ["a"]
    release(line)
    assert {(await task)[0] for task in tasks} == {200}
    assert line.sent() == ["a", [f"p{n}" for n in range(50)]]
    assert (line.meter.coalesced, line.meter.calls_saved) == (50, 49)


async def test_a_prompt_alone_in_an_array_is_one(line: Line) -> None:
    tasks = await gathered(line, {"prompt": ["a"]}, {"prompt": ["b"]}, {"prompt": "c"})
    release(line)
    answers = [(await task)[1] for task in tasks]
    assert line.sent() == [["a"], ["b", "c"]]
    assert [answer["choices"][0]["index"] for answer in answers] == [0, 0, 0]


async def test_who_waits_does_not_wait_for_long(line: Line) -> None:
    tasks = await gathered(line, {"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"})
    await until(lambda: len(line.sent()) == 2, within_s=1)
    assert line.sent() == ["a", ["b", "c"]]
    release(line)
    assert [(await task)[0] for task in tasks] == [200] * 3


async def test_enough_do_not_wait_at_all(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.serving.coalesce.PATIENCE_S", 60)
    monkeypatch.setattr("app.serving.coalesce.ENOUGH_PROMPTS", 5)
    tasks = await gathered(line, {"prompt": "a"}, *({"prompt": f"p{n}"} for n in range(12)))
    await until(lambda: len(line.sent()) == 3)
    assert [len(prompts) for prompts in line.sent()[1:]] == [5, 5]
    release(line)
    assert {(await task)[0] for task in tasks} == {200}
    assert line.sent()[-1] == ["p10", "p11"]


@pytest.mark.parametrize("fields", [{"temperature": 0}, {"max_tokens": 0, "echo": True}])
async def test_the_same_prompt_is_computed_once(line: Line, fields: Any) -> None:
    payload = {"prompt": "same same", "logprobs": 1} | fields
    tasks = await gathered(line, payload, *[payload] * 20, *[payload | {"prompt": "other"}] * 3)
    release(line)
    answers = [(await task)[1] for task in tasks]
    assert line.sent() == ["same same", "other"]
    assert [answer["id"] for answer in answers[1:]] == [f"cmpl-r{n}" for n in range(23)]
    assert {json.dumps(answer | {"id": ""}) for answer in answers[:21]} == {
        json.dumps(answers[0] | {"id": ""})
    }
    (bill,) = line.meter.drain()
    assert (bill.requests, bill.usage.prompt_tokens) == (24, 21 * 2 + 3)


async def test_a_crash_is_told_to_all(
    line: Line, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def crash(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("app.serving.scoring.take_apart", crash)
    tasks = await gathered(line, {"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"})
    release(line)
    assert (await tasks[0])[0] == 200
    for task in tasks[1:]:
        with pytest.raises(UpstreamBroke, match="log says why"):
            await task
    assert "a bug" in caplog.text


async def test_the_end_of_the_gateway_is_the_end_of_its_calls(made: FleetOfMemory) -> None:
    await made.sync(WORLD)
    meter, forwarder = Meter(), Forwarder(made.fleet, made.clock)
    async with Coalescer(forwarder, Batches(forwarder, made.fleet, meter), meter) as coalescer:
        (task,) = await gathered(Line(made, coalescer, meter), {"prompt": "a"})
    with pytest.raises(UpstreamBroke, match="interrupted"):
        await task
    assert made.fleet.live()[0].inflight == 0


async def test_who_left_is_not_computed(line: Line) -> None:
    tasks = await gathered(line, {"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}, {"prompt": "d"})
    tasks[2].cancel()
    await asyncio.sleep(0)
    release(line)
    await asyncio.gather(*tasks, return_exceptions=True)
    assert line.sent() == ["a", ["b", "d"]]


async def test_who_leaves_while_the_call_is_under_way_harms_nobody(line: Line) -> None:
    tasks = await gathered(line, {"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"})
    await until(lambda: len(line.sent()) == 2)
    tasks[1].cancel()
    await asyncio.sleep(0)
    release(line)
    assert [(await task)[0] for task in (tasks[0], tasks[2])] == [200, 200]
    (bill,) = line.meter.drain()
    assert bill.requests == 2


async def test_a_call_ends_with_the_last_who_wanted_it(line: Line) -> None:
    tasks = await gathered(line, {"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"})
    await until(lambda: len(line.sent()) == 2)
    (replica,) = line.made.fleet.live()
    for task in tasks[1:]:
        task.cancel()
    await until(lambda: replica.inflight == 1)
    tasks[0].cancel()
    await until(lambda: replica.inflight == 0)


async def test_one_who_comes_after_a_call_was_given_up_is_served(line: Line) -> None:
    payload = {"prompt": "same", "temperature": 0}
    (first,) = await gathered(line, payload)
    first.cancel()
    await asyncio.sleep(0)
    release(line)
    assert (await line.post(payload))[0] == 200


LONG = {"prompt": "word " * 2000}


async def test_a_poisoned_member_is_alone_in_its_fate(line: Line) -> None:
    payloads = [{"prompt": f"p{n}"} for n in range(32)]
    payloads[9] = LONG
    tasks = await gathered(line, {"prompt": "a"}, *payloads)
    release(line)
    answers = [await task for task in tasks[1:]]
    alone = Line(line.made, None, Meter())
    assert answers == [await alone.post(p, f"r{n}") for n, p in enumerate(payloads)]
    assert [status for status, _ in answers].count(400) == 1
    assert len(line.sent()) - 33 <= 2 + 2 * 5


async def test_a_fault_of_all_is_told_to_all_at_once(line: Line) -> None:
    tasks = await gathered(line, {"prompt": "a", "logprobs": 50}, *[LONG | {"logprobs": 50}] * 8)
    release(line)
    tasks += line.begin(*({"prompt": f"{n}", "logprobs": 50} for n in range(8)))
    answers = [await task for task in tasks]
    assert {status for status, _ in answers} == {400}
    assert {answer["error"]["param"] for _, answer in answers[9:]} == {"logprobs"}


@pytest.mark.parametrize(("status", "calls"), [(500, 2 + 4), (503, 2), (404, 2)])
async def test_a_call_that_fails(line: Line, status: int, calls: int) -> None:
    tasks = await gathered(line, {"prompt": "a"}, *({"prompt": f"p{n}"} for n in range(4)))
    line.answers = [speak, lambda *_: whole(status, b'{"error":{"message":"no"}}')]
    release(line)
    found = [(await task)[0] for task in tasks]
    assert found == [200] + ([200] if status == 500 else [status]) * 4
    assert len(line.sent()) == calls


async def test_a_lost_call_is_made_again(line: Line) -> None:
    tasks = await gathered(line, {"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"})
    line.answers = [speak, UpstreamBroke("it died")]
    release(line)
    assert [(await task)[0] for task in tasks] == [200] * 3
    assert line.sent() == ["a", ["b", "c"], ["b", "c"]]


async def test_an_error_without_an_answer_is_everyone_s(line: Line) -> None:
    tasks = await gathered(line, {"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"})
    line.answers = [speak, *[NoReplicaAvailable("none")] * 2]
    release(line)
    assert (await tasks[0])[0] == 200
    for task in tasks[1:]:
        with pytest.raises(NoReplicaAvailable):
            await task


@pytest.mark.parametrize(
    "spoil",
    [
        lambda reply: reply | {"choices": [c | {"logprobs": 5} for c in reply["choices"]]},
        lambda reply: {},
        lambda reply: reply | {"choices": reply["choices"][1:]},
        lambda reply: reply | {"usage": reply["usage"] | {"prompt_tokens": 77}},
    ],
)
async def test_a_server_whose_answers_cannot_be_shared(
    line: Line, spoil: Callable[[dict[str, Any]], Any]
) -> None:
    """Each is then asked alone: a wrong bill or another's answer would be worse."""

    def spoiled(body: bytes, headers: bytes) -> Reply:
        reply = json.loads(speak(body, headers).take())
        return whole(200, msgspec.json.encode(spoil(reply)))

    tasks = await gathered(line, {"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"})
    line.answers = [speak, spoiled]
    release(line)
    assert [(await task)[0] for task in tasks] == [200] * 3
    assert line.sent() == ["a", ["b", "c"], "b", "c"]


async def test_each_key_pays_for_its_own(line: Line) -> None:
    teams = [Principal(f"key-{n}", f"team {n}", frozenset({Scope.INFERENCE})) for n in range(2)]
    tasks = await gathered(line, {"prompt": "a"})
    loop = asyncio.get_running_loop()
    for n, prompt in enumerate(["one", "one two", "one two three", "one two three four"]):
        tasks.append(loop.create_task(line.post({"prompt": prompt}, f"r{n}", teams[n % 2])))
    await asyncio.sleep(0)
    release(line)
    await asyncio.gather(*tasks)
    assert len(line.sent()) == 2
    usage = {record.key_id: record.usage.prompt_tokens for record in line.meter.drain()}
    assert usage == {"key-1": 2 + 4 + 1, "key-0": 1 + 3}


async def test_a_merged_call_is_split_over_replicas(made: FleetOfMemory) -> None:
    await made.sync(snapshot(replicas=2))
    meter, forwarder = Meter(), Forwarder(made.fleet, made.clock)
    async with Coalescer(forwarder, Batches(forwarder, made.fleet, meter), meter) as coalescer:
        line = Line(made, coalescer, meter)
        tasks = await gathered(line, {"prompt": "a"}, *({"prompt": f"p{n}"} for n in range(64)))
        release(line)
        assert {(await task)[0] for task in tasks} == {200}
    assert [len(backend.sent) for backend in made.connected] == [2, 1]
    assert (meter.batches, meter.parts, meter.coalesced) == (1, 2, 64)
    assert all(replica.inflight == 0 for replica in made.fleet.live())


@pytest.mark.parametrize(
    "fields",
    [
        {"use_beam_search": True},
        {"prompt": ""},
        {"prompt": []},
        {"prompt": None},
        {"prompt": "x" * 300_000},
        {"kv_transfer_params": {}},
        {"echo": True},
    ],
    ids=lambda fields: str(fields)[:40],
)
async def test_what_cannot_be_shared_goes_its_own_way(line: Line, fields: Any) -> None:
    payload = {"prompt": "x"} | fields
    tasks = await gathered(line, payload, payload, payload)
    await until(lambda: len(line.replica.sent) == 3)
    release(line)
    await asyncio.gather(*tasks, return_exceptions=True)
    assert line.meter.coalesced == 0
