"""The filters against the plainest way to say what they do, one row at a time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from app.worker.samplers.filters import keep_likely, keep_top, penalize

VOCABULARY = 7
# Apart enough that float32 rounding never decides; equal values are drawn on purpose.
LOGIT = st.integers(-20, 20).map(lambda value: value / 4)
ROWS = st.lists(st.lists(LOGIT, min_size=VOCABULARY, max_size=VOCABULARY), min_size=1, max_size=4)

pytestmark = pytest.mark.worker


def odds(row: list[float]) -> list[float]:
    weights = [math.exp(value) for value in row]
    return [weight / sum(weights) for weight in weights]


def kept(row: torch.Tensor) -> set[int]:
    return {index for index, value in enumerate(row.tolist()) if value != -math.inf}


@given(ROWS, st.data())
def test_min_p(rows: list[list[float]], data: st.DataObject) -> None:
    wanted = [data.draw(st.sampled_from([0.0, 0.055, 0.31, 0.77])) for _ in rows]
    found = keep_likely(torch.tensor(rows), torch.tensor(wanted))
    for row, result, min_p in zip(rows, found, wanted, strict=True):
        likely = odds(row)
        assert kept(result) == {i for i, p in enumerate(likely) if p >= min_p * max(likely)}


@given(ROWS, st.data())
def test_top_k(rows: list[list[float]], data: st.DataObject) -> None:
    counts = [data.draw(st.integers(1, VOCABULARY)) for _ in rows]
    found = keep_top(torch.tensor(rows), torch.tensor(counts), torch.ones(len(rows)))
    for row, result, count in zip(rows, found, counts, strict=True):
        least = sorted(row, reverse=True)[count - 1]
        assert kept(result) == {index for index, value in enumerate(row) if value >= least}


@given(ROWS, st.data())
def test_top_p_keeps_the_fewest_that_add_up(rows: list[list[float]], data: st.DataObject) -> None:
    wanted = [data.draw(st.floats(0.05, 0.99)) for _ in rows]
    everything = torch.full((len(rows),), VOCABULARY)
    found = keep_top(torch.tensor(rows), everything, torch.tensor(wanted))
    for row, result, top_p in zip(rows, found, wanted, strict=True):
        likely = odds(row)
        left = kept(result)
        mass = sum(likely[index] for index in left)
        least = min(likely[index] for index in left)
        assert mass >= top_p - 1e-5
        assert mass - least <= top_p + 1e-5
        assert all(p <= least + 1e-9 for index, p in enumerate(likely) if index not in left)


@given(ROWS, st.data())
def test_penalties(rows: list[list[float]], data: st.DataObject) -> None:
    size = len(rows)
    counts = [[data.draw(st.integers(0, 3)) for _ in range(VOCABULARY)] for _ in rows]
    prompt = [[data.draw(st.booleans()) for _ in range(VOCABULARY)] for _ in rows]
    repetition = [data.draw(st.sampled_from([0.5, 1.0, 1.5])) for _ in rows]
    frequency = [data.draw(st.sampled_from([-1.0, 0.0, 0.5])) for _ in rows]
    presence = [data.draw(st.sampled_from([-0.5, 0.0, 2.0])) for _ in rows]
    found = penalize(
        torch.tensor(rows),
        prompt=torch.tensor(prompt),
        counts=torch.tensor(counts, dtype=torch.float32),
        repetition=torch.tensor(repetition),
        frequency=torch.tensor(frequency),
        presence=torch.tensor(presence),
    )
    for row in range(size):
        for token in range(VOCABULARY):
            value, count = rows[row][token], counts[row][token]
            if count or prompt[row][token]:
                value = value / repetition[row] if value > 0 else value * repetition[row]
            value -= frequency[row] * count + presence[row] * (count > 0)
            assert found[row, token].item() == pytest.approx(value, abs=1e-5)
