"""One inference request and the client it came from, whatever server carries it.

`inference` is written against `Exchange`; there are two of them: `asgi.AsgiExchange`, under any
ASGI server, and `direct.DirectExchange`, straight on the socket under `loragate serve`.
"""

from __future__ import annotations

from typing import Protocol

from app.backends.base import Reply

Headers = list[tuple[bytes, bytes]]
Address = tuple[str, int | None] | None


class ClientLeft(Exception):
    """The client closed before its answer, or its request, was whole."""


class Exchange(Protocol):
    """A request being answered. Header names are in lower case."""

    method: str
    path: str
    headers: dict[bytes, bytes]
    server: Address
    client: Address
    left: bool
    """Whether the client went away; its task is then cancelled."""

    async def body(self, limit: int) -> bytes:
        """The whole request body.

        Raises:
            BodyTooLarge: it is over `limit` bytes.
            ClientLeft: the client went away before its end.
        """

    async def respond(self, status: int, headers: Headers, body: bytes) -> None:
        """Send a whole response."""

    async def start(self, status: int, headers: Headers) -> None:
        """Send the head of a response whose body follows in pieces."""

    async def write(self, data: bytes) -> None:
        """Send a piece; waits while the client is slow to take what it was sent."""

    async def relay(self, reply: Reply) -> None:
        """Send every piece of a reply as it comes. Raises what the reply raises."""

    async def end(self) -> None:
        """The response is whole."""

    def abort(self) -> None:
        """The response cannot be finished: the client must see that it is not whole."""
