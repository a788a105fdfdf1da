"""Every way to write a model's name, who may use it, and what is said about one that is none."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain import BaseModel, Principal, Route, Scope
from app.errors import ModelNotAllowed, ModelNotFound
from app.serving.resolve import allowed, names_of, near_matches, resolve
from app.serving.snapshot import Snapshot, Snapshots
from tests.unit.serving.made import ANYONE, adapter, snapshot, version

WORLD = snapshot(
    adapter("pirate", 3, {"prod": ((2, 1),), "gone": ((9, 1),), "split": ((1, 1), (2, 3))}),
    adapter("poet"),
    bases={
        "tiny": BaseModel("tiny"),
        "org/base:v1": BaseModel("org/base:v1"),
        "lone": BaseModel("lone"),
    },
    base_pools={"tiny": "pool", "org/base:v1": "pool"},
)


def world() -> Snapshot:
    """The same, with nothing remembered."""
    fields = {name: getattr(WORLD, name) for name in ("number", "bases", "pools", "base_pools")}
    return Snapshot(**fields, replicas=WORLD.replicas, adapters=WORLD.adapters)


def someone(*models: str) -> Principal:
    return Principal("key-2", "someone", frozenset({Scope.INFERENCE}), models)


@pytest.mark.parametrize(
    ("name", "upstream"),
    [
        ("pirate", "pirate@3"),
        ("pirate@1", "pirate@1"),
        ("pirate@2", "pirate@2"),
        ("pirate:latest", "pirate@3"),
        ("pirate:prod", "pirate@2"),
        ("poet", "poet@1"),
    ],
)
def test_a_name_of_an_adapter(name: str, upstream: str) -> None:
    at = world()
    for _ in range(2):  # found, then remembered
        number = int(upstream.partition("@")[2])
        found = version(upstream.partition("@")[0], number)
        assert resolve(at, name, ANYONE) == Route("tiny", "pool", upstream, found)
    assert resolve(at, name, ANYONE) is resolve(at, upstream, ANYONE)


@pytest.mark.parametrize("name", ["tiny", "org/base:v1"])
def test_a_name_of_a_base(name: str) -> None:
    at = world()
    assert resolve(at, name, ANYONE) == Route(name, "pool", "served-tiny")
    assert resolve(at, name, ANYONE) is resolve(at, name, ANYONE)


@pytest.mark.parametrize(
    "name",
    [
        *("", "@", ":", "pirates", "PIRATE", " pirate", "pirate ", "lone"),
        *("pirate@", "pirate@0", "pirate@4", "pirate@-1", "pirate@1.0", "pirate@²", "pirate@1 "),
        *("pirate@9999999999999999999999", "pirate@1:prod", "pirate:prod@1", "pirate@latest"),
        *("pirate:", "pirate:nope", "pirate:gone", "pirate:1", "tiny@1", "tiny:latest"),
    ],
)
def test_a_name_of_nothing(name: str) -> None:
    at = world()
    for _ in range(2):
        with pytest.raises(ModelNotFound, match="does not exist") as caught:
            resolve(at, name, ANYONE)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert not at.routes, "nobody may fill the memory with names of nothing"


def test_a_split_keeps_to_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "choices", random.Random(7).choices)
    at = world()
    drawn = [resolve(at, "pirate:split", ANYONE).upstream_name for _ in range(4000)]
    assert set(drawn) == {"pirate@1", "pirate@2"}
    assert abs(drawn.count("pirate@2") / len(drawn) - 0.75) < 0.03
    assert "pirate:split" not in at.routes


@given(weights=st.lists(st.integers(1, 1000), min_size=2, max_size=6), seed=st.integers(0, 2**32))
def test_a_split_only_goes_where_it_points(weights: list[int], seed: int) -> None:
    targets = tuple(zip(range(2, len(weights) + 2), weights, strict=True))
    at = snapshot(adapter("a", len(weights) + 2, {"split": targets}))
    random.seed(seed)
    drawn = {resolve(at, "a:split", ANYONE).version.number for _ in range(20)}  # type: ignore[union-attr]
    assert drawn <= {number for number, _ in targets}


@pytest.mark.parametrize(
    ("globs", "name", "may"),
    [
        (("pirate",), "pirate", True),
        (("pirate",), "pirate@2", True),
        (("pirate",), "pirate:prod", True),
        (("pirate",), "poet", False),
        (("pirate@2",), "pirate@2", True),
        (("pirate@2",), "pirate", False),
        (("pirate@2",), "pirate:prod", False),
        (("pirate:prod",), "pirate:prod", True),
        (("pirate:prod",), "pirate@2", False),
        (("p*",), "poet", True),
        (("pi*",), "poet", False),
        (("*",), "tiny", True),
        (("PIRATE",), "pirate", False),
        (("poet", "tiny"), "tiny", True),
        ((), "tiny", False),
    ],
)
def test_an_allow_list(globs: tuple[str, ...], name: str, may: bool) -> None:
    caller = someone(*globs)
    assert allowed(caller, name) is may
    if may:
        resolve(world(), name, caller)
        return
    at = world()
    for _ in range(2):  # remembered for whoever may
        with pytest.raises(ModelNotAllowed, match="allow-list"):
            resolve(at, name, caller)
        resolve(at, name, ANYONE)
    assert allowed(ANYONE, name)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("pirat", "'pirate'"),
        ("pirates", "'pirate'"),
        ("poets", "'poet'"),
        ("tyny", "'tiny'"),
        ("pirate@7", "'pirate@3'"),
        ("pirate:prd", "'pirate:prod'"),
        ("completely else", "GET /v1/models"),
    ],
)
def test_what_was_perhaps_meant(name: str, hint: str) -> None:
    with pytest.raises(ModelNotFound) as caught:
        resolve(world(), name, ANYONE)
    assert hint in str(caught.value)


def test_no_hint_at_what_the_caller_may_not_use() -> None:
    assert near_matches(world(), "pirat", someone("poet")) == []
    assert near_matches(world(), "pirate:prd", someone("pirate:latest")) == ["pirate:latest"]
    assert near_matches(world(), "pirate:prd", someone("poet")) == []


@pytest.mark.parametrize("name", ["x" * 10**7, "pirate@" + "x" * 10**7, "pirate:" + "é" * 10**7])
def test_a_name_as_long_as_a_library_does_not_hold_up_the_others(name: str) -> None:
    started = time.monotonic()
    with pytest.raises(ModelNotFound) as caught:
        resolve(world(), name, ANYONE)
    assert time.monotonic() - started < 0.2
    assert len(str(caught.value)) < 500


def test_a_miss_among_very_many_adapters_is_quick() -> None:
    at = snapshot(*(adapter(f"adapter-{n:05}") for n in range(20_000)))
    assert len(at.sorted_names) == 20_000
    started = time.monotonic()
    with pytest.raises(ModelNotFound, match="adapter-09999"):
        resolve(at, "adapter-0999", ANYONE)
    assert time.monotonic() - started < 0.3


def test_the_names_of_an_adapter() -> None:
    assert list(names_of(adapter("a", 2, {"prod": ((1, 1),)}))) == [
        "a",
        "a@1",
        "a@2",
        "a:latest",
        "a:prod",
    ]


def test_publishing_swaps_the_picture() -> None:
    snapshots = Snapshots()
    assert snapshots.current.number == 0
    assert snapshots.current.sorted_names == []
    snapshots.publish(WORLD)
    assert snapshots.current is WORLD
    assert list(WORLD.sorted_names) == ["pirate", "poet"]
