"""Splitting a batch loses nothing and doubles nothing, and gathering undoes it."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import UpstreamBroke
from app.serving import gather, scatter
from app.serving.scatter import prompts_of, shares, split, wanted

texts = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), max_size=60)
ids = st.lists(st.lists(st.integers(0, 999), max_size=20), max_size=60)
batches = (texts | ids).filter(lambda batch: len(batch) > 1)
inflights = st.lists(st.integers(0, 50), min_size=1, max_size=64)


def raw(batch: list[Any]) -> list[bytes]:
    return prompts_of(msgspec.Raw(json.dumps(batch).encode()))


def vllm(places: tuple[int, ...], batch: list[Any], n: int) -> bytes:
    """What a vLLM answers that got these prompts."""
    choices = [
        {"index": at * n + k, "text": repr((batch[place], k)), "logprobs": {"x": [1e-7, -0.0]}}
        for at, place in enumerate(places)
        for k in range(n)
    ]
    prompt_tokens = sum(len(batch[place]) for place in places)
    details = {"cached_tokens": len(places)}
    usage = {"prompt_tokens": prompt_tokens, "prompt_tokens_details": details, "other": None}
    answer = {"id": "cmpl-1", "choices": choices, "usage": usage, "metrics": None}
    return json.dumps(answer).encode()


def test_the_prompts_stay_as_they_were_written() -> None:
    assert prompts_of(msgspec.Raw(b'[ "a\\u0062" ,"" , "c"]')) == [b'"a\\u0062"', b'""', b'"c"']
    assert prompts_of(msgspec.Raw(b"[[1, 2],[]]")) == [b"[1, 2]", b"[]"]


@pytest.mark.parametrize("content", [b"[]", b'["a",[1]]', b'[[1],"a"]', b'["a",1]', b'["a",null]'])
def test_what_is_no_array_of_prompts_is_not_taken_for_one(content: bytes) -> None:
    assert prompts_of(msgspec.Raw(content)) == []
    assert prompts_of(None) == []


@given(batch=batches, inflight=inflights)
def test_every_prompt_is_in_exactly_one_part(batch: list[Any], inflight: list[int]) -> None:
    parts = split(raw(batch), shares(inflight, len(batch)))
    places = [place for part in parts for place in part.places]
    assert sorted(places) == list(range(len(batch)))
    assert all(part.places for part in parts)
    assert [part.share for part in parts] == sorted({part.share for part in parts})


@given(batch=batches, inflight=inflights, n=st.integers(1, 4))
def test_gather_undoes_split(batch: list[Any], inflight: list[int], n: int) -> None:
    parts = split(raw(batch), shares(inflight, len(batch)))
    answers = [(part.places, vllm(part.places, batch, n)) for part in parts]
    whole = json.loads(vllm(tuple(range(len(batch))), batch, n))
    assert json.loads(gather.gather(answers)) == whole


@given(count=st.integers(2, 5000), inflight=st.lists(st.integers(0, 9), min_size=1, max_size=3))
def test_no_call_has_more_prompts_than_vllm_takes(count: int, inflight: list[int]) -> None:
    parts = split([b'"p%d"' % n for n in range(count)], shares(inflight, count))
    assert max(len(part.places) for part in parts) <= scatter.MAX_PROMPTS
    assert sum(len(part.places) for part in parts) == count


def test_no_call_has_very_many_tokens() -> None:
    prompt = b"[" + b"7," * (scatter.PART_TOKENS // 4) + b"7]"
    parts = split([prompt] * 12, [1.0])
    assert [len(part.places) for part in parts] == [3, 3, 3, 3]


@pytest.mark.parametrize("replicas", [2, 3, 4, 7, 64])
def test_one_large_group_is_split_evenly(replicas: int) -> None:
    prompts = [b'"%b question %d"' % (b"the same beginning " * 40, n % 97) for n in range(256)]
    sizes = [len(part.places) for part in split(prompts, [1 / replicas] * replicas)]
    assert len(sizes) == replicas
    assert max(sizes) - min(sizes) <= 1


def test_prompts_with_one_beginning_go_together() -> None:
    groups = [b"alpha " * 50, b"beta " * 60, b"gamma " * 50, b"delta " * 50]
    prompts = [b'"%b%d"' % (groups[n % 4], n) for n in range(102)]  # 26 + 26 + 25 + 25
    parts = split(prompts, [1 / 4] * 4)
    assert [{place % 4 for place in part.places} for part in parts] == [{0}, {1}, {3}, {2}]


def test_a_few_long_prompts_weigh_as_much_as_many_short_ones() -> None:
    prompts = [b'"%b"' % (b"a%d" % n * 2000) for n in range(8)] + [b'"b%d"' % n for n in range(8)]
    parts = split(prompts, [0.5, 0.5])
    assert [len(part.places) for part in parts] == [4, 12]


@given(inflight=inflights, prompts=st.integers(1, 10_000))
def test_shares_are_all_of_it_and_level_the_replicas(inflight: list[int], prompts: int) -> None:
    found = shares(inflight, prompts)
    assert sum(found) == pytest.approx(1)
    levels = [busy + share * prompts for busy, share in zip(inflight, found, strict=True)]
    served = [level for level, share in zip(levels, found, strict=True) if share > 0]
    assert max(served) == pytest.approx(min(served))
    assert all(level >= min(served) - 1e-6 for level in levels)


def test_a_busier_replica_gets_less() -> None:
    assert shares([0, 10, 500], 100) == [0.55, 0.45, 0]
    assert shares([], 5) == []


@pytest.mark.parametrize(
    ("prompts", "replicas"),
    [(2, 1), (15, 1), (16, 2), (64, 8), (1024, 128)],
)
def test_a_small_batch_is_not_worth_a_second_replica(prompts: int, replicas: int) -> None:
    assert wanted([b'"short"'] * prompts) == replicas


def test_a_few_very_long_prompts_are() -> None:
    assert wanted([b'"%b"' % (b"x" * 400_000)] * 3) == 3


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{}",
        b'{"choices":null}',
        b'{"choices":[]}',
        b'{"choices":[{"text":"no index"}]}',
        b'{"choices":[{"index":0},{"index":0}]}',
        b'{"choices":[{"index":0},{"index":2}]}',
        b'{"choices":[{"index":0}]}',
    ],
)
def test_an_answer_that_does_not_fit_is_the_replica_s_fault(body: bytes) -> None:
    with pytest.raises(UpstreamBroke):
        gather.gather([((0, 1), body)])


def test_parts_must_agree_on_the_choices_of_a_prompt() -> None:
    one, two = vllm((0,), ["a", "b"], 1), vllm((1,), ["a", "b"], 2)
    with pytest.raises(UpstreamBroke, match="different numbers"):
        gather.gather([((0,), one), ((1,), two)])


def test_an_index_that_does_not_come_first_is_found() -> None:
    body = b'{"choices":[{"text":"{\\"index\\":9","index" : 0,"deep":{"index":5}}],"usage":null}'
    found = json.loads(gather.gather([((1,), body), ((0,), body)]))
    assert found["choices"] == [
        {"text": '{"index":9', "index": n, "deep": {"index": 5}} for n in (0, 1)
    ]


CHUNK: dict[str, Any] = {"id": "cmpl-1", "created": 5, "model": "m@1"}


def event(value: Any) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


def test_events_get_one_id_and_the_client_s_indices() -> None:
    merger = gather.Merger(2)
    chunk = CHUNK | {"choices": [{"index": 3, "text": '"index":7,'}]}
    found = merger.event(event(chunk), (4, 9))
    assert json.loads(found[6:]) == CHUNK | {"choices": [{"index": 19, "text": '"index":7,'}]}
    other = {"id": "cmpl-2", "created": 6, "model": "m@1", "choices": [{"index": 0}]}
    spaced = b"data: " + json.dumps(other).encode() + b"\n\n"
    for data in (event(other | {"choices": [{"index": 0, "text": "x"}]}), spaced):
        found = merger.event(data, (2,))
        assert found.endswith(b"\n\n")
        assert json.loads(found[6:])["choices"][0]["index"] == 4
    assert json.loads(found[6:])["choices"] == [{"index": 4}]


def test_several_choices_in_an_event() -> None:
    chunk = CHUNK | {"choices": [{"index": 0, "a": []}, {"index": 1, "b": {"index": 3}}]}
    found = gather.Merger(1).event(event(chunk), (7, 5))
    assert json.loads(found[6:])["choices"] == [
        {"index": 7, "a": []},
        {"index": 5, "b": {"index": 3}},
    ]


def test_usage_is_told_once_and_so_is_the_end() -> None:
    merger = gather.Merger(1)
    assert merger.event(event(CHUNK | {"choices": [{"index": 0, "text": "a"}]}), (0,))
    for part in range(3):
        usage = {"prompt_tokens": part + 1, "details": {"cached": 2}, "none": None}
        ending = CHUNK | {"id": f"cmpl-{part}", "choices": [], "usage": usage}
        assert merger.event(event(ending), (part,)) == b""
        assert merger.event(gather.DONE, (part,)) == b""
    usage_event, done, rest = merger.end().split(b"\n\n")
    total = {"prompt_tokens": 6, "details": {"cached": 6}, "none": None}
    assert json.loads(usage_event[6:]) == CHUNK | {"choices": [], "usage": total}
    assert (done, rest) == (b"data: [DONE]", b"")
    assert gather.Merger(1).end() == gather.DONE


def test_an_error_in_a_stream_passes_and_is_noticed() -> None:
    merger = gather.Merger(1)
    error = event({"error": {"message": "out of memory", "code": 500}})
    assert merger.event(error, (0,)) == error
    assert merger.told


@pytest.mark.parametrize("data", [b"data: nonsense\n\n", event({"choices": [{"index": 9}]})])
def test_an_event_that_does_not_fit_is_the_replica_s_fault(data: bytes) -> None:
    with pytest.raises(UpstreamBroke):
        gather.Merger(1).event(data, (0, 1))
