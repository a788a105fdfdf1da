"""A job's loss can be seen in its picture."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.cli.loss_plot import draw
from app.errors import InvalidRequest

pixels = pytest.importorskip("matplotlib.image")


@pytest.mark.parametrize("steps", [1, 2, 30])
def test_the_losses_are_drawn(steps: int, tmp_path: Path) -> None:
    target = tmp_path / "loss.of.a.job"
    draw("ftjob-1", [{"step": n, "train_loss": 2 / n} for n in range(1, steps + 1)], target)
    assert target.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    with target.open("rb") as stream:
        picture = pixels.imread(stream)
    _, width, _ = picture.shape
    middle = picture[:, width * 2 // 5 : width * 3 // 5, :3]  # no legend here
    red, blue = middle[..., 0], middle[..., 2]
    assert (blue - red > 0.3).sum() > 20


def test_without_steps_there_is_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="ftjob-1 has no steps yet"):
        draw("ftjob-1", [], tmp_path / "loss.png")
    assert not list(tmp_path.iterdir())
