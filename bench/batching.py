"""What prompt batches cost through the gateway, and what coalescing makes of single prompts.

    python -m bench.batching [--quick]

What goes out: bench/results/batching.json and batching.md. A real vLLM on this machine's CPU (see
the Makefile's `vllm`) with the demo model and an adapter is asked for the next token's logprobs
after 256 prompts: in one call, in 256 at once, one after another; straight and through a gateway.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import itertools
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import httpx

from app import demo
from bench import batching_report, machine
from bench.batching_report import Conditions, Low, Round
from bench.client import Unready, alive_before
from bench.keepalive import connections
from bench.null_upstream import replying
from bench.peers import ROOT
from bench.processes import Unusable, exit_on_signals, free_port, running, weigh

RESULTS = Path(__file__).parent / "results"
PROMPTS = 256
#: The prefix is whole blocks of vLLM's cache, which are of 128 tokens on a CPU.
SHARED_TOKENS, OWN_TOKENS = 640, 8
VOCABULARY = 2048
ADAPTER = "pirate"
#: These take turns in every order, as each may leave something to the next; then the slow ones.
COMPARED = ("batch", "batch_gateway", "singles_gateway")
SLOW = ("singles", "in_turn")
#: Logprobs of a sampled token do not depend on who else is in the step, but for rounding.
TOLERANCE = 1e-3
STARTS_VLLM_S = 300.0
#: Above this load average somebody else is using the machine.
QUIET = 0.5
COALESCING_OFF = {"LORAGATE_COALESCE": "false"}


@dataclass(frozen=True, slots=True)
class Plan:
    """Rounds of the three ways that are compared closely; of the slow ones; pairs at low load."""

    rounds: int
    slow_rounds: int
    pairs: int


THOROUGH = Plan(rounds=24, slow_rounds=3, pairs=500)
QUICK = Plan(rounds=2, slow_rounds=1, pairs=20)


@dataclass(frozen=True, slots=True)
class Place:
    """Where to ask, and the model's name there; `pid` is the process to weigh."""

    port: int
    model: str
    pid: int

    def request(self, prompt: Sequence[int] | Sequence[Sequence[int]]) -> bytes:
        """A whole HTTP request for the next token's logprobs."""
        asked = {"model": self.model, "prompt": prompt, "max_tokens": 1, "temperature": 0}
        body = json.dumps(asked | {"logprobs": 5}, separators=(",", ":")).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body


class Vllm:
    """The replica, with what its own metrics say; makes up prompts that it has never seen."""

    def __init__(self, port: int, pid: int) -> None:
        self.port = port
        self.pid = pid
        self._rng = Random(0)

    def fresh(self, prefix: Sequence[int] = (), count: int = PROMPTS) -> list[list[int]]:
        """Prompts that share a prefix, a new one unless it is given."""
        shared = list(prefix) or self.tokens(SHARED_TOKENS)
        return [shared + self.tokens(OWN_TOKENS) for _ in range(count)]

    def tokens(self, count: int) -> list[int]:
        return [self._rng.randrange(3, VOCABULARY) for _ in range(count)]

    def counters(self) -> tuple[float, float, float]:
        """Tokens looked up in the prefix cache and found there; calls of /v1/completions."""
        page = httpx.get(f"http://127.0.0.1:{self.port}/metrics", timeout=30).text
        names = (
            "vllm:prefix_cache_queries_total{",
            "vllm:prefix_cache_hits_total{",
            'http_requests_total{handler="/v1/completions"',
        )
        found = [
            sum(
                float(line.rsplit(" ", 1)[1]) for line in page.splitlines() if line.startswith(name)
            )
            for name in names
        ]
        return found[0], found[1], found[2]


