"""Drives runs on our worker by its op protocol, as `bench.skyrl_client` drives SkyRL's server.

What comes in: batches of token ids. What goes out: seconds, losses and adapters. The worker is a
real process; the client is the gateway's own.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from random import Random

import numpy as np
from safetensors.numpy import load_file

from app import demo
from app.domain import LoraSpec, Trainer, TrainerKind
from app.ops import Datum, ForwardBackward, OptimStep, SaveForSampling, Tensor
from app.training.trainers import RunClient, TrainerClient
from bench.batching import until_200
from bench.processes import free_port, running

RUNS = 8
RANK, ALPHA = 16, 32
#: Every linear but the output layer, which shares its weights with the embedding.
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LEARNING_RATE = 1e-3
VOCABULARY = 2048
#: Steps handed over before the outcome of the first is awaited; jobs have as many.
AHEAD = 2
STARTS_WORKER_S = 60.0

Batch = list[list[int]]


@dataclass(frozen=True, slots=True)
class Shape:
    """What one step of one run is: sequences and tokens of each."""

    sequences: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.sequences} x {self.tokens}"

    def batches(self, seed: int = 0) -> list[Batch]:
        """A batch for each run: ids drawn at random, one more than tokens as targets are next."""
        rng = Random(seed)
        return [
            [
                [rng.randrange(3, VOCABULARY) for _ in range(self.tokens + 1)]
                for _ in range(self.sequences)
            ]
            for _ in range(RUNS)
        ]


@dataclass(slots=True)
class Driven:
    """A run and the number of its next op."""

    run: RunClient
    next_seq: int


@contextlib.contextmanager
def worker_running(scratch: Path, threads: int | None = None) -> Iterator[Trainer]:
    """`loragate worker` on the demo model, with as many torch threads or its own choice."""
    port = free_port()
    env = {
        "LORAGATE_WORKER_PORT": str(port),
        "LORAGATE_WORKER_DEVICE": "cpu",
        "LORAGATE_WORKER_STATE_DIR": str(scratch / f"runs-{port}"),
        **({"LORAGATE_WORKER_THREADS": str(threads)} if threads else {}),
    }
    argv = [str(Path(sys.executable).with_name("loragate")), "worker"]
    log = scratch / f"worker-{port}.log"
    with running(argv, core=None, log=log, env=env) as process:
        until_200(port, "/health", process, log, STARTS_WORKER_S)
        url = f"http://127.0.0.1:{port}"
        yield Trainer("bench", TrainerKind.HF, demo.BASE_NAME, url, max_jobs=RUNS)


@contextlib.asynccontextmanager
async def runs_open(client: TrainerClient, name: str) -> AsyncIterator[list[Driven]]:
    """Eight new runs, gone afterwards; their first weights depend on their place alone."""
    opened = []
    try:
        for place in range(RUNS):
            run = client.run(f"{name}-{place}")
            status = await run.open(
                demo.BASE_NAME, LoraSpec(RANK, ALPHA, MODULES, seed=place), fence=1
            )
            opened.append(Driven(run, status.next_seq))
        yield opened
    finally:
        for each in opened:
            await each.run.delete()


async def drive(driven: Driven, batch: Batch, steps: int, *, outputs: bool = False) -> list[float]:
    """Steps on one batch; the mean loss over all tokens of each.

    `outputs` asks for every token's logprob, as the Tinker API always answers them.
    """
    tokens = sum(len(ids) - 1 for ids in batch)
    passing = ForwardBackward([_datum(ids, 1 / tokens) for ids in batch], outputs=outputs)
    stepping = OptimStep(LEARNING_RATE)
    losses: list[float] = []
    waiting: deque[int] = deque()
    for _ in range(steps):
        seq = driven.next_seq
        await driven.run.submit(seq, passing, seq - 1 - 2 * len(waiting))
        await driven.run.submit(seq + 1, stepping)
        driven.next_seq += 2
        waiting.append(seq)
        if len(waiting) == AHEAD:
            losses.append(await _finish(driven.run, waiting.popleft()))
    for seq in waiting:
        losses.append(await _finish(driven.run, seq))
    return losses


async def together(
    driven: Sequence[Driven], batches: Sequence[Batch], steps: int, *, outputs: bool = False
) -> tuple[float, list[list[float]]]:
    """All runs at once: seconds until the last is done, and the losses of each."""
    began = time.perf_counter()
    losses = await asyncio.gather(
        *(
            drive(each, batch, steps, outputs=outputs)
            for each, batch in zip(driven, batches, strict=True)
        )
    )
    return time.perf_counter() - began, list(losses)


async def in_turn(
    driven: Sequence[Driven], batches: Sequence[Batch], steps: int
) -> tuple[float, list[list[float]]]:
    """The same, one run after another."""
    began = time.perf_counter()
    losses = [await drive(each, batch, steps) for each, batch in zip(driven, batches, strict=True)]
    return time.perf_counter() - began, losses


async def adapters(driven: Sequence[Driven]) -> list[dict[str, np.ndarray]]:
    """The tensors of every run's adapter, as the worker writes them for sampling."""
    found = []
    for each in driven:
        seq = each.next_seq
        each.next_seq += 1
        await each.run.submit(seq, SaveForSampling("bench"))
        files = (await each.run.outcome(seq)).files
        with tempfile.TemporaryDirectory() as folder:
            await each.run.download("bench", files, Path(folder))
            found.append(load_file(Path(folder) / "adapter_model.safetensors"))
    return found


def distance(one: Sequence[dict[str, np.ndarray]], other: Sequence[dict[str, np.ndarray]]) -> float:
    """The largest difference between two numbers at one place of the same adapter."""
    return max(
        float(np.abs(mine[name] - theirs[name]).max())
        for mine, theirs in zip(one, other, strict=True)
        for name in mine.keys() | theirs.keys()
    )


async def _finish(run: RunClient, seq: int) -> float:
    result = await run.outcome(seq)
    await run.outcome(seq + 1)
    return result.metrics["loss:sum"]


def _datum(ids: Sequence[int], weight: float) -> Datum:
    size = len(ids) - 1
    return Datum(
        Tensor("int32", (size,), np.asarray(ids[:-1], "<i4").tobytes()),
        Tensor("int32", (size,), np.asarray(ids[1:], "<i4").tobytes()),
        weights=Tensor("float32", (size,), np.full(size, weight, "<f4").tobytes()),
    )


#: Numbers that make run names new within a benchmark.
fresh = count(1)
