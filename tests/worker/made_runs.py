"""A worker's runs over an engine whose weights are its history, and how tests talk to them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from app.ops import Datum, ForwardBackward, Lora, Op, OpenRun, Outcome, Result, RunStatus, Tensor
from app.worker.trainers.messages import Bounds
from app.worker.trainers.oplog import Waiting
from app.worker.trainers.perform import Performer
from app.worker.trainers.runs import Runs
from app.worker.trainers.states import States
from tests.fakes.trainer import MAX_LENGTH, FakeTrainer

LORA = Lora(rank=4, alpha=8, target_modules=["q_proj"], seed=1)
VOCAB = 100


def ids(*values: int) -> Tensor:
    return Tensor("int32", (len(values),), b"".join(v.to_bytes(4, "little") for v in values))


def passing(tag: int, **config: float) -> ForwardBackward:
    return ForwardBackward([Datum(ids(tag, 2), ids(2, 3))], config=config)


@dataclass
class Time:
    """A clock for runs; only durations matter here."""

    seconds: float = 0.0

    def now(self) -> Any:
        raise NotImplementedError

    def monotonic(self) -> float:
        return self.seconds


@dataclass
class Worker:
    """A worker's runs, and what may happen to them."""

    root: Path
    clock: Time = field(default_factory=Time)
    trainer: FakeTrainer = field(default_factory=FakeTrainer)
    max_runs: int = 16
    save_s: float = 0.0
    runs: Runs = field(init=False)

    async def start(self) -> None:
        bounds = Bounds(MAX_LENGTH, VOCAB)
        performer = Performer(self.trainer, States(self.root), bounds, None)
        self.runs = Runs(
            performer,
            self.clock,
            base_model="tiny",
            max_runs=self.max_runs,
            max_rank=8,
            save_s=self.save_s,
        )
        await self.runs.start()

    async def restart(self) -> None:
        """What was in memory is gone, but for what there are `save_s` seconds to save."""
        await self.runs.stop()
        self.trainer = FakeTrainer()
        await self.start()

    async def open(self, run: str = "a", fence: int = 1, lora: Lora = LORA) -> RunStatus:
        return await self.runs.open(run, OpenRun("tiny", lora, fence))

    def submit(self, seq: int, op: Op, run: str = "a", fence: int = 1, acked: int = 0) -> None:
        encoded = msgspec.msgpack.encode(op)
        new = Waiting(seq, op, hashlib.sha256(encoded).digest(), len(encoded))
        self.runs.submit(run, new, fence=fence, acked=acked)

    async def outcome(self, seq: int, run: str = "a", fence: int | None = None) -> Outcome:
        found = await self.runs.outcome(run, seq, fence=fence, wait_s=10)
        assert found is not None
        return msgspec.msgpack.decode(found, type=Outcome)

    async def result(self, seq: int, run: str = "a") -> Result:
        found = await self.outcome(seq, run)
        assert found.result is not None, found.failure
        return found.result

    async def did(self, seq: int, op: Op, run: str = "a") -> Result:
        self.submit(seq, op, run)
        return await self.result(seq, run)

    def running(self, run: str = "a") -> int | None:
        """The number of the op that is being done."""
        running = self.runs._live[run].log.running
        return None if running is None else running.seq

    def done(self, run: str = "a") -> list[str]:
        return self.trainer.runs[run].done
