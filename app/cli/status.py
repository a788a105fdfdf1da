"""`loragate tasks`, `usage` and `models`: what a gateway is doing and offers.

What comes in: filters. What goes out: calls of the API, as tables.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from app.cli import tables
from app.cli.command import command
from app.cli.gateway import Gateway


def install(app: typer.Typer) -> None:
    """Add the commands to `app`, beside the nouns."""

    @command(app, "tasks", tables.tasks)
    def tasks(gateway: Gateway) -> Any:
        """Show the gateway's background tasks and what each last did."""
        return gateway.get("/admin/tasks")

    @command(app, "usage", tables.usage)
    def usage(
        gateway: Gateway,
        since: Annotated[
            str | None, typer.Option(help="From this time on, such as 2026-01-31T00:00:00Z.")
        ] = None,
        until: Annotated[str | None, typer.Option(help="Before this time.")] = None,
        key_id: Annotated[str | None, typer.Option(help="Only this key.")] = None,
        model: Annotated[str | None, typer.Option(help="Only this model, such as bot@3.")] = None,
        limit: Annotated[int, typer.Option(help="At most so many.")] = 1000,
    ) -> Any:
        """Show requests and tokens by hour, key and model."""
        return gateway.get(
            "/admin/usage", since=since, until=until, key_id=key_id, model=model, limit=limit
        )

    @command(app, "models", tables.models)
    def models(gateway: Gateway) -> Any:
        """List what this key may put in `model`."""
        return gateway.get("/v1/models")
