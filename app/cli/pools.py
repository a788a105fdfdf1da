"""`loragate pools …` and `loragate replicas …`.

What comes in: what a person calls a pool and its servers. What goes out: calls of the admin API.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer

from app.cli import tables
from app.cli.command import command
from app.cli.gateway import Gateway
from app.errors import InvalidRequest

app = typer.Typer(help="Pools: interchangeable servers of one base model.", no_args_is_help=True)
replicas = typer.Typer(help="The servers of the pools.", no_args_is_help=True)

PoolName = Annotated[str, typer.Argument(help="The pool's name.")]
ReplicaId = Annotated[str, typer.Argument(help="The replica's id, from `loragate replicas list`.")]

_ALL = "/admin/pools"


@command(app, "list", tables.pools)
def list_(gateway: Gateway) -> Any:
    """List pools."""
    return gateway.get(_ALL)


@command(app, "add", lambda found: tables.pools({"data": [found]}))
def add(
    gateway: Gateway,
    name: PoolName,
    base_model: Annotated[str, typer.Option(help="The base model, as clients write it.")],
    replica: Annotated[
        list[str] | None, typer.Option(help="Base URL of a server; may be given again.")
    ] = None,
    server_key: Annotated[str | None, typer.Option(help="The servers' own --api-key.")] = None,
    served_name: Annotated[str | None, typer.Option(help="What they call the base.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="The base's config.json, to check adapters against.")
    ] = None,
    also: Annotated[
        list[str] | None, typer.Option(help="Another name adapters call the base by.")
    ] = None,
    max_lora_rank: Annotated[int, typer.Option(help="The servers' --max-lora-rank.")] = 64,
    max_loras: Annotated[int, typer.Option(help="The servers' --max-loras.")] = 8,
    max_cpu_loras: Annotated[
        int | None, typer.Option(help="The servers' --max-cpu-loras; as --max-loras if left out.")
    ] = None,
    max_inflight: Annotated[int, typer.Option(help="Most requests at once for one server.")] = 256,
    max_queue: Annotated[int, typer.Option(help="Most requests that wait for a server.")] = 1024,
    store_mount: Annotated[
        str | None, typer.Option(help="Where they see the adapter store, if elsewhere.")
    ] = None,
) -> Any:
    """Add a pool for a base model."""
    body = {
        "name": name,
        "base_model": base_model,
        "base_model_config": None if config is None else _config(config),
        "base_model_aliases": also or [],
        "served_name": served_name,
        "max_lora_rank": max_lora_rank,
        "max_loras": max_loras,
        "max_cpu_loras": max_cpu_loras,
        "max_inflight": max_inflight,
        "max_queue": max_queue,
        "store_mount": store_mount,
        "replicas": [{"url": url, "api_key": server_key} for url in replica or ()],
    }
    return gateway.post(_ALL, body)


@command(app, "update", lambda found: tables.pools({"data": [found]}))
def update(
    gateway: Gateway,
    name: PoolName,
    served_name: Annotated[str | None, typer.Option(help="What they call the base.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="The base's config.json, to check adapters against.")
    ] = None,
    also: Annotated[
        list[str] | None,
        typer.Option(help="Another name adapters call the base by, in place of all before."),
    ] = None,
    max_lora_rank: Annotated[int | None, typer.Option(help="The servers' --max-lora-rank.")] = None,
    max_loras: Annotated[int | None, typer.Option(help="The servers' --max-loras.")] = None,
    max_cpu_loras: Annotated[
        int | None, typer.Option(help="The servers' --max-cpu-loras; 0: as --max-loras.")
    ] = None,
    max_inflight: Annotated[
        int | None, typer.Option(help="Most requests at once for one server.")
    ] = None,
    max_queue: Annotated[
        int | None, typer.Option(help="Most requests that wait for a server.")
    ] = None,
    store_mount: Annotated[
        str | None, typer.Option(help="Where they see the adapter store; '' for the same path.")
    ] = None,
) -> Any:
    """Change a pool; what is left out stays. Its base model stays too."""
    given: dict[str, Any] = {
        "base_model_config": None if config is None else _config(config),
        "base_model_aliases": also or None,
        "served_name": served_name,
        "max_lora_rank": max_lora_rank,
        "max_loras": max_loras,
        "max_inflight": max_inflight,
        "max_queue": max_queue,
    }
    changes = {field: value for field, value in given.items() if value is not None}
    if max_cpu_loras is not None:
        changes["max_cpu_loras"] = max_cpu_loras or None
    if store_mount is not None:
        changes["store_mount"] = store_mount or None
    if not changes:
        raise typer.BadParameter("say what to change")
    return gateway.patch(f"{_ALL}/{quote(name, '')}", changes)


@command(app, "remove", lambda found: tables.line(f"Removed the pool {found['id']}."))
def remove(gateway: Gateway, name: PoolName) -> Any:
    """Remove a pool that no adapter needs, with its replicas."""
    return gateway.delete(f"{_ALL}/{quote(name, '')}")


def _row(found: dict[str, Any]) -> Any:
    return tables.replicas({"data": [found]})


@command(replicas, "list", tables.replicas)
def list_replicas(
    gateway: Gateway,
    pool: Annotated[str | None, typer.Option(help="Only those of this pool.")] = None,
) -> Any:
    """List replicas and what they are doing now."""
    if pool is not None:
        return gateway.get(f"{_ALL}/{quote(pool, '')}/replicas")
    return gateway.get("/admin/replicas")


@command(replicas, "add", _row)
def add_replica(
    gateway: Gateway,
    pool: PoolName,
    server: Annotated[str, typer.Argument(help="Its base URL, such as http://10.0.0.5:8000.")],
    server_key: Annotated[str | None, typer.Option(help="The server's own --api-key.")] = None,
) -> Any:
    """Add a server to a pool."""
    body = {"url": server, "api_key": server_key}
    return gateway.post(f"{_ALL}/{quote(pool, '')}/replicas", body)


@command(replicas, "cordon", _row)
def cordon(gateway: Gateway, id: ReplicaId) -> Any:
    """Keep new requests away from a replica for now."""
    return _change(gateway, id, cordoned=True)


@command(replicas, "uncordon", _row)
def uncordon(gateway: Gateway, id: ReplicaId) -> Any:
    """Let new requests go to a replica again; also ends a drain."""
    return _change(gateway, id, cordoned=False, draining=False)


@command(replicas, "drain", _row)
def drain(gateway: Gateway, id: ReplicaId) -> Any:
    """Let a replica finish what it has, to remove it then."""
    return _change(gateway, id, draining=True)


@command(replicas, "remove", lambda found: tables.line(f"Removed the replica {found['id']}."))
def remove_replica(
    gateway: Gateway,
    id: ReplicaId,
    force: Annotated[
        bool, typer.Option("--force", help="Even if it was not drained or is busy.")
    ] = False,
) -> Any:
    """Forget a replica that was drained."""
    return gateway.delete(f"/admin/replicas/{quote(id, '')}", force=force)


def _change(gateway: Gateway, id: str, **changes: bool) -> Any:
    return gateway.patch(f"/admin/replicas/{quote(id, '')}", changes)


def _config(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as exc:
        raise InvalidRequest(f"{path} is not JSON: {exc}") from exc
