"""Child processes of a benchmark: start them pinned to a core, weigh them, and leave none behind.

What comes in: a command line. What goes out: CPU seconds and memory of its whole process tree,
read from /proc (Linux only). It must not know what the processes are for.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGESIZE")

#: How to get what the benchmark needs and Python does not bring.
PROGRAMS = {
    "wrk": "apt-get install wrk (or https://github.com/wg/wrk)",
    "nginx": "apt-get install nginx-light",
    "taskset": "apt-get install util-linux",
    "setpriv": "apt-get install util-linux",
}


class Unusable(Exception):
    """The benchmark cannot run, or cannot go on, on this machine; the message says why."""


@dataclass(frozen=True, slots=True)
class Cores:
    """The core the gateway has to itself, and the one that the load and the upstream share."""

    gateway: int
    load: int


@dataclass(frozen=True, slots=True)
class Weight:
    """What a process tree has used so far: CPU seconds in user and kernel mode; bytes it holds."""

    user_s: float
    system_s: float
    resident_bytes: int

    @property
    def cpu_s(self) -> float:
        return self.user_s + self.system_s


def require_programs() -> None:
    """Refuse to begin without wrk, nginx and the rest, and say how to get them."""
    missing = [name for name in PROGRAMS if find_program(name) is None]
    if missing:
        ways = "\n".join(f"  {name}: {PROGRAMS[name]}" for name in missing)
        raise Unusable(f"not found on this machine:\n{ways}")


def find_program(name: str) -> str | None:
    """Like `shutil.which`, but nginx lives in sbin, which is seldom on a user's PATH."""
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin:/sbin")


def choose_cores() -> Cores:
    """The first two cores this process may run on."""
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        raise Unusable("two cores are needed: one for the gateway, one for load and upstream")
    return Cores(gateway=allowed[0], load=allowed[1])


@contextlib.contextmanager
def staying_on(core: int) -> Iterator[None]:
    """Keep this process on one core for the length of the block."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def free_port() -> int:
    """A TCP port nobody listens on, chosen by the system."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def pinned(core: int | None, argv: Sequence[str]) -> list[str]:
    """`argv` on one core (or any, for None), killed by the kernel should this process die first."""
    where = [] if core is None else ["taskset", "-c", str(core)]
    return ["setpriv", "--pdeathsig", "KILL", *where, *argv]


@contextlib.contextmanager
def running(
    argv: Sequence[str],
    *,
    core: int | None,
    log: Path,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program for the length of the block; its whole process group is gone afterwards."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            pinned(core, argv),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
            cwd=cwd,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask the group to stop, then insist. Grandchildren may outlive the child, so kill anyway."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=5)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def exit_on_signals() -> None:
    """Turn the polite ways of being killed into an exception, so that `finally` blocks run."""

    def leave(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)


def weigh(pid: int) -> Weight:
    """CPU and memory of `pid` and its descendants.

    The CPU of children already reaped is in their parent's account, so a worker that ends between
    two weighings is not lost.
    """
    children, stats = _process_table()
    user = system = pages = 0
    todo = [pid]
    while todo:
        current = todo.pop()
        todo += children.get(current, [])
        if fields := stats.get(current):
            user += int(fields[11]) + int(fields[13])
            system += int(fields[12]) + int(fields[14])
            pages += int(fields[21])
    return Weight(user / TICKS_PER_S, system / TICKS_PER_S, pages * PAGE_BYTES)


def _process_table() -> tuple[dict[int, list[int]], dict[int, list[str]]]:
    """Children by parent, and the fields of /proc/PID/stat that follow the command's name."""
    children: dict[int, list[int]] = {}
    stats: dict[int, list[str]] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            # The name is in parentheses and may hold spaces and parentheses itself.
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            stats[int(entry.name)] = fields
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    return children, stats
