"""The engine of a simulated replica: continuous batching in steps, one timer at a time.

What comes in: sequences to generate and adapters to load. What goes out: calls to each sequence's
`sink` as its tokens come. As in vLLM, a step decodes what runs and then admits what waits, in
order, except those whose adapter has no slot left in this step; loads happen between steps and
stall them. It knows nothing of HTTP. Its clock is the loop's, times `speed`.

One simplification: a sequence is given the blocks for its whole answer when it is admitted, so
that none is ever preempted.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from bench.sim.figures import Figures
from bench.sim.prefix import PrefixCache
from bench.sim.slots import Slots


class Sink(Protocol):
    """Who asked for a sequence."""

    def token(self, sequence: Sequence) -> None:
        """One more token, perhaps the last."""

    def broke(self) -> None:
        """The engine died."""


@dataclass(eq=False, slots=True)
class Sequence:
    """One answer being generated. `keys` are the prompt's blocks; `index` is its choice's."""

    sink: Sink
    index: int
    adapter: str | None
    keys: list[int]
    prompt_tokens: int
    limit: int
    reads_cache: bool = True
    streams: bool = False
    produced: int = 0
    to_prefill: int = 0
    held: int = 0

    @property
    def finished(self) -> bool:
        return self.produced >= self.limit


@dataclass(slots=True)
class Counts:
    """What an engine did since it started."""

    loads_asked: int = 0
    reads_again: int = 0
    slot_swaps: int = 0
    stalled_ms: float = 0.0
    steps: int = 0
    generated_tokens: int = 0
    sequences: int = 0
    lag_s: float = 0.0


@dataclass(eq=False, slots=True)
class Engine:
    """One replica's GPU. `slow` stretches every step; a hung engine never ends its step."""

    figures: Figures
    speed: float
    loop: asyncio.AbstractEventLoop
    readable: Callable[[str], bool] = lambda name: True
    slow: float = 1.0
    hung: bool = False
    dead: bool = False
    counts: Counts = field(default_factory=Counts)
    slots: Slots = field(init=False)
    cache: PrefixCache = field(init=False)
    running: list[Sequence] = field(default_factory=list)
    waiting: deque[Sequence] = field(default_factory=deque)
    _loads: deque[tuple[str, asyncio.Future[None]]] = field(default_factory=deque)
    _timer: asyncio.TimerHandle | None = None
    _due: float = 0.0
    _scheduled: list[Sequence] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.slots = Slots(self.figures.gpu_slots, self.figures.cpu_slots)
        self.cache = PrefixCache(self.figures.blocks)

    # What is asked of it

    def add(self, sequences: list[Sequence]) -> None:
        self.counts.sequences += len(sequences)
        self.waiting.extend(sequences)
        self._wake()

    def load(self, name: str) -> asyncio.Future[None]:
        """Read an adapter between two steps; done when it is in its slots."""
        future = self.loop.create_future()
        self._loads.append((name, future))
        self._wake()
        return future

    def abort(self, sink: Sink) -> None:
        """Whoever asked has left."""
        for sequence in [each for each in self.running if each.sink is sink]:
            self._leave(sequence)
        self.waiting = deque(each for each in self.waiting if each.sink is not sink)

    def die(self) -> None:
        """EngineDeadError for all who wait; nothing moves from here on."""
        self.dead = True
        self.stop()
        sinks = {id(each.sink): each.sink for each in (*self.running, *self.waiting)}
        self.running, self.waiting = [], deque()
        for sink in sinks.values():
            sink.broke()
        for _, future in self._loads:
            if not future.done():
                future.set_exception(EngineDead())
        self._loads.clear()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def resume(self) -> None:
        """After `hung` was lifted."""
        self.hung = False
        self._wake()

    # Steps

    def _wake(self) -> None:
        if self._timer is None and not self.dead and not self.hung:
            self._due = self.loop.time()
            self._begin()

    def _after(self, ms: float, then: Callable[[], None]) -> None:
        """Steps follow each other on a clock of their own: timers are late, their sum is not."""
        self._due += ms * self.slow / 1000 / self.speed
        self._timer = self.loop.call_at(self._due, self._fire, then)

    def _fire(self, then: Callable[[], None]) -> None:
        self._timer = None
        if self.hung or self.dead:
            return
        self.counts.lag_s = max(self.counts.lag_s, self.loop.time() - self._due)
        then()

    def _begin(self) -> None:
        if self._loads:
            name, future = self._loads.popleft()
            self._after(self._use(name, asked=True), lambda: self._loaded(future))
            return
        self._admit()
        if not self.running:
            return
        stall_ms = 0.0
        for name in dict.fromkeys(each.adapter for each in self.running):
            if name is None:
                continue
            if name not in self.slots.cpu and not self.readable(name):
                self.die()  # as vLLM does when an evicted adapter's files are gone
                return
            stall_ms += self._use(name)
        self._after(stall_ms + self._plan(), self._end)

    def _use(self, name: str, *, asked: bool = False) -> float:
        moved = self.slots.use(name)
        ms = 0.0
        if moved.from_disk:
            ms += self.figures.disk_load_ms
            self.counts.loads_asked += asked
            self.counts.reads_again += not asked
        if moved.to_gpu:
            ms += self.figures.slot_swap_ms
            self.counts.slot_swaps += 1
        self.counts.stalled_ms += ms
        return ms

    def _loaded(self, future: asyncio.Future[None]) -> None:
        if not future.done():
            future.set_result(None)
        self._begin()

    def _admit(self) -> None:
        """Move from waiting to running what fits: sequences, blocks, and adapters in one step."""
        if not self.waiting:
            return
        figures = self.figures
        adapters = {each.adapter for each in self.running if each.adapter is not None}
        budget = figures.max_num_batched_tokens - sum(max(1, s.to_prefill) for s in self.running)
        skipped: list[Sequence] = []
        while self.waiting and budget > 0 and len(self.running) < figures.max_num_seqs:
            sequence = self.waiting.popleft()
            name = sequence.adapter
            if name is not None and name not in adapters and len(adapters) >= figures.gpu_slots:
                skipped.append(sequence)
                continue
            if not self._place(sequence):
                skipped.append(sequence)
                break
            if name is not None:
                adapters.add(name)
            budget -= sequence.to_prefill
        self.waiting.extendleft(reversed(skipped))

    def _place(self, sequence: Sequence) -> bool:
        figures, cache = self.figures, self.cache
        size = figures.block_tokens
        held = -(-(sequence.prompt_tokens + sequence.limit) // size)
        if self.running and cache.held + held > cache.blocks:
            return False
        found = cache.leading(sequence.keys) if sequence.reads_cache else 0
        hit = min(found * size, sequence.prompt_tokens - 1)
        sequence.to_prefill = sequence.prompt_tokens - hit
        sequence.held = held - len(sequence.keys)
        cache.held += sequence.held
        if sequence.reads_cache:
            cache.queried_tokens += sequence.prompt_tokens
            cache.hit_tokens += hit
        # As in vLLM a block can be found from the moment it is scheduled, in the same step too.
        cache.add(sequence.keys)
        self.running.append(sequence)
        return True

    def _plan(self) -> float:
        """Share the step's tokens out, those that decode first; returns its length."""
        budget = self.figures.max_num_batched_tokens
        self._scheduled = [each for each in self.running if each.to_prefill == 0]
        decoding = len(self._scheduled)
        budget -= decoding
        prefill = 0
        for sequence in self.running:
            if sequence.to_prefill == 0:
                continue
            part = min(sequence.to_prefill, budget)
            if part <= 0:
                break
            sequence.to_prefill -= part
            budget -= part
            prefill += part
            if sequence.to_prefill == 0:
                self._scheduled.append(sequence)
        return self.figures.step_ms(prefill, decoding)

    def _end(self) -> None:
        self.counts.steps += 1
        # Those who were aborted during the step are no longer held anywhere.
        for sequence in self._scheduled:
            if sequence.held < 0:
                continue
            sequence.produced += 1
            self.counts.generated_tokens += 1
            if sequence.produced >= sequence.limit:
                self._leave(sequence)
                sequence.sink.token(sequence)
            elif sequence.streams:
                sequence.sink.token(sequence)
        self._scheduled = []
        if self._timer is None and not self.dead:
            self._begin()

    def _leave(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.cache.held -= sequence.held
        sequence.held = -1


class EngineDead(Exception):
    """The engine is dead and its server still answers."""
