"""lm-evaluation-harness through the gateway, and its own transformers and PEFT: one result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from app import demo
from tests.demo_gateway import asked, gateway_before
from tests.docs.pages import page
from tests.integration.gateway import Gateway
from tests.servers import ROOT, ModelServer

pytestmark = [pytest.mark.worker, pytest.mark.timeout(300)]

TASK = "true_false"
ITEMS = 128
CHOICES = 2
BATCH = 64
TOLERANCE = 1e-3
#: One that answers claims its own way and one that was trained for something else.
ADAPTERS = ("skeptic",)
MODELS = (demo.BASE_NAME, *ADAPTERS)


@dataclass(frozen=True)
class Verdict:
    """What the harness found: accuracy, and for each item its choices' (logprob, is greedy)."""

    accuracy: float
    items: list[list[tuple[float, bool]]]


def evaluate(folder: Path, *arguments: str) -> Verdict:
    """Run the harness as a researcher does, from the repository's root and without a network."""
    env = {"HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(Path(sys.executable).with_name("lm_eval")), *arguments],
        cwd=ROOT,
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (results,) = folder.rglob("results_*.json")
    (samples,) = folder.rglob(f"samples_{TASK}_*.jsonl")
    rows = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: row["doc_id"])
    return Verdict(
        json.loads(results.read_text())["results"][TASK]["acc,none"],
        [[(float(a), b == "True") for a, b in row["filtered_resps"]] for row in rows],
    )


def documented() -> list[str]:
    """The arguments that the page for researchers gives."""
    commands = page("docs/researchers.md").commands()
    return next(words[1:] for words in commands if words[0] == "lm_eval")


def through(gateway: Gateway, model: str, folder: Path) -> Verdict:
    """The page's command, at this gateway and for this model."""
    replace = {
        "http://127.0.0.1:8080": gateway.url,
        "model=skeptic@1": f"model={model}",
        "results": str(folder),
    }
    words = documented()
    for old, new in replace.items():
        assert sum(old in word for word in words) == 1
        words = [word.replace(old, new) for word in words]
    return evaluate(folder, *words)


def by_itself(model: str, folder: Path) -> Verdict:
    """The same task and batches, by the harness's own transformers and PEFT."""
    told = f"pretrained={demo.MODEL_DIR},dtype=float32"
    if model in demo.ADAPTERS:
        told += f",peft={demo.ADAPTERS[model]}"
    options = {"model": "hf", "model_args": told, "device": "cpu", "batch_size": str(BATCH)}
    options |= {"include_path": "examples", "tasks": TASK, "output_path": str(folder)}
    words = [part for name, value in options.items() for part in (f"--{name}", value)]
    return evaluate(folder, "run", *words, "--log_samples")


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Verdict]:
    """What the harness finds when it runs the models itself."""

    folders = [tmp_path_factory.mktemp(model) for model in MODELS]
    with ThreadPoolExecutor(2) as threads:
        return dict(zip(MODELS, threads.map(by_itself, MODELS, folders), strict=True))


@pytest.fixture(scope="module")
def through_worker(
    worker_server: ModelServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    with gateway_before(worker_server, tmp_path_factory.mktemp("gateway"), ADAPTERS) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def through_vllm(
    vllm_server: ModelServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    with gateway_before(vllm_server, tmp_path_factory.mktemp("gateway"), ADAPTERS) as gateway:
        yield gateway


@pytest.mark.vllm
@pytest.mark.parametrize("model", MODELS)
def test_vllm_and_transformers_agree(
    through_vllm: Gateway, expected: Mapping[str, Verdict], model: str, tmp_path: Path
) -> None:
    before = asked(through_vllm)
    assert_same(through(through_vllm, model, tmp_path), expected[model])
    assert asked(through_vllm) - before == ITEMS * CHOICES / BATCH


@pytest.mark.parametrize("model", ADAPTERS)
def test_the_worker_and_transformers_agree(
    through_worker: Gateway, expected: Mapping[str, Verdict], model: str, tmp_path: Path
) -> None:
    assert_same(through(through_worker, model, tmp_path), expected[model])


def test_the_models_differ(expected: Mapping[str, Verdict]) -> None:
    """Or the agreement above would not tell an adapter from the base."""
    base = expected[demo.BASE_NAME]
    for model in ADAPTERS:
        pairs = zip(base.items, expected[model].items, strict=True)
        apart = [max(abs(a - b) for (a, _), (b, _) in zip(*pair, strict=True)) for pair in pairs]
        assert sum(distance > 100 * TOLERANCE for distance in apart) > ITEMS / 2, model


def assert_same(found: Verdict, wanted: Verdict) -> None:
    assert len(found.items) == len(wanted.items) == ITEMS
    assert found.accuracy == wanted.accuracy
    for number, (ours, theirs) in enumerate(zip(found.items, wanted.items, strict=True)):
        for (mine, greedy), (its, also_greedy) in zip(ours, theirs, strict=True):
            assert mine == pytest.approx(its, rel=0, abs=TOLERANCE), f"item {number}"
            assert greedy == also_greedy, f"item {number}"
