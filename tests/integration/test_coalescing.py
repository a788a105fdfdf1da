"""Concurrent requests to score one prompt share a call; what each gets is as if it were alone."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.fakes.faults import Break, Stall, Status
from tests.fakes.upstream import FakeUpstream
from tests.integration.gateway import BASE, Gateway, StartGateway, StartUpstream
from tests.integration.test_faults import inflight
from tests.integration.wire import Wire
from tests.waiting import wait_until

COMPLETIONS = "/v1/completions"
TEXTS = [f"is number {n} {'very ' * (n % 5)}odd" for n in range(24)]
TOKENS = [[byte + 3 for byte in text.encode()] for text in TEXTS]

FORMS: dict[str, dict[str, Any]] = {
    "next token": {"max_tokens": 1, "logprobs": 5},
    "n": {"max_tokens": 1, "logprobs": 5, "n": 3, "seed": 1},
    "echo": {"max_tokens": 0, "echo": True, "logprobs": 0},
    "echo and one": {"max_tokens": 1, "echo": True, "logprobs": 0, "n": 2},
    "prompt_logprobs": {"max_tokens": 1, "prompt_logprobs": 0},
    "token ids": {"max_tokens": 1, "prompt_logprobs": 0, "return_token_ids": True},
    "labels": {"max_tokens": 1, "logprobs": 1, "logprob_token_ids": [5, 7]},
    "nothing": {"max_tokens": 1},
}


@pytest.fixture
def one(start_upstream: StartUpstream) -> Iterator[httpx.Client]:
    """A single vLLM, asked without a gateway."""
    with httpx.Client(base_url=start_upstream().url) as client:
        yield client


def ask(prompt: Any, **fields: Any) -> dict[str, Any]:
    return {"model": BASE, "prompt": prompt, "max_tokens": 1} | fields


def calls(upstream: FakeUpstream) -> list[Any]:
    return [seen.json["prompt"] for seen in upstream.requests(COMPLETIONS)]


def many(prompt: Any) -> list[Any]:
    """The prompts of a call, of which there may be one."""
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else list(prompt)


def shares(upstream: FakeUpstream) -> bool:
    """Whether some call had several prompts; how many depends on how quickly they came."""
    return max(len(many(call)) for call in calls(upstream)) > 1


class Crowd:
    """Requests sent while the replica holds the first, so that they gather."""

    def __init__(self, gateway: Gateway, upstream: FakeUpstream, first: Any) -> None:
        self.gateway = gateway
        self.stall = Stall(after=0)
        upstream.script(COMPLETIONS, self.stall)
        self.pool = ThreadPoolExecutor(64)
        self.first = self.send(first)
        assert self.stall.reached.wait(5)

    def send(self, payload: Any, **headers: str) -> Any:
        post = self.gateway.client.post
        return self.pool.submit(post, COMPLETIONS, json=payload, headers=headers)

    def answers(self, payloads: list[Any]) -> list[httpx.Response]:
        sent = [self.send(p, **{"x-request-id": f"rid-{n}"}) for n, p in enumerate(payloads)]
        return [future.result(20) for future in sent]

    def close(self) -> None:
        self.stall.release()
        assert self.first.result(20).status_code == 200
        self.pool.shutdown()


@pytest.mark.parametrize("prompts", [TEXTS, TOKENS], ids=["texts", "tokens"])
@pytest.mark.parametrize("form", FORMS)
def test_each_gets_what_it_would_get_alone(
    gateway: Gateway, upstream: FakeUpstream, one: httpx.Client, form: str, prompts: list[Any]
) -> None:
    payloads = [ask(prompt, **FORMS[form]) for prompt in prompts]
    first = "first" if prompts is TEXTS else [5, 6]
    crowd = Crowd(gateway, upstream, ask(first, **FORMS[form]))
    answers = crowd.answers(payloads)
    crowd.close()
    for n, (answer, payload) in enumerate(zip(answers, payloads, strict=True)):
        alone = one.post(COMPLETIONS, json=payload, headers={"x-request-id": f"rid-{n}"})
        assert answer.json() == alone.json()
        assert answer.headers["x-request-id"] == f"rid-{n}"
    assert shares(upstream)
    assert sorted(prompts) == sorted(p for call in calls(upstream)[1:] for p in many(call))


def test_a_crowd_becomes_a_few_calls(start_gateway: StartGateway, upstream: FakeUpstream) -> None:
    """256 at once, and a replica on which a step takes as long as with a model."""
    upstream.engine.call_s = 0.25
    gateway = start_gateway(upstream.url)

    async def all_at_once() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=256)
        async with httpx.AsyncClient(base_url=gateway.url, limits=limits, timeout=20) as client:
            sent = [client.post(COMPLETIONS, json=ask(f"prompt {n}")) for n in range(256)]
            return await asyncio.gather(*sent)

    answers = asyncio.run(all_at_once())
    assert [answer.status_code for answer in answers] == [200] * 256
    assert len({answer.json()["id"] for answer in answers}) == 256
    assert len(calls(upstream)) <= 8
    metrics = gateway.client.get("/metrics").text
    saved = re.search(r"^loragate_calls_saved_total (\S+)$", metrics, re.M)
    assert saved is not None
    assert float(saved[1]) == 256 - len(calls(upstream))


def test_one_after_another_nothing_is_touched(gateway: Gateway, upstream: FakeUpstream) -> None:
    body = b'{ "model":"tiny", "prompt": "alone",  "max_tokens": 1 }'
    for _ in range(3):
        assert gateway.client.post(COMPLETIONS, content=body).status_code == 200
    assert [seen.body for seen in upstream.requests(COMPLETIONS)] == [body] * 3


def test_it_can_be_turned_off(start_gateway: StartGateway, upstream: FakeUpstream) -> None:
    gateway = start_gateway(upstream.url, coalesce=False)
    crowd = Crowd(gateway, upstream, ask("first"))
    answers = crowd.answers([ask(text) for text in TEXTS])
    crowd.close()
    assert {answer.status_code for answer in answers} == {200}
    assert len(calls(upstream)) == 25


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.5},
        {"logprobs": 3},
        {"cache_salt": "other"},
        {"priority": 1},
        {"session_id": "s"},
        {"seed": 5},
        {"max_tokens": 2},
        {"stream": True},
        {"prompt": [5, 6]},
        {"model": "pirate"},
    ],
    ids=str,
)
def test_what_is_not_alike_does_not_share(
    gateway: Gateway, upstream: FakeUpstream, pirate: str, fields: dict[str, Any]
) -> None:
    crowd = Crowd(gateway, upstream, ask("first"))
    answer = crowd.send(ask("different") | fields).result(10)
    assert answer.status_code == 200
    seen = upstream.requests(COMPLETIONS)[1].json
    assert seen["prompt"] == fields.get("prompt", "different")
    crowd.close()


@pytest.mark.parametrize("name", ["x-session-id", "x-vllm-priority"])
def test_headers_that_mean_something_upstream_are_part_of_it(
    gateway: Gateway, upstream: FakeUpstream, name: str
) -> None:
    crowd = Crowd(gateway, upstream, ask("first"))
    assert crowd.send(ask("different"), **{name: "7"}).result(10).status_code == 200
    assert len(calls(upstream)) == 2
    assert upstream.requests(COMPLETIONS)[1].header(name) == "7"
    crowd.close()


def test_user_and_spelling_of_the_model_do_not_matter(
    gateway: Gateway, upstream: FakeUpstream, pirate: str
) -> None:
    crowd = Crowd(gateway, upstream, ask("first", model="pirate"))
    models = ["pirate", "pirate@1", "pirate:latest"] * 8
    answers = crowd.answers([ask(t, model=m, user=t) for t, m in zip(TEXTS, models, strict=True)])
    crowd.close()
    assert {answer.json()["model"] for answer in answers} == {"pirate@1"}
    assert shares(upstream)


def test_a_sampled_answer_is_everyone_s_own(gateway: Gateway, upstream: FakeUpstream) -> None:
    crowd = Crowd(gateway, upstream, ask("first", temperature=1))
    answers = crowd.answers([ask("the same", temperature=1)] * 10)
    crowd.close()
    assert {answer.status_code for answer in answers} == {200}
    assert str(calls(upstream)).count("the same") == 10


def test_one_bad_prompt_harms_nobody(
    gateway: Gateway, upstream: FakeUpstream, one: httpx.Client
) -> None:
    payloads = [ask(text, logprobs=1) for text in TEXTS]
    payloads[5] = ask("word " * 2000, logprobs=1)
    crowd = Crowd(gateway, upstream, ask("first", logprobs=1))
    answers = crowd.answers(payloads)
    crowd.close()
    for n, (answer, payload) in enumerate(zip(answers, payloads, strict=True)):
        alone = one.post(COMPLETIONS, json=payload, headers={"x-request-id": f"rid-{n}"})
        assert (answer.status_code, answer.json()) == (alone.status_code, alone.json())
    assert [answer.status_code for answer in answers].count(400) == 1


def test_a_shared_call_that_is_lost_is_made_again(gateway: Gateway, upstream: FakeUpstream) -> None:
    crowd = Crowd(gateway, upstream, ask("first"))
    second = Stall(after=0)
    upstream.script(COMPLETIONS, second, Break(after=1))
    sent = [crowd.send(ask(text)) for text in TEXTS[:2]]
    assert second.reached.wait(5)
    sent += [crowd.send(ask(text)) for text in TEXTS[2:]]
    assert {future.result(10).status_code for future in sent[2:]} == {200}
    second.release()
    assert {future.result(10).status_code for future in sent} == {200}
    crowd.close()


def test_who_leaves_is_not_missed(gateway: Gateway, upstream: FakeUpstream) -> None:
    crowd = Crowd(gateway, upstream, ask("first"))
    second = Stall(after=0)
    upstream.script(COMPLETIONS, second)
    with Wire(gateway) as leaving:
        leaving.start(COMPLETIONS, ask("who leaves"))
        stay = [crowd.send(ask(text)) for text in TEXTS[:4]]
        assert second.reached.wait(5)
        leaving.reset()
        second.release()
        assert {future.result(10).status_code for future in stay} == {200}
    crowd.close()
    wait_until(lambda: inflight(gateway) == 0)


def test_a_call_that_nobody_waits_for_is_cut(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.script(COMPLETIONS, Stall(after=0))
    with Wire(gateway) as wire:
        wire.start(COMPLETIONS, ask("who leaves"))
        wait_until(lambda: inflight(gateway) == 1)
        wire.reset()
        wait_until(lambda: len(upstream.cancels()) == 1)
    wait_until(lambda: inflight(gateway) == 0)


def test_a_busy_replica_is_not_asked_again_for_each(
    gateway: Gateway, upstream: FakeUpstream
) -> None:
    crowd = Crowd(gateway, upstream, ask("first"))
    busy = Status(503, b'{"error":{"message":"busy"}}')
    upstream.script(COMPLETIONS, *[busy] * 100)
    answers = crowd.answers([ask(text) for text in TEXTS])
    upstream.behave()
    crowd.close()
    assert {answer.status_code for answer in answers} == {503}
    assert shares(upstream)
