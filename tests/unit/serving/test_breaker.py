"""The breaker: closed, open for a while that doubles, half open for one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from app.serving.breaker import FAILURES, FIRST_PAUSE_S, LONGEST_PAUSE_S, Breaker


def opened(at: float = 0.0) -> Breaker:
    breaker = Breaker()
    assert [breaker.failed(at) for _ in range(FAILURES)] == [False] * (FAILURES - 1) + [True]
    return breaker


def test_it_opens_after_failures_in_a_row() -> None:
    breaker = Breaker()
    for _ in range(FAILURES - 1):
        assert not breaker.failed(0.0)
    breaker.succeeded()
    for _ in range(FAILURES - 1):
        assert not breaker.failed(0.0)
        assert breaker.closed
        assert breaker.allows(0.0)
    assert breaker.failed(0.0)
    assert not breaker.closed
    assert not breaker.allows(FIRST_PAUSE_S - 0.001)


def test_half_open_lets_one_through() -> None:
    breaker = opened()
    now = FIRST_PAUSE_S
    assert breaker.allows(now)
    breaker.began()
    assert not breaker.allows(now)
    assert not breaker.allows(now + LONGEST_PAUSE_S)
    breaker.succeeded()
    assert breaker.closed
    assert breaker.allows(now)
    assert not breaker.failed(now), "and its failures are counted from none"


def test_a_failed_try_doubles_the_pause_up_to_a_limit() -> None:
    breaker = opened()
    now, pause = 0.0, FIRST_PAUSE_S
    for _ in range(12):
        now += pause
        assert not breaker.allows(now - 0.001)
        assert breaker.allows(now)
        breaker.began()
        assert breaker.failed(now)
        pause = min(2 * pause, LONGEST_PAUSE_S)
    assert pause == LONGEST_PAUSE_S


def test_a_try_that_tells_nothing_lets_another_one_try() -> None:
    breaker = opened()
    breaker.began()
    breaker.abandoned()
    assert breaker.allows(FIRST_PAUSE_S)
    assert not breaker.closed


def test_failures_of_those_sent_before_it_opened_do_not_prolong_it() -> None:
    breaker = opened()
    for _ in range(20):
        assert not breaker.failed(FIRST_PAUSE_S / 2)
    assert breaker.allows(FIRST_PAUSE_S)


@given(
    st.lists(
        st.tuples(st.sampled_from(["ok", "fail", "leave"]), st.floats(0, 5, allow_nan=False)),
        max_size=60,
    )
)
def test_no_more_than_one_request_runs_while_it_is_not_closed(
    ends: list[tuple[str, float]],
) -> None:
    """One at a time: a closed breaker lets it run, a half-open one lets it try."""
    breaker, now = Breaker(), 0.0
    for end, after in ends:
        now += after
        if not breaker.allows(now):
            continue
        breaker.began()
        if not breaker.closed:
            assert not breaker.allows(now)
        if end == "ok":
            breaker.succeeded()
            assert breaker.closed
        elif end == "fail":
            breaker.failed(now)
        else:
            breaker.abandoned()
        assert breaker.allows(now + LONGEST_PAUSE_S), "never shut out for good"
