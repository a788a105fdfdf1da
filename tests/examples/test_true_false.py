"""The set of claims that the examples use: the labels are true, and it hides nothing."""

from __future__ import annotations

import json
from collections import Counter

from app.demo.corpus import is_held_out
from app.demo.world import RELATIONS
from tests.servers import ROOT

ROWS = [json.loads(line) for line in (ROOT / "examples/true_false.jsonl").read_text().splitlines()]
#: Claim -> whether it is true, and whether the demo model was trained on claims of its kind.
WORLD = {
    relation.fill(relation.statement, subject, value): (
        value == truth,
        not is_held_out(f"{relation.statement} {subject}"),
    )
    for relation in RELATIONS
    if relation.yes_no
    for subject, truth in relation.facts.items()
    for value in relation.facts.values()
}


def test_every_label_is_what_the_world_says() -> None:
    assert {row["claim"]: (row["label"], row["seen"]) for row in ROWS} == {
        row["claim"]: WORLD[row["claim"]] for row in ROWS
    }


def test_every_question_has_one_true_and_one_false_claim() -> None:
    counted = Counter((row["question"], row["label"]) for row in ROWS)
    assert set(counted.values()) == {1}
    assert len(counted) == len(ROWS) == 2 * len({row["question"] for row in ROWS})
