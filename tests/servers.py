"""Model servers to test against: the fake, the worker, a real vLLM; one shape for all.

What comes in: pytest's request for a server. What goes out: a `ModelServer` that runs. The
worker and vLLM are subprocesses and start once per session; tests must leave no adapter loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.fakes.adapters import write_adapter
from tests.fakes.upstream import FakeUpstream


@dataclass(frozen=True)
class ModelServer:
    """A server that speaks vLLM's dialect, an adapter it can load and one too large for it."""

    url: str
    served: str
    adapter: Path
    oversized: Path


@pytest.fixture(scope="session")
def fake_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelServer]:
    folder = tmp_path_factory.mktemp("fake")
    upstream = FakeUpstream("tiny", max_lora_rank=16)
    yield ModelServer(
        upstream.url,
        "tiny",
        write_adapter(folder / "good"),
        write_adapter(folder / "oversized", rank=64),
    )
    upstream.close()
    assert not upstream.problems
