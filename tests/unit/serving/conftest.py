"""A fleet of memory, opened and closed around a test."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.unit.serving.made import FleetOfMemory


@pytest.fixture
async def made() -> AsyncIterator[FleetOfMemory]:
    made = FleetOfMemory()
    async with made.fleet:
        yield made
