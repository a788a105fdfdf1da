"""The simulator over real sockets: who is served by what, in which steps, and what goes wrong."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import pytest

from bench.sim import Config, Fault, Kind, Scripted, Simulation, read, said
from tests.waiting import until

#: Fast enough to wait for nothing, slow enough that steps keep their order.
FAST = Config(replicas=1, speed=50, resolver=True)
FIGURES = read()


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=20, limits=limits) as client:
        yield client


async def complete(
    client: httpx.AsyncClient,
    sim: Simulation,
    model: str,
    prompt: Any = "hi",
    *,
    replica: int = 0,
    **more: Any,
) -> httpx.Response:
    payload = {"model": model, "prompt": prompt, "max_tokens": 4} | more
    return await client.post(f"{sim.replicas[replica].url}/v1/completions", json=payload)


async def test_an_answer_names_its_adapter_and_its_prompt(client: httpx.AsyncClient) -> None:
    async with Simulation(FAST) as sim:
        answer = (await complete(client, sim, "a", ["one", [1, 2, 3]], n=2)).json()
    texts = [choice["text"] for choice in answer["choices"]]
    assert texts == [said("a", prompt, 4) for prompt in ("one", "one", [1, 2, 3], [1, 2, 3])]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"]["completion_tokens"] == 16


async def test_more_prompts_than_vllm_takes(client: httpx.AsyncClient) -> None:
    async with Simulation(FAST) as sim:
        assert (await complete(client, sim, "a", ["x"] * 1025)).status_code == 400
        assert (await complete(client, sim, "a", ["x"] * 1024, max_tokens=1)).status_code == 200


async def test_unknown_without_a_resolver(client: httpx.AsyncClient) -> None:
    async with Simulation(replace(FAST, resolver=False)) as sim:
        answer = await complete(client, sim, "a")
    assert answer.status_code == 404
    assert "does not exist" in answer.json()["error"]["message"]


async def test_loads_of_every_kind_are_counted(client: httpx.AsyncClient) -> None:
    """Through a resolver, over HTTP, and read again after the CPU evicted one."""
    figures = replace(FIGURES, gpu_slots=1, cpu_slots=2)
    async with Simulation(replace(FAST, figures=figures)) as sim:
        load = {"lora_name": "a", "lora_path": "/anywhere"}
        await client.post(f"{sim.replicas[0].url}/v1/load_lora_adapter", json=load)
        for name in ("a", "b", "c", "c", "b", "a"):
            assert (await complete(client, sim, name)).status_code == 200
        total = sim.stats()["total"]
    assert (total["loads_asked"], total["reads_again"], total["adapter_loads"]) == (3, 1, 4)
    assert total["slot_swaps"] == 5


async def test_an_unloaded_adapter_keeps_its_slot(client: httpx.AsyncClient) -> None:
    async with Simulation(FAST) as sim:
        await complete(client, sim, "a")
        url = f"{sim.replicas[0].url}/v1/unload_lora_adapter"
        assert (await client.post(url, json={"lora_name": "a"})).status_code == 200
        assert list(sim.replicas[0].engine.slots.gpu) == ["a"]
        await complete(client, sim, "a")
        assert sim.stats()["total"]["adapter_loads"] == 1


async def test_the_same_prefix_is_computed_once_for_an_adapter(client: httpx.AsyncClient) -> None:
    prefix = "p" * 64 * 10
    async with Simulation(FAST) as sim:
        for model, tail in (("a", "one"), ("a", "two"), ("b", "one")):
            await complete(client, sim, model, prefix + tail)
        total = sim.stats()["total"]
    assert total["prefix_queried_tokens"] == 3 * 161
    assert total["prefix_hit_tokens"] == 160


async def test_requests_of_adapters_without_a_slot_wait_and_others_pass(
    client: httpx.AsyncClient,
) -> None:
    """No fairness, as in vLLM: a later request of a running adapter overtakes."""
    figures = replace(FIGURES, gpu_slots=1, cpu_slots=4)
    async with Simulation(replace(FAST, figures=figures)) as sim:
        engine = sim.replicas[0].engine
        for name in ("a", "b"):
            await complete(client, sim, name)
        ended: list[str] = []

        async def ask(name: str, tag: str, tokens: int) -> None:
            await complete(client, sim, name, max_tokens=tokens)
            ended.append(tag)

        async with asyncio.TaskGroup() as group:
            group.create_task(ask("a", "a1", 2000))
            await until(lambda: len(engine.running) == 1)
            group.create_task(ask("b", "b", 2))
            await until(lambda: len(engine.waiting) == 1)
            page = (await client.get(f"{sim.replicas[0].url}/metrics")).text
            group.create_task(ask("a", "a2", 2))
        assert ended == ["a2", "a1", "b"]
    assert 'running_lora_adapters="a,b"' in page
    assert 'reason="deferred"} 1.0' in page


async def test_a_load_stalls_those_who_decode(client: httpx.AsyncClient) -> None:
    figures = replace(FIGURES, disk_load_ms=2000.0, slot_swap_ms=0.0)
    async with Simulation(replace(FAST, figures=figures)) as sim:
        await complete(client, sim, "a")
        engine, before = sim.replicas[0].engine, sim.replicas[0].engine.counts.steps
        async with asyncio.TaskGroup() as group:
            group.create_task(complete(client, sim, "a", max_tokens=50))
            await until(lambda: engine.counts.steps > before)
            group.create_task(complete(client, sim, "b"))
            await until(lambda: "b" in engine.slots.cpu, every_s=0.001)
            steps = engine.counts.steps
            await asyncio.sleep(0.02)  # half the load's 40 ms
            assert engine.counts.steps == steps


async def test_a_batch_takes_what_its_steps_take(client: httpx.AsyncClient) -> None:
    """32 prompts of 200 tokens, 4 tokens each: one prefill step and three that decode."""
    config = replace(FAST, speed=1.0)
    prompts = [f"{number:03}" + "x" * 797 for number in range(32)]
    async with Simulation(config) as sim:
        loop = asyncio.get_running_loop()
        began = loop.time()
        await complete(client, sim, "sim-base", prompts)
        took_ms = (loop.time() - began) * 1000
    expected_ms = FIGURES.step_ms(32 * 200, 0) + 3 * FIGURES.step_ms(0, 32)
    assert expected_ms <= took_ms < expected_ms + 150


async def test_a_client_that_leaves_frees_its_place(client: httpx.AsyncClient) -> None:
    async with Simulation(replace(FAST, speed=1.0)) as sim:
        engine = sim.replicas[0].engine
        payload = {"model": "a", "prompt": "hi", "max_tokens": 4000, "stream": True}
        url = f"{sim.replicas[0].url}/v1/completions"
        async with client.stream("POST", url, json=payload) as response:
            await anext(response.aiter_raw())
            assert len(engine.running) == 1
        await until(lambda: not engine.running)
        assert engine.cache.held == 0


async def test_metrics_tell_a_restart(client: httpx.AsyncClient) -> None:
    async with Simulation(FAST) as sim:
        url = f"{sim.replicas[0].url}/metrics"

        async def started_at() -> float:
            lines = (await client.get(url)).text.splitlines()
            name = "process_start_time_seconds "
            return float(next(line for line in lines if line.startswith(name)).split()[1])

        await complete(client, sim, "a")
        before = await started_at()
        await sim.play(0, Fault(Kind.RESTART))
        assert await started_at() > before
        models = (await client.get(f"{sim.replicas[0].url}/v1/models")).json()["data"]
        assert [card["id"] for card in models] == ["sim-base"]
        assert sim.replicas[0].engine.slots.cpu == {}


async def test_kill_refuses_and_restart_listens_again(client: httpx.AsyncClient) -> None:
    async with Simulation(FAST) as sim:
        engine = sim.replicas[0].engine
        async with asyncio.TaskGroup() as group:
            cut = group.create_task(_failure(complete(client, sim, "a", max_tokens=4000)))
            await until(lambda: engine.running)
            await sim.play(0, Fault(Kind.KILL))
        assert cut.result() in (httpx.ReadError, httpx.RemoteProtocolError)
        assert await _failure(complete(client, sim, "a")) is httpx.ConnectError
        await sim.play(0, Fault(Kind.RESTART))
        assert (await complete(client, sim, "a")).status_code == 200


async def test_a_dead_engine_behind_a_live_server(client: httpx.AsyncClient) -> None:
    async with Simulation(FAST) as sim:
        async with asyncio.TaskGroup() as group:
            running = group.create_task(complete(client, sim, "a", max_tokens=4000))
            await until(lambda: sim.replicas[0].engine.running)
            await sim.play(0, Fault(Kind.DEAD_ENGINE))
        after = await complete(client, sim, "a")
        health = await client.get(f"{sim.replicas[0].url}/health")
    for answer in (running.result(), after):
        assert (answer.status_code, "EngineCore" in answer.text) == (500, True)
    assert health.status_code == 503


async def test_faults_of_single_requests(client: httpx.AsyncClient) -> None:
    async with Simulation(FAST) as sim:
        await sim.play(0, Fault(Kind.UNAVAILABLE, times=2))
        await sim.play(0, Fault(Kind.RESET_BEFORE))
        statuses = [(await complete(client, sim, "a")).status_code for _ in range(2)]
        assert statuses == [503, 503]
        assert await _failure(complete(client, sim, "a")) is httpx.ReadError
        await sim.play(0, Fault(Kind.RESET_AFTER, tokens=2))
        received = bytearray()
        assert await _failure(_stream(client, sim, received)) is httpx.ReadError
        assert 1 <= received.count(b"data: ") <= 2
        assert (await complete(client, sim, "a")).status_code == 200


async def test_hanging_slow_lying_and_healed(client: httpx.AsyncClient) -> None:
    async with Simulation(FAST) as sim:
        await sim.play(0, Fault(Kind.LYING))
        answer = (await complete(client, sim, "a")).json()
        assert answer["choices"][0]["text"] == said("sim-base", "hi", 4)
        await sim.play(0, Fault(Kind.HEAL))
        await sim.play(0, Fault(Kind.SLOW, factor=3.0))
        assert sim.replicas[0].engine.slow == 3.0
        await sim.play(0, Fault(Kind.HANG))
        async with asyncio.TaskGroup() as group:
            waiting = group.create_task(complete(client, sim, "a"))
            await until(lambda: sim.replicas[0].engine.waiting)
            assert (await client.get(f"{sim.replicas[0].url}/health")).status_code == 200
            assert not waiting.done()
            await sim.play(0, Fault(Kind.HEAL))
        assert waiting.result().json()["choices"][0]["text"] == said("a", "hi", 4)


async def test_a_script_plays_on_the_simulated_clock(client: httpx.AsyncClient) -> None:
    script = (Scripted(1.0, 1, Fault(Kind.KILL)), Scripted(2.0, 1, Fault(Kind.RESTART)))
    async with Simulation(replace(FAST, replicas=2, script=script)) as sim:
        await until(lambda: not sim.replicas[1].listening, every_s=0.001)
        assert sim.replicas[0].listening
        await until(lambda: sim.replicas[1].listening)
        assert sim.replicas[1].incarnations == 2


async def test_the_control_port(client: httpx.AsyncClient) -> None:
    async with Simulation(replace(FAST, replicas=2)) as sim:
        url = f"http://127.0.0.1:{sim.control_port}/sim"
        await complete(client, sim, "a")
        stats = (await client.get(f"{url}/stats")).json()
        assert stats["total"]["requests"] == 1
        assert stats["replicas"][0]["gpu_adapters"] == ["a"]
        order = {"replica": 1, "fault": {"kind": "kill"}}
        assert (await client.post(f"{url}/fault", json=order)).status_code == 200
        await until(lambda: not sim.replicas[1].listening)
        order["replica"] = 7
        assert (await client.post(f"{url}/fault", json=order)).status_code == 400


async def test_sixty_four_replicas_at_once(client: httpx.AsyncClient) -> None:
    async with Simulation(replace(FAST, replicas=64, speed=10)) as sim:
        asked = [complete(client, sim, f"a{n}", replica=n) for n in range(64)]
        answers = await asyncio.gather(*asked)
        assert [each.json()["model"] for each in answers] == [f"a{n}" for n in range(64)]
        stats = sim.stats()
    assert stats["total"]["adapter_loads"] == 64
    assert len({replica.url for replica in sim.replicas}) == 64


async def _stream(client: httpx.AsyncClient, sim: Simulation, received: bytearray) -> None:
    payload = {"model": "a", "prompt": "hi", "max_tokens": 9, "stream": True}
    url = f"{sim.replicas[0].url}/v1/completions"
    async with client.stream("POST", url, json=payload) as response:
        async for data in response.aiter_raw():
            received += data


async def _failure(asked: Any) -> type[httpx.HTTPError]:
    with pytest.raises(httpx.HTTPError) as failure:
        await asked
    return failure.type
