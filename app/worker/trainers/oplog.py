"""The numbered ops of one run: which wait, which is being done, what came of the others.

What comes in: ops in any order, each perhaps several times. What goes out: the one that is due,
and finished outcomes. Pure bookkeeping; it must not know: threads, disks, what an op does.

A number is *done* once its op succeeded; `next_seq` is the first that is not. A failed op is not
done: the run's weights are those before it, and it and all that follow stay failed until they are
cancelled, which frees their numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import msgspec

from app.errors import Conflict, LoragateError, RequestError, RunLost, TrainerBusy
from app.ops import Failure, Op, Outcome

#: Ops of one run that may wait, counted from the one that is due.
MAX_WAITING = 1024

_encode = msgspec.msgpack.Encoder().encode


@dataclass(frozen=True, slots=True)
class Waiting:
    """An op that is not done; `digest` is of its message, `bytes` the size of that."""

    seq: int
    op: Op
    digest: bytes
    bytes: int


class Done(msgspec.Struct, frozen=True):
    """An op that succeeded: the digest of its message and its `ops.Outcome` as msgpack."""

    seq: int
    digest: bytes
    outcome: bytes


class OpLog:
    """Begins after the ops that a restored run had done; `kept` are those with outcomes."""

    def __init__(self, run: str, next_seq: int = 1, kept: Iterable[Done] = ()) -> None:
        self.next_seq = next_seq
        self.running: Waiting | None = None
        self.failure: LoragateError | None = None
        self.waiting_bytes = 0
        self._run = run
        self._waiting: dict[int, Waiting] = {}
        self._done = {done.seq: done for done in kept}

    @property
    def first_outcome(self) -> int:
        """The least number whose outcome can be asked for, or `next_seq` if none can."""
        return min(self._done, default=self.next_seq)

    @property
    def due(self) -> Waiting | None:
        """The op to do next, if it has arrived and nothing stands in its way."""
        if self.running is not None or self.failure is not None:
            return None
        return self._waiting.get(self.next_seq)

    @property
    def waiting(self) -> int:
        """How many ops have arrived and not ended, the running one included."""
        return len(self._waiting)

    def kept(self) -> Iterator[Done]:
        """The outcomes that nobody has acknowledged, in order."""
        yield from self._done.values()

    def add(self, new: Waiting, acked: int) -> bool:
        """Take in an op; False if it was known.

        Raises:
            Conflict: its number belongs to another op.
            TrainerBusy: too many wait.
        """
        self._acknowledge(min(acked, new.seq - 1))
        known = self._waiting.get(new.seq) or self._done.get(new.seq)
        if known is not None and known.digest != new.digest:
            raise Conflict(
                f"op {new.seq} of run {self._run!r} is another op than the one sent now; "
                f"cancel ops to use a number again. The next free number is at least "
                f"{self.next_seq}."
            )
        if known is not None or new.seq < self.next_seq:
            return False
        if new.seq >= self.next_seq + MAX_WAITING:
            raise TrainerBusy(
                f"op {new.seq} of run {self._run!r} is {new.seq - self.next_seq} after the one "
                f"that is due; at most {MAX_WAITING} may wait. Send it again later."
            )
        self._waiting[new.seq] = new
        self.waiting_bytes += new.bytes
        return True

    def begin(self) -> Waiting:
        """Mark the due op as being done."""
        due = self.due
        assert due is not None
        self.running = due
        return due

    def finish(self, outcome: bytes) -> None:
        """The running op succeeded."""
        running = self._end()
        del self._waiting[running.seq]
        self.waiting_bytes -= running.bytes
        self._done[running.seq] = Done(running.seq, running.digest, outcome)
        self.next_seq = running.seq + 1

    def fail(self, error: LoragateError) -> None:
        """The running op failed, and with it all that come after."""
        self._end()
        self.failure = error

    def cancel(self) -> None:
        """Free the numbers of all ops but those done and the one being done."""
        running = self.running
        self._waiting = {} if running is None else {running.seq: running}
        self.waiting_bytes = 0 if running is None else running.bytes
        self.failure = None

    def outcome(self, seq: int) -> bytes | None:
        """The outcome of an op as msgpack, or None while it waits.

        Raises:
            RunLost: there is no such op, or its outcome was acknowledged.
            LoragateError: it could not be done, and nothing about it is to blame.
        """
        if (done := self._done.get(seq)) is not None:
            return done.outcome
        if seq not in self._waiting:
            raise RunLost(
                f"run {self._run!r} has no outcome of op {seq}: it was acknowledged, cancelled, or "
                "lost with the worker's memory. Open the run to see where it is."
            )
        if self.failure is None:
            return None
        if not isinstance(self.failure, RequestError):
            raise self.failure
        return _encode(Outcome(seq, failure=Failure(self.failure.code, str(self.failure))))

    def outcomes(self, first: int, last: int) -> list[bytes]:
        """The outcomes of ops `first` to `last` as far as they are there, one after another.

        Raises as `outcome` does, of the first one.
        """
        found = []
        for seq in range(first, last + 1):
            if (done := self._done.get(seq)) is None:
                break
            found.append(done.outcome)
        if not found and (one := self.outcome(first)) is not None:
            found.append(one)
        return found

    def awaited(self, seq: int) -> bool:
        """Whether an op has arrived, and something is still to become of it."""
        return seq in self._waiting and self.failure is None

    def _acknowledge(self, acked: int) -> None:
        for seq in [seq for seq in self._done if seq <= acked]:
            del self._done[seq]

    def _end(self) -> Waiting:
        running = self.running
        assert running is not None
        self.running = None
        return running
