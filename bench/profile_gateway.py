"""Where a gateway's time goes: user and kernel CPU, waits, system calls, symbols.

    python -m bench.profile_gateway [--stream] [--only NAME] [--seconds N]

Starts one contender pinned to its core, drives it with wrk as `bench.overhead` does, and prints
what a request (or a streamed chunk) costs in each respect. Each look is a run of its own, since
strace slows the gateway many times and perf a little: only the first run's CPU is its true cost.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench import loragate
from bench.client import Unready
from bench.measure import (
    REPLY_LOADS,
    STREAM_LOADS,
    Load,
    Misbehaved,
    Standing,
    drive,
    measure,
    standing,
)
from bench.null_upstream import CHUNKS_PER_REPLY, replying, streaming
from bench.overhead import NAMES, contender_called
from bench.peers import DIRECT, install
from bench.processes import (
    Unusable,
    choose_cores,
    exit_on_signals,
    find_program,
    require_programs,
)

WARM_UP_S = 2
#: Lines of perf's report worth reading.
SYMBOLS = 45


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
    parser.add_argument("--only", choices=names, default=next(iter(loragate.SIZES)), metavar="NAME")
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
    with (
        upstreams(cores.load, scratch) as upstream,
        standing(
            contender, upstream, stream=load.stream, core=cores.gateway, scratch=scratch
        ) as here,
    ):
        drive(here, load, seconds=WARM_UP_S, load_core=cores.load)
        _cpu(here, load, args.seconds, cores.load)
        _system_calls(here, load, args.seconds, cores.load)
        _symbols(here, load, args.seconds, cores.load, scratch)
    return 0


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
    """Calls per unit by name. The counts are true; the time they take under strace is not."""
    if find_program("strace") is None:
        print("no strace: apt-get install strace to see system calls")
        return
    strace = subprocess.Popen(
        ["strace", "-c", "-f", "-q", "-U", "calls,name", "-p", str(here.pid)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        time.sleep(0.5)  # until it is attached; calls before that are few and not counted
        tally = drive(here, load, seconds=seconds, load_core=load_core)
    finally:
        strace.terminate()
        output = strace.communicate(timeout=10)[1]
    units = (
        tally.bytes / here.reply.wire_bytes * CHUNKS_PER_REPLY if load.stream else tally.requests
    )
    print("  system calls")
    for calls, name in re.findall(r"^\s*(\d+) (\w+)$", output, re.M):
        if int(calls) / units >= 0.005:
            print(f"    {name:<12}{int(calls) / units:8.3f}")


def _symbols(here: Standing, load: Load, seconds: int, load_core: int, scratch: Path) -> None:
    """Where the core was, by library and function, from perf's samples."""
    if find_program("perf") is None:
        print("no perf: apt-get install linux-perf to see symbols")
        return
    data = str(scratch / "perf.data")
    perf = subprocess.Popen(
        ["perf", "record", "-q", "-e", "cpu-clock", "-F", "2000", "-o", data, "-p", str(here.pid)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        drive(here, load, seconds=seconds, load_core=load_core)
    finally:
        perf.terminate()
        complaint = perf.communicate(timeout=30)[1].decode()
    for title, sort, lines in (("libraries", "dso", 12), ("functions", "dso,symbol", SYMBOLS)):
        report = subprocess.run(
            ["perf", "report", "-q", "--stdio", "--no-children", "--sort", sort, "-i", data],
            capture_output=True,
            text=True,
            check=False,
        )
        found = [line for line in report.stdout.splitlines() if "%" in line][:lines]
        print(f"  {title}, share of CPU time" if found else f"  perf saw nothing: {complaint}")
        for line in found:
            print("  " + re.sub(r"[\s-]+$", "", line))


if __name__ == "__main__":
    sys.exit(main())
