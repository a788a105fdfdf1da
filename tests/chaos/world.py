"""A data plane with its replicas and clients, and everything that goes wrong between them.

What comes in: a seed. What goes out: what every client got, held against what it should have got.
Real: the fleet, the forwarder, batches, coalescing, the request path, placement, rollouts and the
driver that runs them. Not real: sockets, SQL, and the time.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from app.backends.base import Reply
from app.control import rollout
from app.control.driver import Driver
from app.control.tasks.place import PERIOD_S, Place
from app.domain import AdapterVersion, Alias, Pool, Probe, Replica
from app.errors import AdapterLoadFailed, LoragateError, ProbeFailed
from app.serving.batches import Batches
from app.serving.coalesce import Coalescer
from app.serving.fleet import Fleet
from app.serving.forward import Forwarder
from app.serving.meter import Meter
from app.serving.request import parse
from app.serving.request_path import RequestPath
from app.serving.resolve import resolve
from app.serving.snapshot import Snapshot, Snapshots
from tests.chaos.engine import ChaosEngine, scored
from tests.fakes import dialect
from tests.fakes.virtual_time import VirtualClock
from tests.unit.serving.made import ANYONE, STORE, adapter, digest, snapshot

BASE = "tiny"
POOL = Pool("pool", BASE, "served-tiny", max_loras=3, max_cpu_loras=6, max_inflight=8, max_queue=48)
ADAPTERS = 12
REPLICAS = 4
PROBE_IDS = ((1, 2, 3, 4), (5, 6, 7))
HEALTH_S = 1.0
PATH = "/v1/completions"


@dataclass
class Rooms:
    """What a rollout needs of a gateway."""

    fleet: Fleet
    snapshots: Snapshots


@dataclass
class Told:
    """What one client got: how it ended, when it began and how long it took."""

    kind: str
    end: str
    at: float
    took_s: float


@dataclass
class World:
    """Everything, and what was seen of it."""

    seed: int
    rng: random.Random
    clock: VirtualClock
    fleet: Fleet
    path: RequestPath
    meter: Meter
    rooms: Rooms
    engines: list[ChaosEngine] = field(default_factory=list)
    told: list[Told] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    begun: int = 0
    billable: int = 0
    flips: Counter[str] = field(default_factory=Counter)

    @property
    def current(self) -> Snapshot:
        return self.rooms.snapshots.current

    @property
    def now(self) -> float:
        return self.clock.monotonic()

    def engine(self, replica: str) -> ChaosEngine:
        """The one that stands behind a replica's id now."""
        return next(e for e in reversed(self.engines) if e.replica.id == replica)

    async def publish(self, made: Snapshot) -> None:
        self.rooms.snapshots.publish(made)
        await self.fleet.sync(made)

    # clients

    async def client(self, kind: str) -> None:
        """One request, from its beginning to its one end."""
        ask = _ASKS[kind]
        self.begun += 1
        at = self.now
        payload = ask(self)
        leaves_s = self.rng.choice([None, None, None, self.rng.uniform(0, 3)])
        try:
            async with asyncio.timeout(leaves_s):
                end = await self._asked(payload)
        except TimeoutError:
            end = "left"
        except LoragateError as exc:
            end = exc.code
        self.told.append(Told(kind, end, at, self.now - at))

    async def _asked(self, payload: dict[str, Any]) -> str:
        request = parse(PATH, json.dumps(payload).encode())
        request.headers = b"x-request-id: r%d\r\n" % self.begun
        seen = self.current
        route = resolve(seen, request.model, ANYONE)
        began = self.now
        reply = await self.path.serve(request, ANYONE, seen)
        self.billable += reply.status < 300
        try:
            data = await self._read(reply)
        finally:
            reply.close()
        if reply.status != 200:
            return str(reply.status)
        if route.version is not None and reply.version != route.upstream_name:
            self.wrong.append(f"{reply.version} answered for {route.upstream_name}")
        speaker = "base" if route.version is None else route.version.digest
        end, right = _judged(payload, speaker, data)
        if end == "ok" and not right and not self._may_lie(reply, route.version, began):
            self.wrong.append(f"{reply.replica} at {began:.1f}: {payload['model']}: {data[:300]!r}")
        return end if right or end != "ok" else "a lie"

    async def _read(self, reply: Reply) -> bytes:
        if self.rng.random() < 0.5:
            return await reply.read(1 << 24)
        pieces: list[bytes] = []

        def push(data: bytes) -> None:
            pieces.append(data)

        await reply.pipe(push)
        return b"".join(pieces)

    def _may_lie(self, reply: Reply, version: AdapterVersion | None, began: float) -> bool:
        """Nobody can tell that the answer is wrong: the replica lies, and is not verified."""
        if version is not None and version.probed:
            return False
        there = reply.replica.split(",")
        spans = [span for e in self.engines if e.replica.id in there for span in e.lied]
        return any(start <= self.now and began <= end for start, end in spans)

    # the registry

    async def flip(self) -> None:
        """A new version of an adapter, prepared, and its alias moved; or moved back."""
        seen = self.current
        name = self.rng.choice(sorted(seen.adapters))
        old = seen.adapters[name]
        number = max(old.versions) + 1
        made = AdapterVersion(name, number, digest(name, number), 8, BASE, probed=_probed(name))
        versions = {**old.versions, number: made}
        served = old.aliases["latest"].targets[0][0]
        kept = {n: v for n, v in versions.items() if n == served or n > number - 3}
        found = replace(old, versions=kept)
        await self.publish(replace_adapter(seen, found))
        try:
            await rollout.prepare(self.rooms, name, [number])
        except ProbeFailed:
            self.flips["refused by its probe"] += 1
            return
        except AdapterLoadFailed:
            self.flips["refused"] += 1
            return
        alias = Alias("latest", ((number, 1),))
        moved = replace(found, aliases={"latest": alias})
        await self.publish(replace_adapter(self.current, moved))
        self.flips["moved"] += 1

    async def reshape(self) -> None:
        """A replica is cordoned, freed again, replaced by another or removed and added."""
        seen = self.current
        replicas = dict(seen.replicas)
        one = self.rng.choice(sorted(replicas))
        row = replicas[one]
        match self.rng.choice(["cordon", "move"]):
            case "cordon":
                replicas[one] = replace(row, cordoned=not row.cordoned)
            case "move":
                replicas[one] = Replica(one, "pool", f"{row.url}x")
        if sum(not r.cordoned for r in replicas.values()) >= 2:
            await self.publish(_with(self.current, replicas=replicas))

    # faults

    async def fault(self) -> None:
        """Something happens to one replica, and ends after a while."""
        one = self.rng.choice(sorted(self.current.replicas))
        engine = self.engine(one)
        what = self.rng.choice(_FAULTS)
        pause_s = self.rng.uniform(1, 12)
        match what:
            case "kill":
                engine.kill()
                await asyncio.sleep(pause_s)
                self.restart(engine)
            case "restart":
                self.restart(engine)
            case "dead engine":
                engine.dead = True
                await asyncio.sleep(pause_s)
                self.restart(engine)
            case "hang":
                engine.hang()
                await asyncio.sleep(2 * pause_s)
                engine.heal()
            case "slow":
                engine.factor = self.rng.uniform(3, 20)
                await asyncio.sleep(pause_s)
                engine.heal()
            case "lies":
                self.restart(engine)
                engine.lies = True
                engine.lied.append((self.now, float("inf")))
                await asyncio.sleep(2 * pause_s)
                self.restart(engine)
            case _:
                setattr(engine, what, self.rng.randint(1, 8))

    def restart(self, engine: ChaosEngine) -> None:
        engine.restart()
        engine.lied = [(start, min(end, self.now)) for start, end in engine.lied]

    def calm(self) -> None:
        """Nothing goes wrong any more, and what did is mended."""
        for engine in self.engines:
            engine.unavailable = engine.resets_before = engine.resets_after = 0
            engine.load_errors = engine.load_refusals = 0
            if engine.lies or engine.dead or not engine.alive:
                self.restart(engine)
            engine.heal()


