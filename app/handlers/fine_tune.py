"""What a fine-tune job does: load, work, apply.

What comes in: a job that was claimed. What goes out: its end, and with it the adapter that it
made. In between no transaction is open, and everything may be lost at any moment: called again,
it goes on where its recorded progress and the run on the worker say.

The transaction that ends the job registers its adapter: there is no moment at which one is there
without the other.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack, asynccontextmanager, suppress
from typing import Protocol

from app.control import files, rollout
from app.db.file_store import FileStore
from app.domain import Job, JobEvent, JobEventType, Trainer
from app.errors import Conflict, LoragateError, NotTrainable, RequestError, TrainerError
from app.handlers import fine_tune_load
from app.handlers.fine_tune_load import Attempt, load
from app.handlers.fine_tune_recorder import Recorder
from app.handlers.step_metrics import as_csv
from app.jobs import queue
from app.jobs.context import JobContext
from app.jobs.queue import NewEvent
from app.training.patience import Patience, Stopped
from app.training.run import ConnectTrainer, Run
from app.training.spec import FineTuneResult, FineTuneSpec

#: How long a job that has ended waits for a replica to have loaded its model.
LOAD_S = 10.0
#: How long the end of a job waits for its worker to forget the run; `tidy_runs` asks again.
FORGET_S = 10.0
_PAGE = 1000


class Rooms(fine_tune_load.Rooms, rollout.Rooms, Protocol):
    """What a fine-tune job needs of the running gateway."""

    @property
    def trainers(self) -> Mapping[str, Trainer]: ...


class FineTune:
    """The handler of fine-tune jobs: `jobs.runner.Handler`."""

    def __init__(self, rooms: Rooms, connect: ConnectTrainer) -> None:
        self._rooms = rooms
        self._connect = connect

    async def __call__(self, job: Job, ctx: JobContext) -> None:
        trainer = self._rooms.trainers.get(job.trainer or "")
        if trainer is None:
            raise NotTrainable(f"The trainer {job.trainer!r} of this job is not set up any more.")
        async with self._connect(trainer) as host:
            attempt = Attempt(
                rooms=self._rooms,
                ctx=ctx,
                job=job,
                spec=FineTuneSpec.from_json(job.spec),
                host=host,
                run=host.run(job.id),
                patience=Patience(ctx.clock, self._rooms.settings.trainer_patience_s),
            )
            try:
                await _see_through(self._rooms, attempt)
            except RequestError:  # the job fails, and nobody asks for its run again
                await _forget(attempt.run)
                raise


async def _see_through(rooms: Rooms, attempt: Attempt) -> None:
    recorder = await _work(attempt)
    if recorder is not None and recorder.last is not None:
        await _apply(attempt, recorder)
        await _load_ahead(rooms, attempt.spec.model)
    elif attempt.ctx.flags.cancel:
        await _cancel(attempt, recorder)
    else:
        return await _lay_aside(attempt, recorder)
    await _forget(attempt.run)


async def _work(attempt: Attempt) -> Recorder | None:
    """Load and work. The recorder has the last weights, unless the job is to stop before."""
    with ExitStack() as spools:
        async with _stopped_by_flags(attempt):
            try:
                loop, recorder = await load(attempt, spools)
            except Stopped:
                return None
            try:
                await loop.run()
            except RequestError:  # the steps before this one may tell why
                await recorder.leave()
                raise
            return recorder


async def _apply(attempt: Attempt, recorder: Recorder) -> None:
    """End the job, and register what it made, in one transaction."""
    ctx, model = attempt.ctx, attempt.spec.model
    await recorder.flush()
    csv = as_csv([event.data async for event in _steps(attempt)])
    digest = await asyncio.to_thread(_keep, attempt.rooms.files, csv)
    made = NewEvent(
        JobEventType.MESSAGE,
        f"New fine-tuned model created: {model}",
        data={"fine_tuned_model": model},
    )
    async with ctx.ending() as session:
        await recorder.register_last(session, [made])
        file = await files.create(
            session,
            ctx.clock,
            key_id=attempt.job.key_id,
            filename="step_metrics.csv",
            purpose=files.RESULTS,
            size=len(csv),
            digest=digest,
        )
        result = FineTuneResult(
            model=model,
            trained_tokens=recorder.of.facts["trained_tokens"],
            result_files=(file.id,),
            hyperparameters=recorder.of.facts["hyperparameters"],
        )
        await queue.finish(session, ctx.clock, ctx.lease, result.to_json())


async def _load_ahead(rooms: Rooms, model: str) -> None:
    """Have the model loaded by the time that someone who saw the job succeed asks for it.

    The job has ended: nothing depends on this, and what is wrong here is said to whoever asks.
    """
    with suppress(LoragateError, TimeoutError):
        async with asyncio.timeout(LOAD_S):
            await rooms.publish.settle(LOAD_S)
            made = rooms.snapshots.current.adapters.get(model)
            if made is not None:
                await rollout.prepare(rooms, model, [max(made.versions)])


def _keep(store: FileStore, content: bytes) -> str:
    with store.incoming(len(content)) as incoming:
        incoming.write(content)
        return store.commit(incoming)


async def _steps(attempt: Attempt) -> AsyncIterator[JobEvent]:
    """The job's metrics events, in order."""
    after: int | None = None
    more = True
    while more:
        async with attempt.ctx.db.read() as session:
            page, more = await queue.events(
                session, attempt.job, after=after, limit=_PAGE, newest_first=False
            )
        for event in page:
            after = event.number
            if event.step is not None:
                yield event


async def _cancel(attempt: Attempt, recorder: Recorder | None) -> None:
    ctx = attempt.ctx
    if recorder is not None:
        await recorder.leave()
    async with ctx.ending() as session:
        await queue.cancelled(session, ctx.clock, ctx.lease)


async def _lay_aside(attempt: Attempt, recorder: Recorder | None) -> None:
    """Let others have the worker's memory; the run's state brings everything back."""
    # Away, without the run, or busy with ops that it could not be told to cancel: the next attempt
    # finds what there is.
    with suppress(TrainerError, Conflict):
        await attempt.run.unload()
    ctx, progress = attempt.ctx, None
    if recorder is not None:
        await recorder.flush()
        progress = recorder.progress()
    async with ctx.ending() as session:
        await queue.paused(session, ctx.clock, ctx.lease, progress)


async def _forget(run: Run) -> None:
    with suppress(LoragateError, TimeoutError):
        async with asyncio.timeout(FORGET_S):
            await run.delete()


@asynccontextmanager
async def _stopped_by_flags(attempt: Attempt) -> AsyncIterator[None]:
    """Let the wish to cancel or pause end whatever is waited for in the block."""

    async def watch() -> None:
        await attempt.ctx.flagged()
        attempt.patience.stop()

    watching = asyncio.get_running_loop().create_task(watch(), name=f"flags:{attempt.job.id}")
    try:
        yield
    finally:
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching
