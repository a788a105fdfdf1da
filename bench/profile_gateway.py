"""Where a gateway's time goes: user and kernel CPU, system calls, C and Python functions.

    python -m bench.profile_gateway [--stream] [--only NAME] [--seconds N]

Starts one contender pinned to its core, drives it with wrk as `bench.overhead` does, and prints
what a request (or a streamed chunk) costs in each respect, and in which functions. Each look is a
run of its own: looking slows the gateway, so only the first run's CPU is its true cost.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench import loragate
from bench.client import Unready
from bench.measure import (
    REPLY_LOADS,
    STREAM_LOADS,
    Load,
    Misbehaved,
    Standing,
    Tally,
    drive,
    measure,
    standing,
)
from bench.null_upstream import CHUNKS_PER_REPLY, replying, streaming
from bench.overhead import NAMES, contender_called
from bench.peers import DIRECT, Contender, Launch, Stand, install
from bench.processes import (
    Unusable,
    choose_cores,
    exit_on_signals,
    find_program,
    require_programs,
)

DEFAULT = "loragate"
WARM_UP_S = 2
#: What a gateway may do per request.
SYSTEM_CALLS = (
    *("read", "readv", "recvfrom", "recvmsg", "write", "writev", "sendto", "sendmsg"),
    *("epoll_wait", "epoll_pwait", "epoll_ctl", "futex", "getpid", "accept4", "close"),
)
#: Lines of perf's report worth reading.
SYMBOLS = 40


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    exit_on_signals()
    try:
        require_programs()
        with tempfile.TemporaryDirectory(prefix="loragate-profile-") as folder:
            return _profile(args, Path(folder))
    except (Misbehaved, Unready, Unusable) as exc:
        print(f"profile: {exc}", file=sys.stderr)
        return 1


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    names = [name for name in NAMES if name != DIRECT.name]
    parser = argparse.ArgumentParser(
        prog="bench.profile_gateway", description="Show where a gateway's time goes."
    )
    parser.add_argument("--only", choices=names, default=DEFAULT, metavar="NAME")
    parser.add_argument("--stream", action="store_true", help="streams instead of short replies")
    parser.add_argument("--connections", type=int, help="default: as in the benchmark")
    parser.add_argument("--seconds", type=int, default=5, help="of each look, default 5")
    return parser.parse_args(argv)


def _profile(args: argparse.Namespace, scratch: Path) -> int:
    cores = choose_cores()
    contender = contender_called(args.only, scratch)
    if not install(contender):
        raise Unusable(f"{args.only} cannot be installed here")
    usual = (STREAM_LOADS if args.stream else REPLY_LOADS)[0]
    load = Load(usual.name, args.connections or usual.connections, usual.stream)
    upstreams = streaming if load.stream else replying
    with upstreams(cores.load, scratch) as upstream:
        with standing(
            contender, upstream, stream=load.stream, core=cores.gateway, scratch=scratch
        ) as here:
            drive(here, load, seconds=WARM_UP_S, load_core=cores.load)
            _cpu(here, load, args.seconds, cores.load)
            if find_program("perf") is not None:
                _system_calls(here, load, args.seconds, cores.load)
                _symbols(here, load, args.seconds, cores.load, scratch)
            else:
                print("  apt-get install linux-perf to see system calls and symbols")
        # Compiled functions have no frames to sample.
        if args.only in loragate.VARIANTS and not loragate.VARIANTS[args.only].compiled:
            samples = scratch / "samples.txt"
            with standing(
                _sampled(contender, samples),
                upstream,
                stream=load.stream,
                core=cores.gateway,
                scratch=scratch,
            ) as here:
                drive(here, load, seconds=WARM_UP_S, load_core=cores.load)
                os.kill(here.pid or 0, signal.SIGUSR1)
                drive(here, load, seconds=2 * args.seconds, load_core=cores.load)
            print("  Python functions with the C code they call, share of CPU time")
            print("\n".join(samples.read_text().splitlines()[:SYMBOLS]))
    return 0


def _sampled(contender: Contender, samples: Path) -> Contender:
    """The same gateway, writing down which of its functions are running."""
    launch = contender.launch
    assert launch is not None

    def launch_sampled(stand: Stand) -> Launch:
        usual = launch(stand)
        return Launch([sys.executable, "-m", "bench.sampled", str(samples), *usual.argv], usual.env)

    return dataclasses.replace(contender, launch=launch_sampled)


def _cpu(here: Standing, load: Load, seconds: int, load_core: int) -> None:
    """CPU by mode, and how often the gateway slept or was pushed aside."""
    before = _switches(here.pid)
    figures = measure(here, load, seconds=seconds, load_core=load_core)
    slept, pushed = (now - then for now, then in zip(_switches(here.pid), before, strict=True))
    units = figures.units_per_s * figures.requests / figures.requests_per_s
    unit = "chunk" if load.stream else "request"
    print(f"{here.contender.title}, {load.connections} connections, per {unit}")
    print(f"  CPU           {figures.cpu_us:8.2f} µs")
    print(f"    user        {figures.user_us:8.2f} µs")
    print(f"    kernel      {figures.system_us:8.2f} µs")
    print(f"  slept         {slept / units:8.3f} times")
    print(f"  pushed aside  {pushed / units:8.3f} times")
    print(
        f"  {figures.units_per_s:,.0f} {unit}s/s, p50 {figures.p50_us} µs, p99 {figures.p99_us} µs"
    )


def _switches(pid: int | None) -> tuple[int, int]:
    """Voluntary and involuntary context switches of a process's main thread."""
    text = Path(f"/proc/{pid}/status").read_text()
    found = re.findall(r"voluntary_ctxt_switches:\s+(\d+)", text)
    return int(found[0]), int(found[1])