def replace_adapter(seen: Snapshot, adapter: Any) -> Snapshot:
    return _with(seen, adapters={**seen.adapters, adapter.name: adapter})


def _with(seen: Snapshot, **fields: Any) -> Snapshot:
    return replace(seen, **fields, routes={})


_FAULTS = (
    *("kill", "kill", "restart", "dead engine", "hang", "slow", "lies", "lies"),
    *("unavailable", "resets_before", "resets_after", "load_errors", "load_refusals"),
)


def _model(world: World) -> str:
    """Few are asked for much, many now and then; the base too."""
    if world.rng.random() < 0.1:
        return BASE
    number = min(int(world.rng.paretovariate(0.8)) - 1, ADAPTERS - 1)
    return f"a{number}"


def _words(world: World, count: int) -> str:
    return " ".join(f"w{world.rng.randrange(50)}" for _ in range(count))


def _single(world: World) -> dict[str, Any]:
    return {"model": _model(world), "prompt": _words(world, 5), "max_tokens": 8}


def _stream(world: World) -> dict[str, Any]:
    return _single(world) | {"stream": True, "stream_options": {"include_usage": True}}


def _scoring(world: World) -> dict[str, Any]:
    ids = [world.rng.randrange(3, 200) for _ in range(6)]
    fields = {"max_tokens": 1, "prompt_logprobs": 0, "temperature": 0}
    return {"model": _model(world), "prompt": ids, **fields}


