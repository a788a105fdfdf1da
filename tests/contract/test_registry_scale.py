"""100,000 versions: all are served, and a change costs what changed. How fast is for the bench."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from app.control import adapters
from app.db.engine import Database
from bench.registry_scale import Shape, fill
from tests.contract.conftest import POSTGRES
from tests.contract.registry import MovableClock, publisher


@pytest.fixture(params=["sqlite", POSTGRES])
def registry(
    request: pytest.FixtureRequest, new_database: Callable[[str], str]
) -> tuple[str, Shape]:
    """A database made before the test's loop runs, and how much to put in it."""
    shape = Shape(20_000, 5) if request.param == "sqlite" else Shape(100_000, 1)
    return new_database(request.param), shape


@pytest.mark.timeout(300)
async def test_a_hundred_thousand_versions(registry: tuple[str, Shape]) -> None:
    url, shape = registry
    db, other = Database(url), Database(url)
    await fill(db, shape)
    publish, snapshots = publisher(db)
    follower, others = publisher(other)
    await publish.activate()
    await follower.activate()
    before = snapshots.current
    assert sum(len(adapter.versions) for adapter in before.adapters.values()) == 100_000

    async with db.begin() as session:
        await adapters.set_alias(
            session,
            MovableClock(),
            adapter="customer-004711",
            alias="prod",
            targets=[(1, 7)],
        )
    for task, seen in ((publish, snapshots), (follower, others)):
        was = seen.current.adapters
        await task.activate()
        now = seen.current.adapters
        assert now["customer-004711"].aliases["prod"].targets == ((1, 7),)
        changed = [name for name, adapter in now.items() if adapter is not was[name]]
        assert changed == ["customer-004711"]
    assert before.adapters["customer-004711"].aliases["prod"].targets == ((shape.versions, 1),)
    await db.close()
    await other.close()
