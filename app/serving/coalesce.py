"""Concurrent scoring requests of one kind, sent as one call.

What comes in: requests for the logprobs of one prompt. What goes out: to each its own reply, as if
it had been alone. Nothing waits while no such call is under way; those that come meanwhile gather.
What may share a call is `scoring`'s. Runs on the event loop only, so it needs no lock.
"""

from __future__ import annotations

import asyncio
import logging
from asyncio import Future
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from app.backends.base import BufferedBody, Reply
from app.domain import Route
from app.errors import LoragateError, UpstreamBroke
from app.serving import scoring
from app.serving.batches import Batches, whole
from app.serving.forward import Forwarder
from app.serving.gather import members_of
from app.serving.meter import Meter
from app.serving.offender import Refusal, may_be_a_prompt
from app.serving.request import InferenceRequest
from app.serving.scoring import Scoring, Share
from app.serving.streams import together
from app.telemetry import Event, log

logger = logging.getLogger(__name__)

#: How long the first that waits does so, for each prompt in the calls under way, and at most. A
#: burst becomes a few calls that way, however it trickles in: each is larger than those before it.
PATIENCE_S = 0.003
LONGEST_S = 0.5
#: What is enough to go at once.
ENOUGH_PROMPTS = 1024
ENOUGH_BYTES = 8 << 20
#: Statuses of a replica that is busy: to say it again one by one would not help it.
_BUSY = (429, 503)


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    headers: list[tuple[bytes, bytes]]
    replica: str
    body: bytes

    def reply(self) -> Reply:
        reply = Reply(self.status, self.headers, BufferedBody(self.body))
        reply.replica = self.replica
        return reply


#: Waits for an answer. None in answer means: ask alone.
_Waiter = Future[_Answer | None]


@dataclass(eq=False, slots=True)
class _Slot:
    """One prompt of a call, and those who wait for its answer: each with the id it goes by."""

    request: InferenceRequest
    scoring: Scoring
    waiters: dict[_Waiter, bytes] = field(default_factory=dict)

    def answer(self, answer: _Answer | None) -> None:
        for waiter in self.waiters:
            if not waiter.done():
                waiter.set_result(answer)

    def share(self, share: Share, answer: _Answer) -> None:
        for waiter, rid in self.waiters.items():
            if not waiter.done():
                waiter.set_result(replace(answer, body=share.body(rid)))

    def fail(self, error: LoragateError) -> None:
        for waiter in self.waiters:
            if not waiter.done():
                waiter.set_exception(error)


@dataclass(eq=False, slots=True)
class _Call:
    slots: list[_Slot]
    task: asyncio.Task[None] | None = None

    @property
    def wanted(self) -> bool:
        return any(slot.waiters for slot in self.slots)


@dataclass(eq=False, slots=True)
class _Kind:
    """Requests that may share a call: those that wait, and the calls under way.

    `slots` has those whose answer a like prompt may have as well.
    """

    key: tuple[object, ...]
    route: Route
    waiting: list[_Slot] = field(default_factory=list)
    size: int = 0
    since: float = 0.0
    timer: asyncio.TimerHandle | None = None
    calls: set[_Call] = field(default_factory=set)
    slots: dict[bytes, _Slot] = field(default_factory=dict)

    def add(self, slot: _Slot, now: float) -> None:
        if not self.waiting:
            self.since = now
        self.waiting.append(slot)
        self.size += len(slot.scoring.prompt)
        if slot.scoring.repeatable:
            self.slots[slot.scoring.prompt] = slot

    def forget(self, slots: Iterable[_Slot]) -> None:
        """Nobody may join these any more."""
        for slot in slots:
            if self.slots.get(slot.scoring.prompt) is slot:
                del self.slots[slot.scoring.prompt]

    def drop(self, slot: _Slot) -> None:
        """Do not send this one."""
        self.waiting.remove(slot)
        self.size -= len(slot.scoring.prompt)
        self.forget([slot])

    @property
    def full(self) -> bool:
        return len(self.waiting) >= ENOUGH_PROMPTS or self.size >= ENOUGH_BYTES

    @property
    def due(self) -> float:
        """When those that wait go, if nothing changes before."""
        under_way = sum(len(call.slots) for call in self.calls)
        return self.since + min(LONGEST_S, PATIENCE_S * under_way)


