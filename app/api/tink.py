"""/api/v1: single training ops, as Tink's clients know them.

What comes in: JSON. What goes out: what an op answered, or the id under which it can be asked for.
Every op is a job in the queue; a route without `_async` waits for it. Sent again with the same
`Idempotency-Key`, a request is not done again.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Response
from fastapi.responses import JSONResponse

from app import errors
from app.api.admin.shapes import InRooms, refusals
from app.api.openai.shapes import OpenAiRoute, Trainer, owner_of
from app.api.rooms import Rooms
from app.api.tink_json import (
    Deleted,
    Drawn,
    Fwdbwd,
    Info,
    Made,
    ModelData,
    ModelName,
    NewLora,
    Optim,
    Passed,
    Pending,
    Retrieve,
    Sample,
    Stepped,
)
from app.control import train_ops
from app.control.train_ops import Asking
from app.domain import Job, JobStatus, Pool, Principal
from app.errors import LoragateError, NotTrainable
from app.serving.resolve import resolve
from app.training import single_ops
from app.training.single_ops import RemoveLora

#: How long a client that waits for an op is kept; it can ask on with retrieve_future.
WAIT_S = 600.0
#: What a base is called by clients that know of one only.
BASE = "base"

_PENDING: dict[int | str, dict[str, Any]] = {
    202: {"model": Pending, "description": "It is not done yet: ask on with retrieve_future."}
}
_BY_CODE: dict[str, type[LoragateError]] = {
    each.code: each
    for each in vars(errors).values()
    if isinstance(each, type)
    and issubclass(each, LoragateError)
    and not issubclass(each, errors.AdapterRejected | errors.InvalidTrainingFile)
}

router = APIRouter(prefix="/api/v1", tags=["Single ops"], route_class=OpenAiRoute)


async def _asking(
    caller: Trainer,
    idempotency_key: Annotated[
        str | None,
        Header(max_length=255, description="Sent again with the same, nothing is done twice."),
    ] = None,
    x_idempotency_key: Annotated[
        str | None, Header(max_length=255, description="The same, as some clients call it.")
    ] = None,
) -> Asking:
    return Asking(caller.key_id, owner_of(caller), idempotency_key or x_idempotency_key)


Asks = Annotated[Asking, Depends(_asking)]


@router.post(
    "/add_lora",
    summary="Make an adapter to train",
    response_model=Made,
    responses=refusals(400, 404, 409) | _PENDING,
)
async def add_lora(body: NewLora, rooms: InRooms, caller: Trainer, asking: Asks) -> Response:
    """Make an adapter that changes nothing yet. It can be sampled from at once, by `model_id`."""
    return await _answered(rooms, asking, await _added(body, rooms, caller, asking))


@router.post(
    "/add_lora_async",
    summary="Begin to make an adapter to train",
    response_model=Pending,
    responses=refusals(400, 404, 409),
)
async def add_lora_async(body: NewLora, rooms: InRooms, caller: Trainer, asking: Asks) -> Pending:
    """The same, without waiting; ops on `model_id` may be sent already."""
    return _pending(await _added(body, rooms, caller, asking))


@router.post(
    "/remove_lora",
    summary="Remove an adapter",
    response_model=Deleted,
    responses=refusals(400, 404, 409) | _PENDING,
)
async def remove_lora(body: ModelName, rooms: InRooms, asking: Asks) -> Response:
    """Delete an adapter with its versions and its training state, after the ops that wait."""
    return await _answered(rooms, asking, await _removed(body, rooms, asking))


@router.post(
    "/remove_lora_async",
    summary="Begin to remove an adapter",
    response_model=Pending,
    responses=refusals(400, 404, 409),
)
async def remove_lora_async(body: ModelName, rooms: InRooms, asking: Asks) -> Pending:
    """The same, without waiting."""
    return _pending(await _removed(body, rooms, asking))


@router.post(
    "/fwdbwd",
    summary="Forward and backward pass",
    response_model=Passed,
    responses=refusals(400, 404, 409) | _PENDING,
)
async def fwdbwd(body: Fwdbwd, rooms: InRooms, asking: Asks) -> Response:
    """Add the gradient of a loss over `data` to what `optim` will step along.

    `loss` is the mean over what has a weight; the gradient is of the sum.
    """
    return await _answered(rooms, asking, await _submitted(rooms, asking, await body.spec()))


@router.post(
    "/fwdbwd_async",
    summary="Begin a forward and backward pass",
    response_model=Pending,
    responses=refusals(400, 404, 409),
)
async def fwdbwd_async(body: Fwdbwd, rooms: InRooms, asking: Asks) -> Pending:
    """The same, without waiting. Ops on one adapter are done in the order they were sent."""
    return _pending(await _submitted(rooms, asking, await body.spec()))


@router.post(
    "/optim",
    summary="Optimizer step",
    response_model=Stepped,
    responses=refusals(400, 404, 409) | _PENDING,
)
async def optim(body: Optim, rooms: InRooms, asking: Asks) -> Response:
    """An AdamW step along the gradient so far. The next sample is of the new weights."""
    return await _answered(rooms, asking, await _submitted(rooms, asking, body.spec()))


@router.post(
    "/optim_async",
    summary="Begin an optimizer step",
    response_model=Pending,
    responses=refusals(400, 404, 409),
)
async def optim_async(body: Optim, rooms: InRooms, asking: Asks) -> Pending:
    """The same, without waiting."""
    return _pending(await _submitted(rooms, asking, body.spec()))


@router.post(
    "/sample",
    summary="Sample",
    response_model=Drawn,
    responses=refusals(400, 404, 409) | _PENDING,
)
async def sample(body: Sample, rooms: InRooms, caller: Trainer, asking: Asks) -> Response:
    """Complete prompts with an adapter's weights as they are after the ops sent before."""
    return await _answered(rooms, asking, await _sampled(body, rooms, caller, asking))