class Ways:
    """The five ways to ask for the same: each returns its logprobs and what it took."""

    def __init__(self, vllm: Vllm, straight: Place, through: Place) -> None:
        self._vllm = vllm
        self._gateway = through.pid
        self.all = {
            "batch": lambda prompts: self._batch(straight, prompts),
            "batch_gateway": lambda prompts: self._batch(through, prompts),
            "singles_gateway": lambda prompts: self._singles(through, prompts, len(prompts)),
            "singles": lambda prompts: self._singles(straight, prompts, len(prompts)),
            "in_turn": lambda prompts: self._singles(straight, prompts, 1),
        }

    async def measure(
        self, way: str, prompts: list[list[int]] | None = None
    ) -> tuple[Round, list[float]]:
        """One round of a way, on prompts of its own unless some are given."""
        asked = prompts or self._vllm.fresh()
        before, weight = self._vllm.counters(), weigh(self._gateway)
        seconds, bodies = await self.all[way](asked)
        cpu_s = weigh(self._gateway).cpu_s - weight.cpu_s
        queries, hits, calls = (
            now - then for now, then in zip(self._vllm.counters(), before, strict=True)
        )
        choices = [choice for body in bodies for choice in _choices(body)]
        if len(choices) != len(asked):
            raise Unready(f"{way}: {len(choices)} answers to {len(asked)} prompts")
        return Round(seconds, int(calls), hits / queries, cpu_s), choices

    async def _batch(
        self, place: Place, prompts: Sequence[Sequence[int]]
    ) -> tuple[float, list[bytes]]:
        return await self._timed(place, [place.request(prompts)], 1)

    async def _singles(
        self, place: Place, prompts: Sequence[Sequence[int]], at_once: int
    ) -> tuple[float, list[bytes]]:
        return await self._timed(place, [place.request(prompt) for prompt in prompts], at_once)

    async def _timed(
        self, place: Place, requests: Sequence[bytes], at_once: int
    ) -> tuple[float, list[bytes]]:
        async with connections(place.port, at_once) as opened:
            started = time.perf_counter()
            if at_once == 1:
                bodies = [await opened[0].ask(each) for each in requests]
            else:
                asking = [one.ask(each) for one, each in zip(opened, requests, strict=True)]
                bodies = await asyncio.gather(*asking)
            return time.perf_counter() - started, bodies


def _choices(body: bytes) -> Iterator[float]:
    """The logprob of each choice's token, in the order of the prompts."""
    choices = json.loads(body)["choices"]
    if [choice["index"] for choice in choices] != list(range(len(choices))):
        raise Unready("the choices of an answer are out of order")
    for choice in choices:
        yield choice["logprobs"]["token_logprobs"][0]


async def low_load(vllm: Vllm, on: Place, off: Place, pairs: int) -> Low:
    """One connection, one request after another: coalescing on and off by turns."""
    prefix = vllm.tokens(SHARED_TOKENS)
    seconds: dict[Place, list[float]] = {on: [], off: []}
    async with connections(on.port, 1) as mine, connections(off.port, 1) as other:
        doors = {on: mine[0], off: other[0]}
        for number in range(pairs + 1):
            for place in (on, off) if number % 2 else (off, on):
                request = place.request(vllm.fresh(prefix, 1)[0])
                started = time.perf_counter()
                await doors[place].ask(request)
                if number:  # the first of each fills the cache
                    seconds[place].append(time.perf_counter() - started)
    added = median(a - b for a, b in zip(seconds[on], seconds[off], strict=True))
    return Low(median(seconds[on]) * 1000, median(seconds[off]) * 1000, added * 1000, pairs)


async def measure(
    vllm: Vllm, straight: Place, through: Place, plan: Plan
) -> dict[str, list[Round]]:
    ways = Ways(vllm, straight, through)
    await _agree(ways, vllm)
    rounds: dict[str, list[Round]] = {way: [] for way in ways.all}
    orders = itertools.cycle(itertools.permutations(COMPARED))
    for number, order in zip(range(plan.rounds), orders, strict=False):
        names = [*order, *(SLOW if number < plan.slow_rounds else ())]
        for way in names:
            found, _ = await ways.measure(way)
            rounds[way].append(found)
        told = ", ".join(f"{way} {rounds[way][-1].seconds:.2f} s" for way in sorted(names))
        print(f"[{number + 1:>2}/{plan.rounds}] {told}", flush=True)
    return rounds


async def _agree(ways: Ways, vllm: Vllm) -> None:
    """Warm everything up, and see that all ways give the same logprobs for the same prompts."""
    prompts = vllm.fresh()
    found = {way: (await ways.measure(way, prompts))[1] for way in ways.all}
    for way, values in found.items():
        if not all(
            math.isclose(a, b, rel_tol=0, abs_tol=TOLERANCE)
            for a, b in zip(values, found["batch"], strict=True)
        ):
            raise Unready(f"{way} does not give the logprobs of the batch sent straight")


@contextlib.contextmanager
def vllm_running(scratch: Path) -> Iterator[Vllm]:
    """A real vLLM as it comes, but for what a CPU needs."""
    python = ROOT / ".venv-vllm" / "bin" / "python"
    if not python.exists():
        raise Unusable("a real vLLM is needed: make vllm")
    port = free_port()
    options = {
        "model": str(demo.MODEL_DIR),
        "served-model-name": demo.BASE_NAME,
        "host": "127.0.0.1",
        "port": str(port),
        "dtype": "float32",
        "max-model-len": "1024",
        "max-loras": "4",
        "max-lora-rank": "16",
    }
    argv = [str(python), "-m", "vllm.entrypoints.openai.api_server"]
    argv += [part for name, value in options.items() for part in (f"--{name}", value)]
    argv += ["--enable-lora", "--enforce-eager"]
    env = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
    }
    log = scratch / "vllm.log"
    with running(argv, core=None, log=log, env=env) as process:
        until_200(port, "/health", process, log, STARTS_VLLM_S)
        yield Vllm(port, process.pid)


