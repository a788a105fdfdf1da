"""Single ops on a run's worker: numbered once, done once, repeated when the worker lost them.

What comes in: a job that was claimed, and the ops it stands for. What goes out: their results. The
numbers that a job's ops get are recorded with the job before the worker hears of them, so that
whoever runs it next sends the same. A worker that was lost has its last state; the ops after that
are made from the jobs that asked for them and done again, for which their payloads are kept until
then. It must not know: adapters, versions, what the results are for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from app.control import op_payloads, runs
from app.domain import Job, JobStatus, TrainingRun
from app.errors import Conflict, RequestError
from app.jobs import queue
from app.jobs.context import JobContext
from app.ops import ForwardBackward, Op, Result, SaveForSampling, SaveState
from app.training import op_data, single_ops
from app.training.patience import Patience
from app.training.run import Run, TrainerHost
from app.training.single_ops import FwdBwd, Optim

#: What the worker calls the adapter that was saved last.
SAVED = "served"
#: More attempts at one job than there will ever be.
_ATTEMPTS = 1 << 16


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt at a job, and what it works with. `of` is the run as it was when it began."""

    ctx: JobContext
    job: Job
    of: TrainingRun
    host: TrainerHost
    run: Run
    patience: Patience

    @property
    def fence(self) -> int:
        """Greater for each job of a run, and for each attempt at one."""
        return self.job.number * _ATTEMPTS + self.ctx.lease.attempt


def to_make(of: TrainingRun) -> list[Op]:
    """The ops of a new run: its weights, and a state of it."""
    return [*to_save(of), SaveState()]


async def to_pass(host: TrainerHost, spec: FwdBwd) -> ForwardBackward:
    """The op of a pass; the same one every time.

    Raises:
        InvalidRequest: the data are not such as can be trained on.
        TrainerError: the worker, which renders conversations, does not answer.
    """
    data = await op_data.datums(host, spec.data)
    return ForwardBackward(data, spec.loss, spec.config, spec.forward_only, spec.outputs)


def to_step(spec: Optim) -> list[Op]:
    """The ops of a step: it, and a state, so that little is done again after a loss."""
    return [spec.step(), SaveState()]


def to_save(of: TrainingRun) -> list[Op]:
    """The op that writes a run's weights, with a probe of them."""
    return [SaveForSampling(SAVED, [list(tokens) for tokens in of.probe_tokens])]


async def perform(attempt: Attempt, ops: Sequence[Op]) -> list[Result]:
    """Have a job's ops done by its run's worker.

    Raises:
        RequestError: an op failed and would fail again; its numbers are free.
        TrainerError: the worker did not come back.
    """
    first = await _numbered(attempt, len(ops))
    try:
        return await attempt.patience.again(partial(_carry_out, attempt, first, ops))
    except RequestError:
        await _free(attempt)
        raise


async def _numbered(attempt: Attempt, count: int) -> int:
    """The number of the job's first op: the one it has, or the run's next."""
    if "seq" in attempt.job.progress:
        return int(attempt.job.progress["seq"])
    ctx = attempt.ctx
    async with ctx.db.begin() as session:
        first = await runs.number(session, attempt.of.id, count)
        await queue.heartbeat(
            session,
            ctx.clock,
            ctx.lease,
            lease_s=ctx.lease_s,
            progress={"seq": first, "ops": count},
        )
    return first


async def _carry_out(attempt: Attempt, first: int, ops: Sequence[Op]) -> list[Result]:
    """Hand the ops over and wait for their results; the worker may have had them before."""
    run = attempt.run
    of = attempt.of
    status = await run.open(of.worker_base, of.lora, attempt.fence)
    for seq, op in (await _lost(attempt, status.next_seq, first)).items():
        await run.submit(seq, op, status.next_seq - 1)
        await run.outcome(seq)
    for seq, op in enumerate(ops, first):
        if seq >= status.next_seq:
            await run.submit(seq, op, first - 1)
    return [await run.outcome(seq) for seq in range(first, first + len(ops))]


async def _lost(attempt: Attempt, next_seq: int, first: int) -> Mapping[int, Op]:
    """The ops before the job's own that the worker does not have done."""
    if next_seq >= first:
        return {}
    async with attempt.ctx.db.read() as session:
        jobs = await runs.numbered(session, attempt.of.id, next_seq, first)
    found: dict[int, Op] = {}
    for job in jobs:
        ops = await _again(attempt, job)
        found |= dict(enumerate(ops, job.progress["seq"]))
    wanted = range(next_seq, first)
    if any(seq not in found for seq in wanted):
        raise Conflict(
            f"The worker lost {attempt.of.id!r}, and not all that was done to it is known any "
            "more. Add a new one.",
            param="model_id",
        )
    return {seq: found[seq] for seq in wanted}


async def _again(attempt: Attempt, job: Job) -> list[Op]:
    """What a job's ops are repeated as; nothing if what they worked on was dropped.

    One that has failed did nothing, as far as its client knows, and of one that leaves the weights
    as they are the result is kept: of these, only the numbers are needed.
    """
    if job.status is not JobStatus.SUCCEEDED or not single_ops.trains(job.spec):
        return [SaveState()] * job.progress["ops"]
    async with attempt.ctx.db.read() as session:
        payload = await op_payloads.of_job(session, job)
    if "payload" in job.spec and payload is None:
        return []
    match single_ops.read(job.spec, payload):
        case FwdBwd() as spec:
            return [await to_pass(attempt.host, spec)]
        case Optim() as spec:
            return to_step(spec)
        case _:
            return []


async def _free(attempt: Attempt) -> None:
    """Take back what failed: later ops of the run get its numbers."""
    ctx = attempt.ctx
    status = await attempt.patience.again(attempt.run.cancel_ops)
    async with ctx.db.begin() as session:
        await runs.rewind(session, attempt.of.id, status.next_seq)
        await queue.heartbeat(session, ctx.clock, ctx.lease, lease_s=ctx.lease_s, progress={})
