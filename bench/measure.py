"""One gateway under one load: what it costs, after making sure that it does its work.

What comes in: a contender, replicas, cores. What goes out: figures. A gateway that refuses a
request, cuts a reply short or answers by itself raises `Misbehaved`: a number for it would lie.

The CPU of a request is what the gateway's whole process tree used in user and kernel mode,
divided by the requests that wrk counted: it holds on a noisy machine, where latencies do not.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.client import Reply, Unready, chat_body, post, until_answering
from bench.null_upstream import CHUNKS_PER_REPLY, Upstream
from bench.peers import Contender, Stand
from bench.processes import Weight, free_port, running, weigh

WRK_SCRIPT = Path(__file__).with_name("wrk.lua")

#: How far the mean size of a reply may be from the size of one that was looked at: headers such
#: as durations differ by a digit or two, an error page in place of a reply by far more.
SIZE_TOLERANCE = 0.05

#: How long a load may last for a slow gateway.
LONGEST_S = 60


class Misbehaved(Exception):
    """A contender did not do what it is measured for; the message says what."""


@dataclass(frozen=True, slots=True)
class Load:
    """A number of connections, each sending its next request when the last reply is complete."""

    name: str
    connections: int
    stream: bool = False


REPLY_LOADS = (Load("reply_16", 16), Load("reply_1", 1))
STREAM_LOADS = (Load("stream_64", 64, stream=True),)


@dataclass(frozen=True, slots=True)
class Tally:
    """What wrk counted: see wrk.lua."""

    requests: int
    duration_us: int
    bytes: int
    p50_us: int
    p99_us: int
    refused: int
    broken: int
    malformed: int

    def complaint(self) -> str | None:
        """What went wrong, if anything did."""
        wrong = {
            "were not answered with success": self.refused,
            "failed on the connection": self.broken,
            "were answered with an incomplete stream": self.malformed,
        }
        found = [f"{count} of {self.requests} requests {what}" for what, count in wrong.items()]
        bad = [text for text, count in zip(found, wrong.values(), strict=True) if count]
        return "; ".join(bad) if bad else None


@dataclass(frozen=True, slots=True)
class Figures:
    """One load, measured once. A unit is a request or, in a stream, a chunk of the reply.

    CPU and memory are None where there is no gateway.
    """

    requests: int
    requests_per_s: float
    units_per_s: float
    p50_us: int
    p99_us: int
    cpu_us: float | None
    user_us: float | None
    system_us: float | None
    resident_mb: float | None

    def as_json(self) -> dict[str, Any]:
        return {
            name: round(value, 2) if isinstance(value, float) else value
            for name, value in asdict(self).items()
        }


@dataclass(frozen=True, slots=True)
class Standing:
    """A contender that runs and was seen to answer as it should. `pid` is None without gateway."""

    contender: Contender
    pid: int | None
    port: int
    upstream: Upstream
    stream: bool
    body_file: Path
    reply: Reply


@contextlib.contextmanager
def standing(
    contender: Contender, upstream: Upstream, *, stream: bool, core: int, scratch: Path
) -> Iterator[Standing]:
    """Start a contender before `upstream`, look at one reply closely, and stop it at the end."""
    body = chat_body(contender.model, stream=stream)
    body_file = scratch / f"{contender.name}.request.json"
    body_file.write_bytes(body)
    with contextlib.ExitStack() as stack:
        if contender.launch is None:
            pid, port = None, int(upstream.urls[0].rpartition(":")[2])
        else:
            port = free_port()
            launch = contender.launch(Stand(port, upstream.urls, contender.key, scratch))
            log = scratch / f"{contender.name}.log"
            process = stack.enter_context(running(launch.argv, core=core, log=log, env=launch.env))
            pid = process.pid
            try:
                within_s = contender.ready_within_s
                until_answering(process, port, body, contender.key, within_s=within_s)
            except Unready:
                _show_end_of(log)
                raise
        reply = post(port, body, contender.key)
        _inspect(reply, contender, upstream, stream)
        yield Standing(contender, pid, port, upstream, stream, body_file, reply)


def measure(here: Standing, load: Load, *, seconds: int, load_core: int) -> Figures:
    """Put a standing contender under a load and weigh it before and after.

    A gateway too slow to complete a reply on every connection is given more time.
    """
    while True:
        reached = here.upstream.requests()
        before = weigh(here.pid) if here.pid else None
        tally = drive(here, load, seconds=seconds, load_core=load_core)
        after = weigh(here.pid) if here.pid else None
        if tally.requests >= load.connections or seconds >= LONGEST_S:
            break
        seconds = min(2 * seconds, LONGEST_S)
    _judge(here, load, tally, here.upstream.requests() - reached)
    return _figures(here, load, tally, before, after)


def drive(here: Standing, load: Load, *, seconds: int, load_core: int) -> Tally:
    """Let wrk ask as fast as it is answered, and return its tally."""
    argv = [
        *("taskset", "-c", str(load_core)),
        *("wrk", "-t1", f"-c{load.connections}", f"-d{seconds}s", "--timeout", "120s"),
        *("-s", str(WRK_SCRIPT), f"http://127.0.0.1:{here.port}/v1/chat/completions"),
        *("--", str(here.body_file), here.contender.key),
        *([str(here.reply.events)] if load.stream else []),
    ]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        if line.startswith("TALLY "):
            return Tally(**json.loads(line.removeprefix("TALLY ")))
    print(done.stdout + done.stderr, file=sys.stderr)
    raise Misbehaved("could not be driven: wrk gave no tally")


def _show_end_of(log: Path) -> None:
    """The last words of a gateway that did not start: for the screen, never for the results."""
    for line in log.read_text(errors="replace").splitlines()[-15:]:
        print(f"        | {line}", file=sys.stderr)


def _inspect(reply: Reply, contender: Contender, upstream: Upstream, stream: bool) -> None:
    """One reply, read with care: whole, from our replicas, for the model they should be asked."""
    if reply.status != 200:
        raise Misbehaved(f"answered {reply.status}")
    if not stream:
        text = json.loads(reply.body)["choices"][0]["message"]["content"]
    else:
        events = reply.streamed()
        choices = [event["choices"][0] for event in events if event["choices"]]
        text = "".join(choice["delta"].get("content") or "" for choice in choices)
        if contender.upstream_model not in {event["model"] for event in events}:
            found = sorted({event["model"] for event in events})
            raise Misbehaved(f"asked its replica for {found}, not {contender.upstream_model!r}")
    if upstream.signature not in text:
        raise Misbehaved("answered with something other than the upstream's reply")


def _judge(here: Standing, load: Load, tally: Tally, reached: int) -> None:
    """Every reply good, every request passed on, every byte of it delivered."""
    if complaint := tally.complaint():
        raise Misbehaved(complaint)
    if tally.requests == 0:
        raise Misbehaved("completed no request in time")
    if reached < tally.requests:
        raise Misbehaved(f"answered {tally.requests} requests and passed on {reached}")
    if load.stream:
        return
    size = tally.bytes / tally.requests
    if abs(size - here.reply.wire_bytes) > SIZE_TOLERANCE * here.reply.wire_bytes:
        raise Misbehaved(f"replies are {size:.0f} bytes on average, not {here.reply.wire_bytes}")


def _figures(
    here: Standing, load: Load, tally: Tally, before: Weight | None, after: Weight | None
) -> Figures:
    seconds = tally.duration_us / 1e6
    # Replies under way at the end were paid for too: count delivered bytes, not finished replies.
    chunks = tally.bytes / here.reply.wire_bytes * CHUNKS_PER_REPLY
    units = chunks if load.stream else tally.requests
    cpu = user = system = resident = None
    if before and after:
        user = (after.user_s - before.user_s) * 1e6 / units
        system = (after.system_s - before.system_s) * 1e6 / units
        cpu = user + system
        resident = after.resident_bytes / 1e6
    return Figures(
        requests=tally.requests,
        requests_per_s=tally.requests / seconds,
        units_per_s=units / seconds,
        p50_us=tally.p50_us,
        p99_us=tally.p99_us,
        cpu_us=cpu,
        user_us=user,
        system_us=system,
        resident_mb=resident,
    )
