"""Model servers that cost nothing, two replicas of each, for gateways to be measured against.

What goes out: the replicas' URLs, and how many requests reached them. Non-streaming replies come
from nginx, which answers several times faster than any gateway can ask; streams come from
`null_sse`. It must not know which gateway is asking.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.client import get, until_listening
from bench.null_sse import chunk_text
from bench.processes import find_program, free_port, running

BASE_MODEL = "tiny"
CHUNKS_PER_REPLY = 100
CHUNK_GAP_MS = 2.0

HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Upstream:
    """Replicas that run now. `signature` is text that only their replies can contain."""

    urls: tuple[str, ...]
    signature: str
    requests: Callable[[], int]


@contextlib.contextmanager
def replying(core: int | None, scratch: Path, base: str = BASE_MODEL) -> Iterator[Upstream]:
    """nginx, answering every completion, chat or not, with one fixed JSON body."""
    home = scratch / "nginx"
    home.mkdir(parents=True, exist_ok=True)
    ports = free_port(), free_port()
    signature = f"null-upstream-{secrets.token_hex(8)}"
    words = {"PORT_A": ports[0], "PORT_B": ports[1], "BASE": base, "SIGNATURE": signature}
    text = (HERE / "nginx.conf").read_text()
    for word, value in words.items():
        text = text.replace(f"@{word}@", str(value))
    (home / "nginx.conf").write_text(text)
    argv = [find_program("nginx") or "nginx", "-e", "stderr", "-p", str(home), "-c", "nginx.conf"]
    with running(argv, core=core, log=home / "output.log") as process:
        until_listening(process, ports, what="nginx")
        yield Upstream(_urls(ports), signature, lambda: _nginx_requests(ports[0]))


@contextlib.contextmanager
def streaming(core: int, scratch: Path) -> Iterator[Upstream]:
    """The event streamer; its chunks name the model that was asked for."""
    ports = free_port(), free_port()
    argv = [
        *(sys.executable, "-m", "bench.null_sse", "--base", BASE_MODEL),
        *("--ports", ",".join(map(str, ports))),
        *("--chunks", str(CHUNKS_PER_REPLY), "--gap-ms", str(CHUNK_GAP_MS)),
    ]
    log = scratch / "null-sse.log"
    with running(argv, core=core, log=log, cwd=HERE.parent) as process:
        until_listening(process, ports, what="the event streamer")
        yield Upstream(
            _urls(ports),
            "".join(chunk_text(number) for number in range(CHUNKS_PER_REPLY)),
            lambda: int(get(ports[0], "/null/requests")),
        )


def _urls(ports: tuple[int, ...]) -> tuple[str, ...]:
    return tuple(f"http://127.0.0.1:{port}" for port in ports)


def _nginx_requests(port: int) -> int:
    """The third number of stub_status's second line: requests so far, of every kind."""
    found = re.search(rb"\n *\d+ +\d+ +(\d+)", get(port, "/null/requests"))
    if found is None:
        raise RuntimeError("nginx's stub_status answered something else")
    return int(found[1])
