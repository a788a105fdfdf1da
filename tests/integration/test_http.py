"""HTTP itself at the front door: what clients and their proxies really send."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.fakes.faults import Slow, Stall
from tests.fakes.upstream import FakeUpstream
from tests.integration.gateway import BASE, DOORS, Door, Gateway
from tests.integration.wire import Wire

pytestmark = pytest.mark.parametrize("door", DOORS)

CHAT = "/v1/chat/completions"
PAYLOAD = {"model": BASE, "messages": [{"role": "user", "content": "x"}]}
BODY = json.dumps(PAYLOAD).encode()

HIDDEN = [
    "/adapters",
    "/adapters/pirate",
    "/sleep",
    "/wake_up",
    "/is_sleeping",
    "/pause",
    "/resume",
    "/update_weights",
    "/init_weight_transfer_engine",
    "/start_weight_update",
    "/invocations",
    "/ping",
    "/collective_rpc",
    "/reset_prefix_cache",
    "/reset_mm_cache",
    "/server_info",
    "/abort_requests",
    "/inference/v1/generate",
    "/generative_scoring",
    "/load",
    "/v1/../adapters",
    "/v1/completions/../../adapters",
    "/v1/%2e%2e/adapters",
    "/v1/..%2fadapters",
    "//adapters",
    "/v1//completions/../adapters",
    "/%61dapters",
    "/adapters/",
    "/adapters?x=/v1/completions",
    "/adapters;/v1/completions",
    "/ADAPTERS",
    "/tokenize/../sleep",
    "/v1/chat/completions/%2e%2e/%2e%2e/%2e%2e/sleep",
    "/./sleep",
    "\\sleep",
]


@pytest.fixture
def wire(gateway: Gateway) -> Iterator[Wire]:
    with Wire(gateway) as wire:
        yield wire


@pytest.mark.parametrize("method", ["POST", "GET", "DELETE"])
def test_the_replica_s_own_routes_are_not_reachable(
    gateway: Gateway, upstream: FakeUpstream, method: str
) -> None:
    for target in HIDDEN:
        with Wire(gateway) as wire:
            status, _, body = wire.request(method, target, BODY if method == "POST" else None)
        assert status in (307, 400, 404, 405), (method, target, body)
    assert upstream.requests() == []


def test_an_absolute_target_is_no_way_around(gateway: Gateway, upstream: FakeUpstream) -> None:
    for target in (f"{upstream.url}/sleep", "http://evil.example/sleep"):
        with Wire(gateway) as wire:
            status, _, _ = wire.request("POST", target, BODY)
        assert status in (400, 404, 405)
    assert upstream.requests() == []


def test_paths_are_matched_exactly(gateway: Gateway, upstream: FakeUpstream) -> None:
    for target in ("//v1/completions", "/v1//completions", "/V1/completions", "/v1/completions/"):
        with Wire(gateway) as wire:
            assert wire.request("POST", target, BODY)[0] in (307, 404), target
    assert upstream.requests() == []


def test_a_connection_is_kept(wire: Wire, upstream: FakeUpstream) -> None:
    for _ in range(5):
        assert wire.request("POST", CHAT, BODY)[0] == 200
    seen = upstream.requests(CHAT)
    assert len({request.connection for request in seen}) == 1, "so is the one to the replica"


def test_a_connection_is_kept_after_a_stream(wire: Wire, upstream: FakeUpstream) -> None:
    for _ in range(3):
        status, headers, body = wire.post(CHAT, PAYLOAD | {"stream": True})
        assert (status, headers["content-type"][:17]) == (200, "text/event-stream")
        assert body.endswith(b"data: [DONE]\n\n")
    assert len({request.connection for request in upstream.requests(CHAT)}) == 1


def test_pipelined_requests_are_answered_in_order(wire: Wire) -> None:
    count = 5
    for number in range(count):
        payload = PAYLOAD | {"messages": [{"role": "user", "content": f"number {number}"}]}
        wire.start(CHAT, payload)
    for number in range(count):
        status, _, body = wire.answer()
        assert status == 200
        text = json.loads(body)["choices"][0]["message"]["content"]
        assert text == f"{BASE} heard: number {number}"


def test_a_chunked_body(wire: Wire, upstream: FakeUpstream) -> None:
    wire.send(wire.message("POST", CHAT, None, transfer_encoding="chunked"))
    for start in range(0, len(BODY), 7):
        piece = BODY[start : start + 7]
        wire.send(b"%x;ext\r\n%b\r\n" % (len(piece), piece))
    wire.send(b"0\r\ntrailer: x\r\n\r\n")
    assert wire.answer()[0] == 200
    assert upstream.requests(CHAT)[0].json == PAYLOAD
    assert wire.request("POST", CHAT, BODY)[0] == 200


def test_a_body_in_dribbles(wire: Wire, upstream: FakeUpstream) -> None:
    message = wire.message("POST", CHAT, BODY)
    for start in range(0, len(message), 11):
        wire.send(message[start : start + 11])
    assert wire.answer()[0] == 200
    assert upstream.requests(CHAT)[0].body == BODY


def test_expect_100_continue(wire: Wire, upstream: FakeUpstream) -> None:
    """curl asks this way before it sends a body of more than a few kilobytes."""
    wire.send(
        wire.message("POST", CHAT, None, expect="100-continue", content_length=str(len(BODY)))
    )
    assert wire.head() == (100, {})
    wire.send(BODY)
    assert wire.answer()[0] == 200
    assert upstream.requests(CHAT)[0].header("expect") is None


def test_expect_100_continue_of_a_body_too_large(wire: Wire) -> None:
    wire.send(wire.message("POST", CHAT, None, expect="100-continue", content_length="99999999999"))
    assert wire.head()[0] == 413, "nobody should be told to go on and send that"


def test_connection_close_is_honoured(wire: Wire) -> None:
    status, headers, body = wire.request("POST", CHAT, BODY, connection="close")
    assert status == 200
    assert headers.get("connection") == "close"
    assert json.loads(body)
    assert wire.ended()


def test_http_1_0(gateway: Gateway) -> None:
    with Wire(gateway) as wire:
        length = len(BODY)
        wire.send(b"POST %b HTTP/1.0\r\nhost: localhost\r\n" % CHAT.encode())
        wire.send(b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % length + BODY)
        status, headers, body = wire.answer()
    assert status == 200
    assert "transfer-encoding" not in headers
    assert json.loads(body)["object"] == "chat.completion"


def test_a_stream_to_http_1_0_ends_with_its_connection(
    gateway: Gateway, upstream: FakeUpstream, door: Door
) -> None:
    upstream.script(CHAT, Slow(0.01))
    body = json.dumps(PAYLOAD | {"stream": True}).encode()
    with Wire(gateway) as wire:
        wire.send(b"POST %b HTTP/1.0\r\nhost: localhost\r\n" % CHAT.encode())
        wire.send(b"content-length: %d\r\n\r\n" % len(body) + body)
        status, headers, answer = wire.answer()
        assert wire.ended()
    assert status == 200
    if door == "direct":  # uvicorn's own protocol sends chunks to HTTP/1.0 too
        assert "transfer-encoding" not in headers
    assert answer.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", None])
def test_the_content_type_is_not_what_makes_it_json(
    gateway: Gateway, upstream: FakeUpstream, kind: str | None
) -> None:
    """`curl -d` says it is a form. The body is what counts, and the replica is told JSON."""
    with Wire(gateway) as wire:
        extra = {} if kind is None else {"content_type": kind}
        head = wire.message("POST", CHAT, None, content_length=str(len(BODY)), **extra)
        wire.send(head + BODY)
        assert wire.answer()[0] == 200
    assert upstream.requests(CHAT)[0].header("content-type") == "application/json"


@pytest.mark.parametrize(
    "message",
    [
        b"NONSENSE\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: x\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"
        b"transfer-encoding: chunked\r\n\r\nzz\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 5\r\n"
        b"transfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
)
def test_what_is_not_http_is_refused(
    gateway: Gateway, upstream: FakeUpstream, message: bytes
) -> None:
    with Wire(gateway) as wire:
        wire.send(message)
        assert b"HTTP/1.1 2" not in wire.rest()
    assert upstream.requests() == []
    assert gateway.client.get("/healthz").status_code == 200


def test_a_client_that_leaves_inside_its_body(gateway: Gateway, upstream: FakeUpstream) -> None:
    with Wire(gateway) as wire:
        wire.send(wire.message("POST", CHAT, None, content_length="1000") + b"{")
    assert gateway.client.get("/healthz").status_code == 200
    assert upstream.requests() == []


def test_other_connections_go_on_while_one_waits(gateway: Gateway, upstream: FakeUpstream) -> None:
    stall = Stall()
    upstream.script(CHAT, stall)
    with Wire(gateway) as waiting, Wire(gateway) as going:
        waiting.start(CHAT, PAYLOAD)
        assert stall.reached.wait(5)
        for _ in range(20):
            assert going.request("POST", CHAT, BODY)[0] == 200
        stall.release()
        assert waiting.answer()[0] == 200
