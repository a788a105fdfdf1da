"""A gateway in front of simulated replicas: both started, both ready, both stopped at the end.

What comes in: a contender and what to simulate. What goes out: a `Ground` to fire at, which tells
what the replicas have done so far. The gateway has a core to itself; the simulator shares the
other with whoever sends.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.client import Unready, alive_before, chat_body, get, until_answering, until_listening
from bench.null_upstream import BASE_MODEL
from bench.peers import ROOT, Contender, Stand
from bench.processes import Cores, free_port, running, weigh

#: What of the simulator's figures is counted, by the names of a report.
COUNTED = (
    "adapter_loads",
    "loads_asked",
    "reads_again",
    "slot_swaps",
    "prefix_hit_tokens",
    "prefix_queried_tokens",
    "requests",
    "stalled_ms",
)


@dataclass(frozen=True, slots=True)
class Ground:
    """A contender that stands before its replicas. Speed is theirs: simulated per real second."""

    contender: Contender
    port: int
    pid: int
    simulator_pid: int
    control_port: int
    speed: float

    def stats(self) -> dict[str, Any]:
        return dict(json.loads(get(self.control_port, "/sim/stats")))

    def counts(self) -> dict[str, float]:
        total = self.stats()["total"]
        return {name: total[name] for name in COUNTED}

    def cpu_s(self) -> tuple[float, float]:
        """What the gateway and the simulator have used so far."""
        return weigh(self.pid).cpu_s, weigh(self.simulator_pid).cpu_s

    def quiet(self, within_s: float = 20.0) -> None:
        """Wait until no replica has anything left to do."""
        deadline = time.monotonic() + within_s
        while True:
            total = self.stats()["total"]
            if not total["running"] and not total["waiting"]:
                return
            if time.monotonic() > deadline:
                raise Unready("the replicas did not come to rest")
            time.sleep(0.05)


@contextlib.contextmanager
def standing(
    contender: Contender, *, replicas: int, speed: float, cores: Cores, scratch: Path
) -> Iterator[Ground]:
    """Start the replicas and the contender; it has seen every replica when the block begins."""
    ports = [free_port() for _ in range(replicas)]
    control = free_port()
    argv = [
        *(sys.executable, "-m", "bench.sim", "--served", BASE_MODEL, "--speed", str(speed)),
        *("--ports", ",".join(map(str, ports)), "--control-port", str(control)),
        # Peers load no adapters: their replicas have vLLM's resolver plugin. We load our own.
        *([] if contender.name.startswith("loragate") else ["--resolver"]),
    ]
    with contextlib.ExitStack() as stack:
        log = scratch / "simulator.log"
        simulator = stack.enter_context(running(argv, core=cores.load, log=log, cwd=ROOT))
        until_listening(simulator, [*ports, control], what="the simulator")
        port = free_port()
        urls = tuple(f"http://127.0.0.1:{each}" for each in ports)
        assert contender.launch is not None
        launch = contender.launch(Stand(port, urls, contender.key, scratch))
        log = scratch / f"{contender.name}.log"
        process = stack.enter_context(
            running(launch.argv, core=cores.gateway, log=log, env=launch.env)
        )
        body = chat_body(BASE_MODEL, stream=False)
        until_answering(process, port, body, contender.key, within_s=contender.ready_within_s)
        ground = Ground(contender, port, process.pid, simulator.pid, control, speed)
        deadline = time.monotonic() + 20
        while any(replica["probes"] == 0 for replica in ground.stats()["replicas"]):
            alive_before(process, deadline, "a gateway that looks at all its replicas")
        ground.quiet()
        yield ground
