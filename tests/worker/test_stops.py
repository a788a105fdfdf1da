"""Stop strings over token boundaries, and what a stream may show meanwhile."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.worker.samplers.stops import OutputText

PIECES = st.lists(st.text("ab", max_size=3), max_size=12)
STOPS = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3).map(tuple)

pytestmark = pytest.mark.worker


def reference(
    pieces: list[str], stops: tuple[str, ...], *, include: bool
) -> tuple[str, str | None]:
    """Add one piece after the other and look for every stop in the whole text."""
    text = ""
    for piece in pieces:
        text += piece
        found = [
            (text.index(stop) + len(stop), place)
            for place, stop in enumerate(stops)
            if stop in text
        ]
        if found:
            end, place = min(found)
            stop = stops[place]
            return text[: end if include else end - len(stop)], stop
    return text, None


def run(
    pieces: list[str], stops: tuple[str, ...], *, include: bool
) -> tuple[list[str], str | None]:
    output = OutputText(stops, include_stop=include)
    shown = []
    for piece in pieces:
        met = output.push(piece)
        shown.append(output.take(finished=met is not None))
        if met is not None:
            return shown, met
    return [*shown, output.take(finished=True)], None


@given(PIECES, STOPS, st.booleans())
def test_as_if_the_whole_text_were_searched(
    pieces: list[str], stops: tuple[str, ...], include: bool
) -> None:
    shown, met = run(pieces, stops, include=include)
    assert ("".join(shown), met) == reference(pieces, stops, include=include)


@given(PIECES, STOPS)
def test_nothing_is_held_back_that_no_stop_can_begin_with(
    pieces: list[str], stops: tuple[str, ...]
) -> None:
    output = OutputText(stops, include_stop=False)
    shown = ""
    for piece in pieces:
        if output.push(piece) is not None:
            return
        shown += output.take(finished=False)
        held = output.text[len(shown) :]
        assert not held or any(stop.startswith(held) for stop in stops)


def test_the_stop_that_ends_first_wins() -> None:
    assert run(["abab"], ("bab", "ba"), include=False) == (["a"], "ba")


def test_the_first_listed_wins_between_equals() -> None:
    assert run(["xab"], ("b", "ab"), include=False) == (["xa"], "b")


def test_an_unchecked_piece_may_hold_a_stop() -> None:
    output = OutputText(("b",), include_stop=False)
    assert output.push("abc", check=False) is None
    assert output.push("b") == "b"
    assert output.take(finished=True) == "abc"
