"""Adapters reach a replica when they are first asked for, once, and come back when lost."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from tests.fakes.faults import Break, Stall, Status
from tests.fakes.upstream import FakeUpstream
from tests.integration.gateway import BASE, Gateway, StartGateway, StartUpstream, Workbench
from tests.waiting import until, wait_until

COMPLETIONS = "/v1/completions"
LOAD = "/v1/load_lora_adapter"


def ask(gateway: Gateway, model: str = "pirate") -> Any:
    return gateway.client.post(COMPLETIONS, json={"model": model, "prompt": "hi"})


def test_registering_loads_nothing(gateway: Gateway, pirate: str, upstream: FakeUpstream) -> None:
    assert upstream.loads() == []


def test_the_first_request_loads_and_the_next_does_not(
    gateway: Gateway, pirate: str, upstream: FakeUpstream
) -> None:
    for _ in range(3):
        assert ask(gateway).status_code == 200
    assert len(upstream.loads("pirate@1")) == 1
    assert len(upstream.requests(COMPLETIONS)) == 3, "no request is spent on finding out"


async def test_fifty_first_requests_make_one_load(
    gateway: Gateway, async_client: openai.AsyncOpenAI, pirate: str, upstream: FakeUpstream
) -> None:
    stall = Stall()
    upstream.script(LOAD, stall)

    async def first() -> str:
        answer = await async_client.completions.create(model=pirate, prompt="hi")
        return answer.choices[0].text

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(first()) for _ in range(50)]
        await until(stall.reached.is_set)
        await asyncio.sleep(0.2)  # all fifty are under way; a second load would come now
        stall.release()
    assert {task.result() for task in tasks} == {"pirate@1 heard: hi"}
    assert len(upstream.loads()) == 1


async def test_the_first_caller_s_leaving_does_not_stop_the_others_load(
    gateway: Gateway, async_client: openai.AsyncOpenAI, pirate: str, upstream: FakeUpstream
) -> None:
    stall = Stall()
    upstream.script(LOAD, stall)
    loop = asyncio.get_running_loop()
    first = loop.create_task(async_client.completions.create(model=pirate, prompt="hi"))
    await until(stall.reached.is_set)
    second = loop.create_task(async_client.completions.create(model=pirate, prompt="hi"))
    await asyncio.sleep(0.1)  # the second has come and waits with the first
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    await asyncio.sleep(0.1)  # the gateway has seen the first leave
    stall.release()
    assert (await second).choices[0].text == "pirate@1 heard: hi"
    assert len(upstream.loads()) == 1


def test_different_adapters_load_independently(
    gateway: Gateway, workbench: Workbench, upstream: FakeUpstream
) -> None:
    for name in ("one", "two"):
        gateway.register(name, workbench.adapter())
    stall = Stall()
    upstream.script(LOAD, stall)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(ask, gateway, "one")
        assert stall.reached.wait(5)
        assert ask(gateway, BASE).status_code == 200, "the base needs no load"
        stall.release()
        assert waiting.result().status_code == 200
    assert ask(gateway, "two").status_code == 200


def test_an_adapter_loaded_by_someone_else_is_fine(
    gateway: Gateway, pirate: str, upstream: FakeUpstream
) -> None:
    """Another gateway got there first: vLLM says 400 `already been loaded`, which is success."""
    body = (
        b'{"error":{"message":"The lora adapter \'pirate@1\' has already been loaded. If you want '
        b"to load the adapter in place, set 'load_inplace' to True.\","
        b'"type":"InvalidUserInput","param":null,"code":400}}'
    )
    store = next(gateway.settings.store_path.glob("??/*"))
    upstream.engine.adapters["pirate@1"] = str(store)
    upstream.script(LOAD, Status(400, body))
    assert ask(gateway).status_code == 200


def test_an_adapter_found_at_the_start_is_not_loaded_again(
    start_gateway: StartGateway, gateway: Gateway, pirate: str, upstream: FakeUpstream
) -> None:
    assert ask(gateway).status_code == 200
    gateway.close()
    again = start_gateway(upstream.url)
    assert ask(again).status_code == 200
    assert len(upstream.loads("pirate@1")) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_lost_adapter_is_loaded_again_and_the_request_replayed(
    gateway: Gateway, client: openai.OpenAI, pirate: str, upstream: FakeUpstream, stream: bool
) -> None:
    assert ask(gateway).status_code == 200
    upstream.forget("pirate@1")
    if stream:
        with client.completions.create(model=pirate, prompt="hi", stream=True) as chunks:
            text = "".join(chunk.choices[0].text for chunk in chunks)
    else:
        text = client.completions.create(model=pirate, prompt="hi").choices[0].text
    assert text == "pirate@1 heard: hi"
    assert len(upstream.loads("pirate@1")) == 2
    _first, lost, replayed = upstream.requests(COMPLETIONS)
    assert lost.body == replayed.body


async def test_an_adapter_lost_by_many_is_loaded_again_once(
    gateway: Gateway, async_client: openai.AsyncOpenAI, pirate: str, upstream: FakeUpstream
) -> None:
    await async_client.completions.create(model=pirate, prompt="hi")
    upstream.forget("pirate@1")
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(async_client.completions.create(model=pirate, prompt="hi"))
            for _ in range(20)
        ]
    assert {task.result().choices[0].text for task in tasks} == {"pirate@1 heard: hi"}
    assert len(upstream.loads("pirate@1")) == 2


def test_an_adapter_that_is_lost_again_and_again_is_an_error(
    gateway: Gateway, pirate: str, upstream: FakeUpstream
) -> None:
    body = (
        b'{"error":{"message":"The model `pirate@1` does not exist. Valid aliases: tiny.",'
        b'"type":"NotFoundError","param":"model","code":404}}'
    )
    upstream.script(COMPLETIONS, *[Status(404, body)] * 50)
    answer = ask(gateway)
    assert answer.status_code >= 400
    assert len(upstream.requests(COMPLETIONS)) <= 5
    assert len(upstream.loads()) <= 5


def test_another_404_is_not_a_lost_adapter(
    gateway: Gateway, pirate: str, upstream: FakeUpstream
) -> None:
    assert ask(gateway).status_code == 200
    answer = gateway.client.post("/v1/embeddings", json={"model": "pirate", "input": "hi"})
    assert (answer.status_code, answer.content) == (404, b'{"detail":"Not Found"}')
    assert len(upstream.requests("/v1/embeddings")) == 1
    assert len(upstream.loads()) == 1


def test_a_restarted_replica_is_filled_on_demand(
    gateway: Gateway, pirate: str, upstream: FakeUpstream
) -> None:
    assert ask(gateway).status_code == 200
    upstream.restart()
    wait_until(lambda: ask(gateway).status_code == 200)
    assert len(upstream.loads("pirate@1")) == 2


@pytest.mark.parametrize("status", [400, 404, 500])
def test_weights_a_replica_will_not_take_are_a_clear_error(
    gateway: Gateway, pirate: str, upstream: FakeUpstream, status: int
) -> None:
    """vLLM says 500 for good as well as for now; asking again and again helps neither."""
    reason = "LoRA rank 64 is greater than max_lora_rank 16."
    body = b'{"error":{"message":"%b","type":"InternalServerError","param":null,"code":500}}'
    upstream.script(LOAD, *[Status(status, body % reason.encode())] * 500)
    answer = ask(gateway)
    assert answer.status_code == 502
    error = answer.json()["error"]
    assert error["code"] == "adapter_load_failed"
    assert "pirate" in error["message"]
    assert reason in error["message"]
    assert upstream.requests(COMPLETIONS) == []
    assert len(upstream.loads()) == 1


def test_no_storm_of_loads_that_fail(gateway: Gateway, pirate: str, upstream: FakeUpstream) -> None:
    body = b'{"error":{"message":"bad","type":"InternalServerError","param":null,"code":500}}'
    upstream.script(LOAD, *[Status(500, body)] * 500)
    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda _: ask(gateway).status_code, range(50)))
    assert set(answers) == {502}
    assert len(upstream.loads()) <= 10


def test_the_client_library_does_not_repeat_a_load_that_failed(
    gateway: Gateway, pirate: str, upstream: FakeUpstream
) -> None:
    body = b'{"error":{"message":"bad","type":"InternalServerError","param":null,"code":500}}'
    upstream.script(LOAD, *[Status(500, body)] * 500)
    with (
        gateway.openai_client(max_retries=3) as client,
        pytest.raises(openai.InternalServerError) as caught,
    ):
        client.completions.create(model=pirate, prompt="hi")
    assert caught.value.code == "adapter_load_failed"
    assert len(upstream.loads()) == 1


def test_a_load_that_breaks_is_tried_elsewhere(
    start_gateway: StartGateway, start_upstream: StartUpstream, workbench: Workbench
) -> None:
    replicas = [start_upstream(), start_upstream()]
    gateway = start_gateway(*[replica.url for replica in replicas])
    names = [f"pirate-{n}" for n in range(12)]  # one of them at least lives on the broken one
    for name in names:
        gateway.register(name, workbench.adapter())
    broken = replicas[0]
    broken.script(LOAD, *[Break()] * 20)
    for name in names:
        answer = ask(gateway, name)
        assert answer.status_code == 200, answer.text
    assert broken.loads()


def test_a_load_that_hangs_has_a_deadline(
    start_gateway: StartGateway, upstream: FakeUpstream, workbench: Workbench
) -> None:
    gateway = start_gateway(upstream.url, load_timeout_s=0.3)
    gateway.register("pirate", workbench.adapter())
    stall = Stall()
    upstream.script(LOAD, stall)
    answer = ask(gateway)
    assert answer.status_code in (503, 504)
    stall.release()
    wait_until(lambda: ask(gateway).status_code == 200)


def test_a_deleted_version_is_unloaded_and_its_files_collected(
    start_gateway: StartGateway, upstream: FakeUpstream, workbench: Workbench
) -> None:
    gateway = start_gateway(upstream.url, reap_period_s=0.1, reap_grace_s=0)
    gateway.register("pirate", workbench.adapter())
    assert ask(gateway).status_code == 200
    store = gateway.settings.store_path
    assert list(store.glob("??/*"))
    gateway.client.delete("/admin/adapters/pirate").raise_for_status()
    wait_until(lambda: "pirate@1" not in upstream.engine.adapters)
    wait_until(lambda: not list(store.glob("??/*")))


def test_a_version_in_use_is_not_unloaded(
    start_gateway: StartGateway, upstream: FakeUpstream, workbench: Workbench
) -> None:
    gateway = start_gateway(upstream.url, reap_period_s=0.05, reap_grace_s=0)
    gateway.register("pirate", workbench.adapter())
    stall = Stall(after=1)
    upstream.script(COMPLETIONS, stall)
    with (
        gateway.openai_client() as client,
        client.completions.create(model="pirate", prompt="hi", stream=True) as stream,
    ):
        assert stall.reached.wait(5)
        gateway.client.delete("/admin/adapters/pirate").raise_for_status()
        wait_until(lambda: ask(gateway).status_code == 404)
        tasks = _runs(gateway, "reap")
        wait_until(lambda: _runs(gateway, "reap") > tasks + 1)
        assert "pirate@1" in upstream.engine.adapters
        assert list(gateway.settings.store_path.glob("??/*"))
        stall.release()
        assert "".join(chunk.choices[0].text for chunk in stream) == "pirate@1 heard: hi"
    wait_until(lambda: "pirate@1" not in upstream.engine.adapters)


def _runs(gateway: Gateway, task: str) -> int:
    listed = gateway.client.get("/admin/tasks").json()["data"]
    (found,) = [status for status in listed if status["name"] == task]
    return int(found["runs"])
