"""One run in memory: its ops, who it is, and who waits for what.

What comes in: what became of its ops. What goes out: requests for outcomes, woken. Lives on the
event loop alone. It must not know: engines, disks, HTTP.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

import msgspec

from app.errors import Conflict, Fenced, LoragateError
from app.ops import OpenRun, Outcome, Result
from app.worker.trainers.oplog import Done, OpLog, Waiting
from app.worker.trainers.states import Manifest, Record

_encode = msgspec.msgpack.Encoder().encode


class LiveRun:
    """A run the engine holds.

    `held` keeps its ops from being begun; `touched` is when it was last asked for anything;
    `saved` is the `next_seq` of its newest state on disk, 0 if there is none.
    """

    def __init__(self, run: str, record: Record, state: Manifest | None, now: float) -> None:
        self.id = run
        self.record = record
        self.log = OpLog(run) if state is None else OpLog(run, state.next_seq, state.outcomes)
        self.optim_steps = 0 if state is None else state.optim_steps
        self.saved = 0 if state is None else state.next_seq
        self.held = False
        self.touched = now
        self._waiters: dict[int, set[asyncio.Future[None]]] = {}

    @property
    def due(self) -> Waiting | None:
        return None if self.held else self.log.due

    @property
    def idle(self) -> bool:
        """Nothing waits, neither ops nor anyone for them."""
        return not (self.held or self.log.waiting or self._waiters)

    def finish(self, result: Result) -> None:
        """The running op succeeded; only who waits for it is woken."""
        running = self.log.running
        assert running is not None
        self.log.finish(_encode(Outcome(running.seq, result)))
        self._wake(running.seq)

    def fail(self, error: LoragateError) -> None:
        self.log.fail(error)
        self.wake_all()

    def cancel(self) -> None:
        self.log.cancel()
        self.wake_all()

    async def news(self, seq: int, within_s: float) -> None:
        """Wait until something becomes of op `seq`, or the time is over."""
        future = asyncio.get_running_loop().create_future()
        self._waiters.setdefault(seq, set()).add(future)
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(within_s):
                    await future
        finally:
            waiters = self._waiters.get(seq, set())
            waiters.discard(future)
            if not waiters:
                self._waiters.pop(seq, None)

    async def at_rest(self) -> None:
        """Wait until no op is being done."""
        while (running := self.log.running) is not None:
            future = asyncio.get_running_loop().create_future()
            self._waiters.setdefault(running.seq, set()).add(future)
            await future

    def manifest(self, *own: Done) -> Manifest:
        """What a state written now says; `own` is the outcome of the op that writes it."""
        next_seq = own[-1].seq + 1 if own else self.log.next_seq
        return Manifest(self.record, next_seq, self.optim_steps, [*self.log.kept(), *own])

    def wake_all(self) -> None:
        for seq in list(self._waiters):
            self._wake(seq)

    def _wake(self, seq: int) -> None:
        for future in self._waiters.pop(seq, ()):
            if not future.done():
                future.set_result(None)


def check_fence(run: str, record: Record | None, fence: int | None) -> None:
    """Raises Fenced unless this attempt may have the run; None always may."""
    if record is not None and fence is not None and fence < record.fence:
        raise Fenced(f"attempt {record.fence} has run {run!r}, and attempt {fence} must stop")


def check_same(run: str, record: Record, asked: OpenRun) -> None:
    """Raises Conflict if the run is another one than asked for, or Fenced."""
    if (record.base_model, record.lora) != (asked.base_model, asked.lora):
        raise Conflict(
            f"run {run!r} trains {record.lora} of {record.base_model!r}; it cannot be opened "
            f"with {asked.lora} of {asked.base_model!r}"
        )
    check_fence(run, record, asked.fence)
