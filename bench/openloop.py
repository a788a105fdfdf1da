"""An open-loop load: every request leaves when it is due, whatever became of those before it.

What comes in: requests with their due times, and a port. What goes out: for each the time to its
first token and whether it was answered right, and how late the sender itself was: a load that
lags would flatter whom it measures. Times are those of the wall.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import httptools


@dataclass(frozen=True, slots=True)
class Shot:
    """One request as bytes, due so long after the start. `expected` must be in the answer."""

    due_s: float
    message: bytes
    expected: bytes


@dataclass(slots=True)
class Outcome:
    """What became of a shot. `first_s` counts from when it was due; `late_s` is the sender's own
    part of that: a gateway that is slow to accept a connection is not the sender's fault."""

    late_s: float = 0.0
    first_s: float | None = None
    whole: bool = False
    trouble: str | None = None


@dataclass(frozen=True, slots=True)
class Volley:
    """A load's outcomes, and what sending it took of one core."""

    outcomes: Sequence[Outcome]
    wall_s: float
    cpu_share: float


class _Open:
    """The open connections: idle ones, and those a request is under way on."""

    def __init__(self) -> None:
        self.idle: list[_Flight] = []
        self.flying: set[_Flight] = set()
        self._still = asyncio.Event()

    async def landed(self) -> None:
        """Wait until no request is under way."""
        while self.flying:
            self._still.clear()
            await self._still.wait()

    def land(self, flight: _Flight) -> None:
        self.flying.discard(flight)
        self._still.set()


class _Flight(asyncio.Protocol):
    """One connection: a request at a time."""

    def __init__(self, pool: _Open) -> None:
        self._pool = pool
        self._outcome: Outcome | None = None
        self._now = asyncio.get_running_loop().time

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass

    def fly(self, shot: Shot, outcome: Outcome, due_at: float) -> None:
        self._shot, self._outcome, self._due_at = shot, outcome, due_at
        self._parser = httptools.HttpResponseParser(self)
        self._body: list[bytes] = []
        self._pool.flying.add(self)
        self.transport.write(shot.message)

    def give_up(self, why: str) -> None:
        if self._outcome is not None:
            self._outcome.trouble = why
            self._outcome = None
        self._pool.land(self)
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        outcome = self._outcome
        if (
            outcome is not None
            and outcome.first_s is None
            and self._parser.get_status_code() == 200
        ):
            outcome.first_s = self._now() - self._due_at
        self._body.append(body)

    def on_message_complete(self) -> None:
        outcome, self._outcome = self._outcome, None
        self._pool.land(self)
        if outcome is None:
            return
        said = b"".join(self._body)
        status = self._parser.get_status_code()
        if status != 200:
            outcome.trouble = f"status {status}: {said[:120]!r}"
        elif not said.rstrip().endswith(b"data: [DONE]"):
            outcome.trouble = "the stream was cut short"
        elif self._shot.expected not in said:
            outcome.trouble = "another adapter answered"
        else:
            outcome.whole = True
        if self._parser.should_keep_alive() and not self.transport.is_closing():
            self._pool.idle.append(self)

    def connection_lost(self, exc: Exception | None) -> None:
        if self in self._pool.idle:
            self._pool.idle.remove(self)
        self._pool.land(self)
        if self._outcome is not None:
            self._outcome.trouble = f"the connection was lost: {exc}"
            self._outcome = None


async def fire(port: int, shots: Sequence[Shot], *, patience_s: float) -> Volley:
    """Send every shot when it is due; wait `patience_s` for the last ones, then leave them."""
    loop = asyncio.get_running_loop()
    pool = _Open()
    outcomes = [Outcome() for _ in shots]
    gc.collect()
    gc.disable()
    cpu_s, start = time.process_time(), loop.time() + 0.01
    try:
        async with asyncio.TaskGroup() as connecting:
            for shot, outcome in zip(shots, outcomes, strict=True):
                due_at = start + shot.due_s
                if (wait_s := due_at - loop.time()) > 0:
                    await asyncio.sleep(wait_s)
                outcome.late_s = loop.time() - due_at
                if pool.idle:
                    pool.idle.pop().fly(shot, outcome, due_at)
                else:
                    connecting.create_task(_connect(pool, port, shot, outcome, due_at))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                await pool.landed()
        wall_s = loop.time() - start
        cpu_share = (time.process_time() - cpu_s) / wall_s
    finally:
        gc.enable()
        for flight in list(pool.flying):
            flight.give_up("no answer in time")
        for flight in list(pool.idle):
            flight.transport.close()
    return Volley(outcomes, wall_s, cpu_share)


async def _connect(pool: _Open, port: int, shot: Shot, outcome: Outcome, due_at: float) -> None:
    loop = asyncio.get_running_loop()
    try:
        _, flight = await loop.create_connection(lambda: _Flight(pool), "127.0.0.1", port)
    except OSError as exc:
        outcome.trouble = f"no connection: {exc}"
        return
    flight.fly(shot, outcome, due_at)
