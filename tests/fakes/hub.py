"""A stand-in for a Hugging Face endpoint, on a real socket.

What comes in: answers by path, or a folder to offer as a repository. What goes out: the two routes
the gateway asks for. It remembers what it was asked, and with which key.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

COMMIT = "c0ffee" * 6 + "c0ff"
FILES = ["adapter_config.json", "adapter_model.safetensors"]


class Hub(ThreadingHTTPServer):
    """What the stand-in answers, by path, and what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers: dict[str, tuple[int, bytes, dict[str, str]]] = {}
        self.asked: list[tuple[str, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, path: str, body: Any, status: int = 200, **headers: str) -> None:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.answers[path] = (status, raw, headers)

    def offer(self, repo: str, folder: Path, *revisions: str) -> None:
        """Make a folder's two files a repository's one commit, under these revisions."""
        for revision in revisions:
            self.answer(f"/api/models/{repo}/revision/{quote(revision, '')}", {"sha": COMMIT})
        for name in FILES:
            self.answer(f"/{repo}/resolve/{COMMIT}/{name}", (folder / name).read_bytes())


@contextmanager
def running() -> Iterator[Hub]:
    """A hub that answers until the block ends."""
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    """Answers from the table; 404 for the rest."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers.get("Authorization")))
        status, body, headers = self.server.answers.get(self.path, (404, b"{}", {}))
        self.send_response(status)
        # Said, and not only done: a client may not reuse a connection that is about to close.
        own = {"Content-Length": str(len(body)), "Connection": "close"}
        for name, value in (own | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""
