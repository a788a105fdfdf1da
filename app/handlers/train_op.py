"""What a job of one single op does: load, work, apply.

What comes in: a job that was claimed. What goes out: its end, with what a client of the Tink API
is told as its result. Ops of one run are done in the order in which they were asked for. What a
run is now is sampled by name: its weights are saved and registered as a version of its adapter
when they have changed since that was done last.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager, suppress
from functools import partial
from typing import Any, Protocol

from app.control import adapters, op_payloads, registration, runs
from app.control.registration import Registration
from app.domain import Job, JobError, LoraSpec, Trainer, TrainingRun
from app.errors import (
    AdapterLoadFailed,
    Conflict,
    DeadlineExceeded,
    InvalidRequest,
    LoragateError,
    NoReplicaAvailable,
    NotFound,
    NotTrainable,
    RequestError,
    UpstreamError,
)
from app.handlers import draw
from app.handlers.fine_tune_load import usual_modules
from app.handlers.fine_tune_recorder import RunSource
from app.handlers.run_ops import SAVED, Attempt, perform, to_make, to_pass, to_save, to_step
from app.jobs import queue
from app.jobs.context import JobContext
from app.ops import Result
from app.training import op_data, single_ops
from app.training.patience import Patience
from app.training.run import TrainerHost
from app.training.single_ops import AddLora, FwdBwd, Optim, RemoveLora, Sample

#: Versions of a run's adapter that are kept: samples of an older one may still be under way.
KEPT_VERSIONS = 8
#: How long an op waits for one before it that was put off, before it looks again.
WAIT_S = 0.2

Connect = Callable[[Trainer], AbstractAsyncContextManager[TrainerHost]]

#: What goes wrong while sampling has been tried again as often as it makes sense.
_FINAL = (AdapterLoadFailed, NoReplicaAvailable, UpstreamError, DeadlineExceeded)


class Rooms(draw.Rooms, registration.Rooms, Protocol):
    """What single ops need of the running gateway."""

    @property
    def trainers(self) -> Mapping[str, Trainer]: ...


class TrainOp:
    """The handler of single ops: `jobs.runner.Handler`."""

    def __init__(self, rooms: Rooms, connect: Connect) -> None:
        self._rooms = rooms
        self._connect = connect

    async def __call__(self, job: Job, ctx: JobContext) -> None:
        async with ctx.db.read() as session:
            payload = await op_payloads.of_job(session, job)
        spec = await asyncio.to_thread(single_ops.read, job.spec, payload)
        try:
            if isinstance(spec, Sample) and spec.model is not None:
                await self._sample(job, ctx, spec.model, spec)
            else:
                await self._on_run(job, ctx, spec)
        except _FINAL as exc:
            async with ctx.ending() as session:
                error = JobError(exc.code, str(exc), exc.param)
                await queue.fail(session, ctx.clock, ctx.lease, error)

    async def _on_run(self, job: Job, ctx: JobContext, spec: single_ops.Spec) -> None:
        """An op that its run's worker has to do with, once it is its turn."""
        async with ctx.db.read() as session:
            of = await runs.get(session, spec.run)
            early = await runs.must_wait(session, job)
        if early:
            await _give_way(ctx)
            return
        trainer = self._rooms.trainers.get(of.trainer)
        if trainer is None:
            raise NotTrainable(f"The trainer {of.trainer!r} of {of.id!r} is not set up any more.")
        async with self._connect(trainer) as host:
            patience = Patience(ctx.clock, self._rooms.settings.trainer_patience_s)
            attempt = Attempt(ctx, job, of, host, host.run(of.id), patience)
            match spec:
                case AddLora():
                    await self._add_lora(attempt)
                case RemoveLora():
                    await self._remove_lora(attempt)
                case FwdBwd():
                    await _fwdbwd(attempt, spec)
                case Optim():
                    await self._optim(attempt, spec)
                case Sample():
                    await self._sample_now(attempt, spec)

    async def _add_lora(self, attempt: Attempt) -> None:
        """Make the run; if that cannot be, its name is as if it had never been."""
        try:
            attempt = await _shaped(attempt)
            saved, _ = await perform(attempt, to_make(attempt.of))
            version = await self._register(attempt, saved)
        except (RequestError, AdapterLoadFailed) as exc:
            await _delete(attempt)
            ctx = attempt.ctx
            async with ctx.ending() as session:
                await runs.remove(session, ctx.clock, attempt.of.id)
                error = JobError(exc.code, str(exc), exc.param)
                await queue.fail(session, ctx.clock, ctx.lease, error)
            return
        ctx, result = attempt.ctx, {"model_id": attempt.of.id, "model": version}
        async with ctx.ending() as session:
            await queue.finish(session, ctx.clock, ctx.lease, result)

    async def _remove_lora(self, attempt: Attempt) -> None:
        await attempt.patience.again(attempt.run.delete)
        ctx, name = attempt.ctx, attempt.of.id
        async with ctx.ending() as session:
            await runs.remove(session, ctx.clock, name)
            await op_payloads.drop_before(session, name, attempt.job)
            with suppress(NotFound):  # an admin has deleted it
                await adapters.delete(session, ctx.clock, name)
            result = {"model_id": name, "status": "deleted"}
            await queue.finish(session, ctx.clock, ctx.lease, result)
        await self._rooms.publish.settle()

    async def _optim(self, attempt: Attempt, spec: Optim) -> None:
        stepped, _ = await perform(attempt, to_step(spec))
        ctx = attempt.ctx
        async with ctx.ending() as session:
            steps = await runs.stepped(session, attempt.of.id)
            # The worker has saved a state: what came before it is not done again.
            await op_payloads.drop_before(session, attempt.of.id, attempt.job)
            result = {
                "model_id": attempt.of.id,
                "step": steps,
                "metrics": dict(stepped.metrics),
            }
            await queue.finish(session, ctx.clock, ctx.lease, result)

    async def _sample_now(self, attempt: Attempt, spec: Sample) -> None:
        """Sample from the run's weights as they are, registered if they are not yet."""
        of = attempt.of
        if of.version is None or of.saved_steps != of.optim_steps:
            (saved,) = await perform(attempt, to_save(of))
            model = await self._register(attempt, saved)
        else:
            model = f"{of.id}@{of.version}"
        await self._sample(attempt.job, attempt.ctx, model, spec)

    async def _sample(self, job: Job, ctx: JobContext, model: str, spec: Sample) -> None:
        if model not in self._rooms.snapshots.current.routes:
            await self._rooms.publish.settle()  # another gateway may have registered it just now
        result = await draw.draw(self._rooms, job.key_id, model, spec)
        async with ctx.ending() as session:
            await op_payloads.drop(session, job)
            await queue.finish(session, ctx.clock, ctx.lease, result)

    async def _register(self, attempt: Attempt, saved: Result) -> str:
        """Make what the worker has saved the newest version of the run's adapter."""
        of, ctx = attempt.of, attempt.ctx
        wanted = Registration(
            name=of.id,
            source=RunSource(attempt.run, SAVED, tuple(saved.files), saved.probe),
            base_model=of.base_model,
            metadata=_provenance(of, attempt.job),
            by=of.key_id,
        )
        registered = await registration.register(self._rooms, wanted)
        number = registered.version.number
        async with ctx.db.begin() as session:
            await runs.saved(session, of.id, steps=of.optim_steps, version=number)
            await queue.heartbeat(session, ctx.clock, ctx.lease, lease_s=ctx.lease_s)
        await self._forget_version(attempt, number - KEPT_VERSIONS)
        return f"{of.id}@{number}"

    async def _forget_version(self, attempt: Attempt, number: int) -> None:
        if number < 1:
            return
        with suppress(Conflict, NotFound):  # an alias points to it; it is gone
            async with attempt.ctx.db.begin() as session:
                await adapters.delete_version(
                    session, attempt.ctx.clock, adapter=attempt.of.id, number=number
                )


