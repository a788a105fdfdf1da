"""`loragate adapters probe`: compute what a version must answer, and keep it with the version.

What comes in: the folders of a base model and of an adapter, or a probe that somebody else made.
What goes out: a call of the admin API. The computing is done by the worker's program, in a process
of its own: this one has no torch.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote

import typer

from app.cli import tables
from app.cli.archive import FILES, PROBE_FILE
from app.cli.command import command
from app.cli.gateway import Gateway
from app.cli.terminal import stderr
from app.errors import ConfigurationError, InvalidRequest

_NEEDS = ("torch", "transformers", "peft")


def install(app: typer.Typer) -> None:
    """Add the command to `app`, beside the other verbs on adapters."""
    command(app, "probe", _probed)(probe)


def _probed(found: dict[str, Any]) -> Any:
    rows = found["token_ids"]
    count = sum(map(len, rows))
    what = f"{len(rows)} rows, {count} token ids, {found['dtype']}"
    return tables.line(f"{found['model']} has a probe: {what}.")


def probe(
    gateway: Gateway,
    name: Annotated[
        str, typer.Argument(help="An adapter, meaning its latest version, or one as name@3.")
    ],
    adapter: Annotated[
        Path | None, typer.Option(help="The adapter's folder, as PEFT saves it.")
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="The base model's folder; the one the adapter names, if left out."),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="A text a line, or a JSON list of texts or of lists of token ids."),
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="What to compute in.")
    ] = "float32",
    device: Annotated[str, typer.Option(help="What to compute on: cpu, cuda, cuda:1…")] = "cpu",
    file: Annotated[
        Path | None, typer.Option(help="Or store this probe.json, and compute nothing.")
    ] = None,
) -> Any:
    """Compute a version's probe with transformers and PEFT, and store it with the version."""
    if (adapter is None) == (file is None):
        raise typer.BadParameter("give --adapter FOLDER, or --file PROBE")
    version = _version(gateway, name)
    if adapter is None:
        assert file is not None
        found = _object(file.read_text("utf-8"), str(file))
    else:
        _check_files(adapter, version)
        options = {"--adapter": adapter, "--model": model, "--prompts": prompts}
        found = _compute({**options, "--dtype": dtype, "--device": device})
    where = f"/admin/adapters/{quote(version['adapter'], '')}/versions/{version['number']}/probe"
    gateway.put(where, found)
    return {"model": version["model"], **gateway.get(where)}


def _version(gateway: Gateway, name: str) -> dict[str, Any]:
    """The version that is meant, as the API shows it."""
    adapter, found, number = name.partition("@")
    path = f"/admin/adapters/{quote(adapter, '')}"
    which = number if found else gateway.get(path)["latest"]
    if which is None:
        raise InvalidRequest(f"{name!r} is not finished: name one of its versions, {name}@1")
    version: dict[str, Any] = gateway.get(f"{path}/versions/{quote(str(which), '')}")
    return version


def _check_files(folder: Path, version: dict[str, Any]) -> None:
    """Refuse other files than the version's: their probe would condemn every right replica."""
    from app.db.blobs import digest_of  # with it comes SQLAlchemy, which no other command needs

    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise InvalidRequest(f"{folder} has no {' and no '.join(missing)}")
    if digest_of(folder) != version["digest"]:
        raise InvalidRequest(
            f"{folder} does not hold the files of {version['model']}; name the version it was "
            "registered as, or register it first with `loragate adapters add`"
        )


def _compute(options: dict[str, object]) -> dict[str, Any]:
    missing = [name for name in _NEEDS if find_spec(name) is None]
    if missing:
        raise ConfigurationError(
            f"a probe is computed with {missing[0]}, which is not installed: "
            "pip install 'loragate[worker]'"
        )
    words = [word for name, value in options.items() if value for word in (name, str(value))]
    with stderr.status("computing the probe"):
        ran = subprocess.run(
            [sys.executable, "-m", "app.worker.probe", *words],
            capture_output=True,
            text=True,
            check=False,
        )
    if ran.returncode != 0:
        lines = ran.stderr.strip().splitlines() or [f"exit code {ran.returncode}"]
        raise InvalidRequest(f"the probe could not be computed: {lines[-1]}")
    return _object(ran.stdout, "what was computed")


def _object(text: str, what: str) -> dict[str, Any]:
    try:
        found = json.loads(text, parse_constant=_no_constant)
    except ValueError as exc:
        raise InvalidRequest(f"{what} is not JSON: {exc}") from exc
    if not isinstance(found, dict):
        raise InvalidRequest(f"{what} is no {PROBE_FILE}: it is not a JSON object")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")
