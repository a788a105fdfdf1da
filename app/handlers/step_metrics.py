"""What a fine-tune job's events say of its steps, and the CSV made of them.

What comes in: what came of steps and epochs, or recorded events. What goes out: events in the
words of OpenAI's API, numbers for checkpoints, CSV. It must not know: SQL, trainers.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from typing import Any

from app.domain import JobEventType
from app.jobs.queue import NewEvent
from app.training.outcomes import Means, StepDone

#: The CSV's columns: those of OpenAI's, then ours.
COLUMNS = {
    "step": "step",
    "train_loss": "train_loss",
    "train_accuracy": "train_mean_token_accuracy",
    "valid_loss": "full_valid_loss",
    "valid_mean_token_accuracy": "full_valid_mean_token_accuracy",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
    "tokens": "tokens",
    "tokens_per_second": "tokens_per_second",
}


def step_event(done: StepDone, steps: int, valid: Means | None) -> NewEvent:
    """A step's numbers; `valid` is there if the step ended an epoch."""
    message = f"Step {done.step}/{steps}: training loss={done.train.loss:.4f}"
    if valid is not None:
        message += f", full validation loss={valid.loss:.4f}"
    data = {**numbers(done, valid), "total_steps": steps}
    return NewEvent(JobEventType.METRICS, message, data=data, step=done.step)


def numbers(done: StepDone, valid: Means | None) -> dict[str, float]:
    """The numbers of a step under the names OpenAI gives them, and ours under our own."""
    found: dict[str, float | None] = {
        "step": done.step,
        "train_loss": done.train.loss,
        "train_mean_token_accuracy": done.train.token_accuracy,
        "train_reward_margin": done.train.reward_margin,
        "train_reward_accuracy": done.train.reward_accuracy,
        "learning_rate": done.learning_rate,
        "grad_norm": done.grad_norm,
        "tokens": done.tokens,
        "tokens_per_second": done.tokens / done.seconds if done.seconds else None,
    }
    if valid is not None:
        found |= {
            "full_valid_loss": valid.loss,
            "full_valid_mean_token_accuracy": valid.token_accuracy,
            "full_valid_reward_margin": valid.reward_margin,
            "full_valid_reward_accuracy": valid.reward_accuracy,
        }
    return {name: value for name, value in found.items() if value is not None}


def as_csv(steps: Iterable[Mapping[str, Any]]) -> bytes:
    """A line for each step's numbers, in their order."""
    text = io.StringIO(newline="")
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(COLUMNS)
    for step in steps:
        lines.writerow([step.get(name, "") for name in COLUMNS.values()])
    return text.getvalue().encode()
