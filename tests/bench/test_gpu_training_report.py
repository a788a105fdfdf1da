"""The page about training on GPUs says what its file says."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from bench import gpu_training_report
from bench.gpu_training_report import NAME, RESULTS


@pytest.fixture
def document() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{NAME}.json").read_text("utf-8"))
    return copy.deepcopy(found)


def test_the_page_here_is_that_of_the_file_here(document: dict[str, Any], tmp_path: Path) -> None:
    gpu_training_report.write(document, tmp_path)
    for kind in ("json", "md"):
        name = f"{NAME}.{kind}"
        assert (tmp_path / name).read_bytes() == (RESULTS / name).read_bytes()


def test_every_engine_has_its_numbers(document: dict[str, Any]) -> None:
    document["engines"][2] |= {"tokens_per_s": 95_206, "memory_gib": [1.25, 0.0]}
    document["engines"][2]["losses"][0] = 2 * document["engines"][0]["losses"][0]
    page = gpu_training_report.page(document)
    line = "| Megatron-Core, each layer over 2 GPUs | 95,206 | 0.2027 | 2.00 | 1.25 |"
    assert line in page
    assert "within 100.000% of each other" in page


def test_one_that_failed_is_said_to_have(document: dict[str, Any]) -> None:
    document["engines"][1] = {"engine": "megatron", "error": "it died"}
    del document["alone"]
    page = gpu_training_report.page(document)
    assert "Megatron-Core failed: it died" in page
    assert "| Megatron-Core |" not in page
    assert "one GPU" not in page
