"""What following shows of a job, from a gateway's pages of events, which go back in time."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from app.cli.follow import events_since, follow_job
from app.cli.gateway import Refused

PATH = "/v1/fine_tuning/jobs/ftjob-1"


class Kept:
    """A gateway with one job. It answers with at most `page` events; `faults` come first."""

    def __init__(self, events: int, page: int = 100, *faults: Refused | None) -> None:
        self.events = [step(number) for number in range(1, events + 1)]
        self.asked = 0
        self._page = page
        self._faults = list(faults)

    def get(self, path: str, **params: object) -> Any:
        if self._faults and (fault := self._faults.pop(0)):
            raise fault
        if path == PATH:
            return {"id": "ftjob-1", "status": "succeeded"}
        assert path == f"{PATH}/events"
        self.asked += 1
        older = self.events[::-1]
        if (after := params["after"]) is not None:
            older = older[[event["id"] for event in older].index(after) + 1 :]
        return {"data": older[: self._page], "has_more": len(older) > self._page}


def step(number: int) -> dict[str, Any]:
    message = f"Step {number}/9: training loss={1 / number:.4f}, " + "and so on " * 20
    return {
        "id": f"ftevent-{number}",
        "type": "metrics",
        "level": "info",
        "message": message.strip(),
        "data": {"step": number, "train_loss": 1 / number, "total_steps": 9},
    }


def followed(gateway: Kept) -> list[str]:
    """The lines that a pipe gets."""
    pipe = io.StringIO()
    follow_job(gateway, "ftjob-1", Console(file=pipe, width=80))
    return pipe.getvalue().splitlines()


@pytest.mark.parametrize("events", [0, 1, 2, 3, 4, 7])
@pytest.mark.parametrize("page", [1, 2, 3, 100])
def test_every_event_comes_once_and_in_order(events: int, page: int) -> None:
    gateway = Kept(events, page)
    assert events_since(gateway, PATH, None) == gateway.events
    for seen, event in enumerate(gateway.events, start=1):
        assert events_since(gateway, PATH, event["id"]) == gateway.events[seen:]


def test_pages_older_than_what_was_seen_are_left_alone() -> None:
    gateway = Kept(7, 2)
    assert len(events_since(gateway, PATH, "ftevent-6")) == 1
    assert gateway.asked == 1
    assert len(events_since(gateway, PATH, "ftevent-4")) == 3
    assert gateway.asked == 3


def test_into_a_pipe_a_message_is_a_line() -> None:
    gateway = Kept(3)
    assert followed(gateway) == [event["message"] for event in gateway.events]


@pytest.mark.parametrize("status", [0, 502, 503, 504])
def test_a_gateway_that_is_away_is_waited_for_and_said_once(status: int) -> None:
    away = Refused("nobody\nis there", status)
    told = followed(Kept(2, 100, None, away, away))
    waiting, *steps = told
    assert waiting == "waiting for the gateway: nobody is there"
    assert len(steps) == 2


def test_a_refusal_ends_it() -> None:
    with pytest.raises(Refused, match="no such job"):
        followed(Kept(1, 100, None, Refused("no such job", 404)))


def test_a_gateway_that_never_answered_is_no_restart() -> None:
    with pytest.raises(Refused, match="wrong address"):
        followed(Kept(1, 100, Refused("wrong address")))
