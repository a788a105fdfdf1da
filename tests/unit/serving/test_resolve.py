"""Every way to write a model's name, who may use it, and what is said about one that is none."""

from __future__ import annotations

import random
import time
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.domain import Adapter, Alias, BaseModel, Principal, Route, Scope, Sticky
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


TUNED = "ft:tiny:pirate:k3v9x2ab"
UNNAMED = "ft:tiny::k3v9x2ab"


@pytest.mark.parametrize("adapter_name", [TUNED, UNNAMED])
def test_a_name_of_a_fine_tuned_model(adapter_name: str) -> None:
    at = snapshot(adapter(adapter_name, 2, {"ckpt-step-10": ((1, 1),)}), adapter("ft"))
    for ending, number in {"": 2, "@1": 1, ":latest": 2, ":ckpt-step-10": 1}.items():
        assert (
            resolve(at, adapter_name + ending, ANYONE).upstream_name == f"{adapter_name}@{number}"
        )
        assert allowed(someone("ft:tiny:*"), adapter_name + ending)
        assert allowed(someone(adapter_name), adapter_name + ending)
        assert not allowed(someone("ft"), adapter_name + ending)
    for ending in (":", "@", "@3", ":nope", ":latest:latest", "x"):
        with pytest.raises(ModelNotFound, match=f"Did you mean '{adapter_name}"):
            resolve(at, adapter_name + ending, ANYONE)
    # An adapter called ft has names like every other.
    assert resolve(at, "ft:latest", ANYONE).upstream_name == "ft@1"
    for name in ("ft:", "ft::", "ft:::", "ft:tiny", "ft:tiny:pirate", "ft:tiny:pirate:"):
        with pytest.raises(ModelNotFound):
            resolve(at, name, ANYONE)


def unfinished(name: str = TUNED) -> Adapter:
    aliases = {f"ckpt-step-{3 * n}": Alias(f"ckpt-step-{3 * n}", ((n, 1),)) for n in range(1, 5)}
    return replace(adapter(name, 4), aliases=aliases)


def test_a_model_that_is_not_finished_has_the_names_of_its_checkpoints() -> None:
    at = snapshot(unfinished())
    assert resolve(at, f"{TUNED}:ckpt-step-12", ANYONE).upstream_name == f"{TUNED}@4"
    newest = [f"{TUNED}:ckpt-step-{step}" for step in (12, 9, 6)]
    with pytest.raises(ModelNotFound) as caught:
        resolve(at, TUNED, ANYONE)
    told = " and ".join(map(repr, newest))
    assert str(caught.value) == f"The model {TUNED!r} is not finished. There is {told}."
    with pytest.raises(ModelNotFound, match="Did you mean"):
        resolve(at, f"{TUNED}:latest", ANYONE)
    assert [*names_of(at.adapters[TUNED])][:2] == [f"{TUNED}@1", f"{TUNED}@2"]
    assert near_matches(at, TUNED[:-1], ANYONE) == []
    for name in (TUNED, TUNED[:-1]):
        with pytest.raises(ModelNotFound, match=r"does not exist\. GET /v1/models"):
            resolve(at, name, someone("poet"))


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


def split(*targets: tuple[int, int], sticky: Sticky = Sticky.USER) -> Snapshot:
    """A registry of one adapter whose alias `canary` is split so."""
    found = adapter("a", 9)
    alias = Alias("canary", targets, sticky)
    return snapshot(replace(found, aliases={**found.aliases, "canary": alias}))


def served(at: Snapshot, client: str, principal: Principal = ANYONE) -> int:
    found = resolve(at, "a:canary", principal, client).version
    assert found is not None
    return found.number


CLIENTS = [f"user-{n}" for n in range(20_000)]
Weights = st.lists(st.integers(1, 100), min_size=2, max_size=6)


def targets_of(weights: list[int]) -> list[tuple[int, int]]:
    return list(enumerate(weights, 1))


def test_a_canary_of_a_tenth_gets_a_tenth_of_the_users() -> None:
    at = split((1, 90), (2, 10))
    counts = Counter(served(at, client) for client in CLIENTS)
    assert abs(counts[2] / len(CLIENTS) - 0.1) < 0.01


