"""The engine thread: what waits, what runs, who is told.

What comes in: prompts from the event loop, adapters to load. What goes out: deltas, posted back
to the loop once per step. Only this thread touches the model. It must not know: HTTP, JSON.

    post ──▶ inbox ──▶ waiting ──▶ prefill ──▶ running ──▶ decode ──┐
                                                  ▲                 │ one token each
                                                  └─────────────────┘
New groups join between steps; a failing step loses the requests in it and nothing else.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future
from typing import TypeVar

import torch

from app.errors import AdapterLoadFailed, LoragateError
from app.settings import Settings
from app.telemetry import Event, log
from app.worker.errors import EngineDead, StepFailed
from app.worker.samplers.adapters import Adapter, Resident
from app.worker.samplers.batch import Batch
from app.worker.samplers.counters import Counters
from app.worker.samplers.lora import AdapterFiles, read_adapter
from app.worker.samplers.model import CausalModel
from app.worker.samplers.params import SamplingParams
from app.worker.samplers.sequence import Sequence
from app.worker.samplers.ticket import Ticket
from app.worker.samplers.waiting import Group, Waiting

logger = logging.getLogger(__name__)
T = TypeVar("T")
JOIN_S = 5.0
GONE = "The engine stopped before this was done; this worker answers nothing more."


class Engine:
    """Owns the thread, and with it the model. Made and started on the event loop."""

    def __init__(self, model: CausalModel, settings: Settings) -> None:
        self.tokens = model.tokens
        self.limits = model.limits
        self.dtype = model.dtype
        self.max_loras = settings.worker_max_loras
        self.counters = Counters()
        self._model = model
        self._max_rank = settings.worker_max_lora_rank
        self._max_batch = settings.worker_max_batch
        self._batch = Batch(model, settings.worker_max_batch_tokens)
        self._resident = Resident(model.layers, self._place, self.max_loras)
        self._files: dict[Adapter, AdapterFiles] = {}
        self._waiting = Waiting(
            self._resident, max_batch=self._max_batch, pass_tokens=settings.worker_max_batch_tokens
        )
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._stopping = False
        self._closed = False
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # On the event loop

    @property
    def alive(self) -> bool:
        return not self._closed

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Let the current step finish; what is left is told that it will not."""
        self._inbox.put(self._stop)
        self._thread.join(JOIN_S)

    def submit(
        self, prompts: list[list[int]], params: SamplingParams, adapter: Adapter | None
    ) -> Ticket:
        """Queue a request; its ticket yields what happens to it."""
        ticket = Ticket(expected=len(prompts) * params.n)
        self._inbox.put(lambda: self._enqueue(ticket, prompts, params, adapter))
        if self._closed:
            raise EngineDead(GONE)
        return ticket

    async def load(self, adapter: Adapter) -> None:
        """Bring an adapter into memory: read here, placed between two steps."""
        files = await asyncio.to_thread(read_adapter, adapter.path, max_rank=self._max_rank)
        await self._call(lambda: self._load(adapter, files))

    async def retire(self, adapter: Adapter) -> None:
        """The adapter will not be asked for again."""
        await self._call(lambda: self._resident.retire(adapter))

    async def _call(self, work: Callable[[], T]) -> T:
        future: Future[T] = Future()

        def answer() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(work())
            except Exception as exc:  # noqa: BLE001 - carried to the caller
                future.set_exception(exc)

        self._inbox.put(answer)
        if self._closed:
            raise EngineDead(GONE)
        return await asyncio.wrap_future(future)

    # On the engine thread

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while not self._stopping:
                    self._read_inbox()
                    self._step()
        except BaseException:
            logger.exception("engine thread died")
        finally:
            self._close()

    def _stop(self) -> None:
        self._stopping = True

    def _close(self) -> None:
        """Answer everything that is still asked. Later callers see `_closed` and ask no more."""
        self._closed = True
        self._stopping = True
        while not self._inbox.empty():
            self._inbox.get()()
        waiting = {group.ticket for group in self._waiting}
        running = {one.ticket for one in self._batch.sequences}
        for ticket in waiting | running:
            ticket.fail(EngineDead(GONE))
        self._notify(waiting | running)

    def _read_inbox(self) -> None:
        """Do what was asked; sleep only when there is nothing else to do."""
        idle = not self._waiting and not len(self._batch)
        try:
            while not self._stopping:
                self._inbox.get(block=idle)()
                idle = False
        except queue.Empty:
            return

    def _step(self) -> None:
        self._leave_cancelled()
        groups = self._waiting.admit(len(self._batch), self._refuse)
        if groups:
            self._attempt(_members(groups), lambda: self._prefill(groups))
        if len(self._batch):
            self._attempt(list(self._batch.sequences), self._decode)
        self.counters.steps += 1
        self.counters.observe(self._batch.sequences, self._waiting)

    def _prefill(self, groups: list[Group]) -> None:
        self._batch.prefill(groups)
        self.counters.prompt_tokens += sum(len(group.prompt) for group in groups)
        self._settle(_members(groups))

    def _decode(self) -> None:
        self._batch.decode()
        self._settle(list(self._batch.sequences))

    def _attempt(self, sequences: list[Sequence], work: Callable[[], None]) -> None:
        """Run a pass. If it fails, the requests in it fail; the next pass starts clean."""
        try:
            work()
        except Exception as exc:
            log(logger, logging.ERROR, Event.WORKER_STEP_FAILED, error=repr(exc))
            logger.debug("step failed", exc_info=exc)
            self._fail(sequences, StepFailed(f"The model failed on this request: {exc}"))
            if self._model.device.type == "cuda":
                torch.cuda.empty_cache()

    def _enqueue(
        self,
        ticket: Ticket,
        prompts: list[list[int]],
        params: SamplingParams,
        adapter: Adapter | None,
    ) -> None:
        try:
            groups = list(self._groups(ticket, prompts, params, adapter))
        except Exception as exc:  # noqa: BLE001 - one request is not the engine
            ticket.fail(StepFailed(f"This request could not be prepared: {exc}"))
            self._notify({ticket})
            return
        for group in groups:
            self._waiting.append(group)

    def _groups(
        self,
        ticket: Ticket,
        prompts: list[list[int]],
        params: SamplingParams,
        adapter: Adapter | None,
    ) -> Iterator[Group]:
        for place, prompt in enumerate(prompts):
            # More samples than rows are read in several goes.
            for begin in range(0, params.n, self._max_batch):
                sequences = []
                for sample in range(begin, min(begin + self._max_batch, params.n)):
                    index = place * params.n + sample
                    one = Sequence(ticket, index, prompt, params, adapter, self.tokens)
                    seed = None if params.seed is None else params.seed + sample
                    one.prepare(seed, self.limits.vocab_size, self._model.device)
                    sequences.append(one)
                yield Group(prompt, sequences, adapter)

    def _settle(self, sequences: list[Sequence]) -> None:
        """Tell everyone their news and take out who is done."""
        told: set[Ticket] = set()
        done: set[Sequence] = set()
        for sequence in sequences:
            delta = sequence.take()
            if delta is not None:
                sequence.ticket.add(delta)
                told.add(sequence.ticket)
            if sequence.finish_reason is not None:
                done.add(sequence)
                self.counters.finished(sequence.finish_reason)
        self.counters.generation_tokens += len(sequences)
        self._leave(done)
        self._notify(told)

    def _leave(self, sequences: set[Sequence]) -> None:
        for sequence in sequences:
            if sequence.adapter is not None:
                self._resident.release(sequence.adapter)
        if sequences:
            self._batch.drop(sequences)

    def _leave_cancelled(self) -> None:
        gone = {one for one in self._batch.sequences if one.ticket.cancelled}
        self.counters.finished("abort", len(gone))
        self._leave(gone)
        self._waiting.drop({group.ticket for group in self._waiting if group.ticket.cancelled})

    def _refuse(self, group: Group, error: LoragateError) -> None:
        self._fail(group.sequences, error, claimed=False)

    def _fail(
        self, sequences: list[Sequence], error: LoragateError, *, claimed: bool = True
    ) -> None:
        """End these sequences' requests, with all that belongs to them."""
        tickets = {one.ticket for one in sequences}
        running = {one for one in self._batch.sequences if one.ticket in tickets}
        lost = running | set(sequences) if claimed else running
        if len(running) == len(self._batch):
            self._batch.clear()
        self._leave(lost)
        self._waiting.drop(tickets)
        self.counters.finished("error", len(lost | set(sequences)))
        for ticket in tickets:
            ticket.fail(error)
        self._notify(tickets)

    def _notify(self, tickets: Collection[Ticket]) -> None:
        """One hop to the event loop for the whole step."""
        if tickets and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_wake, tickets)

    def _load(self, adapter: Adapter, files: AdapterFiles) -> None:
        self._files[adapter] = files
        try:
            ready = self._resident.ensure(adapter)
        finally:
            self._files.pop(adapter, None)
        if not ready:
            raise AdapterLoadFailed(
                f"All {self.max_loras} adapter slots are running; "
                "wait, or raise LORAGATE_WORKER_MAX_LORAS."
            )

    def _place(self, adapter: Adapter) -> None:
        files = self._files.pop(adapter, None)
        if files is None:
            files = read_adapter(adapter.path, max_rank=self._max_rank)
        self._model.layers.load(adapter.slot, files)


def _members(groups: list[Group]) -> list[Sequence]:
    return [sequence for group in groups for sequence in group.sequences]


def _wake(tickets: Collection[Ticket]) -> None:
    for ticket in tickets:
        ticket.wake()
