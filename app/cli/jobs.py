"""`loragate jobs …`: fine-tune, watch it happen, stop it, draw its loss.

What comes in: a training file or a job's id. What goes out: calls of the gateway's OpenAI API for
files and fine-tuning; any other client of that API can do the same.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote

import typer
from rich.console import Group, RenderableType

from app.cli import tables
from app.cli.command import command
from app.cli.follow import events_since, follow_job
from app.cli.gateway import Gateway
from app.cli.loss_plot import draw
from app.cli.terminal import stderr
from app.errors import ConfigurationError, InvalidRequest

app = typer.Typer(help="Fine-tune jobs: submit, follow, cancel.", no_args_is_help=True)

Id = Annotated[str, typer.Argument(help="The job's id, as `loragate jobs list` shows it.")]

_ALL = "/v1/fine_tuning/jobs"


def _job(found: dict[str, Any]) -> RenderableType:
    error = found.get("error") or {}
    return tables.card(
        job=found["id"],
        status=found["status"],
        base_model=found["model"],
        model=found.get("fine_tuned_model"),
        queue_position=found.get("queue_position"),
        training_file=found["training_file"],
        created=tables.when_unix(found["created_at"]),
        finished=tables.when_unix(found.get("finished_at")),
        error=error.get("message"),
    )


def _jobs(found: dict[str, Any]) -> RenderableType:
    rows = tables.table(
        "job", "status", "base model", "model", "created",
        rows=(
            (
                each["id"],
                each["status"],
                each["model"],
                each.get("fine_tuned_model") or "",
                tables.when_unix(each["created_at"]),
            )
            for each in found["data"]
        ),
        empty="no jobs; submit one with `loragate jobs submit train.jsonl`",
    )  # fmt: skip
    if not found["has_more"]:
        return rows
    return Group(rows, tables.line(f"there are more: --after {found['data'][-1]['id']}"))


def _ended(job: dict[str, Any]) -> RenderableType:
    if job["curl"] is None:
        return _job(job)
    succeeded = f"{job['id']} succeeded. The model is {job['fine_tuned_model']}\n"
    return Group(tables.line(succeeded), tables.line(job["curl"]))


def _curl(gateway: Gateway, model: str) -> str:
    """A command for a shell that asks the model something."""
    body = json.dumps(
        {"model": model, "messages": [{"role": "user", "content": "Hello"}]}, ensure_ascii=False
    )
    login = " \\\n  -H 'Authorization: Bearer YOUR_KEY'" if gateway.keyed else ""
    return (
        f"curl {gateway.url}/v1/chat/completions -H 'Content-Type: application/json'{login} \\\n"
        f"  -d {shlex.quote(body)}"
    )


@command(app, "submit", _job)
def submit(
    gateway: Gateway,
    training_file: Annotated[Path, typer.Argument(help="JSON lines, one example each.")],
    model: Annotated[str, typer.Option("--model", "-m", help="The base to train on.")] = "demo",
    validation_file: Annotated[Path | None, typer.Option(help="Examples held out.")] = None,
    suffix: Annotated[str | None, typer.Option(help="Goes into the model's name.")] = None,
    method: Annotated[
        Literal["supervised", "dpo"], typer.Option(help="What the examples teach.")
    ] = "supervised",
    epochs: Annotated[int | None, typer.Option(help="Times through the examples.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples a step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Absolute.")] = None,
    lora_rank: Annotated[int | None, typer.Option(help="The adapter's rank.")] = None,
    seed: Annotated[int | None, typer.Option(help="What shuffling and weights start from.")] = None,
) -> Any:
    """Upload examples and queue a job that trains an adapter on them."""
    for path in (training_file, validation_file):
        if path is not None and not path.is_file():
            raise InvalidRequest(f"{path} is not a file")
    given = {
        "n_epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "lora_rank": lora_rank,
    }
    chosen = {name: value for name, value in given.items() if value is not None}
    body = {
        "model": model,
        "training_file": _uploaded(gateway, training_file),
        "validation_file": _uploaded(gateway, validation_file) if validation_file else None,
        "suffix": suffix,
        "seed": seed,
        "method": {"type": method, method: {"hyperparameters": chosen}},
    }
    return gateway.post(_ALL, {name: value for name, value in body.items() if value is not None})


@command(app, "list", _jobs)
def list_(
    gateway: Gateway,
    limit: Annotated[int, typer.Option(help="At most so many.")] = 20,
    after: Annotated[str | None, typer.Option(help="Only jobs before this one.")] = None,
) -> Any:
    """List jobs, the newest first."""
    return gateway.get(_ALL, limit=limit, after=after)


@command(app, "show", _job)
def show(gateway: Gateway, id: Id) -> Any:
    """Show a job."""
    return gateway.get(_one(id))


@command(app, "follow", _ended, well=lambda job: job["status"] == "succeeded")
def follow(gateway: Gateway, id: Id) -> Any:
    """Watch a job until it ends; status 1 unless it succeeded. A gateway that restarts meanwhile
    is waited for.
    """
    job = follow_job(gateway, id, stderr)
    model = job["fine_tuned_model"] if job["status"] == "succeeded" else None
    return {**job, "curl": model and _curl(gateway, model)}


@command(app, "cancel", _job)
def cancel(gateway: Gateway, id: Id) -> Any:
    """Stop a job for good. What it registered so far stays."""
    return gateway.post(f"{_one(id)}/cancel", {})


@command(app, "pause", _job)
def pause(gateway: Gateway, id: Id) -> Any:
    """Stop a job after its step, to go on later."""
    return gateway.post(f"{_one(id)}/pause", {})


@command(app, "resume", _job)
def resume(gateway: Gateway, id: Id) -> Any:
    """Let a paused job go on, exactly where it was."""
    return gateway.post(f"{_one(id)}/resume", {})


@command(app, "plot", lambda path: tables.line(f"Wrote {path}."))
def plot(
    gateway: Gateway,
    id: Id,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where to; ID.png here.")] = None,
) -> Any:
    """Draw a job's loss, step by step, as a PNG."""
    target = out or Path(f"{id}.png")
    try:
        draw(id, _steps(gateway, id), target)
    except ModuleNotFoundError as exc:
        raise ConfigurationError(
            "drawing needs matplotlib, which is not installed: pip install 'loragate[plot]'"
        ) from exc
    return str(target)


def _one(id: str) -> str:
    return f"{_ALL}/{quote(id, '')}"


def _uploaded(gateway: Gateway, path: Path) -> str:
    return str(gateway.send_file("/v1/files", path, {"purpose": "fine-tune"})["id"])


def _steps(gateway: Gateway, id: str) -> list[dict[str, Any]]:
    """The data of every step's event, from the first step to the last."""
    events = events_since(gateway, _one(id), None)
    return [each["data"] for each in events if each["type"] == "metrics"]
