"""One inference request on its way through a simulated replica.

What comes in: tokens from the engine. What goes out: bytes on a connection: events as they come,
or one body at the end. It must not know who else is being served.
"""

from __future__ import annotations

from collections.abc import Callable

from bench.sim.answers import Shape
from bench.sim.engine import Sequence
from bench.sim.http1 import Connection

ENGINE_DEAD = (
    b'{"error":{"message":"EngineCore encountered an issue. See stack trace (above) for the root '
    b'cause.","type":"InternalServerError","param":null,"code":500}}'
)


class Exchange:
    """The `Sink` of a request's sequences. `reset_after` tokens its connection breaks, if set."""

    def __init__(
        self,
        shape: Shape,
        connection: Connection,
        done: Callable[[Exchange], None],
        reset_after: int | None = None,
    ) -> None:
        self.shape = shape
        self.connection = connection
        self.streams = bool(shape.ask.stream)
        self._done = done
        self._left = shape.choices
        self._tokens = 0
        self._reset_after = reset_after
        self._begun = False
        self._plain = not shape.ask.logprobs and shape.ask.logprobs != 0
        self._frames: dict[int, tuple[bytes, bytes]] = {}

    def token(self, sequence: Sequence) -> None:
        self._left -= sequence.finished
        if self.connection.gone:
            return
        self._tokens += 1
        if self._reset_after is not None and self._tokens > self._reset_after:
            self.connection.reset()
        elif self.streams:
            self._stream(sequence)
        elif self._left == 0:
            if self._reset_after is not None:
                self.connection.reset()
            else:
                self.connection.answer(200, self.shape.body())
                self._done(self)

    def broke(self) -> None:
        """As vLLM: a 500, or an error as the last event of a stream."""
        if not self._begun:
            self.connection.answer(500, ENGINE_DEAD)
        else:
            self.connection.end_stream(b"data: " + ENGINE_DEAD + b"\n\ndata: [DONE]\n\n")
        self._done(self)

    def _stream(self, sequence: Sequence) -> None:
        if not self._begun:
            self._begun = True
            self.connection.begin_stream(self.shape.opening())
        position = sequence.produced - 1
        if position < 2 or sequence.finished or not self._plain:
            event = self.shape.event(sequence.index, position)
        else:
            frame = self._frames.get(sequence.index)
            if frame is None:
                frame = self._frames[sequence.index] = self.shape.frame(sequence.index)
            event = b"%b t%d%b" % (frame[0], position, frame[1])
        if self._left:
            self.connection.send(event)
            return
        self.connection.send(event)
        self.connection.end_stream(self.shape.closing())
        self._done(self)