def _system_calls(here: Standing, load: Load, seconds: int, load_core: int) -> None:
    """Calls per unit by name, from the kernel's trace points: strace would slow them too much."""
    events = ",".join(f"syscalls:sys_enter_{name}" for name in SYSTEM_CALLS)
    argv = ["perf", "stat", "-x,", "-e", f"raw_syscalls:sys_enter,{events}", "-p", str(here.pid)]
    with _beside(argv) as perf:
        tally = drive(here, load, seconds=seconds, load_core=load_core)
    units = _units(here, load, tally)
    counts = re.findall(r"^(\d+),,(?:raw_)?syscalls:(\w+)", perf.complaint, re.M)
    if not counts:
        print("  system calls are not counted: trace points need root")
        return
    print("  system calls")
    for count, name in counts:
        if int(count) / units >= 0.005:
            shown = name.removeprefix("sys_enter").removeprefix("_") or "all"
            print(f"    {shown:<12}{int(count) / units:8.3f}")


def _units(here: Standing, load: Load, tally: Tally) -> float:
    """Requests, or delivered chunks, as `measure` counts them."""
    if not load.stream:
        return tally.requests
    return tally.bytes / here.reply.wire_bytes * CHUNKS_PER_REPLY


def _symbols(here: Standing, load: Load, seconds: int, load_core: int, scratch: Path) -> None:
    """Where the core was, by library and function, from perf's samples."""
    data = str(scratch / "perf.data")
    argv = ["perf", "record", "-q", "-e", "cpu-clock", "-F", "2000", "-o", data]
    with _beside([*argv, "-p", str(here.pid)]) as perf:
        drive(here, load, seconds=seconds, load_core=load_core)
    for title, sort, lines in (("libraries", "dso", 12), ("functions", "dso,symbol", SYMBOLS)):
        report = subprocess.run(
            ["perf", "report", "-q", "--stdio", "--no-children", "--sort", sort, "-i", data],
            capture_output=True,
            text=True,
            check=False,
        )
        found = [line for line in report.stdout.splitlines() if "%" in line][:lines]
        print(f"  {title}, share of CPU time" if found else f"  perf saw nothing: {perf.complaint}")
        for line in found:
            print("  " + re.sub(r"[\s-]+$", "", line))


class _Watcher:
    """A perf that runs beside the load, and what it wrote when it was stopped."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.complaint = ""


@contextlib.contextmanager
def _beside(argv: Sequence[str]) -> Iterator[_Watcher]:
    """Run perf for the length of the block."""
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    watcher = _Watcher(process)
    try:
        yield watcher
    finally:
        process.send_signal(signal.SIGINT)  # on which perf writes its summary
        watcher.complaint = process.communicate(timeout=30)[1]


if __name__ == "__main__":
    sys.exit(main())
