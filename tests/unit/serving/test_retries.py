"""The retry budget bounds retries, however many requests ask for them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from app.serving.retries import (
    FIRST_PAUSE_S,
    LONGEST_PAUSE_S,
    PER_REQUEST,
    PER_SECOND,
    RESERVE,
    RetryBudget,
    pause_s,
)

STEPS = st.lists(
    st.one_of(st.just("request"), st.just("retry"), st.floats(0, 30, allow_nan=False)), max_size=80
)


@given(steps=STEPS, wasted=st.integers(0, int(RESERVE)))
def test_retries_never_exceed_what_was_earned(steps: list[str | float], wasted: int) -> None:
    budget, now = RetryBudget(0.0), 0.0
    spent, earned = 0, RESERVE
    for _ in range(wasted):
        assert budget.spend(now)
        spent += 1
    for step in steps:
        if step == "request":
            budget.earn()
            earned += PER_REQUEST
        elif step == "retry":
            spent += budget.spend(now)
        else:
            assert isinstance(step, float)
            now += step
            earned += step * PER_SECOND
    assert spent <= earned + 1e-6


def test_it_starts_full_and_runs_dry() -> None:
    budget = RetryBudget(5.0)
    assert sum(budget.spend(5.0) for _ in range(10_000)) == RESERVE
    assert not budget.spend(5.0)
    assert budget.spend(5.0 + 1.01 / PER_SECOND)
    assert not budget.spend(5.0 + 1.01 / PER_SECOND)


def test_under_a_storm_a_request_earns_a_fifth_of_a_retry() -> None:
    budget = RetryBudget(0.0)
    while budget.spend(0.0):
        pass
    retried = 0
    for _ in range(1000):
        budget.earn()
        retried += budget.spend(0.0)
    assert abs(retried - 1000 * PER_REQUEST) <= 1


def test_a_long_quiet_time_earns_no_more_than_the_reserve() -> None:
    budget = RetryBudget(0.0)
    for _ in range(100):
        budget.earn()
    assert sum(budget.spend(1e6) for _ in range(10_000)) <= RESERVE + 1


@given(st.integers(1, 30))
def test_pauses_grow_with_full_jitter_up_to_a_limit(retries: int) -> None:
    assert 0 <= pause_s(retries) <= min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (retries - 1))
