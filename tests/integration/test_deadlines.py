"""X-Request-Timeout-Ms: 504 before the first byte, told in the stream after it, ended upstream."""

from __future__ import annotations

import json

import openai
import pytest

from tests.fakes.faults import Slow, Stall
from tests.fakes.upstream import FakeUpstream
from tests.integration.gateway import Gateway
from tests.waiting import wait_until

COMPLETIONS = "/v1/completions"
HEADER = "X-Request-Timeout-Ms"


def inflight(gateway: Gateway) -> int:
    found = gateway.client.get("/admin/replicas").json()["data"]
    return sum(int(replica["inflight"]) for replica in found)


def test_too_late_before_the_first_byte(gateway: Gateway, upstream: FakeUpstream) -> None:
    stall = Stall()
    upstream.script(COMPLETIONS, stall)
    with gateway.openai_client() as client, pytest.raises(openai.InternalServerError) as raised:
        client.completions.create(model="tiny", prompt="x", extra_headers={HEADER: "200"})
    assert raised.value.status_code == 504
    assert raised.value.code == "deadline_exceeded"
    wait_until(lambda: len(upstream.cancels()) == 1)
    assert len(upstream.requests(COMPLETIONS)) == 1, "nothing is sent again"
    wait_until(lambda: inflight(gateway) == 0)


def test_too_late_after_the_first_byte(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.script(COMPLETIONS, Stall(after=1))
    body = {"model": "tiny", "prompt": "one two three", "stream": True}
    answer = gateway.client.post(COMPLETIONS, json=body, headers={HEADER: "300"})
    assert answer.status_code == 200
    events = [event.removeprefix("data: ") for event in answer.text.split("\n\n") if event]
    assert json.loads(events[0])["choices"][0]["text"]
    assert json.loads(events[-1])["error"]["code"] == "deadline_exceeded"
    wait_until(lambda: len(upstream.cancels()) == 1)
    wait_until(lambda: inflight(gateway) == 0)


def test_in_time(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.script(COMPLETIONS, Slow(0.01))
    # Not the SDK: it hangs up at [DONE], which may be before the body's last chunk.
    body = {"model": "tiny", "prompt": "x", "stream": True}
    answer = gateway.client.post(COMPLETIONS, json=body, headers={HEADER: "15000"})
    events = [event.removeprefix("data: ") for event in answer.text.split("\n\n") if event]
    assert events.pop() == "[DONE]"
    assert "".join(json.loads(event)["choices"][0]["text"] for event in events) == "tiny heard: x"
    assert upstream.cancels() == []


def test_a_deadline_covers_the_load_of_an_adapter(
    gateway: Gateway, upstream: FakeUpstream, pirate: str
) -> None:
    upstream.script("/v1/load_lora_adapter", Stall())
    with gateway.openai_client() as client, pytest.raises(openai.InternalServerError) as raised:
        client.completions.create(model=pirate, prompt="x", extra_headers={HEADER: "200"})
    assert raised.value.code == "deadline_exceeded"
    wait_until(lambda: inflight(gateway) == 0)


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "soon", "1000000000", ""])
def test_a_deadline_that_is_none(gateway: Gateway, upstream: FakeUpstream, value: str) -> None:
    with gateway.openai_client() as client, pytest.raises(openai.BadRequestError) as raised:
        client.completions.create(model="tiny", prompt="x", extra_headers={HEADER: value})
    assert raised.value.param == HEADER
    assert upstream.requests() == []
