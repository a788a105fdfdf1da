"""A job's loss as a picture.

What comes in: the numbers of its steps. What goes out: a PNG. matplotlib is imported when it is
needed: the command line does without it otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from app.errors import InvalidRequest


def draw(title: str, steps: Sequence[dict[str, Any]], target: Path) -> None:
    """Draw the training loss of each step, and the validation loss where it was taken.

    Raises:
        InvalidRequest: there is no step yet.
        ModuleNotFoundError: matplotlib is not installed.
    """
    if not steps:
        raise InvalidRequest(f"{title} has no steps yet: there is nothing to draw")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(
        [each["step"] for each in steps],
        [each["train_loss"] for each in steps],
        marker="o" if len(steps) == 1 else None,  # a line through one point shows nothing
        label="training",
    )
    validated = [each for each in steps if each.get("full_valid_loss") is not None]
    if validated:
        axes.plot(
            [each["step"] for each in validated],
            [each["full_valid_loss"] for each in validated],
            marker="o",
            label="validation",
        )
    axes.set(title=title, xlabel="step", ylabel="loss (nats per token)")
    axes.set_ylim(bottom=0)
    axes.legend()
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(target, dpi=150, format="png")
