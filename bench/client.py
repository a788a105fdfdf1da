"""Single requests, made with care: what a gateway answers before anyone counts how fast.

What comes in: a port of this machine and a chat request. What goes out: the whole reply, with its
size on the wire. One request a connection, blocking; the load itself comes from wrk.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import socket
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

PROMPT = "Say hello to the reader in a friendly, moderately short sentence please."


class Unready(Exception):
    """A server did not start, or does not answer what it must; the message says which."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A complete HTTP reply. `wire_bytes` counts head and body as they crossed the socket."""

    status: int
    body: bytes
    wire_bytes: int

    @property
    def events(self) -> int:
        return self.body.count(b"data: ")

    def streamed(self) -> list[dict[str, Any]]:
        """The JSON payloads of an event stream, the closing [DONE] left out."""
        lines = (line[6:] for line in self.body.splitlines() if line.startswith(b"data: "))
        return [json.loads(line) for line in lines if line.strip() != b"[DONE]"]


def chat_body(model: str, *, stream: bool) -> bytes:
    """The one request of every measurement, for every contender."""
    request: dict[str, Any] = {
        "model": model,
        "messages": [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": PROMPT},
        ],
        "max_tokens": 16,
        "temperature": 0,
    }
    if stream:
        request["stream"] = True
    return json.dumps(request, separators=(",", ":")).encode()


def post(port: int, body: bytes, key: str, *, timeout_s: float = 10.0) -> Reply:
    """POST a chat completion and read the reply to its end."""
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
        f"Authorization: Bearer {key}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as connection:
        connection.sendall(head.encode() + body)
        received = bytearray()
        while data := connection.recv(1 << 16):
            received += data
    response = http.client.HTTPResponse(_Received(bytes(received)))  # type: ignore[arg-type]
    response.begin()
    return Reply(response.status, response.read(), len(received))


class _Received:
    """Bytes already read, in the one way `http.client` wants a socket."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def makefile(self, _mode: str) -> io.BytesIO:
        return io.BytesIO(self._data)


def get(port: int, path: str, *, key: str | None = None, timeout_s: float = 10.0) -> bytes:
    """GET a page that must be there."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        connection.request("GET", path, headers={"Authorization": f"Bearer {key}"} if key else {})
        response = connection.getresponse()
        body = response.read()
    finally:
        connection.close()
    if response.status != 200:
        raise Unready(f"GET {path} answered {response.status}")
    return body


def until_listening(
    process: subprocess.Popen[bytes], ports: Iterable[int], *, what: str, within_s: float = 10.0
) -> None:
    """Wait until every port accepts a connection."""
    deadline = time.monotonic() + within_s
    for port in ports:
        while not _accepts(port):
            alive_before(process, deadline, what)


def until_answering(
    process: subprocess.Popen[bytes], port: int, body: bytes, key: str, *, within_s: float
) -> None:
    """Ask until the gateway answers 200: it has started, and found its upstream healthy."""
    deadline = time.monotonic() + within_s
    while True:
        with contextlib.suppress(OSError, http.client.HTTPException):
            if post(port, body, key).status == 200:
                return
        alive_before(process, deadline, "it")


def alive_before(process: subprocess.Popen[bytes], deadline: float, what: str) -> None:
    """Let a moment pass between two looks; give up on a dead process or at the deadline."""
    if process.poll() is not None:
        raise Unready(f"{what} ended at once (exit status {process.returncode})")
    if time.monotonic() > deadline:
        raise Unready(f"{what} was not ready in time")
    time.sleep(0.05)


def _accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
