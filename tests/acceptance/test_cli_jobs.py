"""`loragate jobs …` as users type it, against a gateway that trains."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.conftest import Served, served_by
from tests.acceptance.training import examples
from tests.waiting import wait_until

pytestmark = [pytest.mark.worker, pytest.mark.timeout(240)]

STEPS = 12


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("jobs")
    served = served_by(folder / "log", data_dir=folder / "data", lease_s=1, checkpoint_period_s=0.5)
    with served.process:
        served.wait_ready(within_s=120)
        yield served


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("examples") / "parrot.jsonl"
    path.write_bytes(examples(4 * STEPS))
    return path


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "app.cli", "jobs", *map(str, arguments)]


def environment(served: Served) -> dict[str, str]:
    return {**os.environ, "LORAGATE_URL": served.url, "NO_COLOR": "1"}


def loragate(served: Served, *arguments: object, code: int = 0) -> str:
    done = subprocess.run(
        command(*arguments),
        env=environment(served),
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout if code == 0 else done.stderr


def submit(served: Served, path: Path, *options: object) -> str:
    wanted = ("--epochs", 1, "--batch-size", 4, "--lora-rank", 4, "--seed", 7)
    found: dict[str, Any] = json.loads(
        loragate(served, "submit", path, *wanted, *options, "--json")
    )
    return str(found["id"])


def test_from_a_file_to_an_answer(served: Served, lines: Path, tmp_path: Path) -> None:
    job = submit(served, lines, "--suffix", "parrot", "--validation-file", lines)
    said = loragate(served, "follow", job)
    model, _, curl = said.partition("The model is ")[2].partition("\n")
    assert re.fullmatch(r"ft:demo:parrot:[a-z0-9]{8}", model)

    answer = subprocess.run(
        ["bash", "-c", curl], capture_output=True, text=True, timeout=60, check=True
    )
    assert json.loads(answer.stdout)["choices"][0]["message"]["content"]

    assert job in loragate(served, "list")
    shown = loragate(served, "show", job)
    assert "succeeded" in shown
    assert model in shown

    picture = tmp_path / "loss.png"
    loragate(served, "plot", job, "--out", picture)
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert picture.stat().st_size > 10_000


def test_follow_outlives_the_gateway(served: Served, lines: Path) -> None:
    job = submit(served, lines, "--epochs", 8)
    follower = subprocess.Popen(
        command("follow", job),
        env=environment(served),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    client = served.openai_client()

    def trains() -> bool:
        events = client.fine_tuning.jobs.list_events(job).data
        return any(event.type == "metrics" for event in events)

    wait_until(trains, within_s=60)
    served.process.kill()
    served.start(within_s=120)
    out, told = follower.communicate(timeout=180)
    assert follower.returncode == 0, told
    assert "The model is ft:demo::" in out
    steps = [int(step) for step in re.findall(r"^Step (\d+)/", told, re.MULTILINE)]
    assert steps == list(range(1, 8 * STEPS + 1))


def test_a_job_is_paused_resumed_and_cancelled(served: Served, lines: Path) -> None:
    job = submit(served, lines, "--epochs", 100)

    def status() -> str:
        return str(json.loads(loragate(served, "show", job, "--json"))["status"])

    wait_until(lambda: status() == "running", within_s=60)
    loragate(served, "pause", job)
    wait_until(lambda: status() == "paused", within_s=60)
    loragate(served, "resume", job)
    wait_until(lambda: status() == "running", within_s=60)
    loragate(served, "cancel", job)
    wait_until(lambda: status() == "cancelled", within_s=60)
    assert "cancelled" in loragate(served, "follow", job)


def test_what_is_wrong_is_said_in_a_line(served: Served, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": [{"role": "user", "content": "hi"}]}\nnot json\n')
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    for arguments, words in (
        (("submit", bad), ("line 1", "line 2")),
        (("submit", empty), ("empty",)),
        (("submit", tmp_path / "missing.jsonl"), ("missing.jsonl",)),
        (("show", "ftjob-nobody"), ("ftjob-nobody",)),
        (("follow", "ftjob-nobody"), ("ftjob-nobody",)),
        (("plot", "ftjob-nobody"), ("ftjob-nobody",)),
    ):
        told = loragate(served, *arguments, code=1)
        assert told.startswith("error: ")
        assert told.count("\n") == 1, told
        for word in words:
            assert word in told, told
