"""Many simulated replicas in one process, a script of faults, and a port to look at them from.

What comes in: a `Config`. What goes out: replicas on real sockets. A test enters it as a context
manager; a benchmark runs it as a program and reads `GET /sim/stats` on the control port.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import msgspec

from bench.sim import figures
from bench.sim.answers import dumps
from bench.sim.faults import Fault, Scripted
from bench.sim.figures import Figures
from bench.sim.http1 import Connection, Request
from bench.sim.replica import Replica


@dataclass(frozen=True, slots=True)
class Config:
    """What to simulate. Without `ports` the system chooses them."""

    replicas: int = 4
    figures: Figures = field(default_factory=figures.read)
    served: str = "sim-base"
    speed: float = 1.0
    resolver: bool = False
    files: bool = False
    max_lora_rank: int = 64
    ports: tuple[int, ...] = ()
    control_port: int = 0
    script: tuple[Scripted, ...] = ()


class Simulation:
    """`async with Simulation(Config(replicas=2)) as sim: sim.replicas[0].url`."""

    def __init__(self, config: Config | None = None) -> None:
        self.config = config = config or Config()
        ports = config.ports or (0,) * config.replicas
        self.replicas = [
            Replica(
                number,
                config.figures,
                served=config.served,
                speed=config.speed,
                resolver=config.resolver,
                files=config.files,
                max_lora_rank=config.max_lora_rank,
                port=port,
            )
            for number, port in enumerate(ports)
        ]
        self.control_port = config.control_port
        self._acts: set[asyncio.Task[None]] = set()
        self._timers: list[asyncio.TimerHandle] = []

    @property
    def urls(self) -> tuple[str, ...]:
        return tuple(replica.url for replica in self.replicas)

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        for replica in self.replicas:
            await replica.start()
        self._control = await loop.create_server(
            lambda: Connection(_Control(self)), "127.0.0.1", self.control_port
        )
        self.control_port = self._control.sockets[0].getsockname()[1]
        for entry in self.config.script:
            delay_s = entry.at_s / self.config.speed
            self._timers.append(loop.call_later(delay_s, self._act, entry.replica, entry.fault))
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for timer in self._timers:
            timer.cancel()
        await asyncio.gather(*self._acts)
        self._control.close()
        for replica in self.replicas:
            replica.kill()
        await asyncio.sleep(0)  # let the reset connections be told

    async def play(self, number: int, fault: Fault) -> None:
        await self.replicas[number].play(fault)

    def stats(self) -> dict[str, Any]:
        """Each replica's figures, and their sum."""
        each = [replica.stats() for replica in self.replicas]
        total: dict[str, float] = {}
        for one in each:
            for name, value in one.items():
                if not isinstance(value, list):
                    total[name] = total.get(name, 0) + value
        total["lag_s"] = max(one["lag_s"] for one in each)
        return {"total": total, "replicas": each}

    def forget_lag(self) -> None:
        """Begin a new measurement of how late steps are."""
        for replica in self.replicas:
            replica.engine.counts.lag_s = 0.0

    def _act(self, number: int, fault: Fault) -> None:
        task = asyncio.get_running_loop().create_task(self.play(number, fault))
        self._acts.add(task)
        task.add_done_callback(self._acts.discard)


class _Order(msgspec.Struct):
    replica: int
    fault: Fault


class _Control:
    """The control port: figures, and faults on demand."""

    def __init__(self, simulation: Simulation) -> None:
        self.simulation = simulation

    def opened(self, connection: Connection) -> None:
        """Nothing to remember."""

    def closed(self, connection: Connection) -> None:
        """Nothing to forget."""

    def handle(self, request: Request, connection: Connection) -> None:
        match request.method, request.path:
            case "GET", "/sim/stats":
                connection.answer(200, dumps(self.simulation.stats()))
                self.simulation.forget_lag()
            case "GET", "/sim/urls":
                connection.answer(200, dumps(self.simulation.urls))
            case "POST", "/sim/fault":
                try:
                    order = msgspec.json.decode(request.body, type=_Order)
                    replica = self.simulation.replicas[order.replica]
                except (msgspec.DecodeError, IndexError) as exc:
                    connection.answer(400, dumps({"detail": str(exc)}))
                    return
                self.simulation._act(replica.number, order.fault)
                connection.answer(200, b"{}")
            case _:
                connection.answer(404, b'{"detail":"Not Found"}')
