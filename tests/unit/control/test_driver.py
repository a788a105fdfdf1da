"""Tasks run at their period and when woken; one that fails takes no other with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress

import pytest

from app.clock import SystemClock
from app.control.driver import Driver
from app.control.interruptible import in_thread
from tests.waiting import until

HOUR = 3600.0


def counting() -> tuple[Callable[[], Awaitable[Mapping[str, object]]], list[int]]:
    runs: list[int] = []

    async def activate() -> Mapping[str, object]:
        runs.append(1)
        return {"run": len(runs)}

    return activate, runs


@asynccontextmanager
async def running(driver: Driver) -> AsyncIterator[None]:
    task = asyncio.get_running_loop().create_task(driver.run())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def test_a_task_runs_at_once_and_when_woken() -> None:
    driver = Driver(SystemClock())
    activate, runs = counting()
    activator = driver.add("count", activate, HOUR)
    async with running(driver):
        await until(lambda: len(runs) == 1)
        activator.wake()
        await until(lambda: len(runs) == 2)
    status = driver.statuses()[0]
    assert (status.name, status.runs, status.failures) == ("count", 2, 0)
    assert (status.details, status.running, status.last_error) == ({"run": 2}, False, None)
    assert status.last_started_at is not None
    assert status.last_duration_s is not None


async def test_a_task_runs_at_its_period() -> None:
    driver = Driver(SystemClock())
    activate, runs = counting()
    driver.add("count", activate, 0.001)
    async with running(driver):
        await until(lambda: len(runs) > 3)


async def test_a_failing_task_is_shown_and_runs_again() -> None:
    driver = Driver(SystemClock())
    activate, runs = counting()
    fine = driver.add("fine", activate, HOUR)

    async def fail() -> Mapping[str, object]:
        raise ValueError("the disk is gone")

    broken = driver.add("broken", fail, HOUR)
    async with running(driver):
        await until(lambda: broken.status().runs and fine.status().runs)
        assert await broken.settle()
        assert await fine.settle()
    status = broken.status()
    assert status.failures == status.runs >= 2
    assert status.last_error == "ValueError: the disk is gone"
    assert runs


async def test_settle_waits_for_a_run_that_began_afterwards() -> None:
    driver = Driver(SystemClock())
    gate = asyncio.Event()
    value, seen = 0, []

    async def read() -> Mapping[str, object]:
        found = value
        await gate.wait()
        seen.append(found)
        return {}

    activator = driver.add("read", read, HOUR)
    async with running(driver):
        await until(lambda: activator.status().running)
        value = 1  # the run under way has read 0
        settled = asyncio.get_running_loop().create_task(activator.settle())
        await asyncio.sleep(0)
        gate.set()
        assert await settled
        assert seen[-1] == 1


async def test_settle_gives_up_in_time() -> None:
    driver = Driver(SystemClock())

    async def forever() -> Mapping[str, object]:
        await asyncio.Event().wait()
        return {}

    activator = driver.add("forever", forever, HOUR)
    assert not await activator.settle()  # no driver, no wait
    async with running(driver):
        await until(lambda: activator.status().running)
        assert not await activator.settle(within_s=0.01)
    assert not activator.status().running


async def test_work_in_a_thread_has_ended_when_its_caller_is_cancelled() -> None:
    started, ended = asyncio.Event(), []
    loop = asyncio.get_running_loop()

    def work(check: Callable[[], None]) -> None:
        loop.call_soon_threadsafe(started.set)
        try:
            while True:
                check()
        finally:
            ended.append(True)

    task = loop.create_task(in_thread(work))
    await started.wait()
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended == [True]


async def test_work_in_a_thread_answers_and_fails() -> None:
    assert await in_thread(lambda check: 3) == 3
    with pytest.raises(ZeroDivisionError):
        await in_thread(lambda check: 1 / 0)
