"""A real gateway before simulated replicas that die, hang and reset: all requests end, right."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from app.settings import PoolSettings
from bench.sim import Config, Fault, Kind, Scripted, Simulation, said
from tests.fakes.loops import LoopThread
from tests.integration.gateway import BASE, Gateway, Workbench
from tests.waiting import wait_until

SPEED = 10.0
STORM_S = 10.0
SEED = 7
ADAPTERS = 5
REPLICAS = 3
TOKENS = 6
COMES_BACK = (Kind.KILL, Kind.DEAD_ENGINE)
LASTS = (Kind.HANG, Kind.SLOW)
STRIKES = (Kind.UNAVAILABLE, Kind.RESET_BEFORE, Kind.RESET_AFTER)


def script(rng: random.Random) -> tuple[Scripted, ...]:
    """In real seconds: something every half second, to any replica; in the end all are well."""
    entries: list[Scripted] = []
    for number in range(int(STORM_S * 2)):
        at, replica = number / 2, rng.randrange(REPLICAS)
        kind = rng.choice((*COMES_BACK, *LASTS, *STRIKES))
        entries.append(Scripted(at, replica, Fault(kind, times=3)))
        if kind in COMES_BACK:
            entries.append(Scripted(at + 1, replica, Fault(Kind.RESTART)))
        elif kind in LASTS:
            entries.append(Scripted(at + 1, replica, Fault(Kind.HEAL)))
    for replica in range(REPLICAS):
        for kind in (Kind.RESTART, Kind.HEAL):
            entries.append(Scripted(STORM_S + 0.5, replica, Fault(kind)))
    return tuple(entries)


@pytest.fixture
def thread() -> Iterator[LoopThread]:
    thread = LoopThread("simulator")
    yield thread
    thread.close()


@pytest.fixture
def sim(thread: LoopThread) -> Iterator[Simulation]:
    simulation = Simulation(Config(replicas=REPLICAS, served=BASE, speed=SPEED))
    thread.run(simulation.__aenter__())
    yield simulation
    thread.run(simulation.__aexit__(None, None, None))


@pytest.fixture
def gateway(tmp_path: Path, sqlite_template: Path, sim: Simulation) -> Iterator[Gateway]:
    workbench = Workbench(tmp_path, sqlite_template)
    pool = PoolSettings(
        name="pool",
        base_model=BASE,
        base_model_path=workbench.base,
        max_lora_rank=16,
        max_inflight=16,
        replicas=sim.urls,
    )
    settings = workbench.settings(pools=(pool,), first_byte_timeout_s=5.0, idle_timeout_s=5.0)
    gateway = Gateway(settings)
    wait_until(gateway.ready)
    for number in range(ADAPTERS):
        gateway.register(f"a{number}", workbench.adapter())
    yield gateway
    gateway.close()


class Clients:
    """Requests of every kind, and how each of them ended."""

    def __init__(self, client: openai.AsyncOpenAI, rng: random.Random) -> None:
        self.client = client
        self.rng = rng
        self.begun = 0
        self.ends: Counter[str] = Counter()
        self.wrong: list[str] = []

    async def one(self, kind: str) -> None:
        self.begun += 1
        name = f"a{self.rng.randrange(ADAPTERS)}"
        count = self.rng.randint(10, 40) if kind == "batch" else 1
        prompts = [f"prompt {self.begun} {n}" for n in range(count)]
        wanted = [said(f"{name}@1", prompt, TOKENS) for prompt in prompts]
        try:
            found = await self.asked(kind, name, prompts)
        except openai.APIStatusError as exc:
            self.ends[str(exc.status_code)] += 1
        except openai.APIError:  # told inside a stream, or cut: a stream that had begun
            self.ends["broken"] += 1
        else:
            self.ends["ok"] += 1
            if found != wanted:
                self.wrong.append(f"{kind} {name}: {found[:2]} for {wanted[:2]}")

    async def asked(self, kind: str, name: str, prompts: list[str]) -> list[str]:
        prompt: Any = prompts if kind == "batch" else prompts[0]
        if kind != "stream":
            answer = await self.client.completions.create(
                model=name, prompt=prompt, max_tokens=TOKENS
            )
            return [choice.text for choice in answer.choices]
        stream = await self.client.completions.create(
            model=name, prompt=prompt, max_tokens=TOKENS, stream=True
        )
        return ["".join([event.choices[0].text async for event in stream])]


async def test_every_request_ends_and_right(
    sim: Simulation, thread: LoopThread, gateway: Gateway
) -> None:
    rng = random.Random(SEED)
    loop = asyncio.get_running_loop()

    def play(entry: Scripted) -> None:
        asyncio.run_coroutine_threadsafe(sim.play(entry.replica, entry.fault), thread.loop)

    for entry in script(rng):
        loop.call_later(entry.at_s, play, entry)
    async with gateway.async_openai_client(timeout=30) as client:
        clients = Clients(client, rng)
        async with asyncio.TaskGroup() as group:
            until = loop.time() + STORM_S
            while loop.time() < until:
                group.create_task(clients.one(rng.choice(("single", "single", "stream", "batch"))))
                await asyncio.sleep(0.04)
        assert clients.wrong == []
        assert clients.begun == clients.ends.total()
        assert set(clients.ends) <= {"ok", "broken", "502", "503", "504"}, clients.ends
        assert clients.ends["ok"] > 0.7 * clients.begun, clients.ends
        await asyncio.to_thread(_well_again, gateway)
        before = clients.ends.copy()
        for kind in ("single", "stream", "batch") * 5:
            await clients.one(kind)
        assert clients.ends - before == Counter(ok=15)
        assert clients.wrong == []
    wait_until(lambda: all(one["inflight"] == 0 for one in _replicas(gateway)))


def _replicas(gateway: Gateway) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = gateway.client.get("/admin/replicas").json()["data"]
    return found


def _well_again(gateway: Gateway) -> None:
    wait_until(lambda: all(one["state"] == "healthy" for one in _replicas(gateway)), within_s=15)