def test_a_canary_of_a_tenth_gets_a_tenth_of_the_requests_of_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(random, "choices", random.Random(11).choices)
    at = split((1, 90), (2, 10))
    counts = Counter(served(at, "") for _ in CLIENTS)
    assert abs(counts[2] / len(CLIENTS) - 0.1) < 0.01


def test_a_larger_canary_moves_only_the_share_it_grows_by() -> None:
    before, after = split((1, 90), (2, 10)), split((1, 80), (2, 20))
    moved = Counter((served(before, each), served(after, each)) for each in CLIENTS)
    assert moved[2, 1] == 0
    assert abs(moved[1, 2] / len(CLIENTS) - 0.1) < 0.01


@given(weights=Weights, client=st.text(min_size=1), order=st.randoms(use_true_random=False))
def test_a_sticky_client_stays(weights: list[int], client: str, order: random.Random) -> None:
    targets = targets_of(weights)
    first = served(split(*targets), client)
    assert weights[first - 1] > 0
    shuffled = order.sample(targets, len(targets))
    scaled = [(number, 3 * weight) for number, weight in shuffled]
    assert {served(split(*each), client) for each in (targets, shuffled, scaled)} == {first}


@given(
    weights=Weights,
    which=st.integers(0, 5),
    by=st.integers(1, 100),
    client=st.text(min_size=1),
)
def test_a_weight_that_grows_moves_clients_only_to_it(
    weights: list[int], which: int, by: int, client: str
) -> None:
    grown = which % len(weights)
    before = served(split(*targets_of(weights)), client)
    weights[grown] += by
    assert served(split(*targets_of(weights)), client) in (before, grown + 1)


@settings(max_examples=20)
@given(weights=Weights)
def test_clients_are_shared_out_by_weight(weights: list[int]) -> None:
    at = split(*targets_of(weights))
    counts = Counter(served(at, client) for client in CLIENTS[:4000])
    for number, weight in targets_of(weights):
        # Five standard deviations of a share of 4,000 are at most four hundredths.
        assert abs(counts[number] / 4000 - weight / sum(weights)) < 0.04


def test_another_alias_has_other_clients_in_its_canary() -> None:
    """Or the same people would get every experiment."""
    found = adapter("a", 2)
    targets = ((1, 50), (2, 50))
    aliases = {name: Alias(name, targets) for name in ("canary", "other")}
    at = snapshot(replace(found, aliases=aliases))
    same = [
        resolve(at, "a:canary", ANYONE, client) is resolve(at, "a:other", ANYONE, client)
        for client in CLIENTS[:1000]
    ]
    assert 400 < sum(same) < 600


def test_sticky_by_key_asks_for_no_user() -> None:
    at = split((1, 50), (2, 50), sticky=Sticky.KEY)
    keys = [replace(ANYONE, key_id=f"key-{n}") for n in range(200)]
    first = [served(at, "", key) for key in keys]
    assert [served(at, f"user-{n}", key) for n, key in enumerate(keys)] == first
    assert 60 < first.count(1) < 140


def test_not_sticky_draws_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "choices", random.Random(5).choices)
    at = split((1, 50), (2, 50), sticky=Sticky.NONE)
    assert {served(at, "one-user") for _ in range(50)} == {1, 2}


def test_a_user_may_be_called_anything() -> None:
    at = split((1, 50), (2, 50))
    assert served(at, "\ud800") == served(at, "\ud800")


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
    started = time.thread_time()
    with pytest.raises(ModelNotFound) as caught:
        resolve(world(), name, ANYONE)
    assert time.thread_time() - started < 0.2
    assert len(str(caught.value)) < 500


def test_a_miss_among_very_many_adapters_is_quick() -> None:
    at = snapshot(*(adapter(f"adapter-{n:05}") for n in range(20_000)))
    assert len(at.sorted_names) == 20_000
    started = time.thread_time()
    with pytest.raises(ModelNotFound, match="adapter-09999"):
        resolve(at, "adapter-0999", ANYONE)
    assert time.thread_time() - started < 0.3


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
