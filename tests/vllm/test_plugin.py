"""A real vLLM with loragate-vllm: prompt logprobs of the base and of adapters, all at once.

The demo model's lm_head is tied to its embeddings; an adapter's lm_head adds to the logits alone.
"""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from app import demo
from app.backends.base import Features
from app.backends.vllm import VllmBackend
from app.backends.wire import Limits
from tests.servers import ModelServer, run_vllm, vllm_python
from tests.vllm.reference import Reference, write_random_adapter
from tests.waiting import wait_until

# A test may have to start a server of its own.
pytestmark = [pytest.mark.vllm, pytest.mark.worker, pytest.mark.timeout(300)]

TOLERANCE = 1e-3
LONG = "The king went down to the sea and the sea was wide and old and cold. " * 12
PROMPTS = [
    "Tell me about the sea.",
    "Why?",
    LONG,
    "What do you know of an old ship? Answer in one line.",
    "two plus three",
    LONG[:400] + "Then it was winter.",
]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """More than a server has slots for; two of them change lm_head."""
    folder = tmp_path_factory.mktemp("adapters")
    head = ("lm_head", "q_proj")
    return {
        "head-a": write_random_adapter(folder / "a", head, seed=1),
        "head-b": write_random_adapter(folder / "b", head, seed=2),
        "body-a": write_random_adapter(folder / "c", ("q_proj", "down_proj"), seed=3),
        "body-b": write_random_adapter(folder / "d", ("v_proj", "o_proj"), seed=4),
        "only-head": write_random_adapter(folder / "e", ("lm_head",), seed=5),
    }


@pytest.fixture(scope="module")
def references(adapters: dict[str, Path]) -> dict[str, Reference]:
    known = {name: Reference(path) for name, path in adapters.items()}
    return known | {demo.BASE_NAME: Reference(None)}


@pytest.fixture(scope="module")
def tight_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelServer]:
    """Prompts are read in chunks of a few tokens, two adapters at a time."""
    options = ("--max-num-batched-tokens", "48", "--max-num-seqs", "8", "--max-loras", "2")
    with run_vllm(tmp_path_factory.mktemp("tight"), *options) as server:
        yield server


@pytest.fixture(params=["vllm_server", "tight_server"])
def server(request: pytest.FixtureRequest, adapters: Mapping[str, Path]) -> Iterator[ModelServer]:
    found: ModelServer = request.getfixturevalue(request.param)
    with httpx.Client(base_url=found.url, timeout=120) as http:
        for name, path in adapters.items():
            body = {"lora_name": name, "lora_path": str(path)}
            http.post("/v1/load_lora_adapter", json=body).raise_for_status()
        yield found
        for name in adapters:
            http.post("/v1/unload_lora_adapter", json={"lora_name": name}).raise_for_status()


