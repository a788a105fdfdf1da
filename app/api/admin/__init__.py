"""The admin API: everything here needs a key with the scope `admin`."""

from __future__ import annotations

from fastapi import APIRouter

from app.api.admin import adapters, aliases, keys, pools, replicas, status, vllm

_NOUNS = (
    adapters.router,
    aliases.router,
    pools.router,
    replicas.router,
    keys.router,
    status.router,
)

router = APIRouter()
for _noun in _NOUNS:
    router.include_router(_noun, prefix="/admin")
router.include_router(vllm.router)
