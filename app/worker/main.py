"""The worker's server: which route leads where, how it starts and how it stops.

What comes in: settings, perhaps a listening socket. What goes out: an HTTP server in vLLM's
dialect. It must not know: the gateway.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TypedDict

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from app.errors import LoragateError
from app.settings import Settings
from app.telemetry import Event, configure_logging, log
from app.worker.http.faults import answer
from app.worker.http.generate import chat_completions, completions
from app.worker.http.health import features, health, metrics, show_version
from app.worker.http.models import detokenize, load_adapter, models, tokenize, unload_adapter
from app.worker.http.served import Served
from app.worker.http.train import training_routes
from app.worker.http.training import Training, training_with
from app.worker.samplers.engine import Engine
from app.worker.samplers.model import CausalModel, load_model
from app.worker.trainers import megatron
from app.worker.trainers.base import Trainer
from app.worker.trainers.hf import HfTrainer

logger = logging.getLogger(__name__)

DEMO_MODEL = Path(__file__).parent.parent / "demo" / "model"
DEMO_NAME = "demo"
KEEP_ALIVE_S = 75
STDIN = 0

ROUTES = [
    Route("/v1/completions", completions, methods=["POST"]),
    Route("/v1/chat/completions", chat_completions, methods=["POST"]),
    Route("/v1/models", models, methods=["GET"]),
    Route("/v1/load_lora_adapter", load_adapter, methods=["POST"]),
    Route("/v1/unload_lora_adapter", unload_adapter, methods=["POST"]),
    Route("/tokenize", tokenize, methods=["POST"]),
    Route("/detokenize", detokenize, methods=["POST"]),
    Route("/health", health, methods=["GET"]),
    Route("/ping", health, methods=["GET", "POST"]),
    Route("/version", show_version, methods=["GET"]),
    Route("/loragate/features", features, methods=["GET"]),
    Route("/metrics", metrics, methods=["GET"]),
]


#: From settings, the base's folder and name, and the sampler's model.
MakeTrainer = Callable[[Settings, Path, str, CausalModel], Trainer]


class State(TypedDict):
    """`training` is None on a worker that does not train."""

    served: Served
    training: Training | None


def make_trainer(settings: Settings, folder: Path, name: str, model: CausalModel) -> Trainer:
    """The engine that the settings name, for the model the sampler serves."""
    if settings.worker_trainer == "megatron":
        return megatron.MegatronTrainer.start(settings, folder, base_model=name)
    return HfTrainer.beside(model, settings, base_model=name)


def create_app(settings: Settings, make: MakeTrainer = make_trainer) -> Starlette:
    """The application; the model is read when it starts."""
    trains = settings.worker_trainer != "off"
    key = settings.worker_api_key

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[State]:
        folder = (settings.worker_model or DEMO_MODEL).expanduser().absolute()
        name = settings.worker_served_name or (folder.name if settings.worker_model else DEMO_NAME)
        model = await asyncio.to_thread(load_model, settings, folder)
        async with AsyncExitStack() as stack:
            engine = Engine(model, settings)
            engine.start()
            stack.push_async_callback(asyncio.to_thread, engine.stop)
            training = None
            if trains:
                trainer = await asyncio.to_thread(make, settings, folder, name, model)
                training = await stack.enter_async_context(
                    training_with(trainer, engine, settings, name)
                )
            yield {"served": Served(engine, settings, name, folder), "training": training}

    return Starlette(
        routes=[
            *ROUTES,
            training_routes(None if key is None else key.get_secret_value(), on=trains),
        ],
        lifespan=lifespan,
        exception_handlers={
            LoragateError: answer,
            HTTPException: _no_route,
            Exception: answer,
        },
    )


async def _no_route(request: Request, exc: Exception) -> Response:
    """Unknown paths and methods, in the words of vLLM's framework."""
    if not isinstance(exc, HTTPException):
        raise exc
    return JSONResponse({"detail": exc.detail}, exc.status_code, headers=exc.headers)


class Server(uvicorn.Server):
    """Says where it listens once it does, and holds nobody up who waits for an op when it ends."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if not self.started:
            return
        listening = [one.getsockname() for server in self.servers for one in server.sockets]
        served: Served = self.lifespan.state["served"]
        log(
            logger,
            logging.INFO,
            Event.WORKER_READY,
            address=":".join(map(str, listening[0])),
            model=served.name,
            max_model_len=served.engine.limits.max_model_len,
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        training: Training | None = self.lifespan.state.get("training")
        if training is not None:
            training.runs.let_go()
        await super().shutdown(sockets=sockets)


def run(settings: Settings, *, fd: int | None = None) -> None:
    """Serve until told to stop; running requests may finish within `drain_timeout_s`."""
    configure_logging(settings.log_level, settings.log_format)
    if settings.worker_trainer == "megatron" and megatron.follow(settings):
        return
    config = uvicorn.Config(
        create_app(settings),
        host=settings.worker_host,
        port=settings.worker_port,
        fd=fd,
        log_config=None,
        access_log=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(settings.drain_timeout_s),
    )
    Server(config).run()


def _stop_with_parent() -> None:
    """Stop once standard input closes: the parent holds its other end for as long as it lives."""

    def wait() -> None:
        # The bare descriptor: the lock of sys.stdin would be held when the interpreter ends.
        while os.read(STDIN, 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="parent", daemon=True).start()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Serve a base model and its adapters.")
    parser.add_argument("--fd", type=int, help="a listening socket handed down by the parent")
    parser.add_argument(
        "--exit-with-stdin", action="store_true", help="stop when standard input closes"
    )
    arguments = parser.parse_args()
    if arguments.exit_with_stdin:
        _stop_with_parent()
    run(Settings(), fd=arguments.fd)
