"""A probe agrees with a replica that serves the same, and says by how much another is off."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain import Probe
from app.serving.verify import EXACT_TOLERANCE, HALF_TOLERANCE, compare

Logprob = st.floats(-30, 0, allow_subnormal=False)
Rows = st.lists(st.lists(Logprob, min_size=1, max_size=6), min_size=1, max_size=5)


def probe(rows: list[list[float]], dtype: str = "float32") -> Probe:
    ids = tuple(tuple(range(len(row) + 1)) for row in rows)
    return Probe(ids, tuple(map(tuple, rows)), dtype)


ROWS = [[-1.0, -2.0, -3.0], [-4.0]]


@given(rows=Rows, dtype=st.sampled_from(["float32", "bfloat16", "float16", "auto"]))
def test_the_same_numbers_agree(rows: list[list[float]], dtype: str) -> None:
    verdict = compare(probe(rows), rows, dtype)
    assert (verdict.ok, verdict.max_abs, verdict.mean_abs) == (True, 0.0, 0.0)


@given(rows=Rows, data=st.data(), off=st.floats(0.0011, 5))
def test_the_worst_place_is_named(rows: list[list[float]], data: st.DataObject, off: float) -> None:
    row = data.draw(st.integers(0, len(rows) - 1))
    place = data.draw(st.integers(0, len(rows[row]) - 1))
    served = [list(each) for each in rows]
    served[row][place] -= off
    verdict = compare(probe(rows), served, "float32")
    assert not verdict.ok
    assert verdict.worst == (row, place + 1)
    assert math.isclose(verdict.max_abs, off, abs_tol=1e-9)
    count = sum(map(len, rows))
    assert math.isclose(verdict.mean_abs, off / count, abs_tol=1e-9)


@pytest.mark.parametrize(
    ("trained", "served", "tolerance"),
    [
        ("float32", "float32", EXACT_TOLERANCE),
        ("float32", "bfloat16", HALF_TOLERANCE),
        ("float32", "float16", HALF_TOLERANCE),
        ("bfloat16", "float32", HALF_TOLERANCE),
        ("float32", "", HALF_TOLERANCE),
    ],
)
def test_the_coarser_side_decides(trained: str, served: str, tolerance: object) -> None:
    assert compare(probe(ROWS, trained), ROWS, served).tolerance == tolerance


@pytest.mark.parametrize(
    ("largest", "mean", "ok"),
    [
        (0.057, 0.016, True),  # a right adapter, as measured
        (0.246, 0.042, True),  # the most that right ones had among many
        (0.281, 0.048, True),
        (0.249, 0.070, False),  # one without its lm_head
        (0.5, 0.006, False),  # one token is enough
        (0.06, 0.055, False),  # and so is a little everywhere
    ],
)
def test_the_band_of_half_precision(largest: float, mean: float, ok: bool) -> None:
    rest = (mean * 100 - largest) / 99
    served = [[-1.0 - largest] + [-1.0 - rest] * 99]
    verdict = compare(probe([[-1.0] * 100]), served, "bfloat16")
    assert verdict.ok is ok
    assert math.isclose(verdict.mean_abs, mean, rel_tol=1e-6)


def test_a_verdict_shows_its_numbers() -> None:
    served = [[-1.0, -2.25, -3.0], [-4.0]]
    assert str(compare(probe(ROWS), served, "float32")) == (
        "logprobs differ: max 0.25 (allowed 0.001), mean 0.0625 (allowed 0.001), "
        "worst at row 0, token 2"
    )
    assert str(compare(probe(ROWS), ROWS, "float32")).startswith("logprobs agree: max 0 ")


@pytest.mark.parametrize(
    ("served", "says"),
    [
        ([[-1.0, -2.0, -3.0]], "rows of [3] numbers came, not of [3, 1]"),
        ([[-1.0, -2.0], [-4.0]], "rows of [2, 1] numbers came"),
        ([], "rows of [] numbers came"),
        ([[-1.0, math.nan, -3.0], [-4.0]], "not numbers"),
        ([[-1.0, -math.inf, -3.0], [-4.0]], "not numbers"),
    ],
)
def test_what_cannot_be_compared_does_not_agree(served: list[list[float]], says: str) -> None:
    verdict = compare(probe(ROWS), served, "bfloat16")
    assert (verdict.ok, verdict.max_abs, verdict.worst) == (False, math.inf, None)
    assert says in str(verdict)
