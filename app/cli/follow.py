"""Watching a job: a bar that moves with its steps, and its messages above the bar.

What comes in: a gateway and a job's id. What goes out: lines and a bar on a console, and the job
as it ended. What it must not know: how the end is shown.
"""

from __future__ import annotations

import time
from typing import Any, Protocol
from urllib.parse import quote

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from app.cli.gateway import Refused

_POLL_S = 0.5
_PAGE = 100
_ENDED = ("succeeded", "failed", "cancelled")
#: Answers that a gateway gives while it, or what stands before it, is being restarted.
_PASSING = (0, 502, 503, 504)


class Readable(Protocol):
    """What watching needs of a gateway: the JSON at a path, or `Refused`."""

    def get(self, path: str, **params: object) -> Any: ...


def follow_job(gateway: Readable, id: str, console: Console) -> dict[str, Any]:
    """Show a job's events as they come, and return the job once it has ended.

    A gateway that has answered once and then does not is asked again: the job goes on without
    anybody watching.

    Raises:
        Refused: the gateway knows no such job, the key may not see it, or there is no gateway.
    """
    path = f"/v1/fine_tuning/jobs/{quote(id, '')}"
    gateway.get(path)  # a wrong address is a mistake to report, not a restart to wait for
    watching = Watching(console)
    with watching.bar:
        while True:
            try:
                job: dict[str, Any] = gateway.get(path)
                watching.show(events_since(gateway, path, watching.seen), job)
            except Refused as exc:
                if exc.status not in _PASSING:
                    raise
                watching.waiting(str(exc))
            else:
                if job["status"] in _ENDED:
                    return job
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
                self._say(event["message"], style)
        self.bar.update(self._task, description=_state(job))

    def waiting(self, why: str) -> None:
        """The gateway does not answer; said once."""
        if not self._away:
            self._say(f"waiting for the gateway: {why}", "dim")
        self._away = True

    def _say(self, message: str, style: str) -> None:
        # Unwrapped: what reads a pipe takes a line for a message.
        self._console.print(Text(" ".join(message.split()), style=style), soft_wrap=True)

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


def events_since(gateway: Readable, path: str, seen: str | None) -> list[dict[str, Any]]:
    """A job's events after the one that was seen (all for None), the oldest first.

    `path` is the job's. The API's pages go back in time.
    """
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
