"""`loragate jobs …`: what scripts and pipes get of it, and its refusals."""

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

pytestmark = [pytest.mark.worker, pytest.mark.timeout(120)]

LONG = ("--epochs", 100)


class Terminal:
    """`loragate jobs` against one gateway."""

    def __init__(self, served: Served) -> None:
        self._environment = {**os.environ, "LORAGATE_URL": served.url, "NO_COLOR": "1"}

    def start(self, *arguments: object, into: Path) -> subprocess.Popen[bytes]:
        with into.open("wb") as told:
            return subprocess.Popen(
                self._command(arguments), env=self._environment, stdout=told, stderr=told
            )

    def run(self, *arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            self._command(arguments),
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done

    def json(self, *arguments: object, code: int = 0) -> Any:
        return json.loads(self.run(*arguments, "--json", code=code).stdout)

    def error(self, *arguments: object) -> str:
        done = self.run(*arguments, code=1)
        assert done.stdout == ""
        assert re.fullmatch(r"error: [^\n]+\n", done.stderr), done.stderr
        return done.stderr

    def submit(self, path: Path, *options: object) -> str:
        wanted = ("--epochs", 1, "--batch-size", 4, "--lora-rank", 4, "--seed", 7)
        return str(self.json("submit", path, *wanted, *options)["id"])

    def until(self, job: str, status: str) -> None:
        wait_until(lambda: self.json("show", job)["status"] == status, within_s=30)

    @staticmethod
    def _command(arguments: tuple[object, ...]) -> list[str]:
        return [sys.executable, "-m", "app.cli", "jobs", *map(str, arguments)]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """It trains one job at a time, so that another waits."""
    folder = tmp_path_factory.mktemp("jobs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MAX_WORKERS", "1")
        served = served_by(
            folder / "log", data_dir=folder / "data", lease_s=1, checkpoint_period_s=0.5
        )
    with served.process:
        served.wait_ready(within_s=60)
        yield served


@pytest.fixture
def jobs(served: Served) -> Terminal:
    return Terminal(served)


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("examples") / "parrot.jsonl"
    path.write_bytes(examples(8))
    return path


@pytest.fixture
def trained(jobs: Terminal, lines: Path) -> str:
    job = jobs.submit(lines)
    jobs.until(job, "succeeded")
    return job


def uploaded(served: Served) -> list[str]:
    with served.openai_client() as client:
        return [each.id for each in client.files.list()]


def test_what_was_chosen_is_what_is_asked(jobs: Terminal, lines: Path) -> None:
    job = jobs.json(
        *("submit", lines, "--model", "demo", "--validation-file", lines, "--suffix", "parrot"),
        *("--epochs", 2, "--batch-size", 3, "--learning-rate", 0.002, "--lora-rank", 5),
        *("--seed", 11),
    )
    chosen = job["method"]["supervised"]["hyperparameters"]
    assert (chosen["n_epochs"], chosen["batch_size"], chosen["lora_rank"]) == (2, 3, 5)
    assert chosen["learning_rate"] == 0.002
    assert (job["seed"], job["user_provided_suffix"]) == (11, "parrot")
    assert job["validation_file"] not in (None, job["training_file"])
    ended = jobs.json("follow", job["id"])
    assert ended["status"] == "succeeded"
    assert ended["result_files"]


def test_following_an_ended_job_tells_it_all(jobs: Terminal, trained: str) -> None:
    done = jobs.run("follow", trained)
    steps = [line for line in done.stderr.splitlines() if line.startswith("Step ")]
    assert [line.partition(":")[0] for line in steps] == ["Step 1/2", "Step 2/2"]
    ended = jobs.json("follow", trained)
    assert ended["fine_tuned_model"] in done.stdout
    assert done.stdout.rstrip().endswith(ended["curl"])
    answer = subprocess.run(
        ["bash", "-c", ended["curl"]], capture_output=True, text=True, timeout=60, check=True
    )
    assert json.loads(answer.stdout)["choices"][0]["message"]["content"]


def test_every_command_has_its_json(
    served: Served, jobs: Terminal, trained: str, lines: Path, tmp_path: Path
) -> None:
    assert jobs.json("show", trained)["id"] == trained
    assert jobs.json("list", "--limit", 1)["data"][0]["id"] == trained
    picture = tmp_path / "loss.png"
    assert jobs.json("plot", trained, "--out", picture) == str(picture)
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")

    job = jobs.submit(lines, *LONG)
    jobs.until(job, "running")
    assert jobs.json("pause", job)["id"] == job
    jobs.until(job, "paused")
    assert jobs.json("resume", job)["id"] == job
    jobs.until(job, "running")
    assert jobs.json("cancel", job)["id"] == job
    ended = jobs.json("follow", job, code=1)
    assert (ended["status"], ended["curl"]) == ("cancelled", None)
    assert "cancelled" in jobs.run("follow", job, code=1).stdout
    with served.openai_client() as client:
        assert client.fine_tuning.jobs.retrieve(job).status == "cancelled"


def test_a_list_says_how_it_goes_on(jobs: Terminal, lines: Path, trained: str) -> None:
    newer = jobs.submit(lines)
    shown = jobs.run("list", "--limit", 1).stdout
    assert trained not in shown
    assert f"there are more: --after {newer}" in shown
    assert trained in jobs.run("list", "--limit", 1, "--after", newer).stdout


def test_a_job_that_waits_has_a_place_and_no_loss(
    jobs: Terminal, lines: Path, tmp_path: Path
) -> None:
    first, second = jobs.submit(lines, *LONG), jobs.submit(lines)
    jobs.until(first, "running")
    assert re.search(r"queue position +0\b", jobs.run("show", second).stdout)
    picture = tmp_path / "loss.png"
    told = jobs.error("plot", second, "--out", picture)
    assert f"{second} has no steps yet" in told
    assert not picture.exists()
    for job in (second, first):
        jobs.run("cancel", job)
        jobs.until(job, "cancelled")


def test_a_follower_waits_for_its_gateway(
    served: Served, jobs: Terminal, lines: Path, tmp_path: Path
) -> None:
    job = jobs.submit(lines, "--epochs", 30)
    said = tmp_path / "said"
    follower = jobs.start("follow", job, into=said)
    try:
        wait_until(lambda: "Step 1/60" in said.read_text(), within_s=30)
        served.process.kill()
        wait_until(lambda: "waiting for the gateway" in said.read_text(), within_s=30)
        served.start(within_s=60)
        assert follower.wait(timeout=60) == 0, said.read_text()
    finally:
        follower.kill()
    told = said.read_text()
    waits = re.findall(r"^waiting for the gateway: .+LORAGATE_URL$", told, re.MULTILINE)
    assert len(waits) == 1
    steps = [int(step) for step in re.findall(r"^Step (\d+)/60: ", told, re.MULTILINE)]
    assert steps == list(range(1, 61))
    assert "succeeded. The model is ft:demo::" in told


def test_what_is_wrong_is_said_in_a_line(
    served: Served, jobs: Terminal, trained: str, lines: Path, tmp_path: Path
) -> None:
    before = uploaded(served)
    missing = tmp_path / "missing.jsonl"
    assert f"{missing} is not a file" in jobs.error("submit", missing)
    assert f"{missing} is not a file" in jobs.error("submit", lines, "--validation-file", missing)
    assert uploaded(served) == before

    bad = tmp_path / "bad.jsonl"
    good, *_ = lines.read_text().splitlines()
    bad.write_text(f'{good}\n{{"messages": []}}\n{good}\nnot json\n')
    told = jobs.error("submit", bad)
    assert re.search(r"line 2: .+; line 4: ", told)

    for verb in ("show", "follow", "cancel", "pause", "resume", "plot"):
        assert "ftjob-nobody" in jobs.error(verb, "ftjob-nobody")
    nowhere = tmp_path / "nowhere" / "loss.png"
    assert str(nowhere) in jobs.error("plot", trained, "--out", nowhere)
    assert "there is no gateway at" in jobs.error("follow", trained, "--url", "http://127.0.0.1:1")
    assert "is not the URL of a gateway" in jobs.error("follow", trained, "--url", "nonsense")
    for verb in ("cancel", "pause", "resume"):
        told = jobs.error(verb, trained)
        assert trained in told
        assert "succeeded" in told
