"""A full pool: some wait, more are told to come again, and nobody's crowd shuts out another."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from app.settings import PoolSettings
from tests.fakes.faults import Stall
from tests.fakes.upstream import FakeUpstream
from tests.integration.gateway import BASE, Gateway, StartGateway, Workbench
from tests.waiting import until

COMPLETIONS = "/v1/completions"


@pytest.fixture
def narrow(workbench: Workbench, start_gateway: StartGateway, upstream: FakeUpstream) -> Gateway:
    """One replica that is given one request at a time, and four that wait."""
    pool = PoolSettings(
        name="pool",
        base_model=BASE,
        base_model_path=workbench.base,
        max_lora_rank=16,
        max_inflight=1,
        max_queue=4,
        replicas=(upstream.url,),
    )
    return start_gateway(pools=(pool,))


def waiting(gateway: Gateway) -> int:
    lines = gateway.client.get("/metrics").text.splitlines()
    return int(sum(float(x.split()[-1]) for x in lines if x.startswith("loragate_pool_waiting{")))


class Crowd:
    """Requests that are not answered yet."""

    def __init__(self, client: openai.AsyncOpenAI) -> None:
        self.client = client
        self.tasks: list[asyncio.Task[Any]] = []

    def ask(self, model: str = BASE, **more: Any) -> asyncio.Task[Any]:
        asked = self.client.completions.create(model=model, prompt="x", **more)
        self.tasks.append(asyncio.get_running_loop().create_task(asked))
        return self.tasks[-1]

    async def texts(self) -> list[str]:
        return [(await task).choices[0].text for task in self.tasks]


async def test_the_pool_is_full(narrow: Gateway, upstream: FakeUpstream) -> None:
    stall = Stall()
    upstream.script(COMPLETIONS, stall)
    async with narrow.async_openai_client() as client:
        crowd = Crowd(client)
        crowd.ask()
        await until(lambda: upstream.requests(COMPLETIONS))
        for _ in range(4):
            crowd.ask()
        await until(lambda: waiting(narrow) == 4)
        with pytest.raises(openai.InternalServerError) as raised:
            await client.completions.create(model=BASE, prompt="x")
        assert raised.value.status_code == 503
        assert raised.value.code == "pool_full"
        assert int(raised.value.response.headers["retry-after"]) >= 1
        assert len(upstream.requests(COMPLETIONS)) == 1
        stall.release()
        assert await crowd.texts() == ["tiny heard: x"] * 5
    assert waiting(narrow) == 0


async def test_an_adapter_with_more_than_its_share(
    narrow: Gateway, upstream: FakeUpstream, workbench: Workbench
) -> None:
    narrow.register("crowd", workbench.adapter())
    narrow.register("one", workbench.adapter())
    stall = Stall()
    async with narrow.async_openai_client() as client:
        for name in ("crowd", "one"):
            await client.completions.create(model=name, prompt="x")
        upstream.script(COMPLETIONS, stall)
        crowd = Crowd(client)
        crowd.ask("crowd")
        await until(lambda: len(upstream.requests(COMPLETIONS)) == 3)
        for name in ("crowd", "crowd", "one"):
            crowd.ask(name)
        await until(lambda: waiting(narrow) == 3)
        with pytest.raises(openai.RateLimitError) as raised:
            await client.completions.create(model="crowd", prompt="x")
        assert raised.value.status_code == 429
        assert raised.value.code == "adapter_queue_full"
        assert int(raised.value.response.headers["retry-after"]) >= 1
        crowd.ask("one")
        await until(lambda: waiting(narrow) == 4)
        stall.release()
        assert len(await crowd.texts()) == 5
    asked = [request.json["model"] for request in upstream.requests(COMPLETIONS)][3:]
    assert asked.index("one@1") <= 1, "one turn later, however many wait"


async def test_who_leaves_the_queue_makes_room(narrow: Gateway, upstream: FakeUpstream) -> None:
    stall = Stall()
    upstream.script(COMPLETIONS, stall)
    async with narrow.async_openai_client() as client:
        crowd = Crowd(client)
        crowd.ask()
        await until(lambda: upstream.requests(COMPLETIONS))
        for _ in range(4):
            crowd.ask()
        await until(lambda: waiting(narrow) == 4)
        crowd.tasks.pop().cancel()
        await until(lambda: waiting(narrow) == 3)
        crowd.ask()
        await until(lambda: waiting(narrow) == 4)
        stall.release()
        assert await crowd.texts() == ["tiny heard: x"] * 5
    assert len(upstream.requests(COMPLETIONS)) == 5


async def test_a_deadline_ends_in_the_queue_too(narrow: Gateway, upstream: FakeUpstream) -> None:
    stall = Stall()
    upstream.script(COMPLETIONS, stall)
    async with narrow.async_openai_client() as client:
        crowd = Crowd(client)
        crowd.ask()
        await until(lambda: upstream.requests(COMPLETIONS))
        late = crowd.ask(extra_headers={"X-Request-Timeout-Ms": "100"})
        with pytest.raises(openai.InternalServerError) as raised:
            await late
        assert raised.value.code == "deadline_exceeded"
        assert waiting(narrow) == 0
        stall.release()
        assert (await crowd.tasks[0]).choices[0].text == "tiny heard: x"
    assert len(upstream.requests(COMPLETIONS)) == 1
