"""`loragate adapters …`: register weights, look at them, move aliases, delete.

What comes in: a folder, an archive, a hub repository or a folder on the gateway's machine. What
goes out: calls of the admin API.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote

import typer
from rich.console import Group, RenderableType
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from app.cli import tables
from app.cli.archive import Upload, upload_of
from app.cli.command import command
from app.cli.gateway import Gateway, Refused
from app.cli.terminal import stderr
from app.errors import InvalidRequest

app = typer.Typer(help="LoRA adapters, their versions and aliases.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="The adapter's name.")]

_ALL = "/admin/adapters"


def _added(found: dict[str, Any]) -> RenderableType:
    model = found["version"]["model"]
    if not found["created"]:
        return tables.line(f"{model} has these very weights already; nothing changed.")
    return Group(tables.version(found["version"]), tables.line(f"\nAdded. Ask for {model!r}."))


@command(app, "add", _added)
def add(
    gateway: Gateway,
    source: Annotated[
        Path | None,
        typer.Argument(help="A folder as PEFT saves it, or a .tar, .tar.gz or .zip of one."),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", "-n", help="Its name; the folder's if left out.")
    ] = None,
    from_hub: Annotated[
        str | None, typer.Option(help="A Hugging Face repo id instead, as repo or repo@revision.")
    ] = None,
    server_path: Annotated[
        str | None, typer.Option(help="A folder on the gateway's machine instead.")
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="The base, if the adapter's own config does not say.")
    ] = None,
    alias: Annotated[str | None, typer.Option(help="Also point this alias at it.")] = None,
    metadata: Annotated[
        str | None,
        typer.Option(help="A JSON object to keep with it, or @file.", metavar="JSON"),
    ] = None,
) -> Any:
    """Add an adapter, or the next version of one. Uploads a local folder."""
    given = [each for each in (source, from_hub, server_path) if each is not None]
    if len(given) != 1:
        raise typer.BadParameter("give one of SOURCE, --from-hub and --server-path")
    kept = None if metadata is None else _object(metadata)
    name = name or _name_of(str(given[0]))
    upload = upload_of(source) if source is not None else None
    path = _destination(gateway, name)
    options: dict[str, Any] = {"base_model": base_model, "alias": alias}
    if path == _ALL:
        options["name"] = name
    if upload is not None:
        options["metadata"] = None if kept is None else json.dumps(kept, separators=(",", ":"))
        with _progress(upload, name) as chunks:
            return gateway.upload(path, chunks, upload.size, upload.media_type, options)
    where = _hub(from_hub) if from_hub else {"path": server_path}
    return gateway.post(path, {"source": where, "metadata": kept, **options})


@command(app, "list", tables.adapters)
def list_(
    gateway: Gateway,
    prefix: Annotated[str | None, typer.Option(help="Only names that begin so.")] = None,
    base_model: Annotated[str | None, typer.Option(help="Only adapters of this base.")] = None,
    limit: Annotated[int, typer.Option(help="At most so many.")] = 100,
    after: Annotated[str | None, typer.Option(help="Only names after this one.")] = None,
) -> Any:
    """List adapters by name."""
    return gateway.get(_ALL, prefix=prefix, base_model=base_model, limit=limit, after=after)


@command(app, "show", tables.adapter)
def show(gateway: Gateway, name: Name) -> Any:
    """Show an adapter with its versions and aliases."""
    return gateway.get(_one(name))


@command(app, "remove", lambda found: tables.line(f"Removed {found['id']}."))
def remove(
    gateway: Gateway,
    name: Annotated[str, typer.Argument(help="An adapter, or one version of it as name@3.")],
) -> Any:
    """Remove an adapter, or one version of it. Requests under way finish."""
    adapter, found, number = name.partition("@")
    return gateway.delete(f"{_one(adapter)}/versions/{quote(number, '')}" if found else _one(name))


@command(app, "alias", tables.adapter)
def alias(
    gateway: Gateway,
    name: Name,
    alias: Annotated[str, typer.Argument(help="The alias; clients write name:alias.")],
    versions: Annotated[
        list[str] | None,
        typer.Argument(help="A version, or a split by weight: 3=90 4=10.", metavar="VERSION..."),
    ] = None,
    sticky: Annotated[
        Literal["user", "key", "none"] | None,
        typer.Option(help="What keeps a client of a split on one version; as it is if left out."),
    ] = None,
    delete: Annotated[bool, typer.Option("--delete", help="Remove the alias instead.")] = False,
) -> Any:
    """Point an alias at a version, or split it over several by weight."""
    if delete == bool(versions):
        raise typer.BadParameter("give VERSION, or --delete")
    path = f"{_one(name)}/aliases/{quote(alias, '')}"
    if delete:
        gateway.delete(path)
        return gateway.get(_one(name))
    targets = [_target(each) for each in versions or ()]
    return gateway.put(path, {"targets": targets, "sticky": sticky})


@command(app, "rollback", tables.adapter)
def rollback(
    gateway: Gateway,
    name: Name,
    alias: Annotated[str, typer.Option(help="The alias to move back.")] = "latest",
) -> Any:
    """Undo an alias's newest move; of `latest`, if no other is named."""
    return gateway.post(f"{_one(name)}/rollback", {"alias": alias})


def _one(name: str) -> str:
    return f"{_ALL}/{quote(name, '')}"


def _destination(gateway: Gateway, name: str) -> str:
    """Where weights of this name go. Asked first, so that they are uploaded once."""
    try:
        gateway.get(_one(name))
    except Refused as exc:
        if exc.status != 404:
            raise
        return _ALL
    return f"{_one(name)}/versions"


def _name_of(source: str) -> str:
    """What an adapter is called if nobody says: its folder or repository, without endings."""
    name = Path(source.partition("@")[0]).resolve().name
    for ending in (".tar.gz", ".tgz", ".tar", ".zip"):
        name = name.removesuffix(ending)
    return name


def _hub(repo: str) -> dict[str, str]:
    name, found, revision = repo.partition("@")
    return {"hf_repo": name, "revision": revision} if found else {"hf_repo": name}


def _object(text: str) -> dict[str, Any]:
    """The JSON object in `text`, or in the file that `@file` names."""
    what = f"the file {text[1:]}" if text.startswith("@") else repr(text)
    try:
        found = json.loads(Path(text[1:]).read_text("utf-8") if text.startswith("@") else text)
    except ValueError as exc:
        raise InvalidRequest(f"{what} is not JSON: {exc}") from exc
    if not isinstance(found, dict):
        raise InvalidRequest(f"{what} is JSON, but not an object")
    return found


def _target(text: str) -> dict[str, int]:
    version, _, weight = text.partition("=")
    try:
        return {"version": int(version), "weight": int(weight or 1)}
    except ValueError as exc:
        raise typer.BadParameter(f"{text!r} is not a version, nor version=weight") from exc


@contextmanager
def _progress(upload: Upload, name: str) -> Iterator[Iterator[bytes]]:
    """The chunks of an upload, drawn on stderr as a bar while they are sent."""
    bar = Progress(
        TextColumn(f"uploading {name}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=stderr,
        disable=not stderr.is_terminal,
        transient=True,
    )
    task = bar.add_task("", total=upload.size)

    def chunks() -> Iterator[bytes]:
        for chunk in upload.chunks():
            yield chunk
            bar.advance(task, len(chunk))

    with bar:
        yield chunks()
