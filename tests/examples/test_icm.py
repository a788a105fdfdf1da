"""Label search by mutual predictability, run as its reader would, and the algebra inside it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples import icm
from tests.demo_gateway import asked, gateway_before
from tests.integration.gateway import Gateway
from tests.servers import ROOT, ModelServer

ITEMS, INITIAL, ITERATIONS = 8, 4, 6
CLAIMS = [icm.Claim(f"question {n // 3}?", f"claim {n}.", n % 3 == 0) for n in range(9)]


def run(gateway: Gateway, folder: Path, *options: str) -> tuple[str, dict[str, Any]]:
    command = [sys.executable, "examples/icm.py", "--url", gateway.url, "--out", str(folder)]
    for name, value in (("items", ITEMS), ("initial", INITIAL), ("iterations", ITERATIONS)):
        command += [f"--{name}", str(value)]
    done = subprocess.run(
        [*command, *options],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((folder / "icm.json").read_text())


@pytest.mark.worker
def test_a_search_is_one_call_an_iteration(worker_server: ModelServer, tmp_path: Path) -> None:
    with gateway_before(worker_server, tmp_path / "data") as gateway:
        printed, found = run(gateway, tmp_path / "out")
        answered = asked(gateway)
    searched, in_turn, at_once, batch = found["costs"]
    assert searched["calls"] == 1 + ITERATIONS
    assert searched["prompts"] > ITERATIONS + INITIAL
    assert in_turn["calls"] == at_once["calls"] == ITEMS
    assert batch["calls"] == 1
    assert {cost["prompts"] for cost in (in_turn, at_once, batch)} == {ITEMS}
    tokenized, compared, the_rest = len(icm.LABELS), 2 * ITEMS + 1, {0, 1}
    assert answered - searched["calls"] - tokenized - compared in the_rest

    assert [step["iteration"] for step in found["steps"]] == list(range(1, 1 + ITERATIONS))
    assert all(step["score"] < 0 for step in found["steps"])
    assert len({label["claim"] for label in found["labels"]}) == ITEMS
    true = Counter(label["question"] for label in found["labels"] if label["found"])
    assert max(true.values(), default=0) <= 1
    right = [label["found"] == label["label"] for label in found["labels"]]
    assert found["accuracy"] == sum(right) / ITEMS
    for told in ("one after another", "concurrent", "one batch", "labels are as in the data"):
        assert told in printed
    assert (tmp_path / "out" / "icm.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.vllm
def test_vllm_tells_its_hit_rates(vllm_server: ModelServer, tmp_path: Path) -> None:
    with gateway_before(vllm_server, tmp_path / "data") as gateway:
        _, found = run(gateway, tmp_path / "out", "--metrics", f"{vllm_server.url}/metrics")
    for cost in found["costs"]:
        assert 0 <= cost["hit_rate"] < 1


def test_the_labels_are_tokens(worker_server: ModelServer, tmp_path: Path) -> None:
    with gateway_before(worker_server, tmp_path / "data") as gateway:
        tokens = icm.label_tokens(gateway.url, "none", "demo")
        back = [
            gateway.client.post("/detokenize", json={"model": "demo", "tokens": [token]}).json()
            for token in tokens.values()
        ]
    assert [answer["prompt"] for answer in back] == list(icm.LABELS.values())


@given(st.lists(st.tuples(st.integers(0, len(CLAIMS) - 1), st.booleans(), st.booleans())))
def test_no_labelling_contradicts_itself(changes: list[tuple[int, bool, bool]]) -> None:
    labels: icm.Labels = {}
    for index, label, first in changes:
        options = icm.consistent(CLAIMS, labels, index, label)
        assert options[0][index] == label
        for option in options:
            assert option.keys() == labels.keys() | {index}
            true = Counter(CLAIMS[i].question for i, value in option.items() if value)
            assert max(true.values(), default=0) <= 1
            unchanged = option is labels and labels.get(index) == label
            assert unchanged or list(option)[-1] == index
        labels = options[0 if first else -1]


def test_a_prompt_shows_every_label_but_its_own() -> None:
    labels = {4: True, 0: False, 7: False}
    text = icm.prompt(CLAIMS, labels, 0)
    assert text == (
        "Claim: claim 4.\nTrue or False? Answer: True\n\n"
        "Claim: claim 7.\nTrue or False? Answer: False\n\n"
        "Claim: claim 0.\nTrue or False? Answer:"
    )
    assert icm.pool(CLAIMS, labels) == [icm.prompt(CLAIMS, labels, index) for index in labels]


def test_the_score_is_the_mean_logprob_of_the_labels() -> None:
    answers = [{True: math.log(0.5), False: math.log(0.5)}, {True: math.log(0.2), False: -0.2}]
    score = icm.utility({3: False, 5: True}, answers, alpha=10)
    assert score == pytest.approx(10 * (math.log(0.5) + math.log(0.2)) / 2)