class Coalescer:
    """Merges calls. Use as a context manager: it owns the calls under way."""

    def __init__(self, forwarder: Forwarder, batches: Batches, meter: Meter) -> None:
        self._forwarder = forwarder
        self._batches = batches
        self._meter = meter
        self._kinds: dict[tuple[object, ...], _Kind] = {}
        self._tasks = asyncio.TaskGroup()

    async def __aenter__(self) -> Coalescer:
        await self._tasks.__aenter__()
        return self

    async def __aexit__(self, *exc: object) -> None:
        for kind in list(self._kinds.values()):
            for call in kind.calls:
                if call.task is not None:
                    call.task.cancel()
        await self._tasks.__aexit__(None, None, None)

    async def forward(self, request: InferenceRequest, route: Route) -> Reply:
        """The reply to a scoring request.

        Raises:
            NoReplicaAvailable, AdapterLoadFailed, UpstreamError: it could not be served.
        """
        found = scoring.read(request, route)
        if found is None:
            return await self._forwarder.forward(request, route)
        kind = self._kinds.get(found.key)
        if kind is None:
            kind = self._kinds[found.key] = _Kind(found.key, route)
        waiter: _Waiter = asyncio.get_running_loop().create_future()
        slot = kind.slots.get(found.prompt) if found.repeatable else None
        if slot is None:
            slot = _Slot(request, found)
            kind.add(slot, asyncio.get_running_loop().time())
        slot.waiters[waiter] = scoring.request_id(request.headers)
        self._look(kind)
        try:
            answer = await waiter
        finally:
            self._left(kind, slot, waiter)
        if answer is None:
            return await self._forwarder.forward(request, route)
        return answer.reply()

    def _left(self, kind: _Kind, slot: _Slot, waiter: _Waiter) -> None:
        """Nobody else may notice; but what only this one wanted ends."""
        del slot.waiters[waiter]
        if slot.waiters:
            return
        if slot in kind.waiting:
            kind.drop(slot)
            self._look(kind)
            return
        for call in kind.calls:
            if slot in call.slots and not call.wanted and call.task is not None:
                kind.forget(call.slots)  # who comes now must not be cut off with it
                call.task.cancel()

    def _look(self, kind: _Kind) -> None:
        """Send what waits, if it has waited long enough."""
        if kind.timer is not None:
            kind.timer.cancel()
            kind.timer = None
        if not kind.waiting:
            if not kind.calls:
                self._kinds.pop(kind.key, None)
            return
        loop = asyncio.get_running_loop()
        if kind.full or not kind.calls or loop.time() >= kind.due:
            call = _Call(kind.waiting)
            kind.waiting, kind.size = [], 0
            kind.calls.add(call)
            call.task = self._tasks.create_task(self._run(kind, call))
        else:
            kind.timer = loop.call_at(kind.due, self._look, kind)

    async def _run(self, kind: _Kind, call: _Call) -> None:
        try:
            await self._answer(kind, call.slots)
        except LoragateError as exc:
            _fail(call, exc)
        except Exception:  # one call must not end the task group of all
            logger.exception(Event.REQUEST_CRASHED.value)
            _fail(call, UpstreamBroke("a shared call failed; the gateway's log says why"))
        except asyncio.CancelledError:
            _fail(call, UpstreamBroke("a shared call was interrupted"))
            raise
        finally:
            kind.calls.discard(call)
            kind.forget(call.slots)
            self._look(kind)

    async def _answer(self, kind: _Kind, slots: list[_Slot]) -> None:
        if len(slots) == 1:
            await self._answer_one(kind, slots[0])
            return
        leader, prompts = slots[0].scoring, [slot.scoring.prompt for slot in slots]
        request = leader.shared(slots[0].request, prompts)
        answer = await self._call(request, kind.route)
        if answer.status < 300:
            self._deal(slots, answer)
            return
        refusal = Refusal(answer.status, answer.headers, answer.body)
        if may_be_a_prompt(refusal, leader.members):
            # One of them is to blame: it ends up alone, and harms nobody.
            middle = len(slots) // 2
            await together([self._answer(kind, half) for half in (slots[:middle], slots[middle:])])
            return
        everyones = answer.status < 500 or answer.status in _BUSY
        for slot in slots:
            slot.answer(answer if everyones else None)

    async def _call(self, request: InferenceRequest, route: Route) -> _Answer:
        """A shared call; made once more if it is lost, as it is more than one client's loss."""
        try:
            return await _read(await self._batches.forward(request, route, name=False))
        except UpstreamBroke:
            return await _read(await self._batches.forward(request, route, name=False))

    def _deal(self, slots: list[_Slot], answer: _Answer) -> None:
        """To each its own of a call's answer."""
        prompts = [slot.scoring.prompt for slot in slots]
        try:
            shares = scoring.take_apart(answer.body, slots[0].scoring, prompts)
        except UpstreamBroke as exc:  # a server whose answers cannot be shared
            log(logger, logging.WARNING, Event.REQUEST_FAILED, error=str(exc))
            for slot in slots:
                slot.answer(None)
            return
        self._meter.merged(sum(len(slot.waiters) for slot in slots))
        for slot, share in zip(slots, shares, strict=True):
            slot.share(share, answer)

    async def _answer_one(self, kind: _Kind, slot: _Slot) -> None:
        """One prompt: the call goes, and its answer comes, as if nothing were shared."""
        answer = await _read(await self._forwarder.forward(slot.request, kind.route))
        if len(slot.waiters) < 2 or answer.status >= 300:
            slot.answer(answer)
            return
        self._meter.merged(len(slot.waiters))
        slot.share(Share(members_of(answer.body)), answer)


def _fail(call: _Call, error: LoragateError) -> None:
    for slot in call.slots:
        slot.fail(error)


async def _read(reply: Reply) -> _Answer:
    return _Answer(reply.status, reply.headers, reply.replica, await whole(reply))
