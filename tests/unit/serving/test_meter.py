"""What is counted is written down once: nothing lost and nothing twice."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from app.serving.meter import BUCKETS, Meter

KEYS = st.sampled_from(["key-1", "key-2"])
MODELS = st.sampled_from(["a@1", "a@2", "b@1"])
STEPS = st.lists(
    st.tuples(st.just("used"), KEYS, MODELS, st.integers(0, 100), st.integers(0, 100))
    | st.tuples(st.sampled_from(["write", "fail"])),
    max_size=30,
)


@given(STEPS)
def test_drain_and_restore_conserve(steps: list[tuple]) -> None:  # type: ignore[type-arg]
    meter = Meter()
    used: Counter[tuple[str, str, str]] = Counter()
    kept: Counter[tuple[str, str, str]] = Counter()

    def add(to: Counter[tuple[str, str, str]], key: str, model: str, *counts: int) -> None:
        for what, count in zip(("requests", "prompt", "completion"), counts, strict=True):
            to[(key, model, what)] += count

    for step in [*steps, ("write",)]:
        if step[0] == "used":
            meter.used(*step[1:])
            add(used, step[1], step[2], 1, *step[3:])
            continue
        records = meter.drain()
        assert len({(r.key_id, r.model) for r in records}) == len(records)
        if step[0] == "fail":
            meter.restore(records)
            continue
        for record in records:
            usage = record.usage
            counts = (record.requests, usage.prompt_tokens, usage.completion_tokens)
            add(kept, record.key_id, record.model, *counts)
    assert +kept == +used
    assert meter.drain() == []
    for model, (prompt, completion) in meter.tokens.items():
        assert prompt == sum(n for (_, m, w), n in used.items() if (m, w) == (model, "prompt"))
        assert completion == sum(
            n for (_, m, w), n in used.items() if (m, w) == (model, "completion")
        )


@given(st.lists(st.floats(0, 1000), max_size=20))
def test_durations_fall_in_the_buckets_prometheus_expects(durations: list[float]) -> None:
    meter = Meter()
    for duration in durations:
        meter.ended("/v1/completions", 200, duration)
    if not durations:
        assert meter.durations == {}
        return
    counts, total = meter.durations["/v1/completions"]
    for at, bound in enumerate(BUCKETS):
        assert sum(counts[: at + 1]) == sum(d <= bound for d in durations)
    assert sum(counts) == len(durations) == meter.requests[("/v1/completions", 200)]
    assert abs(total[0] - sum(durations)) < 1e-6 * max(1, sum(durations))
