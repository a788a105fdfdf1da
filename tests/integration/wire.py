"""Plain HTTP/1.1 as bytes on a socket, for what no well-behaved client would send.

What comes in: bytes. What goes out: what the gateway answered, piece by piece, so that a test
can stop reading, hang up or look between two events.
"""

from __future__ import annotations

import json
import socket
import struct
from types import TracebackType
from typing import Any, Self

from tests.integration.gateway import Gateway


class Wire:
    """One connection to a gateway, or to whatever listens on a port."""

    def __init__(self, gateway: Gateway | int, *, receive_buffer: int | None = None) -> None:
        self.sock = socket.socket()
        if receive_buffer is not None:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.sock.settimeout(15)
        port = gateway if isinstance(gateway, int) else gateway.port
        self.sock.connect(("127.0.0.1", port))
        self.host = f"127.0.0.1:{port}"
        self._file = self.sock.makefile("rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()
        self.sock.close()

    def reset(self) -> None:
        """Hang up with a reset, as a client that was killed does."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def request(
        self, method: str, target: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        """Send a request with exactly this target and read the whole answer."""
        self.send(self.message(method, target, body, **headers))
        return self.answer(method)

    def message(self, method: str, target: str, body: bytes | None = None, **headers: str) -> bytes:
        """A request's bytes; header names are given with `_` for `-`."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        lines = {"host": self.host} | named
        if body is not None:
            lines = {"content-type": "application/json", "content-length": str(len(body))} | lines
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        return f"{method} {target} HTTP/1.1\r\n{head}\r\n".encode() + (body or b"")

    def post(self, target: str, payload: Any, **headers: str) -> tuple[int, dict[str, str], bytes]:
        return self.request("POST", target, json.dumps(payload).encode(), **headers)

    def start(self, target: str, payload: Any, **headers: str) -> None:
        """Send a request and read nothing yet."""
        self.send(self.message("POST", target, json.dumps(payload).encode(), **headers))

    def head(self) -> tuple[int, dict[str, str]]:
        """Read a status line and headers (lower case)."""
        status_line = self._file.readline()
        assert status_line.startswith(b"HTTP/1.1 "), f"not an answer: {status_line!r}"
        headers: dict[str, str] = {}
        while (line := self._file.readline()) != b"\r\n":
            assert line, "the connection ended inside the headers"
            name, _, value = line.decode("latin-1").partition(":")
            assert name.lower() not in headers, f"{name} twice"
            headers[name.lower()] = value.strip()
        return int(status_line.split()[1]), headers

    def answer(self, method: str = "GET") -> tuple[int, dict[str, str], bytes]:
        status, headers = self.head()
        if method == "HEAD" or status in (204, 304):
            return status, headers, b""
        if headers.get("transfer-encoding") == "chunked":
            return status, headers, b"".join(iter(self.chunk, b""))
        if "content-length" in headers:
            return status, headers, self.read(int(headers["content-length"]))
        return status, headers, self._file.read()

    def read(self, size: int) -> bytes:
        return self._file.read(size)

    def chunk(self) -> bytes:
        """One chunk of a chunked body; b"" is its proper end, an EOFError any other."""
        line = self._file.readline()
        if not line:
            raise EOFError("the connection ended before the last chunk")
        data = self._file.read(int(line, 16))
        self._file.readline()
        return data

    def rest(self) -> bytes:
        """Everything up to the end of the connection, which the gateway must make."""
        try:
            return self._file.read()
        except ConnectionError:
            return b""

    def ended(self) -> bool:
        """Whether the gateway has closed the connection, after whatever it still had to say."""
        try:
            return self._file.read(1) == b""
        except ConnectionError:
            return True
