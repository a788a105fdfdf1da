"""Any sequence of verbs: numbers are never reused, latest is right, rollback undoes, and what is
published step by step is what a fresh start would publish."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from app.control import adapters, keys
from app.db.engine import Database
from app.domain import LATEST, BaseModel, Scope
from app.errors import Conflict
from tests.contract.conftest import POSTGRES
from tests.contract.registry import MovableClock, add_pool, add_version, digest_of, publisher

NAMES = st.sampled_from(["pirate", "haiku"])
ALIASES = st.sampled_from(["prod", "next", LATEST])
Targets = tuple[tuple[int, int], ...]


class Line:
    """What one adapter should look like."""

    def __init__(self, base: str) -> None:
        self.base = base
        self.versions: dict[int, str] = {}
        self.aliases: dict[str, Targets] = {}
        self.history: dict[str, list[Targets]] = {}

    def move(self, alias: str, targets: Targets) -> None:
        before = self.aliases.get(alias)
        if before is not None and before != targets:
            self.history.setdefault(alias, []).append(before)
        self.aliases[alias] = targets


class Registry(RuleBasedStateMachine):
    """A registry beside a model of it in plain dicts."""

    new_url: Callable[[], str]

    @initialize()
    def start(self) -> None:
        self.runner = asyncio.Runner()
        self.clock = MovableClock()
        self.db = Database(self.new_url())
        self.publish, self.snapshots = publisher(self.db)
        self.lines: dict[str, Line] = {}
        self.last: dict[str, int] = {}
        self.keys: dict[str, bytes] = {}
        self.run(add_pool(self.db, self.clock))
        self.run(add_pool(self.db, self.clock, BaseModel("large")))

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.runner.run(work)

    def verb(self, work: Callable[[Any], Coroutine[Any, Any, Any]]) -> Any:
        async def go() -> Any:
            async with self.db.begin() as session:
                return await work(session)

        return self.run(go())

    @rule(
        name=NAMES,
        seed=st.integers(0, 3),
        base=st.sampled_from(["tiny", "large"]),
        alias=st.none() | ALIASES,
    )
    def register(self, name: str, seed: int, base: str, alias: str | None) -> None:
        line = self.lines.get(name)
        work = add_version(self.db, self.clock, name, seed, base_model=base, alias=alias)
        if line is not None and line.base != base:
            with pytest.raises(Conflict):
                self.run(work)
            return
        line = self.lines.setdefault(name, Line(base))
        done = self.run(work)
        newest = max(line.versions, default=0)
        created = line.versions.get(newest) != digest_of(seed)
        assert done.created is created
        if created:
            newest = self.last[name] = self.last.get(name, 0) + 1
            line.versions[newest] = digest_of(seed)
            line.move(LATEST, ((newest, 1),))
        if alias is not None and alias != LATEST:
            line.move(alias, ((newest, 1),))
        assert done.version.number == newest

    @rule(name=NAMES, alias=ALIASES, data=st.data())
    def set_alias(self, name: str, alias: str, data: st.DataObject) -> None:
        if (line := self.lines.get(name)) is None:
            return
        numbers = data.draw(
            st.lists(
                st.sampled_from(sorted(line.versions)),
                min_size=1,
                max_size=1 if alias == LATEST else 3,
                unique=True,
            )
        )
        targets = tuple((number, 1 + number % 3) for number in numbers)
        self.verb(
            lambda s: adapters.set_alias(s, self.clock, adapter=name, alias=alias, targets=targets)
        )
        line.move(alias, targets)

    @rule(name=NAMES, alias=ALIASES)
    def rollback(self, name: str, alias: str) -> None:
        line = self.lines.get(name)
        if line is None or alias not in line.aliases:
            return
        history = line.history.get(alias, [])
        current = line.aliases[alias]
        while history:
            before = history.pop()
            if before != current and all(number in line.versions for number, _ in before):
                line.aliases[alias] = before
                self.verb(lambda s: adapters.rollback(s, adapter=name, alias=alias))
                return
        # The transaction is undone as a whole, but what it skipped can never be used again.
        with pytest.raises(Conflict):
            self.verb(lambda s: adapters.rollback(s, adapter=name, alias=alias))

    @rule(name=NAMES, alias=st.sampled_from(["prod", "next"]))
    def delete_alias(self, name: str, alias: str) -> None:
        line = self.lines.get(name)
        if line is None or alias not in line.aliases:
            return
        self.verb(lambda s: adapters.delete_alias(s, adapter=name, alias=alias))
        del line.aliases[alias]
        line.history.pop(alias, None)

    @rule(name=NAMES, data=st.data())
    def delete_version(self, name: str, data: st.DataObject) -> None:
        if (line := self.lines.get(name)) is None:
            return
        number = data.draw(st.sampled_from(sorted(line.versions)))
        held = any(
            number in dict(targets) for alias, targets in line.aliases.items() if alias != LATEST
        )
        work = lambda s: adapters.delete_version(s, self.clock, adapter=name, number=number)  # noqa: E731
        if held or len(line.versions) == 1:
            with pytest.raises(Conflict):
                self.verb(work)
            return
        self.verb(work)
        del line.versions[number]
        if number in dict(line.aliases[LATEST]):
            line.aliases[LATEST] = ((max(line.versions), 1),)

    @rule(name=NAMES)
    def delete(self, name: str) -> None:
        if self.lines.pop(name, None) is not None:
            self.verb(lambda s: adapters.delete(s, self.clock, name))

    @rule()
    def create_key(self) -> None:
        view, secret = self.verb(
            lambda s: keys.create(s, self.clock, name="k", scopes=[Scope.INFERENCE])
        )
        self.keys[view.id] = keys.digest(secret)

    @rule(data=st.data())
    def revoke_key(self, data: st.DataObject) -> None:
        if self.keys:
            key_id = data.draw(st.sampled_from(sorted(self.keys)))
            self.verb(lambda s: keys.revoke(s, self.clock, key_id))
            del self.keys[key_id]

    @invariant()
    def what_is_served_is_what_should_be(self) -> None:
        self.run(self.publish.activate())
        served = self.snapshots.current
        assert {
            name: (
                adapter.base_model,
                {number: version.digest for number, version in adapter.versions.items()},
                {alias.name: alias.targets for alias in adapter.aliases.values()},
            )
            for name, adapter in served.adapters.items()
        } == {name: (line.base, line.versions, line.aliases) for name, line in self.lines.items()}
        assert set(served.keys) == set(self.keys.values())

        fresh, snapshots = publisher(self.db)
        self.run(fresh.activate())
        assert snapshots.current == served

    def teardown(self) -> None:
        if hasattr(self, "runner"):
            self.run(self.db.close())
            self.runner.close()


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("dialect", "examples"),
    [("sqlite", 15), pytest.param("postgresql", 5, marks=POSTGRES.marks)],
)
def test_any_sequence_of_verbs(
    dialect: str, examples: int, new_database: Callable[[str], str]
) -> None:
    class OnThis(Registry):
        new_url = staticmethod(lambda: new_database(dialect))

    run_state_machine_as_test(
        OnThis,
        settings=settings(
            max_examples=examples,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
