"""The worker as a process of its own: a socket from its parent, a ready line, a polite end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.waiting import wait_until

pytestmark = pytest.mark.worker


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


@pytest.fixture
def worker(
    tiny: Path, listener: socket.socket, tmp_path: Path
) -> Iterator[subprocess.Popen[bytes]]:
    env = {
        **os.environ,
        "LORAGATE_WORKER_MODEL": str(tiny / "model"),
        "LORAGATE_WORKER_SERVED_NAME": "tiny",
        "LORAGATE_WORKER_THREADS": "1",
        "LORAGATE_WORKER_STATE_DIR": str(tmp_path / "runs"),
        "LORAGATE_DRAIN_TIMEOUT_S": "20",
    }
    command = [sys.executable, "-m", "app.worker.main", "--exit-with-stdin"]
    command += ["--fd", str(listener.fileno())]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            command,
            env=env,
            pass_fds=[listener.fileno()],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
        )
    with process:
        yield process
        process.kill()


def test_a_running_request_finishes_after_sigterm(
    worker: subprocess.Popen[bytes], listener: socket.socket, tmp_path: Path
) -> None:
    host, port = listener.getsockname()
    url = f"http://{host}:{port}"
    # The socket listens before the worker does: the first request just waits.
    assert httpx.get(f"{url}/health", timeout=60).status_code == 200
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    ready = next(line for line in lines if line["event"] == "worker.ready")
    assert ready["address"] == f"{host}:{port}"
    assert ready["model"] == "tiny"

    body = {"prompt": [5, 6], "max_tokens": 200, "ignore_eos": True, "n": 16}
    answers: list[httpx.Response] = []
    asking = threading.Thread(
        target=lambda: answers.append(httpx.post(f"{url}/v1/completions", json=body, timeout=60))
    )
    asking.start()
    running = 'vllm:num_requests_running{engine="0",model_name="tiny"} 16.0'
    wait_until(lambda: running in httpx.get(f"{url}/metrics").text, within_s=20)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(20) in (0, -signal.SIGTERM)
    asking.join(5)
    assert [answer.status_code for answer in answers] == [200]
    assert answers[0].json()["usage"]["completion_tokens"] == 16 * 200


def test_it_ends_with_its_parent(worker: subprocess.Popen[bytes], listener: socket.socket) -> None:
    host, port = listener.getsockname()
    assert httpx.get(f"http://{host}:{port}/health", timeout=60).status_code == 200
    assert worker.stdin is not None
    worker.stdin.close()
    assert worker.wait(10) in (0, -signal.SIGTERM)
