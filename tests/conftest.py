"""What every test gets: async tests and fixtures, a check for leaked tasks, a clean environment.

What comes in: pytest's hooks. What goes out: `async def test_…` functions and async generator
fixtures run on one `asyncio.Runner` per test. No plugin does this for us, so that what runs is
what asyncio does, without a second event loop's rules.
"""

from __future__ import annotations

import asyncio
import inspect
import os
from collections.abc import AsyncGenerator, Generator, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import settings

from app.settings import BackendSettings
from tests.databases import db, db_url, new_database, postgres, sqlite_template
from tests.servers import fake_server, megatron_server, sim_server, vllm_server, worker_server

__all__ = [
    "db",
    "db_url",
    "fake_server",
    "megatron_server",
    "new_database",
    "postgres",
    "sim_server",
    "sqlite_template",
    "vllm_server",
    "worker_server",
]

# A machine may be busy with something else: how long an example takes says nothing.
settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")

RUNNER = "asyncio_runner"
#: Folders of tests, by how long one of them takes.
LONG_FIRST = ("vllm", "acceptance", "worker", "chaos", "examples", "bench", "integration")
#: A real vLLM takes its time to start on a busy machine; whichever test comes first pays it.
STARTS_VLLM_S = 600


def pytest_configure(config: pytest.Config) -> None:
    """Let no setting, hub or proxy of the developer's shell reach a test or its subprocesses."""
    for name in list(os.environ):
        ours = name.startswith("LORAGATE_") and not name.startswith("LORAGATE_TEST_")
        if ours or name.lower() in BackendSettings.model_fields:
            del os.environ[name]
    os.environ |= {"HF_HUB_OFFLINE": "1", "NO_PROXY": "127.0.0.1,localhost,::1"}
    # Threads of torch that wait for each other let go of their core: other tests need it.
    os.environ |= {"OMP_WAIT_POLICY": "passive"}


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let what takes long come first, and what shares a server stay in one process (`-n 2`)."""
    items.sort(key=_turn)
    for item in items:
        group = "vllm" if item.get_closest_marker("vllm") else item.nodeid.partition("::")[0]
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture
def asyncio_runner() -> Iterator[asyncio.Runner]:
    """One loop for a test and its async fixtures; fails the test that leaves a task behind."""
    with asyncio.Runner() as runner:
        yield runner
        left = asyncio.all_tasks(runner.get_loop())
    if left:
        names = ", ".join(sorted(repr(task.get_coro()) for task in left))
        pytest.fail(f"{len(left)} task(s) still pending at the end of the test: {names}")


def pytest_itemcollected(item: pytest.Item) -> None:
    if isinstance(item, pytest.Function) and _is_async(item.obj):
        item.fixturenames.insert(0, RUNNER)
    if item.get_closest_marker("vllm"):
        item.add_marker(pytest.mark.timeout(STARTS_VLLM_S))


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run an async test; with Hypothesis, run each of its examples."""
    test = pyfuncitem.obj
    if not _is_async(test):
        return None
    runner = cast(asyncio.Runner, pyfuncitem.funcargs[RUNNER])
    wanted = pyfuncitem._fixtureinfo.argnames
    arguments = {name: pyfuncitem.funcargs[name] for name in wanted}
    if (property_ := getattr(test, "hypothesis", None)) is not None:
        example = property_.inner_test

        def run_example(*args: Any, **kwargs: Any) -> None:
            runner.run(example(*args, **kwargs))

        property_.inner_test = run_example
        try:
            test(**arguments)
        finally:
            property_.inner_test = example
    else:
        runner.run(test(**arguments))
    return True


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(
    fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
) -> object | None:
    """Set up an async generator fixture (function scope), and tear it down on the same loop."""
    function = fixturedef.func
    if not inspect.isasyncgenfunction(function):
        return None
    runner: asyncio.Runner = request.getfixturevalue(RUNNER)
    arguments = {name: request.getfixturevalue(name) for name in fixturedef.argnames}
    generator = function(**arguments)
    fixturedef.addfinalizer(lambda: runner.run(_finish(generator)))
    value = runner.run(_start(generator))
    fixturedef.cached_result = (value, fixturedef.cache_key(cast(Any, request)), None)
    return cast(object, value)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Let tests that miss the same share one line of the summary: same place, same reason."""
    report = yield
    needy = item.get_closest_marker("vllm") or item.get_closest_marker("bridge")
    if report.skipped and needy and isinstance(report.longrepr, tuple):
        report.longrepr = ("tests/servers.py", 0, report.longrepr[2])
    return report


def _turn(item: pytest.Item) -> int:
    if item.get_closest_marker("vllm"):
        return 0
    folder = next(iter(Path(item.nodeid).parts[1:-1]), "")
    return LONG_FIRST.index(folder) if folder in LONG_FIRST else len(LONG_FIRST)


async def _start(generator: AsyncGenerator[Any]) -> Any:
    return await anext(generator)


async def _finish(generator: AsyncGenerator[Any]) -> None:
    try:
        await anext(generator)
    except StopAsyncIteration:
        return
    raise RuntimeError("an async fixture yields once")


def _is_async(test: Any) -> bool:
    if (property_ := getattr(test, "hypothesis", None)) is not None:
        test = property_.inner_test
    return inspect.iscoroutinefunction(test)
