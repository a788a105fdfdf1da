"""Does one op, or the passes of several runs, with the engine, the disk and the sampler.

What comes in: runs and their ops. What goes out: results, or an error of app/errors. Awaited on
the event loop; the engine is called on the trainer thread only, disks on threads of their own.
It must not know: the order of ops, HTTP.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import msgspec

from app.domain import Probe
from app.errors import InvalidRequest, LoragateError
from app.ops import (
    ForwardBackward,
    LoadState,
    Lora,
    Op,
    OptimStep,
    Outcome,
    ProbeResult,
    Result,
    Sample,
    SaveForSampling,
    SaveState,
)
from app.worker.samplers.engine import Engine
from app.worker.trainers.base import Trainer
from app.worker.trainers.live import LiveRun
from app.worker.trainers.messages import Bounds, together
from app.worker.trainers.oplog import Done
from app.worker.trainers.sampling import sample
from app.worker.trainers.states import ENGINE, Manifest, States, plain

T = TypeVar("T")
DISK_THREADS = 4

_encode = msgspec.msgpack.Encoder().encode


class Performer:
    """Owns the trainer thread. `sampler` is None on a worker that serves no model."""

    def __init__(
        self, trainer: Trainer, states: States, bounds: Bounds, sampler: Engine | None
    ) -> None:
        self.trainer = trainer
        self.states = states
        self.bounds = bounds
        self._sampler = sampler
        self._trainer_thread = ThreadPoolExecutor(1, thread_name_prefix="trainer")
        self._disk_threads = ThreadPoolExecutor(DISK_THREADS, thread_name_prefix="states")

    async def passes(
        self, asked: Sequence[tuple[str, ForwardBackward]]
    ) -> list[Result | LoragateError]:
        """The passes of several runs, as one call of the engine."""
        return await self.on_trainer(lambda: together(self.trainer, asked, self.bounds))

    async def do(self, live: LiveRun, op: Op) -> Result:
        """Any op that is not a pass.

        Raises:
            LoragateError: it failed; the run is as before.
        """
        match op:
            case OptimStep():
                return await self._optim_step(live, op)
            case SaveState():
                return await self._save_state(live)
            case LoadState():
                return await self._load_state(live, op)
            case SaveForSampling():
                return await self.on_disk(lambda: self._save_for_sampling(live.id, op))
            case Sample():
                return await self._sample(live.id, op)
            case ForwardBackward():
                raise AssertionError("passes are done together")

    async def save(self, live: LiveRun, manifest: Manifest) -> None:
        """Write a state of the run as it is."""
        await self.on_disk(lambda: self._write_state(live.id, manifest))
        live.saved = manifest.next_seq

    async def on_trainer(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._trainer_thread, work)

    async def on_disk(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._disk_threads, work)

    def stop(self) -> None:
        """Let what is being done finish, and close the engine."""
        self._disk_threads.shutdown(cancel_futures=True)
        self._trainer_thread.submit(self.trainer.close).result()
        self._trainer_thread.shutdown()
        self.states.close()

    async def _optim_step(self, live: LiveRun, op: OptimStep) -> Result:
        metrics = await self.on_trainer(lambda: self.trainer.optim_step(live.id, op))
        live.optim_steps += 1
        return Result(metrics=dict(metrics))

    async def _save_state(self, live: LiveRun) -> Result:
        running = live.log.running
        assert running is not None
        result = Result()
        done = Done(running.seq, running.digest, _encode(Outcome(running.seq, result)))
        await self.save(live, live.manifest(done))
        return result

    async def _load_state(self, live: LiveRun, op: LoadState) -> Result:
        found = await self.on_disk(lambda: self.states.newest(op.run))
        if found is None:
            raise InvalidRequest(f"run {op.run!r} has no state on this worker")
        manifest, folder = found
        theirs, ours = _shape(manifest.record.lora), _shape(live.record.lora)
        if theirs != ours:
            raise InvalidRequest(
                f"the state of run {op.run!r} has {theirs} and run {live.id!r} has {ours}: "
                "they must be alike"
            )
        await self.on_trainer(
            lambda: self.trainer.load_state(live.id, folder, optimizer=op.optimizer)
        )
        if op.optimizer:
            live.optim_steps = manifest.optim_steps
        return Result()

    async def _sample(self, run: str, op: Sample) -> Result:
        if self._sampler is None:
            raise InvalidRequest("This worker has no sampler, so it cannot do the op `sample`.")
        folder = await self.on_disk(lambda: self._lend_adapter(run))
        try:
            return Result(samples=await sample(self._sampler, folder, op))
        finally:
            await self.on_disk(lambda: shutil.rmtree(folder, ignore_errors=True))

    # On a disk thread, which waits for the trainer's

    def _write_state(self, run: str, manifest: Manifest) -> None:
        with self.states.writing(run) as folder:
            engine = folder / ENGINE
            engine.mkdir()
            self._wait(lambda: self.trainer.save_state(run, engine))
            self.states.commit_state(run, folder, manifest)

    def _save_for_sampling(self, run: str, op: SaveForSampling) -> Result:
        plain(op.name)
        self._check_probe(op.probe_tokens)
        with self.states.writing(run) as folder:

            def write() -> Probe | None:
                self.trainer.save_adapter(run, folder)
                return self.trainer.probe(run, op.probe_tokens) if op.probe_tokens else None

            probe = self._wait(write)
            return Result(
                files=self.states.commit_adapter(run, folder, op.name),
                probe=None if probe is None else _probe_result(probe),
            )

    def _lend_adapter(self, run: str) -> Path:
        folder = self.states.lend(run)
        try:
            self._wait(lambda: self.trainer.save_adapter(run, folder))
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return folder

    def _check_probe(self, rows: Sequence[Sequence[int]]) -> None:
        bounds = self.bounds
        for place, row in enumerate(rows):
            if not 2 <= len(row) <= bounds.max_length:
                raise InvalidRequest(
                    f"probe_tokens[{place}] has {len(row)} ids; 2 to {bounds.max_length} are "
                    "allowed here"
                )
            if strange := [each for each in row if not 0 <= each < bounds.vocab_size]:
                raise InvalidRequest(
                    f"probe_tokens[{place}] has the id {strange[0]}; ids are 0 to "
                    f"{bounds.vocab_size - 1}"
                )

    def _wait(self, work: Callable[[], T]) -> T:
        return self._trainer_thread.submit(work).result()


def _shape(lora: Lora) -> str:
    modules = ", ".join(sorted(lora.target_modules))
    return f"rank {lora.rank}, alpha {lora.alpha} on {modules}"


def _probe_result(probe: Probe) -> ProbeResult:
    return ProbeResult(
        token_ids=[list(row) for row in probe.token_ids],
        logprobs=[list(row) for row in probe.logprobs],
        dtype=probe.dtype,
    )
