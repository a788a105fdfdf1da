"""The page about prompt batches says what the rounds say, and which targets they keep."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import batching_report
from bench.batching_report import Conditions, Low, Round, Rounds

CONDITIONS = Conditions("2026-01-02", "a machine", "abc1234", 0.1, 1.5, 256, 640, 8)
LOW = Low(on_ms=10.15, off_ms=10.0, added_ms=0.15, pairs=3)


def rounds(**seconds: float) -> Rounds:
    """Three rounds of every way; their median is the one in the middle."""
    usual = dict.fromkeys(batching_report.TITLES, 1.0) | seconds
    return {
        way: [Round(middle + off, 4, 0.984) for off in (0.1, 0.0, -0.1)]
        for way, middle in usual.items()
    }


def kept(found: Rounds, low: Low = LOW) -> list[bool]:
    return [target.kept for target in batching_report.targets(found, low)]


def test_targets_are_judged_by_medians_and_worst_rounds() -> None:
    assert kept(rounds()) == [True] * 5
    assert kept(rounds(batch_gateway=1.04)) == [False, True, True, True, True]
    assert kept(rounds(singles_gateway=1.06)) == [True, False, True, True, True]
    assert kept(rounds(batch=0.9, singles=9.0)) == [False, True, True, True, True]
    assert kept(rounds(), Low(10.1, 10.0, 0.3, 3)) == [True, True, True, True, False]
    worst = {"singles_gateway": [Round(1.0, 4, 0.984), Round(1.0, 9, 0.5), Round(1.0, 4, 0.984)]}
    assert kept({**rounds(), **worst}) == [True, True, False, False, True]


def test_the_page_and_the_file_have_every_way(tmp_path: Path) -> None:
    found = rounds(singles_gateway=1.06)
    batching_report.write(found, LOW, LOW, CONDITIONS, tmp_path)
    page = (tmp_path / "batching.md").read_text()
    for way, title in batching_report.TITLES.items():
        assert f"| {title} | 3 | 4 | {1.06 if way == 'singles_gateway' else 1.0:.3f} |" in page
    assert page.count("| kept |") == 4
    assert page.count("| missed |") == 1
    document = json.loads((tmp_path / "batching.json").read_text())
    assert document["median_s"]["singles_gateway"] == pytest.approx(1.06)
    assert [len(each) for each in document["rounds"].values()] == [3] * 5
    assert document["conditions"]["prompts"] == 256