async def _shaped(attempt: Attempt) -> Attempt:
    """The attempt at a run that fits its worker.

    Raises:
        InvalidRequest: it does not.
    """
    info = await attempt.patience.again(attempt.host.info)
    lora = attempt.of.lora
    unknown = sorted(set(lora.target_modules) - set(info.target_modules))
    if unknown:
        raise InvalidRequest(
            f"target_modules has {unknown[0]!r}; the base has {', '.join(info.target_modules)}.",
            param="target_modules",
        )
    if lora.rank > info.max_rank:
        raise InvalidRequest(
            f"rank is {lora.rank}; the trainer takes {info.max_rank} at most.", param="rank"
        )
    modules = lora.target_modules or usual_modules(info.target_modules)
    fitting = LoraSpec(lora.rank, lora.alpha, modules, lora.seed)
    probe_tokens = attempt.of.probe_tokens or await attempt.patience.again(
        partial(op_data.first_probe_tokens, attempt.host)
    )
    async with attempt.ctx.db.begin() as session:
        await runs.shape(session, attempt.of.id, fitting, info.base_model)
        of = await runs.probe_by(session, attempt.of.id, probe_tokens)
    return Attempt(attempt.ctx, attempt.job, of, attempt.host, attempt.run, attempt.patience)


async def _delete(attempt: Attempt) -> None:
    """Let the worker forget what nobody will ask for; one that is away may keep it."""
    with suppress(LoragateError):
        await attempt.run.delete()


async def _give_way(ctx: JobContext) -> None:
    """Let an op that came before go first."""
    reason = JobError("waiting", "An op of the same model that came before has not ended.")
    async with ctx.ending() as session:
        await queue.give_back(session, ctx.clock, ctx.lease, reason, count=False, delay_s=WAIT_S)


async def _fwdbwd(attempt: Attempt, spec: FwdBwd) -> None:
    ctx, job = attempt.ctx, attempt.job
    op = await attempt.patience.again(partial(to_pass, attempt.host, spec))
    (result,) = await perform(attempt, [op])
    rows = op_data.probe_tokens(op.data)
    async with ctx.ending() as session:
        if not single_ops.trains(job.spec):
            await op_payloads.drop(session, job)
        elif rows:
            await runs.probe_by(session, attempt.of.id, rows)
        await queue.finish(session, ctx.clock, ctx.lease, _passed(result, spec))


def _passed(result: Result, spec: FwdBwd) -> dict[str, Any]:
    """What a pass answers: the mean loss of what counts, the sums, and logprobs if asked for."""
    metrics = dict(result.metrics)
    count = metrics.get("pairs:sum") if spec.loss == "dpo" else metrics.get("weight:sum")
    total = metrics.get("loss:sum", 0.0)
    found: dict[str, Any] = {
        "model_id": spec.run,
        "loss": total / count if count else total,
        "metrics": metrics,
    }
    if spec.outputs:
        rows = [memoryview(row.data).cast("f").tolist() for row in result.outputs]
        found["loss_fn_outputs"] = [{"logprobs": row} for row in rows]
    return found


def _provenance(of: TrainingRun, job: Job) -> dict[str, Any]:
    return {
        "job": job.id,
        "trainer": of.trainer,
        "optim_steps": of.optim_steps,
        "rank": of.lora.rank,
        "alpha": of.lora.alpha,
        "seed": of.lora.seed,
    }
