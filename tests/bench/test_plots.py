"""The plots: each is drawn from its results, and one without results is left alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="plots need the extra `bench`")

from bench import plots

COUNTS = {"adapter_loads": 9, "prefix_hit_tokens": 5, "prefix_queried_tokens": 10}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """This repository's overhead, and the others in the shape they are written in."""
    folder = tmp_path / "results"
    folder.mkdir()
    shutil.copy(plots.RESULTS / "overhead.json", folder)
    cold = {"requests": 100, "counts": COUNTS}
    rows = [{"title": title, "cold": cold, "goodput": 12.5} for title in ("loragate", "other")]
    (folder / "routing.json").write_text(json.dumps({"bound_ms": 1000, "contenders": rows}))
    each = {"seconds": 1.0, "calls": 1, "hit_rate": 0.9}
    document = {"conditions": {"prompts": 256}, "rounds": {"batch": [each], "singles": [each] * 3}}
    (folder / "batching.json").write_text(json.dumps(document))
    eight = {"together_s": 1.0, "in_turn_s": 3.0}
    contest = {"ours_per_s": 9.0, "theirs_per_s": 3.0}
    trained = {"runs": {"1 x 16": [eight]}, "beside": {"1 x 64": [contest]}}
    (folder / "training.json").write_text(json.dumps(trained))
    return folder


def draw(results: Path) -> int:
    return plots.main(["--results", str(results), "--out", str(results.parent / "images")])


def drawn(results: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (results.parent / "images").iterdir()}


def test_one_plot_of_each(results: Path) -> None:
    assert draw(results) == 0
    pictures = drawn(results)
    assert set(pictures) == {"overhead.png", "routing.png", "batching.png", "training.png"}
    assert all(data.startswith(b"\x89PNG") for data in pictures.values())
    assert draw(results) == 0
    assert drawn(results) == pictures  # equal results give equal files


def test_a_benchmark_without_results_is_left_alone(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (results / "batching.json").unlink()
    assert draw(results) == 0
    assert set(drawn(results)) == {"overhead.png", "routing.png", "training.png"}
    assert "batching: no results yet" in capsys.readouterr().out


def test_results_of_another_shape_are_refused(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (results / "batching.json").write_text("{}")
    assert draw(results) == 1
    assert "batching: these results cannot be drawn" in capsys.readouterr().err
