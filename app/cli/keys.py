"""`loragate keys …`: who may call.

What comes in: what a key may do. What goes out: calls of the admin API, and a new secret, once.
"""

from __future__ import annotations

import re
from typing import Annotated, Any
from urllib.parse import quote

import typer

from app.cli import tables
from app.cli.command import command
from app.cli.gateway import Gateway
from app.domain import Scope

app = typer.Typer(help="API keys.", no_args_is_help=True)

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_SPAN = re.compile(r"(\d{1,9})([smhd])")


@command(app, "create", tables.new_key)
def create(
    gateway: Gateway,
    name: Annotated[str, typer.Argument(help="Whose it is, for people.")],
    scope: Annotated[
        list[Scope] | None,
        typer.Option(help="What it may do; may be given again. `inference` if left out."),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(help="A glob of models it may use; may be given again. All if left out."),
    ] = None,
    expires_in: Annotated[
        str | None, typer.Option(help="How long it works, such as 12h or 30d.")
    ] = None,
) -> Any:
    """Create a key. Its secret is shown once."""
    body = {
        "name": name,
        "scopes": scope or [Scope.INFERENCE],
        "models": model or None,
        "expires_in_s": None if expires_in is None else _seconds(expires_in),
    }
    return gateway.post("/admin/keys", body)


@command(app, "list", tables.keys)
def list_(
    gateway: Gateway,
    limit: Annotated[int, typer.Option(help="At most so many.")] = 100,
    after: Annotated[str | None, typer.Option(help="Only ids after this one.")] = None,
    revoked: Annotated[bool, typer.Option(help="Revoked ones too.")] = True,
) -> Any:
    """List keys, without their secrets."""
    return gateway.get("/admin/keys", limit=limit, after=after, revoked=revoked)


@command(app, "revoke", lambda found: tables.line(f"Revoked {found['id']}."))
def revoke(
    gateway: Gateway,
    id: Annotated[str, typer.Argument(help="The key's id, from `loragate keys list`.")],
) -> Any:
    """End a key for good."""
    return gateway.delete(f"/admin/keys/{quote(id, '')}")


def _seconds(span: str) -> int:
    found = _SPAN.fullmatch(span)
    if found is None:
        raise typer.BadParameter(f"{span!r} is not a time such as 90s, 15m, 12h or 30d")
    return int(found[1]) * _UNITS[found[2]]
