"""docs/fine-tuning.md lists what the API takes, and its numbers are the code's."""

from __future__ import annotations

import json
import re

import pytest

from app.api.openai.fine_tuning_json import Hyperparameters, NewFineTuningJob
from app.control import files, fine_tuning, uploads
from app.training import plan
from app.training.conversations import preference, supervised
from tests.docs.pages import codes, page

PAGE = page("docs/fine-tuning.md")


def left_out() -> dict[str, str]:
    rows = PAGE.table("Hyperparameter")
    return {codes(name)[0]: default for name, default in rows}


def numbers(text: str) -> list[float]:
    found = re.findall(r"\d[\d,]*(?:\.\d+)?(?:e-?\d+)?", text)
    return [float(number.replace(",", "")) for number in found]


def test_every_hyperparameter_is_listed() -> None:
    assert left_out().keys() == Hyperparameters.model_fields.keys()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "n_epochs",
            [
                plan.TARGET_EPOCHS,
                plan.MAX_AUTO_EPOCHS,
                plan.MIN_TARGET_EXAMPLES,
                plan.MAX_TARGET_EXAMPLES,
            ],
        ),
        ("batch_size", [plan.MAX_AUTO_BATCH, plan.TARGET_STEPS]),
        ("learning_rate", [plan.BASE_LEARNING_RATE, plan.BASE_HIDDEN_SIZE]),
        ("lora_rank", [fine_tuning.DEFAULT_RANK]),
    ],
)
def test_what_is_chosen_for_auto(name: str, said: list[float]) -> None:
    assert numbers(left_out()[name]) == said


def test_purposes_are_listed() -> None:
    assert [codes(cell)[0] for cell, _ in PAGE.table("Purpose")] == list(files.PURPOSES)


def test_limits_are_the_codes() -> None:
    limits = dict(PAGE.table("Limit of files"))
    assert limits["a part of an upload"] == f"{uploads.MAX_PART_BYTES >> 20} MiB"
    assert numbers(limits["parts of an upload"]) == [uploads.MAX_PARTS]
    assert numbers(limits["time for an upload"]) == [uploads.LIFETIME_S]
    expiry = [files.EXPIRY_S.start, files.EXPIRY_S.stop - 1]
    assert numbers(limits["`expires_after`"]) == expiry


def test_the_examples_can_be_trained_on() -> None:
    conversation, pair = (json.loads(block) for block in PAGE.blocks("json"))
    assert len(supervised(conversation)) == 1
    assert len(preference(pair)) == 2


def test_the_range_of_priorities() -> None:
    (line,) = (line for line in PAGE.text.splitlines() if line.startswith("- `priority`"))
    schema = NewFineTuningJob.model_json_schema()["properties"]["priority"]
    assert f"{schema['minimum']} to {schema['maximum']}" in line
