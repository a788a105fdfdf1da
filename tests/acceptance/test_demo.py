"""`make serve`: a real model, three adapters, three voices; and what the README says about it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from app import demo
from tests.acceptance.conftest import Served, served_by
from tests.acceptance.readme import Block, blocks, run_code
from tests.waiting import wait_until

pytestmark = pytest.mark.worker

NAMES = list(demo.ADAPTERS)
QUESTION = demo.SAMPLE_PROMPTS[1]


@pytest.fixture(scope="module")
def demo_gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """What `make serve` starts, with nothing configured but where to keep things."""
    folder = tmp_path_factory.mktemp("demo")
    options = ("--log-format", "text", "--hello")
    served = served_by(folder / "log", *options, data_dir=folder / "data")
    with served.process:
        wait_until(lambda: "loragate is ready" in served.process.output(), within_s=120)
        yield served


@pytest.fixture
def client(demo_gateway: Served) -> Iterator[openai.OpenAI]:
    with demo_gateway.openai_client() as client:
        yield client


def say(client: openai.OpenAI, model: str) -> tuple[str, int]:
    """A streamed answer, and in how many pieces it came."""
    with client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": QUESTION}],
        stream=True,
        temperature=0,
        max_tokens=48,
    ) as stream:
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
    return "".join(pieces), len(pieces)


def test_three_adapters_give_three_streamed_answers(client: openai.OpenAI) -> None:
    answers = {name: say(client, name) for name in (*NAMES[:3], demo.BASE_NAME)}
    assert len({text for text, _ in answers.values()}) == 4
    for name, (text, pieces) in answers.items():
        assert text.strip(), name
        assert pieces > 3, name


def test_the_same_question_has_the_same_answer(client: openai.OpenAI) -> None:
    assert say(client, NAMES[0])[0] == say(client, NAMES[0])[0]


def test_every_demo_adapter_is_listed(client: openai.OpenAI) -> None:
    listed = {model.id for model in client.models.list()}
    assert {demo.BASE_NAME, *NAMES} <= listed


def test_logprobs_and_token_ids(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=NAMES[0],
        prompt=QUESTION,
        max_tokens=4,
        logprobs=1,
        extra_body={"return_token_ids": True},
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert len(logprobs.token_logprobs) == len(answer.choices[0].token_ids)  # type: ignore[attr-defined]


@pytest.mark.parametrize("language", ["bash", "python"])
def test_what_it_prints_works_as_printed(
    demo_gateway: Served, tmp_path: Path, language: str
) -> None:
    """Copied from the terminal with the mouse, changed in nothing."""
    lines = demo_gateway.process.output().splitlines(keepends=True)
    start, end = {"bash": ("curl ", "\n"), "python": ("from openai ", "The API ")}[language]
    first = next(i for i, line in enumerate(lines) if line.lstrip().startswith(start))
    last = next(i for i, line in enumerate(lines) if i > first and line.startswith(end))
    output = run_code(language, "".join(lines[first:last]), cwd=tmp_path)
    assert output.strip()


@pytest.mark.parametrize(
    "block", [block for block in blocks() if block.name == "serve"], ids=lambda b: b.language
)
def test_readme(demo_gateway: Served, block: Block, tmp_path: Path) -> None:
    address = demo_gateway.url.removeprefix("http://")
    replace = {"127.0.0.1:8080": address, "localhost:8080": address}
    output = block.run(replace, cwd=tmp_path, env={"LORAGATE_URL": demo_gateway.url})
    assert output.strip()


def test_a_killed_worker_comes_back_by_itself(client: openai.OpenAI, demo_gateway: Served) -> None:
    """The last test of this module: it takes the worker away."""
    before, _ = say(client, NAMES[0])
    gateway = demo_gateway.process
    for pid in gateway.group():
        if pid != gateway.pid:
            os.kill(pid, signal.SIGKILL)

    def answers_again() -> bool:
        try:
            return say(client, NAMES[0])[0] == before
        except openai.APIError:
            return False

    wait_until(answers_again, within_s=90, every_s=0.2)
    assert httpx.get(f"{demo_gateway.url}/readyz").status_code == 200


def test_the_end_of_the_gateway_is_the_end_of_its_worker(demo_gateway: Served) -> None:
    demo_gateway.process.terminate()
    wait_until(lambda: demo_gateway.process.group() == [], within_s=15)
