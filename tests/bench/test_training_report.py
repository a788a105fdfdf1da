"""The page about training says what the rounds say, and which targets they keep."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench import training_report
from bench.training_client import RUNS, Shape, distance
from bench.training_report import Beside, Conditions, Eight, Ending, Found

CONDITIONS = Conditions(
    "2026-01-02", "a machine", "abc1234", 0.1, 1.5, None, {"SkyRL": "0123abc"}, 2e-6
)
ENDINGS = [Ending(0.1, 0.2)] * 19 + [Ending(0.2, 3.0)]
FOUND = Found(
    runs={"4 x 64": [Eight(50, seconds, 10.0, 1e-6) for seconds in (4.9, 4.0, 9.0)]},
    jobs={"4 examples": [Eight(50, 5.0, 10.0)]},
    beside={"4 x 64": [Beside(15.0, ours, (9.0, 8.0), (9.1, 8.1)) for ours in (9.0, 10.0, 30.0)]},
    endings={"job": ENDINGS},
)


def kept(found: Found) -> list[bool]:
    return [target.kept for target in training_report.targets(found)]


def test_targets_are_judged_by_medians_worst_adapters_and_late_tokens() -> None:
    assert kept(FOUND) == [True] * 5
    slow = [Eight(50, seconds, 10.0, 1e-6) for seconds in (5.1, 5.1, 1.0)]
    assert kept(replace(FOUND, runs={"4 x 64": slow})) == [False, True, True, True, True]
    slow = [Eight(50, 5.1, 10.0)]
    assert kept(replace(FOUND, jobs={"4 examples": slow})) == [True, False, True, True, True]
    wrong = [*FOUND.runs["4 x 64"], Eight(50, 4.0, 10.0, 2e-4)]
    assert kept(replace(FOUND, runs={"4 x 64": wrong})) == [True, True, False, True, True]
    close = [Beside(14.0, 10.0, (9.0, 8.0), (9.1, 8.1))]
    assert kept(replace(FOUND, beside={"4 x 64": close})) == [True, True, True, False, True]
    late = [*ENDINGS, Ending(0.2, 1.0)]
    assert kept(replace(FOUND, endings={"job": late})) == [True, True, True, True, False]


@pytest.mark.parametrize(
    ("count", "place"), [(1, 1), (20, 19), (50, 48), (100, 95)], ids=lambda value: str(value)
)
def test_p95_is_not_exceeded_by_95_in_100(count: int, place: int) -> None:
    assert training_report.p95([float(value) for value in range(count, 0, -1)]) == place


def test_the_page_and_the_file_have_every_part(tmp_path: Path) -> None:
    training_report.write(FOUND, CONDITIONS, tmp_path)
    page = (tmp_path / "training.md").read_text()
    assert "| runs | 4 x 64 | 3 | 50 | 4.90 | 10.00 | 0.49 | 81.6 | 1.0e-06 |" in page
    assert "| jobs | 4 examples | 1 | 50 | 5.00 | 10.00 | 0.50 | 80.0 |  |" in page
    assert "| 4 x 64 | 3 | 15.0 | 10.0 | 1.50 | 9.000 to 8.000 | 9.100 to 8.100 |" in page
    assert "| 20 | 0.100 s | 0.100 s | 0.200 s | 0.200 s | 3.000 s |" in page
    assert page.count("| kept |") == 5
    document = json.loads((tmp_path / "training.json").read_text())
    assert [each["together_s"] for each in document["runs"]["4 x 64"]] == [4.9, 4.0, 9.0]
    assert document["conditions"]["same_start"] == 2e-6


def test_what_was_not_measured_is_left_out() -> None:
    found = Found({}, {}, {}, {"job": ENDINGS})
    page = training_report.page(found, CONDITIONS)
    assert "first token" in page
    assert "SkyRL" not in page
    assert "at once" not in page


def test_a_batch_is_the_same_for_both_and_another_for_each_run() -> None:
    batches = Shape(2, 8).batches()
    assert batches == Shape(2, 8).batches()
    assert [[len(ids) for ids in batch] for batch in batches] == [[9, 9]] * RUNS
    assert len({str(batch) for batch in batches}) == RUNS


def test_adapters_are_compared_number_by_number() -> None:
    one = [{"a": np.zeros(3), "b": np.ones(2)}, {"a": np.zeros(3)}]
    assert distance(one, one) == 0
    moved = [{"a": np.zeros(3), "b": np.array([1.0, 0.75])}, {"a": np.zeros(3)}]
    assert distance(one, moved) == 0.25
    with pytest.raises(KeyError):
        distance(one, [{"a": np.zeros(3)}, {"a": np.zeros(3)}])
