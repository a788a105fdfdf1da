"""Requests to one training worker, over connections of this client's own.

What comes in: a method, a path, a body. What goes out: a `Reply`, or an `UpstreamError`. It must
not know: runs, ops, what an answer means.
"""

from __future__ import annotations

import ssl
from functools import cache
from urllib.parse import urlsplit

import httpx

from app.backends.base import Reply
from app.backends.wire import Client, Limits
from app.errors import UpstreamRefused

CONNECTIONS = 128
#: How long an idle connection is kept, in seconds; the worker's server would keep it longer.
KEEP_ALIVE_S = 60.0


class TrainerServer:
    """One worker, reached at `url`: `http://host:port` or `https://…`, without a path.

    Args:
        media_type: of every body that is sent.
        connect_s: how long it may take to accept a connection.
        silence_s: how long it may send nothing while an answer is waited for.

    Raises:
        UpstreamRefused: no server can have that URL.
    """

    def __init__(
        self, url: str, *, api_key: str | None, media_type: str, connect_s: float, silence_s: float
    ) -> None:
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError as exc:
            raise UpstreamRefused(f"its URL is none: {exc}") from exc
        if parts.scheme not in ("http", "https") or not host:
            raise UpstreamRefused("its URL is not http://host:port or https://host")
        secure = parts.scheme == "https"
        address = parts.netloc.rpartition("@")[2]
        self._client = Client(
            host,
            port or (443 if secure else 80),
            name=address,
            limits=Limits(
                connections=CONNECTIONS,
                connect_s=connect_s,
                first_byte_s=silence_s,
                idle_s=silence_s,
                keep_alive_s=KEEP_ALIVE_S,
                tick_s=1.0,
            ),
            tls=_authorities() if secure else None,
        )
        credentials = f"authorization: Bearer {api_key}\r\n" if api_key else ""
        self._common = f"host: {address}\r\naccept-encoding: identity\r\n{credentials}".encode()
        self._kind = f"content-type: {media_type}\r\n".encode()

    async def send(self, method: str, target: str, body: bytes | None = None) -> Reply:
        """Send a request and return once its answer's head is here.

        Raises:
            UpstreamRefused: nothing arrived.
            UpstreamTimeout: no first byte in time.
            UpstreamBroke: the connection died or the answer was not HTTP.
        """
        line = f"{method} {target} HTTP/1.1\r\n".encode()
        kind = b"" if body is None else self._kind
        content = body or b""
        length = b"content-length: %d\r\n\r\n" % len(content)
        head = b"%b%b%b%b" % (line, self._common, kind, length)
        response = await self._client.request(head + content)
        return Reply(response.status, response.headers, response)

    def close(self) -> None:
        """Close idle connections now, and busy ones as they finish."""
        self._client.close()


@cache
def _authorities() -> ssl.SSLContext:
    """What vouches for https workers, read once: it takes longer than most requests."""
    return httpx.create_ssl_context(trust_env=False)
