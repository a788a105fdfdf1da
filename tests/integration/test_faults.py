"""Replicas that refuse, reset, hang, lie or die, and what a client then sees."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.fakes.faults import Break, EndlessHead, EngineDead, Raw, Stall, Status
from tests.fakes.upstream import FakeUpstream, refused_url
from tests.integration.gateway import BASE, Gateway, StartGateway, StartUpstream
from tests.integration.wire import Wire
from tests.waiting import wait_until

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
ASK: Any = [{"role": "user", "content": "one two three four five six"}]
PAYLOAD = {"model": BASE, "messages": ASK}
STREAM = PAYLOAD | {"stream": True}


def inflight(gateway: Gateway) -> int:
    """Slots held on replicas, as `/metrics` tells."""
    text = gateway.client.get("/metrics").text
    found = re.findall(r"^loragate_replica_inflight\{[^}]*\} ([0-9.e+]+)$", text, re.M)
    return sum(int(float(value)) for value in found)


def chat(gateway: Gateway) -> Any:
    return gateway.client.post(CHAT, json=PAYLOAD)


@pytest.fixture(autouse=True)
def slots_are_freed(request: pytest.FixtureRequest) -> Iterator[None]:
    """However a request ends, its slot comes back."""
    shared = "gateway" in request.fixturenames
    gateway: Gateway | None = request.getfixturevalue("gateway") if shared else None
    yield
    if gateway is not None:
        wait_until(lambda: inflight(gateway) == 0)


def test_a_refused_connection_is_tried_elsewhere(
    start_gateway: StartGateway, upstream: FakeUpstream
) -> None:
    gateway = start_gateway(refused_url(), upstream.url)
    for _ in range(6):
        assert chat(gateway).status_code == 200


def test_a_replica_that_goes_away_is_routed_around_and_comes_back(
    start_gateway: StartGateway, start_upstream: StartUpstream
) -> None:
    one, two = start_upstream(), start_upstream()
    gateway = start_gateway(one.url, two.url)
    one.stop()
    for _ in range(10):
        assert chat(gateway).status_code == 200
    one.start()
    seen = len(one.requests(CHAT))

    def is_used_again() -> bool:
        assert chat(gateway).status_code == 200
        return len(one.requests(CHAT)) > seen

    wait_until(is_used_again)


def test_the_only_replica_gone_and_back(gateway: Gateway, upstream: FakeUpstream) -> None:
    assert chat(gateway).status_code == 200
    upstream.stop()
    answer = chat(gateway)
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) >= 1
    wait_until(lambda: not gateway.ready())
    upstream.start()
    wait_until(lambda: chat(gateway).status_code == 200)
    wait_until(gateway.ready)


@pytest.mark.parametrize("status", [429, 503])
def test_an_overloaded_replica_is_left_for_another(
    start_gateway: StartGateway, start_upstream: StartUpstream, status: int
) -> None:
    replicas = [start_upstream(), start_upstream()]
    gateway = start_gateway(*[replica.url for replica in replicas])
    assert chat(gateway).status_code == 200
    (full,) = [replica for replica in replicas if replica.requests(CHAT)]
    body = b'{"error":{"message":"queue is full","type":"Service Unavailable","code":503}}'
    full.script(CHAT, *[Status(status, body)] * 10)
    for _ in range(6):
        assert chat(gateway).status_code == 200
    assert len(full.requests(CHAT)) > 1


@pytest.mark.parametrize("status", [429, 503])
def test_all_overloaded(gateway: Gateway, upstream: FakeUpstream, status: int) -> None:
    upstream.script(CHAT, *[Status(status, b'{"error":{"message":"full"}}')] * 10)
    answer = chat(gateway)
    assert answer.status_code in (status, 503)
    assert len(upstream.requests(CHAT)) <= 5


def test_the_replica_s_retry_after_reaches_the_client(
    gateway: Gateway, upstream: FakeUpstream
) -> None:
    headers = (("content-type", "application/json"), ("retry-after", "7"))
    upstream.script(CHAT, *[Status(503, b'{"error":{"message":"full"}}', headers)] * 10)
    assert int(chat(gateway).headers["retry-after"]) >= 1


@pytest.mark.parametrize("politely", [False, True])
def test_cut_before_the_first_byte(
    gateway: Gateway, upstream: FakeUpstream, politely: bool
) -> None:
    """The model may have begun: it is not sent again, and the client is told."""
    assert chat(gateway).status_code == 200
    upstream.script(CHAT, *[Break(politely=politely)] * 10)
    before = len(upstream.requests(CHAT))
    answer = chat(gateway)
    assert answer.status_code in (502, 503)
    assert answer.json()["error"]["code"] in ("upstream_broke", "upstream_unavailable")
    sent = len(upstream.requests(CHAT)) - before
    # A kept connection may turn out dead the moment it is used; that one may be sent afresh.
    assert sent <= 2


def test_an_idle_connection_the_replica_dropped_is_not_an_error(
    gateway: Gateway, upstream: FakeUpstream
) -> None:
    """Its server closes kept connections whenever it likes; clients must never see that."""
    upstream.drop_idle = True
    for _ in range(30):
        assert chat(gateway).status_code == 200


def test_a_closing_the_replica_announced_is_respected(
    gateway: Gateway, upstream: FakeUpstream
) -> None:
    upstream.announce_close = True
    for _ in range(10):
        assert chat(gateway).status_code == 200
    seen = upstream.requests(CHAT)
    assert len({request.connection for request in seen}) == 10


@pytest.mark.parametrize("politely", [False, True])
@pytest.mark.parametrize("after", [1, 3])
def test_a_stream_cut_in_the_middle_never_looks_complete(
    gateway: Gateway, upstream: FakeUpstream, after: int, politely: bool
) -> None:
    upstream.script(CHAT, Break(after=after, politely=politely))
    with Wire(gateway) as wire:
        wire.start(CHAT, STREAM)
        status, _ = wire.head()
        assert status == 200
        received = b""
        try:
            while piece := wire.chunk():
                received += piece
        except (EOFError, ConnectionError):
            pytest.fail("errors after the first byte are told in the stream")
    *events, last = received.split(b"\n\n")[:-1]
    assert len(events) == after
    assert b"[DONE]" not in received
    error = json.loads(last.removeprefix(b"data: "))["error"]
    assert error["code"] == "upstream_broke"
    assert error["message"]


def test_the_client_raises_when_a_stream_is_cut(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.script(CHAT, Break(after=3))
    words: list[str] = []
    with gateway.openai_client() as client:
        stream = client.chat.completions.create(model=BASE, messages=ASK, stream=True)
        with stream, pytest.raises(openai.APIError) as caught:
            words.extend(chunk.choices[0].delta.content or "" for chunk in stream)
    assert caught.value.code == "upstream_broke"
    assert len(upstream.requests(CHAT)) == 1


def test_a_stream_cut_inside_an_event(gateway: Gateway, upstream: FakeUpstream) -> None:
    """The half event must not swallow the error that follows it."""
    half = b'data: {"id":"x","choices":[{"delta":{"content":"ha'
    head = (
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    )
    upstream.script(CHAT, Raw(head + b"%x\r\n%b\r\n" % (len(half), half)))
    with gateway.openai_client() as client:
        stream = client.chat.completions.create(model=BASE, messages=ASK, stream=True)
        with stream, pytest.raises((openai.APIError, json.JSONDecodeError)):
            list(stream)


@pytest.mark.parametrize("politely", [False, True])
def test_a_plain_answer_cut_in_the_middle_is_an_error(
    gateway: Gateway, upstream: FakeUpstream, politely: bool
) -> None:
    upstream.script(CHAT, Break(after=1, politely=politely))
    with gateway.openai_client() as client, pytest.raises((openai.APIError, json.JSONDecodeError)):
        client.chat.completions.create(model=BASE, messages=ASK)
    assert len(upstream.requests(CHAT)) == 1


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"NONSENSE\r\n\r\n",
        b"HTTP/1.1 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 2\r\n\r\n{}xxx",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nx: " + b"a" * (1 << 20) + b"\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\n\r\n",
        b"\x00" * 100,
    ],
)
def test_nonsense_from_a_replica_is_a_502(
    gateway: Gateway, upstream: FakeUpstream, data: bytes
) -> None:
    upstream.script(CHAT, *[Raw(data)] * 5)
    with Wire(gateway) as wire:
        try:
            status, _, _ = wire.post(CHAT, PAYLOAD)
        except (EOFError, AssertionError):
            status = 0  # the head was fine and the body broke: cut off is all that can be said
    assert status in (0, 502, 503)
    assert status != 0 or b"200 OK" in data
    assert chat(gateway).status_code in (200, 502, 503)
    upstream.behave()
    wait_until(lambda: chat(gateway).status_code == 200)


def test_a_head_without_end_is_cut_off(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.script(CHAT, EndlessHead())
    answer = chat(gateway)
    assert answer.status_code == 502
    (seen,) = upstream.requests(CHAT)
    wait_until(lambda: seen.cancelled)
    assert seen.bytes_sent < 16 << 20


@pytest.mark.parametrize("stream", [False, True])
def test_silence_before_the_first_byte_has_a_deadline(
    start_gateway: StartGateway, upstream: FakeUpstream, stream: bool
) -> None:
    gateway = start_gateway(upstream.url, first_byte_timeout_s=0.3)
    upstream.script(CHAT, Stall())
    began = time.monotonic()
    answer = gateway.client.post(CHAT, json=PAYLOAD | {"stream": stream})
    assert time.monotonic() - began < 5
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "upstream_timeout")
    (seen,) = upstream.requests(CHAT)
    wait_until(lambda: seen.cancelled)
    wait_until(lambda: inflight(gateway) == 0)


def test_silence_inside_a_stream_has_a_deadline(
    start_gateway: StartGateway, upstream: FakeUpstream
) -> None:
    gateway = start_gateway(upstream.url, idle_timeout_s=0.3)
    upstream.script(CHAT, Stall(after=2))
    with gateway.openai_client() as client:
        stream = client.chat.completions.create(model=BASE, messages=ASK, stream=True)
        with stream, pytest.raises(openai.APIError) as caught:
            list(stream)
    assert caught.value.code == "upstream_timeout"
    (seen,) = upstream.requests(CHAT)
    wait_until(lambda: seen.cancelled)
    wait_until(lambda: inflight(gateway) == 0)


def test_an_engine_that_dies_takes_its_replica_out(
    start_gateway: StartGateway, start_upstream: StartUpstream
) -> None:
    dying, other = start_upstream(), start_upstream()
    gateway = start_gateway(dying.url, other.url)
    dying.script(CHAT, EngineDead())
    assert [chat(gateway).status_code for _ in range(4)] == [200] * 4, "it was asked elsewhere"
    assert dying.engine.dead

    def out() -> bool:
        listed = gateway.client.get("/admin/replicas").json()["data"]
        return any(r["url"] == dying.url and r["state"] == "unhealthy" for r in listed)

    wait_until(out)
    before = len(dying.requests(CHAT))
    assert [chat(gateway).status_code for _ in range(10)] == [200] * 10
    assert len(dying.requests(CHAT)) == before
    dying.restart()
    wait_until(lambda: not out())


def test_a_request_that_kills_engines_does_not_kill_them_all(
    start_gateway: StartGateway, start_upstream: StartUpstream
) -> None:
    replicas = [start_upstream() for _ in range(4)]
    gateway = start_gateway(*[replica.url for replica in replicas])
    for replica in replicas:
        replica.script(CHAT, EngineDead())
    answer = chat(gateway)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_replica_available")
    assert sum(replica.engine.dead for replica in replicas) == 2


def test_a_replica_that_never_answers_its_health_is_not_used(
    start_gateway: StartGateway, start_upstream: StartUpstream
) -> None:
    silent, healthy = start_upstream(), start_upstream()
    silent.script("/health", *[Stall() for _ in range(1000)])
    gateway = start_gateway(silent.url, healthy.url)
    assert [chat(gateway).status_code for _ in range(10)] == [200] * 10
    assert silent.requests(CHAT) == []