def _batch(world: World) -> dict[str, Any]:
    shared = _words(world, 3)
    prompts = [f"{shared} {n} {_words(world, 3)}" for n in range(world.rng.randint(2, 40))]
    return _single(world) | {"prompt": prompts, "n": world.rng.choice([1, 1, 2])}


def _batch_stream(world: World) -> dict[str, Any]:
    return _batch(world) | {"stream": True, "max_tokens": 3, "n": 1}


_ASKS: dict[str, Callable[[World], dict[str, Any]]] = {
    "single": _single,
    "stream": _stream,
    "scoring": _scoring,
    "batch": _batch,
    "batch stream": _batch_stream,
}


def _judged(payload: dict[str, Any], speaker: str, data: bytes) -> tuple[str, bool]:
    """How an answer ended, and whether it is the right one."""
    wanted = json.loads(dialect.completion_body(speaker, payload | {"weights": speaker}, "r"))
    if not payload.get("stream"):
        found = json.loads(data)
        return "ok", _same(found, wanted)
    events = [line[6:] for line in data.split(b"\n\n") if line]
    if not events or events[-1] != b"[DONE]":
        return "cut", False
    parsed = [json.loads(event) for event in events[:-1]]
    if any("error" in event for event in parsed):
        return "in-band error", False
    texts: Counter[int] = Counter()
    said: dict[int, str] = {}
    for event in parsed:
        for choice in event["choices"]:
            said[choice["index"]] = said.get(choice["index"], "") + choice["text"]
            texts[choice["index"]] += choice["finish_reason"] is not None
    expected = {choice["index"]: choice["text"] for choice in wanted["choices"]}
    usages = [event["usage"] for event in parsed if event.get("usage")]
    asked = payload.get("stream_options") is not None
    once = all(count == 1 for count in texts.values())
    return "ok", said == expected and once and usages == ([wanted["usage"]] if asked else [])


def _same(found: Any, wanted: Any) -> bool:
    return bool(found["choices"] == wanted["choices"] and found["usage"] == wanted["usage"])


def _probed(name: str) -> bool:
    return int(name[1:]) % 2 == 0


@asynccontextmanager
async def opened(seed: int) -> AsyncIterator[World]:
    """A world in which everything is well."""
    clock = VirtualClock()
    engines: list[ChaosEngine] = []

    def connect(replica: Replica) -> ChaosEngine:
        engines.append(ChaosEngine(replica, POOL))
        return engines[-1]

    async def find_probe(version: AdapterVersion) -> Probe | None:
        await asyncio.sleep(0.005)
        rows = scored(version.digest, PROBE_IDS)
        return Probe(PROBE_IDS, tuple(map(tuple, rows)))

    fleet = Fleet(
        connect,
        clock=clock,
        store_root=STORE,
        store_path=lambda digest: STORE / digest[:2] / digest,
        find_probe=find_probe,
    )
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(fleet)
        meter, forwarder, snapshots = Meter(), Forwarder(fleet, clock), Snapshots()
        batches = Batches(forwarder, fleet, meter)
        coalescer = await stack.enter_async_context(Coalescer(forwarder, batches, meter))
        path = RequestPath(forwarder, batches, coalescer, meter)
        rng = random.Random(seed)
        rooms = Rooms(fleet, snapshots)
        world = World(seed, rng, clock, fleet, path, meter, rooms, engines)
        driver = Driver(clock)
        fleet.on_change = driver.add("probe", fleet.probe, HEALTH_S).wake
        placing = Place(fleet, snapshots, clock, grace_s=5)
        driver.add("place", placing.activate, PERIOD_S)
        adapters = [_first(f"a{number}") for number in range(ADAPTERS)]
        await world.publish(snapshot(*adapters, replicas=REPLICAS, pools={"pool": POOL}))
        await fleet.probe()
        running = asyncio.get_running_loop().create_task(driver.run())
        try:
            yield world
        finally:
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running
            assert [s.name for s in driver.statuses() if s.failures] == []


def _first(name: str) -> Any:
    made = adapter(name)
    return replace(made, versions={1: replace(made.versions[1], probed=_probed(name))})


async def every(
    mean_s: float, rng: random.Random, until: float, act: Callable[[], Awaitable[None]]
) -> None:
    """Begin `act` at random moments, and see each of them end."""
    loop = asyncio.get_running_loop()
    async with asyncio.TaskGroup() as group:
        while loop.time() < until:
            await asyncio.sleep(rng.expovariate(1 / mean_s))
            group.create_task(_ran(act))


async def _ran(act: Callable[[], Awaitable[None]]) -> None:
    await act()
