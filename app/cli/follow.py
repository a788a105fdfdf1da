"""Watching a job: a bar that moves with its steps, and its messages above the bar.

What comes in: a gateway and a job's id. What goes out: lines and a bar on a console, and the job
as it ended. What it must not know: how the end is shown.
"""

from __future__ import annotations

import time
from typing import Any, TypedDict
from urllib.parse import quote

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from app.cli.gateway import Gateway, Refused

_POLL_S = 0.5
_PAGE = 100
_ENDED = ("succeeded", "failed", "cancelled")
#: Answers that a gateway gives while it, or what stands before it, is being restarted.
_PASSING = (0, 502, 503, 504)


class Outcome(TypedDict):
    """The job as it ended, and what a ready-made command needs to ask for its model."""

    job: dict[str, Any]
    url: str
    keyed: bool


def follow_job(gateway: Gateway, id: str, console: Console) -> Outcome:
    """Show a job's events as they come, until it has ended.

    A gateway that does not answer is asked again: the job goes on without anybody watching.

    Raises:
        Refused: the gateway knows no such job, or the key may not see it.
    """
    path = f"/v1/fine_tuning/jobs/{quote(id, '')}"
    watching = Watching(console)
    with watching.bar:
        while True:
            try:
                job = gateway.get(path)
                watching.show(_since(gateway, path, watching.seen), job)
            except Refused as exc:
                if exc.status not in _PASSING:
                    raise
                watching.waiting(str(exc))
            else:
                if job["status"] in _ENDED:
                    return {"job": job, "url": gateway.url, "keyed": gateway.keyed}
            time.sleep(_POLL_S)


class Watching:
    """What has been shown so far. On a console that is no terminal: a line for each message."""

    def __init__(self, console: Console) -> None:
        self.seen: str | None = None
        self._console = console
        self._away = False
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self.bar.add_task("waiting", total=None, numbers="")

    def show(self, events: list[dict[str, Any]], job: dict[str, Any]) -> None:
        """Take in a job and its new events, the oldest first."""
        self._away = False
        for event in events:
            self.seen = event["id"]
            if event["type"] == "metrics":
                self._step(event["data"])
            if event["type"] != "metrics" or not self._console.is_terminal:
                style = "red" if event["level"] == "error" else ""
                self._console.print(Text(event["message"], style=style))
        self.bar.update(self._task, description=_state(job))

    def waiting(self, why: str) -> None:
        """The gateway does not answer; said once."""
        if not self._away:
            self._console.print(Text(f"waiting: {why}", style="dim"))
        self._away = True

    def _step(self, data: dict[str, Any]) -> None:
        parts = [f"loss {data['train_loss']:.4f}"]
        if (valid := data.get("full_valid_loss")) is not None:
            parts.append(f"valid {valid:.4f}")
        if (speed := data.get("tokens_per_second")) is not None:
            parts.append(f"{speed:,.0f} tokens/s")
        self.bar.update(
            self._task,
            completed=data["step"],
            total=data.get("total_steps"),
            numbers="  ".join(parts),
        )


def _state(job: dict[str, Any]) -> str:
    position = job.get("queue_position")
    return str(job["status"]) if position is None else f"{job['status']}, {position} before it"


def _since(gateway: Gateway, path: str, seen: str | None) -> list[dict[str, Any]]:
    """The events after the one that was seen, the oldest first. The API's pages go back in time."""
    found: list[dict[str, Any]] = []
    after: str | None = None
    while True:
        page = gateway.get(f"{path}/events", limit=_PAGE, after=after)
        for event in page["data"]:
            if event["id"] == seen:
                return found[::-1]
            found.append(event)
        if not page["has_more"]:
            return found[::-1]
        after = page["data"][-1]["id"]
