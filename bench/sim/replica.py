"""One simulated vLLM server: its port, its engine, what it knows, and its faults.

What comes in: connections, and faults. What goes out: whatever `server` answers. A replica that
restarts is a new one behind the old port.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import asdict
from typing import Any

from bench.sim.adapters import Adapters
from bench.sim.engine import Engine
from bench.sim.exchange import Exchange
from bench.sim.faults import Fault, Kind
from bench.sim.figures import Figures
from bench.sim.http1 import Connection, Request
from bench.sim.requests import Refusal
from bench.sim.server import ROUTES


class Replica:
    """vLLM behind its HTTP server.

    Args:
        served: what it calls its base.
        speed: how much faster than the figures it runs.
        resolver: load an unknown model on first use, as vLLM's resolver plugins do.
        files: read an adapter's configuration when it is loaded.
        port: where to listen; 0 lets the system choose, once.
    """

    def __init__(
        self,
        number: int,
        figures: Figures,
        *,
        served: str,
        speed: float,
        resolver: bool = False,
        files: bool = False,
        max_lora_rank: int = 64,
        port: int = 0,
    ) -> None:
        self.number = number
        self.figures = figures
        self.served = served
        self.speed = speed
        self.resolver = resolver
        self.files = files
        self.max_lora_rank = max_lora_rank
        self.port = port
        self.incarnations = 0
        self._connections: dict[Connection, Exchange | None] = {}
        self._server: asyncio.Server | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def listening(self) -> bool:
        return self._server is not None

    # Its life

    async def start(self) -> None:
        """Listen, remembering nothing; after `kill`, on the same port."""
        loop = asyncio.get_running_loop()
        self.engine = Engine(self.figures, self.speed, loop)
        self.adapters = Adapters(
            self.engine, self.served, files=self.files, max_lora_rank=self.max_lora_rank
        )
        self.engine.readable = self.adapters.readable
        self.incarnations += 1
        # Seconds with a fraction, as Linux tells them: two starts within a tick must differ.
        self.started_at_s = time.time() + self.incarnations / 1000
        self.lying = False
        self.requests: dict[str, int] = {}
        self.probes = 0
        self.faults: deque[Fault] = deque()
        self._server = await loop.create_server(
            lambda: Connection(self), "127.0.0.1", self.port, backlog=1024, reuse_address=True
        )
        self.port = self._server.sockets[0].getsockname()[1]

    def kill(self) -> None:
        """As SIGKILL does: nobody listens and every connection is reset."""
        if self._server is None:
            return
        self._server.close()
        self._server = None
        self.engine.stop()
        self.adapters.close()
        for connection in list(self._connections):
            connection.reset()

    async def restart(self) -> None:
        self.kill()
        await self.start()

    async def play(self, fault: Fault) -> None:
        """Let one fault happen."""
        match fault.kind:
            case Kind.KILL:
                self.kill()
            case Kind.RESTART:
                await self.restart()
            case Kind.DEAD_ENGINE:
                self.engine.die()
            case Kind.HANG:
                self.engine.hung = True
            case Kind.SLOW:
                self.engine.slow = fault.factor
            case Kind.LYING:
                self.lying = True
            case Kind.HEAL:
                self.lying, self.engine.slow = False, 1.0
                self.engine.resume()
            case _:
                self.faults.extend([fault] * fault.times)

    def stats(self) -> dict[str, Any]:
        """What it did since it started: the figures of a benchmark."""
        counts, cache = self.engine.counts, self.engine.cache
        return {
            **asdict(counts),
            "adapter_loads": counts.loads_asked + counts.reads_again,
            "prefix_queried_tokens": cache.queried_tokens,
            "prefix_hit_tokens": cache.hit_tokens,
            "running": len(self.engine.running),
            "waiting": len(self.engine.waiting),
            "requests": sum(self.requests.values()),
            "probes": self.probes,
            "incarnations": self.incarnations,
            "gpu_adapters": list(self.engine.slots.gpu),
            "cpu_adapters": list(self.engine.slots.cpu),
        }

    # Its connections

    def opened(self, connection: Connection) -> None:
        self._connections[connection] = None
        if self._server is None:
            connection.reset()

    def closed(self, connection: Connection) -> None:
        exchange = self._connections.pop(connection)
        if exchange is not None:
            self.engine.abort(exchange)

    def began(self, exchange: Exchange) -> None:
        """From here on the engine works for a connection; should it close, it stops."""
        self._connections[exchange.connection] = exchange

    def ended(self, exchange: Exchange) -> None:
        if exchange.connection in self._connections:
            self._connections[exchange.connection] = None

    def handle(self, request: Request, connection: Connection) -> None:
        method, handler = ROUTES.get(request.path, ("", None))
        try:
            if handler is None:
                connection.answer(404, b'{"detail":"Not Found"}')
            elif method != request.method:
                connection.answer(405, b'{"detail":"Method Not Allowed"}')
            else:
                handler(self, request, connection)
        except Refusal as refusal:
            connection.answer(refusal.status, refusal.body)
