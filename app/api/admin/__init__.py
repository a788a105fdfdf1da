"""The admin API: everything here needs a key with the scope `admin`."""

from __future__ import annotations

from fastapi import APIRouter

from app.api.admin import adapters, aliases, keys, pools, probes, replicas, status, vllm
from app.api.admin.shapes import ErrorEnvelope

_NOUNS = (
    adapters.router,
    aliases.router,
    probes.router,
    pools.router,
    replicas.router,
    keys.router,
    status.router,
)

# Every one of them asks the database.
router = APIRouter(responses={503: {"model": ErrorEnvelope}})
for _noun in _NOUNS:
    router.include_router(_noun, prefix="/admin")
router.include_router(vllm.router)