@router.post(
    "/asample",
    summary="Begin to sample",
    response_model=Pending,
    responses=refusals(400, 404, 409),
)
async def asample(body: Sample, rooms: InRooms, caller: Trainer, asking: Asks) -> Pending:
    """The same, without waiting."""
    return _pending(await _sampled(body, rooms, caller, asking))


@router.post(
    "/retrieve_future",
    summary="What became of an op",
    response_model=Made | Deleted | Passed | Stepped | Drawn,
    responses=refusals(400, 404) | _PENDING,
)
async def retrieve_future(body: Retrieve, rooms: InRooms, asking: Asks) -> Response:
    """What an op answered, as often as asked for; 202 while it is not done.

    An op that failed is answered with its error.
    """
    job = await train_ops.ended(rooms, asking, body.request_id, body.wait_s)
    return _result(job)


@router.post(
    "/get_info",
    summary="What a model is",
    response_model=Info,
    responses=refusals(400, 404),
)
async def get_info(body: ModelName, rooms: InRooms, caller: Trainer, asking: Asks) -> Info:
    """An adapter's base, shape and how far it is trained; or a base model."""
    run = await train_ops.find_run(rooms, asking, body.model_id)
    if run is not None:
        lora = run.lora
        return Info(
            model_id=run.id,
            model_data=ModelData(model_name=run.base_model),
            base_model=run.base_model,
            is_lora=True,
            lora_rank=lora.rank,
            lora_alpha=lora.alpha,
            target_modules=list(lora.target_modules),
            optim_steps=run.optim_steps,
            trainer=run.trainer,
        )
    model = _base_or(rooms, body.model_id)
    route = resolve(rooms.snapshots.current, model, caller)
    return Info(
        model_id=model,
        model_data=ModelData(model_name=route.base_model),
        base_model=route.base_model,
        is_lora=route.version is not None,
        lora_rank=None if route.version is None else route.version.rank,
    )


async def _added(body: NewLora, rooms: Rooms, caller: Principal, asking: Asking) -> Job:
    new = train_ops.NewLora(
        asked=body.base_model,
        rank=body.rank,
        alpha=body.alpha,
        target_modules=tuple(body.target_modules or ()),
        seed=body.seed,
    )
    pool = _pool_of(rooms, caller, _base_or(rooms, body.base_model))
    return _woken(rooms, await train_ops.add_lora(rooms, asking, pool, new))


async def _removed(body: ModelName, rooms: Rooms, asking: Asking) -> Job:
    return await _submitted(rooms, asking, RemoveLora(body.model_id))


async def _submitted(rooms: Rooms, asking: Asking, spec: single_ops.Spec) -> Job:
    return _woken(rooms, await train_ops.submit(rooms, asking, spec))


async def _sampled(body: Sample, rooms: Rooms, caller: Principal, asking: Asking) -> Job:
    name = body.model_id or body.base_model or BASE
    if await train_ops.find_run(rooms, asking, name) is not None:
        return await _submitted(rooms, asking, body.spec(name, None))
    model = _base_or(rooms, name)
    route = resolve(rooms.snapshots.current, model, caller)
    if route.version is not None:
        model = route.upstream_name
    job = await train_ops.submit_sample(rooms, asking, body.spec("", model))
    return _woken(rooms, job)


def _woken(rooms: Rooms, job: Job) -> Job:
    rooms.runner.wake()
    return job


def _base_or(rooms: Rooms, name: str) -> str:
    """`name`, unless it is what clients that know one base call it."""
    if name != BASE or BASE in rooms.snapshots.current.bases:
        return name
    return train_ops.only_base(rooms.trainers)


def _pool_of(rooms: Rooms, caller: Principal, model: str) -> Pool:
    snapshot = rooms.snapshots.current
    route = resolve(snapshot, model, caller)
    if route.version is not None:
        raise NotTrainable(f"{model!r} is an adapter of {route.base_model!r}: name that base.")
    return snapshot.pools[route.pool]


async def _answered(rooms: Rooms, asking: Asking, job: Job) -> Response:
    return _result(await train_ops.ended(rooms, asking, job.id, WAIT_S))


def _result(job: Job) -> Response:
    """What came of an op; raises what it failed with."""
    if job.error is not None:
        kind = _BY_CODE.get(job.error.code, errors.TrainerError)
        raise kind(job.error.message, param=job.error.param, code=job.error.code)
    if job.status is JobStatus.CANCELLED:
        raise errors.Conflict(f"The op {job.id!r} was cancelled.", param="request_id")
    if not job.status.terminal:
        return JSONResponse(_pending(job).model_dump(), 202)
    return JSONResponse(dict(job.result or {}))


def _pending(job: Job) -> Pending:
    model_id = job.spec["run"] or job.spec.get("model")
    return Pending(request_id=job.id, model_id=model_id)
