"""/v1/fine_tuning/jobs: OpenAI's fine-tuning API on the job queue.

What comes in: JSON. What goes out: jobs, their events and checkpoints. A key sees its own jobs;
an admin sees everybody's.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request

from app.api.admin.shapes import InRooms, refusals
from app.api.openai.fine_tuning_json import (
    JOB_ID,
    CheckpointObjects,
    EventObjects,
    FineTuningJob,
    FineTuningJobs,
    NewFineTuningJob,
    checkpoint_json,
    event_json,
    event_number,
    job_json,
)
from app.api.openai.shapes import OpenAiRoute, Trainer, owner_of
from app.api.rooms import Rooms
from app.control import fine_tune_jobs as jobs
from app.control import fine_tuning
from app.control.checkpoints import checkpoint_alias
from app.control.fine_tune_jobs import JobView
from app.domain import Job, JobStatus, Scope
from app.errors import Forbidden, InvalidRequest, NotTrainable
from app.serving.resolve import resolve

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["Fine-tuning"], route_class=OpenAiRoute)

JobId = Annotated[str, Path(description="The job's id.", examples=[JOB_ID])]
Limit = Annotated[int, Query(ge=1, le=100, description="At most so many.")]
After = Annotated[str | None, Query(description="Those after this id, the page's last.")]

#: How long after a job's end its model may not have come to this gateway yet.
_FRESH = timedelta(minutes=1)

_METADATA: dict[str, Any] = {
    "parameters": [
        {
            "name": "metadata",
            "in": "query",
            "style": "deepObject",
            "explode": True,
            "description": "Only jobs with these pairs: `metadata[team]=sea`. `metadata=null`: "
            "only jobs without any.",
            "schema": {"type": "object", "additionalProperties": {"type": "string"}},
        }
    ]
}


@router.post(
    "",
    summary="Create a fine-tuning job",
    response_model=FineTuningJob,
    responses=refusals(400, 404, 409),
)
async def create(body: NewFineTuningJob, rooms: InRooms, caller: Trainer) -> FineTuningJob:
    """Queue a job that trains an adapter on a file of examples.

    The file is checked line by line first; what is wrong is said with line numbers. The model the
    job makes is served as soon as it has succeeded, as `fine_tuned_model`, and so is each epoch's
    checkpoint.
    """
    wanted = body.wanted()
    if wanted.priority > 0 and Scope.ADMIN not in caller.scopes:
        raise Forbidden("A priority above 0 needs a key with the scope 'admin'.", param="priority")
    snapshot = rooms.snapshots.current
    route = resolve(snapshot, body.model, caller)
    if route.version is not None:
        raise NotTrainable(f"{body.model!r} is an adapter of {route.base_model!r}: name that base.")
    pool = snapshot.pools[route.pool]
    job = await fine_tuning.create(rooms, pool, wanted, caller.key_id, owner_of(caller))
    rooms.runner.wake()
    return await _viewed(rooms, job)


@router.get(
    "",
    summary="List fine-tuning jobs",
    response_model=FineTuningJobs,
    openapi_extra=_METADATA,
    responses=refusals(400, 404),
)
async def list_jobs(
    request: Request, rooms: InRooms, caller: Trainer, limit: Limit = 20, after: After = None
) -> FineTuningJobs:
    """The key's jobs, the newest first."""
    metadata, without = _metadata_of(request)
    async with rooms.db.read() as session:
        found, has_more = await jobs.list_(
            session,
            owner_of(caller),
            metadata=metadata,
            without_metadata=without,
            after=after,
            limit=limit,
        )
        views = [await jobs.view(session, rooms.clock, job, rooms.trainers) for job in found]
    return FineTuningJobs(data=[_json(rooms, view) for view in views], has_more=has_more)


@router.get(
    "/{job_id}",
    summary="Retrieve a fine-tuning job",
    response_model=FineTuningJob,
    responses=refusals(404),
)
async def retrieve(job_id: JobId, rooms: InRooms, caller: Trainer) -> FineTuningJob:
    """One job. While it waits, `queue_position` jobs go before it."""
    async with rooms.db.read() as session:
        job = await jobs.get(session, job_id, owner_of(caller))
        view = await jobs.view(session, rooms.clock, job, rooms.trainers)
    await _settled(rooms, job)
    return _json(rooms, view)