def complete(server: ModelServer, model: str, **options: Any) -> list[dict[str, Any]]:
    body = {"model": model, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    answer = httpx.post(f"{server.url}/v1/completions", json=body | options, timeout=300)
    assert answer.status_code == 200, answer.text
    choices: list[dict[str, Any]] = answer.json()["choices"]
    return choices


def complete_all(
    server: ModelServer, models: list[str], **options: Any
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every prompt to every model, a request each and all at once."""
    asked = [(model, prompt) for prompt in options.pop("prompts", PROMPTS) for model in models]
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = [
            pool.submit(complete, server, model, prompt=prompt, **options)
            for model, prompt in asked
        ]
        for (model, _), answer in zip(asked, answers, strict=True):
            (choice,) = answer.result()
            yield model, choice


def prompt_error(reference: Reference, choice: dict[str, Any]) -> float:
    """The largest difference of a prompt logprob, top ones included."""
    tokens, rows = choice["prompt_token_ids"], choice["prompt_logprobs"]
    assert rows[0] is None
    assert len(rows) == len(tokens)
    expected = reference.logprobs(tokens)
    worst = 0.0
    for position, (token, row) in enumerate(zip(tokens[1:], rows[1:], strict=True)):
        assert str(token) in row
        for other, found in row.items():
            worst = max(worst, abs(found["logprob"] - expected[position, int(other)].item()))
    return worst


def generated_error(reference: Reference, choice: dict[str, Any]) -> float:
    """The largest difference of a generated token's logprob."""
    prompt, generated = choice["prompt_token_ids"], choice["token_ids"]
    expected = reference.logprobs(prompt + generated)[len(prompt) - 1 : -1]
    theirs = torch.tensor(choice["logprobs"]["token_logprobs"])
    ours = expected.gather(1, torch.tensor(generated).unsqueeze(1)).squeeze(1)
    return float((theirs - ours).abs().max())


def test_prompt_logprobs_agree_with_peft(
    server: ModelServer, references: dict[str, Reference]
) -> None:
    answers = complete_all(server, list(references), max_tokens=3, logprobs=1, prompt_logprobs=2)
    worst = dict.fromkeys(references, 0.0)
    for model, choice in answers:
        reference = references[model]
        found = max(prompt_error(reference, choice), generated_error(reference, choice))
        worst[model] = max(worst[model], found)
    assert max(worst.values()) < TOLERANCE, worst


def test_one_call_of_many_prompts(server: ModelServer, references: dict[str, Reference]) -> None:
    for model in ("head-a", demo.BASE_NAME):
        choices = complete(server, model, prompt=PROMPTS, max_tokens=1, prompt_logprobs=0)
        assert len(choices) == len(PROMPTS)
        assert max(prompt_error(references[model], choice) for choice in choices) < TOLERANCE


def test_echo_with_logprobs(server: ModelServer, references: dict[str, Reference]) -> None:
    for model, choice in complete_all(
        server, list(references), max_tokens=0, echo=True, logprobs=1, prompts=PROMPTS[:4]
    ):
        tokens, found = choice["prompt_token_ids"], choice["logprobs"]["token_logprobs"]
        assert found[0] is None
        expected = references[model].logprobs(tokens)
        for position, logprob in enumerate(found[1 : len(tokens)]):
            difference = logprob - expected[position, tokens[position + 1]].item()
            assert abs(difference) < TOLERANCE, model


def test_the_adapters_differ(references: dict[str, Reference]) -> None:
    """Else the tests above would not see one taken for another."""
    tokens = list(range(50, 90))
    rows = [reference.logprobs(tokens) for reference in references.values()]
    for i, one in enumerate(rows):
        assert all(float((one - other).abs().max()) > 0.1 for other in rows[:i])


def test_the_base_is_itself_when_the_slots_are_full(
    server: ModelServer, references: dict[str, Reference]
) -> None:
    """vLLM on the CPU lets the last slot's adapter answer for the base."""
    base = demo.BASE_NAME
    for filler in ("head-a", "head-b", "body-a", "only-head", "body-b"):
        complete(server, filler, prompt=PROMPTS[0], max_tokens=1)
        (choice,) = complete(
            server, base, prompt=PROMPTS[3], max_tokens=8, logprobs=1, cache_salt=filler
        )
        assert generated_error(references[base], choice) < TOLERANCE, filler


def test_the_prefix_cache_is_used_as_before(
    server: ModelServer, references: dict[str, Reference]
) -> None:
    """Prompt logprobs read the whole prompt; what they leave in the cache is right."""

    def hits() -> float:
        metrics = httpx.get(f"{server.url}/metrics", timeout=30).text
        lines = [line for line in metrics.splitlines() if not line.startswith("#")]
        return sum(
            float(line.split()[-1]) for line in lines if "vllm:prefix_cache_hits_total" in line
        )

    salt = {"cache_salt": "prefix"}
    (choice,) = complete(server, "head-b", prompt=LONG, max_tokens=1, prompt_logprobs=1, **salt)
    assert prompt_error(references["head-b"], choice) < TOLERANCE
    before = hits()
    (choice,) = complete(server, "head-b", prompt=LONG, max_tokens=4, logprobs=1, **salt)
    assert hits() > before
    assert generated_error(references["head-b"], choice) < TOLERANCE


def test_it_says_what_it_gets_right(server: ModelServer) -> None:
    assert features_of(server) == Features(True, True, True, dtype="float32")
    found = httpx.get(f"{server.url}/loragate/features", timeout=30).json()
    assert (found["plugin"], found["vllm"]) == ("0.1.0", "0.32.0")


def test_without_the_plugin_it_is_known_for_what_it_is(tmp_path: Path) -> None:
    """A vLLM that dies of two prompts is not taken for a safe one."""
    with run_vllm(tmp_path, env={"VLLM_PLUGINS": ""}) as server:
        assert httpx.get(f"{server.url}/loragate/features", timeout=30).status_code == 404
        assert features_of(server) == Features(False, False, False)
        body = {"model": demo.BASE_NAME, "prompt": PROMPTS, "prompt_logprobs": 0, "max_tokens": 1}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=120)
        assert answer.status_code == 500
        assert server.process is not None
        process = server.process
        wait_until(lambda: not process.running, within_s=60)


def test_the_code_for_a_gpu() -> None:
    """Without a GPU: vLLM's own bookkeeping, its kernels stood in for."""
    script = Path(__file__).with_name("gpu_bookkeeping.py")
    found = subprocess.run([vllm_python(), script], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


def features_of(server: ModelServer) -> Features:
    async def ask() -> Features:
        backend = VllmBackend(server.url, api_key=None, limits=Limits(), load_s=30)
        try:
            return await backend.features()
        finally:
            await backend.close()

    return asyncio.run(ask())
