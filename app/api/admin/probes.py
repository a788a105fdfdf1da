"""/admin/adapters/{name}/versions/{number}/probe: proof that what is served is what was trained.

What comes in: a trainer's logprobs for some token ids. What goes out: the same, or the version
that now has them. Who compares them with what a replica says is not known here.
"""

from __future__ import annotations

import logging
from typing import Literal

from fastapi import APIRouter
from pydantic import Field

from app.api.admin.adapter_json import Version, version_json
from app.api.admin.adapters import Name, Number
from app.api.admin.shapes import Admin, Answer, Body, Deleted, InRooms, refusals
from app.api.rooms import Rooms
from app.control import adapters, probes
from app.domain import Principal
from app.telemetry import Event, log

logger = logging.getLogger(__name__)
router = APIRouter(prefix="/adapters/{name}/versions/{number}/probe", tags=["Adapters"])

_IDS = "Rows of token ids: 1 to 32 rows of 2 to 512."
_LOGPROBS = (
    "For each row, the natural-log probability of every id but the first, given those before it."
)
_DTYPE = "What they were computed in; served logprobs must agree closer if both are float32."
_Dtype = Literal["float32", "bfloat16", "float16"]


class Probe(Answer):
    """Token ids and the logprobs that the trainer computed for them."""

    token_ids: list[list[int]] = Field(description=_IDS, examples=[[[71, 302, 15]]])
    logprobs: list[list[float]] = Field(description=_LOGPROBS, examples=[[[-2.31, -0.07]]])
    dtype: _Dtype = Field(description=_DTYPE, examples=["float32"])


class NewProbe(Body):
    """A probe to give to a version."""

    token_ids: list[list[int]] = Field(description=_IDS, examples=[[[71, 302, 15]]])
    logprobs: list[list[float]] = Field(description=_LOGPROBS, examples=[[[-2.31, -0.07]]])
    dtype: _Dtype = Field("float32", description=_DTYPE, examples=["float32"])


@router.get("", summary="Show a version's probe", response_model=Probe, responses=refusals(404))
async def show(name: Name, number: Number, rooms: InRooms, admin: Admin) -> Probe:
    """The token ids and logprobs that every load of the version is checked with."""
    async with rooms.db.read() as session:
        return Probe.model_validate(probes.stored(await probes.show(session, name, number)))


@router.put(
    "", summary="Set a version's probe", response_model=Version, responses=refusals(404, 422)
)
async def put(name: Name, number: Number, body: NewProbe, rooms: InRooms, admin: Admin) -> Version:
    """Give a version a probe, in place of the one it has. The weights stay what they are.

    From then on a replica that loads the version is asked for the same logprobs.
    """
    async with rooms.db.begin() as session:
        await probes.put(session, name, number, body.model_dump())
        view = await adapters.show_version(session, name, number)
    await _changed(rooms, admin, f"{name}@{number}", True)
    return version_json(view)


@router.delete(
    "", summary="Delete a version's probe", response_model=Deleted, responses=refusals(404)
)
async def delete(name: Name, number: Number, rooms: InRooms, admin: Admin) -> Deleted:
    """Take a version's probe away: its loads are no longer checked."""
    async with rooms.db.begin() as session:
        await probes.remove(session, name, number)
    await _changed(rooms, admin, f"{name}@{number}", False)
    return Deleted(id=f"{name}@{number}", object="adapter.version.probe")


async def _changed(rooms: Rooms, admin: Principal, version: str, probed: bool) -> None:
    fields = {"adapter": version, "probed": probed, "by": admin.key_id}
    log(logger, logging.INFO, Event.PROBE_CHANGED, **fields)
    await rooms.publish.settle()
    rooms.fleet.distrust(version)
