"""Rendezvous hashing: even shares, and a lost replica moves only what was on it."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from app.serving.rendezvous import key, weights

NAMES = st.text(min_size=1, max_size=12)


def order(adapter: str, replicas: list[str]) -> list[str]:
    wants = weights(key(adapter), [key(replica) for replica in replicas])
    return [r for _, r in sorted(zip(wants, replicas, strict=True), reverse=True)]


@given(adapter=NAMES, replicas=st.lists(NAMES, min_size=2, max_size=8, unique=True), n=st.data())
def test_the_order_of_the_others_does_not_change_with_one_lost(
    adapter: str, replicas: list[str], n: st.DataObject
) -> None:
    lost = n.draw(st.sampled_from(replicas))
    left = [replica for replica in replicas if replica != lost]
    assert order(adapter, left) == [r for r in order(adapter, replicas) if r != lost]


@given(name=NAMES, other=NAMES)
def test_keys_and_weights_are_64_bits(name: str, other: str) -> None:
    assert key(name) == key(name)
    assert key(name) % 2 == 1
    for value in (key(name), *weights(key(name), [key(other)])):
        assert 0 <= value < 1 << 64


def test_every_replica_is_first_for_as_many() -> None:
    replicas = [f"replica-{n}" for n in range(8)]
    firsts = Counter(order(f"adapter-{n}@1", replicas)[0] for n in range(4000))
    assert set(firsts) == set(replicas)
    assert max(firsts.values()) < 1.25 * 500
    assert min(firsts.values()) > 0.75 * 500


def test_versions_of_one_adapter_are_spread_too() -> None:
    replicas = [f"replica-{n}" for n in range(8)]
    firsts = Counter(order(f"adapter@{n}", replicas)[0] for n in range(800))
    assert min(firsts.values()) > 60
