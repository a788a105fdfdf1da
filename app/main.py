"""create_app(settings): the whole gateway as one ASGI app. A table of contents."""

from __future__ import annotations

import asyncio
import logging

import uvicorn
from fastapi import FastAPI

from app import __version__
from app.api import errors, health, openapi, tink
from app.api.admin import router as admin
from app.api.direct import DirectProtocol
from app.api.front_door import FrontDoor
from app.api.inference import Inference
from app.api.openai import files, fine_tuning, models, uploads
from app.lifespan import lifespan
from app.settings import Settings
from app.telemetry import configure_logging


def create_app(settings: Settings | None = None) -> FrontDoor:
    """Build the gateway. Nothing is opened before the server starts its lifespan."""
    settings = settings or Settings()
    configure_logging(settings.log_level, settings.log_format)
    rest = FastAPI(title="loragate", version=__version__, lifespan=lifespan(settings))
    rest.include_router(health.router)
    for module in (models, files, uploads, fine_tuning, tink):
        rest.include_router(module.router)
    rest.include_router(admin)
    errors.install(rest)
    openapi.install(rest)
    return FrontDoor(rest, Inference())


def serve(settings: Settings) -> None:
    """Run the gateway until SIGINT or SIGTERM; requests under way may finish."""
    config = uvicorn.Config(
        create_app(settings),
        host=settings.host,
        port=settings.port,
        loop="uvloop",
        http=DirectProtocol,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=4096,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=int(settings.drain_timeout_s),
    )
    try:
        uvicorn.Server(config).run()
    except (KeyboardInterrupt, asyncio.CancelledError):
        logging.getLogger(__name__).debug("interrupted")


def __getattr__(name: str) -> FrontDoor:
    """`app`, for `uvicorn app.main:app`: built when asked for, so that importing does nothing."""
    if name == "app":
        return create_app()
    raise AttributeError(name)
