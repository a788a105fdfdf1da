"""A model server without a model: streams fixed chat chunks at a steady pace.

    python -m bench.null_sse --ports 9003,9004 --chunks 100 --gap-ms 2

What comes in: the requests a gateway sends to vLLM. What goes out: a server-sent event every
`gap` for each open stream, each with its own timer, so that streams do not march in step. The
`model` of a chunk is the `model` that was asked for: whoever reads the stream sees what the
gateway really sent. `GET /null/requests` tells how many completions were asked for so far.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from typing import Any, cast

import httptools
import uvloop

COMPLETIONS = b"/v1/chat/completions"
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\n"
    b"content-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)


def chunk_text(number: int) -> str:
    """What chunk `number` of every reply says."""
    return f" token{number}"


class Pace:
    """What every connection shares: how much to stream, how fast, and the count of requests."""

    def __init__(self, chunks: int, gap_s: float, base: str) -> None:
        self.chunks = chunks
        self.gap_s = gap_s
        self.base = base
        self.requests = 0
        self._scripts: dict[tuple[str, bool], list[bytes]] = {}

    def script(self, request: dict[str, Any]) -> list[bytes]:
        """The writes of one reply, made once for a model. As in vLLM, usage comes if asked for."""
        model = str(request["model"])
        with_usage = bool((request.get("stream_options") or {}).get("include_usage"))
        if (model, with_usage) not in self._scripts:
            events = [_event(model, _said(number)) for number in range(self.chunks)]
            end = _event(model, _usage(self.chunks)) if with_usage else b""
            last = _chunk(end + b"data: [DONE]\n\n") + b"0\r\n\r\n"
            self._scripts[model, with_usage] = [*(_chunk(event) for event in events), last]
        return self._scripts[model, with_usage]


class Connection(asyncio.Protocol):
    """One keep-alive connection; a gateway sends the next request after the last reply."""

    def __init__(self, pace: Pace) -> None:
        self.pace = pace
        self.parser = httptools.HttpRequestParser(self)
        self.path = b""
        self.body = b""
        self.keep_alive = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        self.loop = asyncio.get_running_loop()

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self.path = url
        self.body = b""

    def on_headers_complete(self) -> None:
        self.keep_alive = self.parser.should_keep_alive()

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        if self.path != COMPLETIONS:
            self.transport.write(self._plain())
            self._reply_ends()
            return
        self.pace.requests += 1
        self.transport.write(STREAM_HEAD)
        script = self.pace.script(json.loads(self.body))
        self.loop.call_later(self.pace.gap_s, self._emit, script, 0)

    def _emit(self, script: list[bytes], position: int) -> None:
        if self.transport.is_closing():
            return
        self.transport.write(script[position])
        if position + 1 < len(script):
            self.loop.call_later(self.pace.gap_s, self._emit, script, position + 1)
        else:
            self._reply_ends()

    def _reply_ends(self) -> None:
        if not self.keep_alive:
            self.transport.close()

    def _plain(self) -> bytes:
        if self.path == b"/null/requests":
            return _reply(b"%d" % self.pace.requests)
        if self.path == b"/v1/models":
            card = {"id": self.pace.base, "object": "model", "created": 1, "owned_by": "vllm"}
            card |= {"root": self.pace.base, "parent": None, "max_model_len": 4096}
            return _reply(json.dumps({"object": "list", "data": [card]}).encode())
        if self.path in (b"/server_info", b"/get_model_info"):
            return _reply(json.dumps({"model_path": self.pace.base, "dp_size": 1}).encode())
        return _reply(b"")


def _said(number: int) -> dict[str, Any]:
    delta = {"content": chunk_text(number)}
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
    return {"choices": [choice]}


def _usage(chunks: int) -> dict[str, Any]:
    counts = {"prompt_tokens": 31, "completion_tokens": chunks, "total_tokens": 31 + chunks}
    return {"choices": [], "usage": counts}


def _event(model: str, content: dict[str, Any]) -> bytes:
    event = {
        "id": "chatcmpl-0f5ae3c1b7d94e6c8a21",
        "object": "chat.completion.chunk",
        "created": 1795225565,
        "model": model,
        **content,
    }
    return b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n"


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _reply(body: bytes) -> bytes:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    return head % len(body) + body


async def serve(ports: list[int], pace: Pace) -> None:
    loop = asyncio.get_running_loop()
    for port in ports:
        await loop.create_server(lambda: Connection(pace), "127.0.0.1", port, backlog=1024)
    await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--ports", required=True, help="comma-separated ports to listen on")
    parser.add_argument("--chunks", type=int, default=100, help="events of one reply")
    parser.add_argument("--gap-ms", type=float, default=2.0, help="time between two events")
    parser.add_argument("--base", default="tiny", help="the model name in /v1/models")
    args = parser.parse_args()
    ports = [int(port) for port in args.ports.split(",")]
    uvloop.run(serve(ports, Pace(args.chunks, args.gap_ms / 1000, args.base)))


if __name__ == "__main__":
    main()
