"""The report of overhead: which build is judged, and what stands beside it."""

from __future__ import annotations

from bench import report
from bench.measure import Figures
from bench.report import OURS, OURS_PURE, REFERENCE, Record


def record(name: str, cpu_us: float) -> Record:
    figures = Figures(100, 100.0, 100.0, 10, 20, cpu_us, cpu_us, 0.0, 50.0)
    return Record(name, name, rounds=[{"reply_16": figures}])


def row(*records: Record) -> str:
    """The line of the goal: CPU per request, of the reference's."""
    lines = report.targets({each.name: each for each in records}).splitlines()
    return next(line for line in lines if "goal" in line).partition("| ≤ 1.00 ")[2]


def test_the_compiled_build_is_judged_and_the_pure_one_stands_beside() -> None:
    peer = record(REFERENCE, 100.0)
    fast, slow = record(OURS, 80.0), record(OURS, 101.0)
    pure = record(OURS_PURE, 120.0)
    assert row(peer, fast, pure) == "| 0.800 | kept | 1.200 |"
    assert row(peer, slow, pure) == "| 1.010 | missed | 1.200 |"
    assert row(peer, fast) == "| 0.800 | kept |  |"


def test_without_a_compiled_build_nothing_is_judged() -> None:
    pure = record(OURS_PURE, 90.0)
    assert row(record(REFERENCE, 100.0), pure) == "| - | not measured | 0.900 |"
