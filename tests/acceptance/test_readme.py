"""The README's other commands, run as they stand."""

from __future__ import annotations

from pathlib import Path

import httpx

from tests.acceptance.conftest import Serve
from tests.acceptance.readme import blocks
from tests.fakes.adapters import write_adapter
from tests.fakes.upstream import FakeUpstream
from tests.waiting import wait_until


def test_every_marked_block_has_its_test() -> None:
    assert {block.name for block in blocks()} <= {"serve", "train", "own-pool"}


def test_own_pool(serve: Serve, upstream: FakeUpstream, tmp_path: Path) -> None:
    """A pool and an adapter from the command line, then a request through both."""
    served = serve(embedded="off")
    served.process.start()
    served.process.wait_http(f"{served.url}/healthz")
    write_adapter(tmp_path / "my-adapter", base="llama-3-8b")
    second = FakeUpstream("llama-3-8b")
    upstream.engine.served = "llama-3-8b"
    replace = {"http://gpu-1:8000": upstream.url, "http://gpu-2:8000": second.url}
    try:
        for block in blocks():
            if block.name == "own-pool":
                block.run(replace, cwd=tmp_path, env={"LORAGATE_URL": served.url})
        payload = {"model": "support-bot:prod", "prompt": "hi"}

        def answered() -> bool:
            answer = httpx.post(f"{served.url}/v1/completions", json=payload)
            return answer.status_code == 200 and answer.json()["model"] == "support-bot@1"

        wait_until(answered)
    finally:
        served.process.kill()
        second.close()
