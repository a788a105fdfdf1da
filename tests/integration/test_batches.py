"""A batch of prompts over several replicas, which answer as one vLLM would."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.fakes.faults import Break, EngineDead, Flood, Raw, Stall, Status
from tests.fakes.upstream import FakeUpstream
from tests.integration.gateway import BASE, DOORS, Door, Gateway, StartGateway, StartUpstream
from tests.integration.test_faults import inflight
from tests.integration.test_streaming import MIB, _kernel_buffers, _settled
from tests.integration.wire import Wire
from tests.waiting import wait_until

COMPLETIONS = "/v1/completions"
TEXTS = [f"say number {n} of {'many ' * (n % 5)}things" for n in range(48)]
TOKENS = [[byte + 3 for byte in text.encode()] for text in TEXTS]
RID = {"x-request-id": "batch-1"}

FORMS: dict[str, dict[str, Any]] = {
    "plain": {"max_tokens": 3},
    "n": {"max_tokens": 2, "n": 3},
    "logprobs": {"max_tokens": 1, "logprobs": 5},
    "echo": {"max_tokens": 0, "echo": True, "logprobs": 0},
    "echo and more": {"max_tokens": 2, "echo": True, "logprobs": 1, "n": 2},
    "prompt_logprobs": {"max_tokens": 1, "prompt_logprobs": 0, "return_token_ids": True},
    "logprob_token_ids": {"max_tokens": 1, "logprobs": 1, "logprob_token_ids": [5, 7]},
    "unknown fields": {"max_tokens": 1, "vllm_xargs": {"a": [1]}, "user": "me", "seed": 3},
}


@pytest.fixture
def fleet(start_upstream: StartUpstream) -> list[FakeUpstream]:
    return [start_upstream() for _ in range(3)]


@pytest.fixture
def gateway(start_gateway: StartGateway, fleet: list[FakeUpstream]) -> Gateway:
    return start_gateway(*[upstream.url for upstream in fleet])


@pytest.fixture
def one(start_upstream: StartUpstream) -> Iterator[httpx.Client]:
    """A single vLLM, asked without a gateway."""
    with httpx.Client(base_url=start_upstream().url) as client:
        yield client


def calls(fleet: list[FakeUpstream]) -> list[list[Any]]:
    """The prompts of each call, replica by replica."""
    return [seen.json["prompt"] for upstream in fleet for seen in upstream.requests(COMPLETIONS)]


def ask(prompts: Any, **fields: Any) -> dict[str, Any]:
    return {"model": BASE, "prompt": prompts} | fields


def events(response: httpx.Response) -> list[dict[str, Any]]:
    *lines, end = [line for line in response.text.split("\n") if line]
    assert end == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


@pytest.mark.parametrize("prompts", [TEXTS, TOKENS], ids=["texts", "tokens"])
@pytest.mark.parametrize("form", FORMS)
def test_three_replicas_answer_as_one(
    gateway: Gateway, fleet: list[FakeUpstream], one: httpx.Client, form: str, prompts: Any
) -> None:
    payload = ask(prompts, **FORMS[form])
    answer = gateway.client.post(COMPLETIONS, json=payload, headers=RID)
    assert answer.json() == one.post(COMPLETIONS, json=payload, headers=RID).json()
    assert len(answer.json()["choices"]) == 48 * payload.get("n", 1)
    assert [len(upstream.requests(COMPLETIONS)) for upstream in fleet] == [1, 1, 1]
    assert sorted(p for call in calls(fleet) for p in call) == sorted(prompts)
    assert all(abs(len(call) - 16) <= 3 for call in calls(fleet))
    for upstream in fleet:
        sent = upstream.requests(COMPLETIONS)[0].json
        assert sent | {"prompt": None} == payload | {"prompt": None}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("usage", [False, True])
@pytest.mark.parametrize("form", ["plain", "n", "logprobs", "echo", "echo and more"])
def test_a_stream_of_three_is_as_of_one(
    gateway: Gateway,
    fleet: list[FakeUpstream],
    one: httpx.Client,
    form: str,
    usage: bool,
    door: Door,
) -> None:
    payload = ask(TEXTS, stream=True, **FORMS[form])
    if usage:
        payload["stream_options"] = {"include_usage": True}
    streamed = events(gateway.client.post(COMPLETIONS, json=payload, headers=RID))
    alone = events(one.post(COMPLETIONS, json=payload, headers=RID))
    assert [len(upstream.requests(COMPLETIONS)) for upstream in fleet] == [1, 1, 1]
    if usage:
        assert streamed[-1] == alone[-1]
    assert sum(bool(event.get("usage")) for event in streamed) == usage

    def by_choice(found: list[dict[str, Any]]) -> list[Any]:
        chunks = [event for event in found if event["choices"]]
        return sorted(chunks, key=lambda event: int(event["choices"][0]["index"]))

    assert by_choice(streamed) == by_choice(alone)


def test_the_client_gets_its_prompts_in_order(gateway: Gateway) -> None:
    with gateway.openai_client() as client:
        answer = client.completions.create(model=BASE, prompt=TEXTS)
    assert [choice.index for choice in answer.choices] == list(range(48))
    assert [choice.text for choice in answer.choices] == [f"{BASE} heard: {t}" for t in TEXTS]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(len(text.split()) for text in TEXTS)


def test_the_client_s_stream_of_many_prompts(gateway: Gateway) -> None:
    said = dict.fromkeys(range(48), "")
    ids = set()
    with gateway.openai_client() as client:
        for chunk in client.completions.create(model=BASE, prompt=TEXTS, stream=True):
            ids.add(chunk.id)
            said[chunk.choices[0].index] += chunk.choices[0].text
    assert list(said.values()) == [f"{BASE} heard: {text}" for text in TEXTS]
    assert len(ids) == 1


def test_a_small_batch_goes_through_untouched(gateway: Gateway, fleet: list[FakeUpstream]) -> None:
    body = b'{"model": "tiny",  "prompt": ["a",  "b"], "max_tokens":1 }'
    assert gateway.client.post(COMPLETIONS, content=body).status_code == 200
    (seen,) = [seen for upstream in fleet for seen in upstream.requests(COMPLETIONS)]
    assert seen.body == body


@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_more_prompts_than_vllm_takes(
    start_gateway: StartGateway, fleet: list[FakeUpstream], replicas: int, stream: bool
) -> None:
    fleet = fleet[:replicas]
    gateway = start_gateway(*[upstream.url for upstream in fleet])
    prompts = [f"p{n}" for n in range(3500)]
    answer = gateway.client.post(COMPLETIONS, json=ask(prompts, max_tokens=3, stream=stream))
    if stream:
        said = {event["choices"][0]["index"]: event["choices"] for event in events(answer)}
        texts = [said[n][0]["text"] for n in range(3500)]
    else:
        texts = [choice["text"].split()[-1] for choice in answer.json()["choices"]]
    assert texts == prompts
    assert max(map(len, calls(fleet))) <= 1024
    assert sum(map(len, calls(fleet))) == 3500


def test_a_part_lost_on_its_way_is_sent_again_alone(
    gateway: Gateway, fleet: list[FakeUpstream], one: httpx.Client
) -> None:
    fleet[1].script(COMPLETIONS, Break(after=1))
    payload = ask(TEXTS, max_tokens=3)
    answer = gateway.client.post(COMPLETIONS, json=payload, headers=RID)
    assert answer.json() == one.post(COMPLETIONS, json=payload, headers=RID).json()
    assert len(calls(fleet)) == 4
    lost = fleet[1].requests(COMPLETIONS)[0].json["prompt"]
    assert calls(fleet).count(lost) == 2
    wait_until(lambda: inflight(gateway) == 0)


def test_a_replica_that_died_is_replaced(
    gateway: Gateway, fleet: list[FakeUpstream], one: httpx.Client
) -> None:
    fleet[2].script(COMPLETIONS, EngineDead())
    payload = ask(TEXTS, max_tokens=3)
    answer = gateway.client.post(COMPLETIONS, json=payload, headers=RID)
    assert answer.json() == one.post(COMPLETIONS, json=payload, headers=RID).json()
    assert len(fleet[2].requests(COMPLETIONS)) == 1


def test_a_part_that_is_lost_again_and_again_fails_the_batch(
    gateway: Gateway, fleet: list[FakeUpstream]
) -> None:
    for upstream in fleet:
        upstream.script(COMPLETIONS, *[Break(after=1)] * 20)
    answer = gateway.client.post(COMPLETIONS, json=ask(TEXTS))
    assert answer.status_code == 502
    assert answer.json()["error"]["code"] == "upstream_broke"
    assert len(calls(fleet)) <= 9
    wait_until(lambda: inflight(gateway) == 0)


@pytest.mark.parametrize("door", DOORS)
def test_a_stream_lost_before_its_first_event_is_sent_again(
    gateway: Gateway, fleet: list[FakeUpstream], door: Door
) -> None:
    fleet[0].script(COMPLETIONS, Break(after=0))
    fleet[1].script(COMPLETIONS, Raw(NO_EVENT))
    streamed = events(gateway.client.post(COMPLETIONS, json=ask(TEXTS, max_tokens=3, stream=True)))
    said = dict.fromkeys(range(48), "")
    for event in streamed:
        said[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert list(said.values()) == [f"{BASE} heard: say " for _ in TEXTS]


@pytest.mark.parametrize("door", DOORS)
def test_a_stream_lost_inside_ends_with_an_error(
    gateway: Gateway, fleet: list[FakeUpstream], door: Door
) -> None:
    fleet[0].script(COMPLETIONS, Break(after=5))
    answer = gateway.client.post(COMPLETIONS, json=ask(TEXTS, stream=True))
    assert answer.status_code == 200
    last = answer.text.strip().split("\n\n")[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "upstream_broke"
    wait_until(lambda: inflight(gateway) == 0)


NO_EVENT = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
)
LONG = "word " * 2000
BAD = {"too long": (TEXTS, LONG), "unknown token": (TOKENS, [5, 9999, 7])}


@pytest.mark.parametrize("count", [4, 48])
@pytest.mark.parametrize("place", [0, 1, 3])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", BAD)
def test_one_bad_prompt_fails_as_on_vllm_and_is_named(
    gateway: Gateway,
    fleet: list[FakeUpstream],
    one: httpx.Client,
    fault: str,
    stream: bool,
    place: int,
    count: int,
) -> None:
    good, bad = BAD[fault]
    place = place * 13 % count
    prompts = [*good[:place], bad, *good[place + 1 : count]]
    payload = ask(prompts, max_tokens=2, stream=stream)
    answer = gateway.client.post(COMPLETIONS, json=payload)
    alone = one.post(COMPLETIONS, json=payload)
    assert answer.status_code == alone.status_code
    if answer.status_code == 200:  # vLLM notices when its head is out
        assert answer.text.endswith(alone.text)
    else:
        expected = alone.json()["error"] | {"param": f"prompt[{place}]"}
        assert answer.json() == {"error": expected}
    assert len(calls(fleet)) <= 3 + 12
    wait_until(lambda: inflight(gateway) == 0)


@pytest.mark.parametrize("count", [4, 48])
@pytest.mark.parametrize(
    "fields", [{"logprobs": 50}, {"max_tokens": -3}, {"prompt_logprobs": 1, "stream": True}]
)
def test_what_no_prompt_is_to_blame_for(
    gateway: Gateway,
    fleet: list[FakeUpstream],
    one: httpx.Client,
    fields: dict[str, Any],
    count: int,
) -> None:
    payload = ask(TEXTS[:count], **fields)
    answer = gateway.client.post(COMPLETIONS, json=payload)
    alone = one.post(COMPLETIONS, json=payload)
    assert (answer.status_code, answer.json()) == (alone.status_code, alone.json())
    assert len(calls(fleet)) <= 3


def test_a_refusal_that_names_nothing_is_not_blamed_on_a_prompt(
    gateway: Gateway, fleet: list[FakeUpstream]
) -> None:
    refusal = b'{"error":{"message":"no","type":"BadRequestError","param":null,"code":400}}'
    for upstream in fleet:
        upstream.script(COMPLETIONS, *[Status(400, refusal)] * 30)
    answer = gateway.client.post(COMPLETIONS, json=ask(TEXTS))
    assert (answer.status_code, answer.content) == (400, refusal)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_every_part(
    gateway: Gateway, fleet: list[FakeUpstream], stream: bool, door: Door
) -> None:
    stalls = [Stall(after=2 if stream else 1) for _ in fleet]
    for upstream, stall in zip(fleet, stalls, strict=True):
        upstream.script(COMPLETIONS, stall)
    with Wire(gateway) as wire:
        wire.start(COMPLETIONS, ask(TEXTS, stream=stream))
        assert all(stall.reached.wait(5) for stall in stalls)
        assert inflight(gateway) == 3
        wire.reset()
        wait_until(lambda: all(upstream.cancels() for upstream in fleet))
    wait_until(lambda: inflight(gateway) == 0)


def test_usage_is_billed_once(gateway: Gateway) -> None:
    def billed() -> list[float]:
        text = gateway.client.get("/metrics").text
        found = re.findall(
            r'^loragate_tokens_total\{kind="(\w+)",model="tiny"\} (\S+)$', text, re.M
        )
        return [float(count) for _, count in sorted(found)]

    gateway.client.post(COMPLETIONS, json=ask(TEXTS, max_tokens=3))
    assert billed() == [48 * 3, sum(len(text.split()) for text in TEXTS)]
    gateway.client.post(COMPLETIONS, json=ask(TEXTS, max_tokens=3, stream=True))
    assert billed() == [2 * 48 * 3, 2 * sum(len(text.split()) for text in TEXTS)]
    metrics = gateway.client.get("/metrics").text
    assert "\nloragate_batches_split_total 2.0\n" in metrics
    assert "\nloragate_batch_parts_total 6.0\n" in metrics


@pytest.mark.parametrize("door", DOORS)
def test_a_slow_client_holds_every_part_back(
    gateway: Gateway, fleet: list[FakeUpstream], door: Door
) -> None:
    choice = {"index": 0, "text": "x" * 2000, "logprobs": None, "finish_reason": None}
    event = b"data: " + json.dumps({"id": "cmpl-1", "choices": [choice]}).encode() + b"\n\n"
    for upstream in fleet:
        upstream.script(COMPLETIONS, Flood(100 * 10**6, event=event))
    with Wire(gateway, receive_buffer=4096) as wire:
        wire.start(COMPLETIONS, ask(TEXTS, stream=True))
        assert wire.head()[0] == 200
        assert wire.read(4096)
        seen = [upstream.requests(COMPLETIONS)[0] for upstream in fleet]
        pushed = sum(map(_settled, seen))
        assert pushed < 4 * _kernel_buffers() + MIB
        assert not any(request.finished for request in seen)
        wire.reset()
    wait_until(lambda: inflight(gateway) == 0)


def test_odd_prompts_are_for_vllm_to_judge(gateway: Gateway, fleet: list[FakeUpstream]) -> None:
    for upstream in fleet:
        upstream.script(COMPLETIONS, Status(400, b'{"error":{"message":"odd"}}'))
    for prompts in (["a", [1]] * 20, [["a"], 5] * 20):
        with gateway.openai_client() as client, pytest.raises(openai.BadRequestError, match="odd"):
            client.completions.create(model=BASE, prompt=prompts)  # type: ignore[call-overload]
    assert sorted(map(len, calls(fleet))) == [40, 40]