@router.post(
    "/{job_id}/cancel",
    summary="Cancel a fine-tuning job",
    response_model=FineTuningJob,
    responses=refusals(404, 409),
)
async def cancel(job_id: JobId, rooms: InRooms, caller: Trainer) -> FineTuningJob:
    """Stop a job for good: at once if it waits, else within a step. Its checkpoints stay."""
    async with rooms.db.begin() as session:
        job = await jobs.cancel(session, rooms.clock, job_id, owner_of(caller))
    rooms.runner.nudge(job_id)
    return await _viewed(rooms, job)


@router.post(
    "/{job_id}/pause",
    summary="Pause a fine-tuning job",
    response_model=FineTuningJob,
    responses=refusals(404, 409),
)
async def pause(job_id: JobId, rooms: InRooms, caller: Trainer) -> FineTuningJob:
    """Lay a job aside, so that others can be trained: at once if it waits, else after its step."""
    async with rooms.db.begin() as session:
        job = await jobs.pause(session, rooms.clock, job_id, owner_of(caller))
    rooms.runner.nudge(job_id)
    return await _viewed(rooms, job)


@router.post(
    "/{job_id}/resume",
    summary="Resume a fine-tuning job",
    response_model=FineTuningJob,
    responses=refusals(404, 409),
)
async def resume(job_id: JobId, rooms: InRooms, caller: Trainer) -> FineTuningJob:
    """Queue a paused job again. It goes on exactly where it was."""
    async with rooms.db.begin() as session:
        job = await jobs.resume(session, rooms.clock, job_id, owner_of(caller))
    rooms.runner.nudge(job_id)
    rooms.runner.wake()
    return await _viewed(rooms, job)


@router.get(
    "/{job_id}/events",
    summary="List a job's events",
    response_model=EventObjects,
    responses=refusals(400, 404),
)
async def list_events(
    job_id: JobId, rooms: InRooms, caller: Trainer, limit: Limit = 20, after: After = None
) -> EventObjects:
    """What happened to a job, the newest first: messages, and each step's numbers."""
    number = None if after is None else event_number(job_id, after)
    async with rooms.db.read() as session:
        job = await jobs.get(session, job_id, owner_of(caller))
        events, has_more = await jobs.events(session, job, after=number, limit=limit)
    return EventObjects(data=[event_json(event) for event in events], has_more=has_more)


@router.get(
    "/{job_id}/checkpoints",
    summary="List a job's checkpoints",
    response_model=CheckpointObjects,
    responses=refusals(400, 404),
)
async def list_checkpoints(
    job_id: JobId, rooms: InRooms, caller: Trainer, limit: Limit = 10, after: After = None
) -> CheckpointObjects:
    """What a job registered along the way, the newest first. Each can be put in `model`."""
    async with rooms.db.read() as session:
        job = await jobs.get(session, job_id, owner_of(caller))
        found, has_more = await jobs.checkpoints(session, job, after=after, limit=limit)
    data = [checkpoint_json(checkpoint) for checkpoint in found]
    return CheckpointObjects(
        data=data,
        has_more=has_more,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
    )


def _metadata_of(request: Request) -> tuple[dict[str, str], bool]:
    """The pairs of `metadata[k]=v`, and whether only jobs without metadata are wanted."""
    pairs: dict[str, str] = {}
    without = False
    for name, value in request.query_params.multi_items():
        if name == "metadata":
            if value not in ("null", ""):
                raise InvalidRequest("metadata is null, or metadata[k]=v.", param="metadata")
            without = True
        elif name.startswith("metadata[") and name.endswith("]"):
            pairs[name[len("metadata[") : -1]] = value
    return pairs, without


async def _viewed(rooms: Rooms, job: Job) -> FineTuningJob:
    async with rooms.db.read() as session:
        return _json(rooms, await jobs.view(session, rooms.clock, job, rooms.trainers))


async def _settled(rooms: Rooms, job: Job) -> None:
    """Before anyone reads here that a job has succeeded, let this gateway serve what it made.

    Whoever waits for that asks for the model next, sooner than the registry is looked at again.
    """
    if job.status is not JobStatus.SUCCEEDED or job.finished_at is None:
        return
    if rooms.clock.now() - job.finished_at > _FRESH:
        return
    adapter = rooms.snapshots.current.adapters.get(job.spec["model"])
    last = checkpoint_alias(job.progress.get("total_steps", 0))
    if adapter is None or last not in adapter.aliases:
        await rooms.publish.settle()


def _json(rooms: Rooms, view: JobView) -> FineTuningJob:
    return job_json(
        view.job,
        position=view.position,
        starts_in_s=view.starts_in_s,
        now=rooms.clock.now(),
    )
