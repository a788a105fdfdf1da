"""The tap counts the same however a reply is cut, and withholds one event at most."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from app.serving.usage import UsageTap

CUTS = st.lists(st.integers(0, 2000), max_size=12)
COUNTS = st.integers(0, 10**9)
SEPARATORS = st.sampled_from([(",", ":"), (", ", ": "), (",", ":  ")])
ENDS = st.sampled_from(["\n\n", "\r\n\r\n"])


@st.composite
def usages(draw: st.DrawFn) -> dict[str, Any]:
    """A usage object as vLLM, OpenAI's completions and OpenAI's responses write it."""
    prompt, completion = draw(st.sampled_from(["prompt", "input"])), "completion"
    completion = "output" if prompt == "input" else completion
    usage: dict[str, Any] = {f"{prompt}_tokens": draw(COUNTS)}
    if draw(st.booleans()):
        usage[f"{prompt}_tokens_details"] = draw(st.none() | st.just({"cached_tokens": 3}))
    if draw(st.booleans()):
        usage["total_tokens"] = draw(COUNTS)
    usage[f"{completion}_tokens"] = draw(COUNTS)
    if draw(st.booleans()):
        usage[f"{completion}_tokens_details"] = {"reasoning_tokens": 1}
    return usage


CONTENT = st.text(max_size=10) | st.sampled_from(
    ['"usage":{', '"usage":', "\n\n", "}", '"choices":[]']
)
CHOICE_EVENTS = st.builds(
    lambda content, usage: {"choices": [{"delta": {"content": content}}], "usage": usage},
    CONTENT,
    st.none() | usages(),
) | st.builds(lambda content: {"choices": [{"delta": {"content": content}}]}, CONTENT)


def counted(usage: dict[str, Any] | None) -> tuple[int, int]:
    usage = usage or {}
    return (
        usage.get("prompt_tokens", usage.get("input_tokens", 0)),
        usage.get("completion_tokens", usage.get("output_tokens", 0)),
    )


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    at = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[a:b] for a, b in pairwise(at) if a < b]


def passed(tap: UsageTap, data: list[bytes]) -> bytes:
    return b"".join([*(tap.feed(piece) for piece in data), tap.finish()])


def passed_to_the_last(tap: UsageTap, data: list[bytes]) -> bytes:
    *before, last = data or [b""]
    return b"".join([*(tap.feed(piece) for piece in before), tap.last(last)])


def written(events: list[Any], separators: tuple[str, str], end: str) -> list[bytes]:
    return [
        f"data: {event if isinstance(event, str) else json.dumps(event, separators=separators)}"
        f"{end}".encode()
        for event in events
    ]


@given(
    events=st.lists(CHOICE_EVENTS, max_size=5),
    usage=st.none() | usages(),
    separators=SEPARATORS,
    end=ENDS,
    cuts=CUTS,
    hide=st.booleans(),
    terminated=st.booleans(),
)
@example(  # two spaces after the colon, and a cut between them
    [], {"prompt_tokens": 1, "completion_tokens": 2}, (",", ":  "), "\n\n", [31], False, True
)
@example(  # a cut after the nested details
    [],
    {"input_tokens": 1, "input_tokens_details": {"cached_tokens": 3}, "output_tokens": 2},
    (",", ":"),
    "\n\n",
    [85],
    False,
    True,
)
def test_a_stream_is_counted_and_only_the_usage_event_is_hidden(
    events: list[dict[str, Any]],
    usage: dict[str, Any] | None,
    separators: tuple[str, str],
    end: str,
    cuts: list[int],
    hide: bool,
    terminated: bool,
) -> None:
    last = [] if usage is None else [{"choices": [], "usage": usage}]
    stream = written([*events, *last, "[DONE]"], separators, end)
    if not terminated:
        stream = written([*events, *last], separators, end)
        if stream:
            stream[-1] = stream[-1].removesuffix(end.encode())
    tap = UsageTap(hide=hide)
    seen = passed(tap, pieces(b"".join(stream), cuts))
    visible = stream[: len(events)] + stream[len(events) + len(last) :] if hide else stream
    assert seen == b"".join(visible)
    said = [event["usage"] for event in [*events, *last] if event.get("usage")]
    assert tap.counts() == counted(said[-1] if said else None)
    told = UsageTap(hide=hide)
    assert passed_to_the_last(told, pieces(b"".join(stream), cuts)) == seen
    assert told.counts() == tap.counts()


@given(usage=st.none() | usages(), separators=SEPARATORS, cuts=CUTS, hide=st.booleans())
def test_a_whole_reply_is_counted_and_passes_unchanged(
    usage: dict[str, Any] | None, separators: tuple[str, str], cuts: list[int], hide: bool
) -> None:
    reply = {"choices": [{"text": '"usage":{'}], "usage": usage, "prompt_logprobs": None}
    data = json.dumps(reply, separators=separators).encode()
    tap = UsageTap(hide=hide)
    assert passed(tap, pieces(data, cuts)) == data
    assert tap.counts() == counted(usage)
    told = UsageTap(hide=hide)
    assert passed_to_the_last(told, pieces(data, cuts)) == data
    assert told.counts() == counted(usage)


@pytest.mark.parametrize(
    ("usage", "counts"),
    [
        ('{"prompt_tokens":4,"completion_tokens":null}', (4, 0)),
        ('{"prompt_tokens":-4,"completion_tokens":5}', (0, 5)),
        ('{"prompt_tokens":"4","completion_tokens":5}', (0, 5)),
        ('{"prompt_tokens":1234567890123,"completion_tokens":5}', (123456789012, 5)),
        ('{"total_tokens":9}', (0, 0)),
        (
            '{"prompt_tokens":4,"completion_tokens":5,"cached":[' + "[" * 300 + "]" * 301 + "}",
            (4, 5),
        ),
        ('{"prompt_tokens":4,"said":"' + "x" * 1000 + '","completion_tokens":5}', (4, 0)),
        ("null", (0, 0)),
    ],
)
def test_an_odd_usage_object_is_read_as_far_as_it_goes(usage: str, counts: tuple[int, int]) -> None:
    data = b'{"usage":%b}' % usage.encode()
    fed, told = UsageTap(hide=False), UsageTap(hide=False)
    assert passed(fed, [data]) == passed_to_the_last(told, [data]) == data
    assert fed.counts() == told.counts() == counts


@given(
    parts=st.lists(
        st.binary(max_size=12)
        | st.sampled_from(
            [b'"usage":', b" ", b"{", b"}", b'"prompt_tokens":7', b'"completion_tokens":9', b"\n\n"]
        ),
        max_size=12,
    ),
    cuts=CUTS,
)
def test_any_bytes_are_counted_the_same_however_they_are_cut(
    parts: list[bytes], cuts: list[int]
) -> None:
    data = b"".join(parts)
    whole, cut = UsageTap(hide=False), UsageTap(hide=False)
    assert passed(whole, [data] if data else []) == data
    assert passed(cut, pieces(data, cuts)) == data
    assert whole.counts() == cut.counts()
    told = UsageTap(hide=False)
    assert passed_to_the_last(told, [data]) == data
    assert told.counts() == whole.counts()


@given(data=st.binary(max_size=200), cuts=CUTS)
def test_any_bytes_pass_a_hiding_tap_the_same_however_they_are_cut(
    data: bytes, cuts: list[int]
) -> None:
    assert passed(UsageTap(hide=True), pieces(data, cuts)) == data


@pytest.mark.parametrize("hide", [False, True])
def test_an_event_passes_at_once_when_it_is_whole(hide: bool) -> None:
    tap = UsageTap(hide=hide)
    for event in written([{"choices": [{"text": "a"}]}] * 3, (",", ":"), "\n\n"):
        assert tap.feed(event) == event
        assert tap.feed(event + b"data") in ((event, event + b"data")[not hide],)
        assert tap.feed(event) == (b"data" + event if hide else event)


def test_an_event_too_long_to_hold_is_passed_on_in_pieces() -> None:
    tap = UsageTap(hide=True)
    piece = b"x" * (300 << 10)
    held = [tap.feed(b"data: " + piece), tap.feed(piece), tap.feed(piece)]
    assert held == [b"", b"", b""]
    assert len(tap.feed(piece)) == 4 * len(piece) + 6
    rest = b'"}\n\ndata: {"choices":[],"usage":{"prompt_tokens":4,"completion_tokens":5}}\n\n'
    assert tap.feed(rest) == b'"}\n\n'
    assert tap.counts() == (4, 5)


def test_two_ends_of_events_in_one_piece() -> None:
    tap = UsageTap(hide=True)
    usage = b'data: {"choices":[],"usage":{"prompt_tokens":4,"completion_tokens":5}}\n\n'
    assert tap.feed(b"data: 1\r\n\r\n" + usage + b"data: 2\n\n") == b"data: 1\r\n\r\ndata: 2\n\n"


def test_a_usage_object_beyond_all_bounds_does_not_fill_the_memory() -> None:
    tap = UsageTap(hide=False)
    tap.feed(b'"usage":{"prompt_tokens":4,')
    for _ in range(100):
        tap.feed(b'"x":1,' * 1000)
    assert tap.counts() == (4, 0)
    assert len(tap._carry) < 1000
