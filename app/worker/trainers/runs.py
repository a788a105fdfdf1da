"""The runs of a training worker: opened, fed with ops, asked for outcomes, put away.

What comes in: what docs/training-protocol.md lets a gateway ask. What goes out: where a run is,
outcomes as finished bytes, files. Lives on the event loop; `perform` has the threads. It must
not know: HTTP, how an engine trains.

    open ─▶ LiveRun ◀─ submit         turns ─▶ perform ─▶ engine · disk · sampler
               │ ▲                       │
    outcome ◀──┘ └────── finish, fail ───┘
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from pathlib import Path
from typing import Literal
from weakref import WeakValueDictionary

from app.clock import Clock
from app.domain import LoraSpec
from app.errors import (
    Conflict,
    InvalidRequest,
    NotFound,
    RunLost,
    StorageUnavailable,
    TrainerBusy,
)
from app.ops import OpenRun, RunStatus, RunSummary, TrainerInfo
from app.worker.trainers.live import LiveRun, check_fence, check_same
from app.worker.trainers.oplog import Waiting
from app.worker.trainers.perform import Performer
from app.worker.trainers.states import Manifest, Record, plain
from app.worker.trainers.turns import Turns

logger = logging.getLogger(__name__)

#: A run that nobody asked for anything this long may be put away to make room for another.
IDLE_S = 5.0
#: Most bytes of ops that wait, over all runs; the op that is due is always taken.
MAX_WAITING_BYTES = 1 << 30


class Runs:
    """Every run of one worker. Made, started and stopped on the event loop.

    Args:
        base_model: what the worker calls its base; runs of another are refused.
        max_runs: runs the engine holds at once; others are on disk.
        max_rank: largest rank of an adapter.
        save_s: how long a worker that is told to end may write what no state holds, in seconds.
    """

    def __init__(
        self,
        performer: Performer,
        clock: Clock,
        *,
        base_model: str,
        max_runs: int,
        max_rank: int,
        save_s: float,
    ) -> None:
        self._live: dict[str, LiveRun] = {}
        self.turns = Turns(self._live, performer, clock)
        self._performer = performer
        self._states = performer.states
        self._clock = clock
        self._base_model = base_model
        self._max_runs = max_runs
        self._max_rank = max_rank
        self._save_s = save_s
        self._opening = 0
        self._leaving: asyncio.Task[None] | None = None
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._serving: asyncio.Task[None] | None = None

    @property
    def in_memory(self) -> int:
        """How many runs the engine holds."""
        return len(self._live)

    @property
    def alive(self) -> bool:
        """Whether ops are still done; False is a fault of this program and for good."""
        return self._serving is not None and not self._serving.done()

    async def start(self) -> None:
        """Begin to take turns. Whoever opens a run hears of a state folder that is unusable."""
        try:
            await self._performer.on_disk(self._states.start)
        except StorageUnavailable as exc:
            logger.warning("no run can be opened: %s", exc)
        self._serving = asyncio.get_running_loop().create_task(self._serve(), name="turns")

    def let_go(self) -> None:
        """The worker is about to end: begin no op any more, and write what no state holds.

        Whoever waits for an outcome shall ask again later.
        """
        if self._leaving is None:
            for live in self._live.values():
                live.held = True
                live.wake_all()
            self._leaving = asyncio.get_running_loop().create_task(self._save_all(), name="save")

    async def stop(self) -> None:
        """End, once states are written. What did not get into one within `save_s` is lost."""
        self.let_go()
        if self._leaving is not None:
            await asyncio.wait([self._leaving])
        if self._serving is not None:
            self._serving.cancel()
            await asyncio.wait([self._serving])
        await asyncio.to_thread(self._performer.stop)

    async def info(self) -> TrainerInfo:
        """What this worker is, and its runs."""
        facts = self._performer.trainer.facts
        runs = {run: RunSummary(run, False, seq) for run, seq in await self._stored()}
        runs |= {run: RunSummary(run, True, live.log.next_seq) for run, live in self._live.items()}
        return TrainerInfo(
            kind="megatron" if facts.kind == "megatron" else "hf",
            base_model=self._base_model,
            dtype=facts.dtype,
            max_runs=self._max_runs,
            max_rank=self._max_rank,
            max_length=facts.max_length,
            target_modules=list(facts.target_modules),
            parallel=dict(facts.parallel),
            runs=[runs[run] for run in sorted(runs)],
        )

    async def open(self, run: str, asked: OpenRun) -> RunStatus:
        """Make the run, or take it up in memory or from its newest state.

        A greater fence than before cancels what an earlier attempt left waiting.

        Raises:
            Conflict: it has another base or adapter.
            Fenced: a newer attempt has it.
            InvalidRequest: the engine cannot train such an adapter.
            TrainerBusy: no room, and no run that could be put away.
            StorageUnavailable: the state folder cannot be written.
        """
        plain(run)
        async with self._lock(run):
            live = self._live.get(run)
            if live is not None:
                return await self._adopt(live, asked)
            return await self._bring(run, asked)

    def submit(self, run: str, new: Waiting, *, fence: int, acked: int) -> None:
        """Take in an op; the same one again changes nothing.

        Raises:
            RunLost, Fenced, Conflict, TrainerBusy, InvalidRequest: see docs/training-protocol.md.
        """
        live = self._find(run, fence)
        if new.seq < 1:
            raise InvalidRequest(f"op number {new.seq}: the first op of a run is 1")
        waiting = sum(each.log.waiting_bytes for each in self._live.values())
        if new.seq != live.log.next_seq and waiting + new.bytes > MAX_WAITING_BYTES:
            raise TrainerBusy(
                f"{waiting} bytes of ops wait on this worker, and {MAX_WAITING_BYTES} may. "
                "Send this op again later."
            )
        if live.log.add(new, acked):
            self.turns.wake()

    async def outcome(
        self, run: str, seq: int, *, fence: int | None, wait_s: float
    ) -> bytes | None:
        """The outcome of an op as msgpack, or None if there is none within `wait_s`."""
        found = await self.outcomes(run, seq, seq, fence=fence, wait_s=wait_s)
        return found[0] if found else None

    async def outcomes(
        self, run: str, first: int, last: int, *, fence: int | None, wait_s: float
    ) -> list[bytes]:
        """Those of ops `first` to `last` that are there, once the last one is or time is over."""
        log = self._find(run, fence).log
        if wait_s > 0 and self._leaving is None and log.awaited(last):
            await self._live[run].news(last, wait_s)
            log = self._find(run, fence).log
        return log.outcomes(first, last)

    async def cancel(self, run: str, *, fence: int | None) -> RunStatus:
        """Cancel every op that has not begun; answers once none is being done."""
        live = self._find(run, fence)
        await self._clear(live)
        return _status(live, "live")

    async def unload(self, run: str, *, fence: int | None) -> None:
        """Write a state and let the engine forget the run.

        Raises:
            Conflict: ops are waiting.
        """
        async with self._lock(run):
            live = self._find(run, fence)
            if live.log.waiting and live.log.failure is None:
                raise Conflict(
                    f"{live.log.waiting} op(s) of run {run!r} wait; ask for their outcomes, or "
                    "cancel them, before it is unloaded"
                )
            await self._put_away(live)

    async def delete(self, run: str, *, fence: int | None) -> None:
        """Remove every trace of a run, in memory and on disk; harmless when there is none."""
        plain(run)
        async with self._lock(run):
            live = self._live.get(run)
            if live is not None:
                check_fence(run, live.record, fence)
                live.held = True
                await self._clear(live)
                await self._forget(live)
            else:
                record = await self._performer.on_disk(lambda: self._states.record(run))
                check_fence(run, record, fence)
            await self._performer.on_disk(lambda: self._states.delete(run))

    async def file(self, run: str, name: str, file: str) -> Path:
        """Where a file of an adapter for sampling is.

        Raises:
            NotFound: there is no such file.
        """
        found = await self._performer.on_disk(lambda: self._states.file(run, name, file))
        if found is None:
            raise NotFound(f"run {run!r} has no file {file!r} of an adapter {name!r}")
        return found

    async def _serve(self) -> None:
        try:
            await self.turns.serve()
        except Exception:
            logger.exception("the trainer's turns ended")
            raise

    async def _save_all(self) -> None:
        """Write a state of every run that has done more than its last one holds."""
        saving = [self._save(live) for live in self._live.values()]
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(*saving), self._save_s)

    async def _save(self, live: LiveRun) -> None:
        async with self._lock(live.id):
            await live.at_rest()
            if self._live.get(live.id) is not live or live.saved == live.log.next_seq:
                return
            try:
                await self._performer.save(live, live.manifest())
            except Exception as exc:  # noqa: BLE001 - the other runs' states matter as much
                logger.warning("run %s is left without its last ops: %s", live.id, exc)

    async def _stored(self) -> list[tuple[str, int]]:
        return await self._performer.on_disk(lambda: list(self._states.runs()))

    async def _adopt(self, live: LiveRun, asked: OpenRun) -> RunStatus:
        check_same(live.id, live.record, asked)
        newer = asked.fence > live.record.fence
        live.touched = self._clock.monotonic()
        if newer:
            record = Record(asked.base_model, asked.lora, asked.fence)
            await self._performer.on_disk(lambda: self._states.write_record(live.id, record))
            live.record = record
            await self._clear(live)
        return _status(live, "live")

    async def _bring(self, run: str, asked: OpenRun) -> RunStatus:
        record = await self._performer.on_disk(lambda: self._states.record(run))
        found = await self._performer.on_disk(lambda: self._states.newest(run))
        if known := record or (found[0].record if found else None):
            check_same(run, known, asked)
        self._check(asked)
        await self._make_room(run)
        self._opening += 1
        try:
            return await self._create(run, asked, found)
        finally:
            self._opening -= 1

    async def _create(
        self, run: str, asked: OpenRun, found: tuple[Manifest, Path] | None
    ) -> RunStatus:
        trainer = self._performer.trainer
        lora = asked.lora
        spec = LoraSpec(lora.rank, lora.alpha, tuple(lora.target_modules), lora.seed)
        record = Record(asked.base_model, lora, asked.fence)

        def make() -> None:
            trainer.create(run, spec)
            if found is not None:
                trainer.load_state(run, found[1], optimizer=True)

        try:
            await self._performer.on_trainer(make)
            await self._performer.on_disk(lambda: self._states.write_record(run, record))
        except BaseException:
            await self._performer.on_trainer(lambda: trainer.drop(run))
            raise
        manifest = None if found is None else found[0]
        live = LiveRun(run, record, manifest, self._clock.monotonic())
        self._live[run] = live
        return _status(live, "created" if manifest is None else "restored")

    def _check(self, asked: OpenRun) -> None:
        lora = asked.lora
        if asked.base_model != self._base_model:
            raise InvalidRequest(
                f"base_model {asked.base_model!r}: this worker trains {self._base_model!r}"
            )
        if not 1 <= lora.rank <= self._max_rank:
            raise InvalidRequest(
                f"lora.rank {lora.rank}: 1 to {self._max_rank} are allowed here "
                "(LORAGATE_WORKER_MAX_LORA_RANK)"
            )
        if lora.alpha < 1:
            raise InvalidRequest(f"lora.alpha {lora.alpha}: it must be at least 1")
        known = self._performer.trainer.facts.target_modules
        strange = sorted(set(lora.target_modules) - set(known))
        if strange or not lora.target_modules:
            raise InvalidRequest(
                f"lora.target_modules {strange or []}: one or more of {', '.join(known)} are "
                "allowed here"
            )

    async def _make_room(self, run: str) -> None:
        """Put away runs that are idle, longest first, until another one fits."""
        while len(self._live) + self._opening >= self._max_runs:
            idle = self._idlest()
            if idle is None:
                raise TrainerBusy(
                    f"This worker holds {self._max_runs} runs (LORAGATE_WORKER_MAX_RUNS) and "
                    f"none is idle, so run {run!r} must wait."
                )
            async with self._lock(idle.id):
                if self._live.get(idle.id) is idle and idle.idle:
                    await self._put_away(idle)

    def _idlest(self) -> LiveRun | None:
        since = self._clock.monotonic() - IDLE_S
        idle = [
            live
            for live in self._live.values()
            if live.idle and live.touched <= since and not self._lock(live.id).locked()
        ]
        return min(idle, key=lambda live: live.touched, default=None)

    async def _put_away(self, live: LiveRun) -> None:
        live.held = True
        try:
            live.log.cancel()
            await live.at_rest()
            if live.saved != live.log.next_seq:
                await self._performer.save(live, live.manifest())
            await self._forget(live)
        except BaseException:
            live.held = False
            self.turns.wake()
            raise

    async def _forget(self, live: LiveRun) -> None:
        await self._performer.on_trainer(lambda: self._performer.trainer.drop(live.id))
        del self._live[live.id]
        live.wake_all()

    async def _clear(self, live: LiveRun) -> None:
        live.cancel()
        await live.at_rest()
        if live.log.failure is not None:
            live.cancel()

    def _find(self, run: str, fence: int | None) -> LiveRun:
        live = self._live.get(run)
        if live is None:
            raise RunLost(f"run {run!r} is not in this worker's memory; open it")
        check_fence(run, live.record, fence)
        live.touched = self._clock.monotonic()
        return live

    def _lock(self, run: str) -> asyncio.Lock:
        return self._locks.setdefault(run, asyncio.Lock())


def _status(live: LiveRun, origin: Literal["created", "live", "restored"]) -> RunStatus:
    return RunStatus(
        run=live.id,
        next_seq=live.log.next_seq,
        first_outcome=live.log.first_outcome,
        origin=origin,
        optim_steps=live.optim_steps,
    )
