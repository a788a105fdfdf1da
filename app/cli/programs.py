"""`serve`, `worker` and `migrate`: the programs themselves, in this process.

What comes in: settings from the environment, and options that override them. What goes out: a
running program. They are imported here and not above, because the client half of the command
needs none of them, and the worker needs torch.
"""

from __future__ import annotations

import asyncio
import importlib
import ipaddress
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from app.cli.terminal import stderr
from app.errors import ConfigurationError
from app.settings import Settings

_TORCH = ("torch", "transformers", "peft")


def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0: any free one.")] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Holds the SQLite database and the adapter store.")
    ] = None,
    database_url: Annotated[str | None, typer.Option(help="Another database.")] = None,
    embedded: Annotated[
        Literal["auto", "off"] | None, typer.Option(help="The demo worker, with no pool at all.")
    ] = None,
    log_level: Annotated[
        Literal["DEBUG", "INFO", "WARNING", "ERROR"] | None, typer.Option(help="Lowest level.")
    ] = None,
    log_format: Annotated[Literal["json", "text"] | None, typer.Option(help="Log lines.")] = None,
    hello: Annotated[
        bool, typer.Option("--hello", help="Say how to ask it, once a model can answer.")
    ] = False,
) -> None:
    """Run the gateway. Options override LORAGATE_* variables; see `loragate settings`."""
    settings = _settings(
        host=host,
        port=port,
        data_dir=data_dir,
        database_url=database_url,
        embedded=embedded,
        log_level=log_level,
        log_format=log_format,
    )
    if not _on_loopback(settings.host) and settings.admin_key is None:
        asyncio.run(_refuse_without_keys(settings))
    from app.main import serve as run

    if hello:
        from app.cli.hello import greet_when_ready

        greet_when_ready(settings.host, settings.port)
    run(settings)


def worker(
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0: any free one.")] = None,
    model: Annotated[
        Path | None, typer.Option(help="Folder of the base model; the demo model if left out.")
    ] = None,
    served_name: Annotated[str | None, typer.Option(help="What the base is called.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1…, or auto.")] = None,
    log_level: Annotated[
        Literal["DEBUG", "INFO", "WARNING", "ERROR"] | None, typer.Option(help="Lowest level.")
    ] = None,
    log_format: Annotated[Literal["json", "text"] | None, typer.Option(help="Log lines.")] = None,
) -> None:
    """Run a worker: the demo or any transformers model with its adapters, in vLLM's dialect."""
    settings = _settings(
        worker_host=host,
        worker_port=port,
        worker_model=model,
        worker_served_name=served_name,
        worker_device=device,
        log_level=log_level,
        log_format=log_format,
    )
    _worker_run()(settings)


def migrate(
    database_url: Annotated[
        str | None, typer.Option(help="The database; LORAGATE_DATABASE_URL if left out.")
    ] = None,
) -> None:
    """Bring the database's schema up to date. Safe to run again, and on several machines."""
    from app.db.engine import migrate as upgrade

    upgrade(_settings(database_url=database_url))
    stderr.print("The schema is current.")


def _settings(**options: Any) -> Settings:
    return Settings(**{name: value for name, value in options.items() if value is not None})


def _on_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def _refuse_without_keys(settings: Settings) -> None:
    """An open door for the whole network must be wanted, and nobody could want it."""
    from app.control import keys
    from app.db.engine import Database, database_url

    db = Database(database_url(settings))
    try:
        await db.prepare()
        async with db.read() as session:
            found = await keys.list_(session, limit=1, revoked=False)
    finally:
        await db.close()
    if not found.data:
        raise ConfigurationError(
            f"{settings.host} can be reached from other machines, and there is no API key yet. "
            "Set LORAGATE_ADMIN_KEY to a secret of your choice and make keys with it, or listen "
            "on this machine only with --host 127.0.0.1."
        )


def _worker_run() -> Callable[[Settings], None]:
    try:
        # By name: nothing above the worker may import it, so that torch stays out of the gateway.
        run: Callable[[Settings], None] = importlib.import_module("app.worker.main").run
    except ModuleNotFoundError as exc:
        if exc.name not in _TORCH:
            raise
        raise ConfigurationError(
            f"the worker needs {exc.name}, which is not installed: pip install 'loragate[worker]'"
        ) from exc
    return run