@contextlib.contextmanager
def gateway_running(
    scratch: Path, name: str, replica: str, more: Mapping[str, str] | None = None
) -> Iterator[Place]:
    """A whole gateway in front of a replica, with the adapter registered and loaded."""
    port = free_port()
    pool = {
        "name": "bench",
        "base_model": demo.BASE_NAME,
        "base_model_path": str(demo.MODEL_DIR),
        "max_lora_rank": 16,
        "replicas": [replica],
    }
    env = {
        "LORAGATE_HOST": "127.0.0.1",
        "LORAGATE_PORT": str(port),
        "LORAGATE_DATA_DIR": str(scratch / name),
        "LORAGATE_IMPORT_DIRS": str(demo.MODEL_DIR.parent),
        "LORAGATE_POOLS": json.dumps([pool]),
        "LORAGATE_EMBEDDED": "off",
    }
    argv = [str(Path(sys.executable).with_name("loragate")), "serve"]
    log = scratch / f"{name}.log"
    with running(argv, core=None, log=log, env={**env, **(more or {})}) as process:
        until_200(port, "/readyz", process, log, 30.0)
        url = f"http://127.0.0.1:{port}"
        body = {"name": name, "source": {"path": str(demo.ADAPTERS[ADAPTER])}}
        httpx.post(f"{url}/admin/adapters", json=body, timeout=30).raise_for_status()
        model = f"{name}@1"
        until_200(port, f"/v1/models/{model}", process, log, 10.0)
        ask = {"model": model, "prompt": "x", "max_tokens": 1}
        httpx.post(f"{url}/v1/completions", json=ask, timeout=60).raise_for_status()
        yield Place(port, model, process.pid)


def until_200(port: int, path: str, process: Any, log: Path, within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while True:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"http://127.0.0.1:{port}{path}", timeout=5).status_code == 200:
                return
        try:
            alive_before(process, deadline, path)
        except Unready as exc:
            raise Unready(f"{exc}\n{log.read_text(errors='replace')[-2000:]}") from None


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bench.batching", description="Measure prompt batches and coalesced single prompts."
    )
    parser.add_argument("--quick", action="store_true", help="few rounds; writes nothing")
    quick = parser.parse_args(argv).quick
    plan = QUICK if quick else THOROUGH
    exit_on_signals()
    load_average = machine.load_average()
    if load_average > QUIET:
        print(f"load average {load_average:.1f}: somebody else is using this machine", flush=True)
    try:
        with tempfile.TemporaryDirectory(prefix="loragate-bench-") as folder:
            scratch = Path(folder)
            with contextlib.ExitStack() as stack:
                print("starting vLLM", flush=True)
                vllm = stack.enter_context(vllm_running(scratch))
                url = f"http://127.0.0.1:{vllm.port}"
                on = stack.enter_context(gateway_running(scratch, "on", url))
                off = stack.enter_context(gateway_running(scratch, "off", url, COALESCING_OFF))
                straight = Place(vllm.port, on.model, vllm.pid)
                rounds = asyncio.run(measure(vllm, straight, on, plan))
                print(f"low load: {plan.pairs} pairs", flush=True)
                low = asyncio.run(low_load(vllm, on, off, plan.pairs))
            # vLLM's own spread hides tenths of a millisecond; a replica that answers at once shows
            # them. vLLM has stopped by then.
            with contextlib.ExitStack() as stack:
                null = stack.enter_context(replying(None, scratch, demo.BASE_NAME)).urls[0]
                on = stack.enter_context(gateway_running(scratch, "null-on", null))
                off = stack.enter_context(
                    gateway_running(scratch, "null-off", null, COALESCING_OFF)
                )
                bare = asyncio.run(low_load(vllm, on, off, 4 * plan.pairs))
    except (Unusable, Unready) as exc:
        print(f"bench: {exc}", file=sys.stderr)
        return 2
    conditions = Conditions(
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        machine=machine.in_words(),
        commit=machine.commit(),
        load_average=load_average,
        load_average_after=machine.load_average(),
        prompts=PROMPTS,
        shared_tokens=SHARED_TOKENS,
        own_tokens=OWN_TOKENS,
    )
    text = batching_report.page(rounds, low, bare, conditions)
    print(f"\n{text}")
    if not quick:
        batching_report.write(rounds, low, bare, conditions, RESULTS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
