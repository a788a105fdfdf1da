"""`make serve`, then train: the README's example and the one beside it, run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from examples import fine_tune
from tests.acceptance.conftest import Served, served_by
from tests.acceptance.readme import ROOT, blocks
from tests.acceptance.training import HELD_OUT, conversations, served_as_trained
from tests.waiting import wait_until

pytestmark = [pytest.mark.worker, pytest.mark.timeout(300)]

MODEL = re.compile(r"ft:demo:parrot:[a-z0-9]{8}")
ASKED = 10


@pytest.fixture(scope="module")
def demo_gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """What `make serve` starts, with nothing configured but where to keep things."""
    folder = tmp_path_factory.mktemp("training")
    options = ("--log-format", "text", "--hello")
    served = served_by(folder / "log", *options, data_dir=folder / "data")
    with served.process:
        wait_until(lambda: "loragate is ready" in served.process.output(), within_s=120)
        yield served


@pytest.fixture(scope="module")
def example(demo_gateway: Served) -> Iterator[subprocess.Popen[str]]:
    """The example at work."""
    argv = [sys.executable, "examples/fine_tune.py", "--url", demo_gateway.url]
    with subprocess.Popen(
        argv,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        yield process
        process.kill()


def test_readme(demo_gateway: Served, example: subprocess.Popen[str]) -> None:
    """The model has learned what its examples have in common, not the examples.

    The example trains on the same worker meanwhile.
    """
    (block,) = [block for block in blocks() if block.name == "train"]
    address = demo_gateway.url.removeprefix("http://")
    printed = block.run({"127.0.0.1:8080": address}, cwd=ROOT, env={})
    *_, last = printed.splitlines()
    model, _, answer = last.partition(": ")
    assert MODEL.fullmatch(model)
    assert answer.startswith("Squawk!")

    held_out = conversations(HELD_OUT)
    client = demo_gateway.openai_client()
    before, after = (fine_tune.loss(client, name, held_out) for name in ("demo", model))
    assert after < before / 2
    answers = [fine_tune.say(client, model, messages[0]) for messages in held_out[:ASKED]]
    squawks = [each for each in answers if re.fullmatch(r"Squawk! .+ Squawk, squawk!", each)]
    assert len(squawks) >= 0.8 * ASKED, answers
    served_as_trained(demo_gateway.url, model)


def test_the_example(
    demo_gateway: Served,
    example: subprocess.Popen[str],
    record_property: Callable[[str, object], None],
) -> None:
    output, complaints = example.communicate(timeout=180)
    assert example.returncode == 0, output + complaints
    *said, last = output.splitlines()
    record_property("trained", last)
    found = re.fullmatch(r"held-out loss: ([\d.]+) before, ([\d.]+) after; trained in \d+ s", last)
    assert found is not None, last
    before, after = map(float, found.groups())
    assert after < before / 2
    steps = [int(step) for line in said for step in re.findall(r"^Step (\d+)/", line)]
    assert steps == list(range(1, len(steps) + 1))
    (model,) = {name for line in said for name in MODEL.findall(line)}
    served_as_trained(demo_gateway.url, model)
