"""The test harness itself: async tests run, async fixtures close, leaked tasks are found."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tests.conftest
from tests.waiting import until, wait_until

pytest_plugins = ["pytester"]


@pytest.fixture
async def loop_of_fixture() -> AsyncIterator[asyncio.AbstractEventLoop]:
    loop = asyncio.get_running_loop()
    yield loop
    assert asyncio.get_running_loop() is loop


async def test_async_test_and_fixture_share_a_loop(
    loop_of_fixture: asyncio.AbstractEventLoop,
) -> None:
    assert asyncio.get_running_loop() is loop_of_fixture


@given(number=st.integers())
@settings(max_examples=5)
async def test_hypothesis_examples_run_on_the_loop(number: int) -> None:
    await asyncio.sleep(0)
    assert isinstance(number, int)


async def test_until_returns_the_value() -> None:
    seen: list[int] = []
    assert await until(lambda: seen.append(1) or len(seen) > 2) is True
    assert wait_until(lambda: "now") == "now"


async def test_until_names_the_condition() -> None:
    never_true = False
    with pytest.raises(AssertionError, match="never_true"):
        await until(lambda: never_true, within_s=0.02)


def test_network_is_off() -> None:
    with (
        pytest.warns(UserWarning, match=r"192\.0\.2\.1"),
        pytest.raises(RuntimeError),
        socket.socket() as sock,
    ):
        sock.connect(("192.0.2.1", 9))


def test_a_leaked_task_fails_its_test(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(Path(tests.conftest.__file__).read_text())
    pytester.makepyfile(
        """
        import asyncio

        kept = []

        async def test_leaks():
            kept.append(asyncio.get_running_loop().create_task(asyncio.sleep(3600)))
        """
    )
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*1 task(s) still pending*sleep*"])
