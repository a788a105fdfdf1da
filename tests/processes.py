"""Servers in processes of their own: started, watched, killed as a machine would kill them.

What comes in: a command. What goes out: a handle that can kill -9 it with all its children and
start it again on the same port.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from tests.waiting import wait_until

LORAGATE = str(Path(sys.executable).with_name("loragate"))


class Process:
    """One server. Its output goes to a file, which `output` reads."""

    def __init__(
        self, command: Sequence[str], *, log: Path, env: Mapping[str, str] | None = None
    ) -> None:
        self.command = list(command)
        self.log = log
        self._env = {**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._env,
                start_new_session=True,
            )

    def kill(self) -> None:
        """kill -9 the process and everything it started."""
        if self._process is None:
            return
        # At once, by one call; then whoever left the group. The group outlives its leader.
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        for number in self.group():
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        self._process.wait(timeout=30)
        wait_until(lambda: not self.group(), within_s=30)

    def terminate(self, within_s: float = 30) -> int:
        """Ask it to end, as an init system does, and return its exit status."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(timeout=within_s)

    def wait(self, within_s: float = 30) -> int:
        assert self._process is not None
        return self._process.wait(timeout=within_s)

    def group(self) -> list[int]:
        """The living processes of its session, itself included."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            state, session = fields[0], int(fields[3])
            if session == self.pid and state != "Z":
                found.append(int(stat.parent.name))
        return found

    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def wait_http(self, url: str, within_s: float = 60) -> None:
        """Wait until `url` answers 200; fail with the output when the process ends before."""

        def answers() -> bool:
            assert self.running, f"{self.command} ended:\n{self.output()[-4000:]}"
            try:
                return httpx.get(url, timeout=5).status_code == 200
            except httpx.TransportError:
                return False

        try:
            wait_until(answers, within_s=within_s, every_s=0.05)
        except AssertionError as exc:
            raise AssertionError(f"{exc}\n{self.output()[-4000:]}") from None

    def resident_bytes(self) -> int:
        """What the process alone holds in memory."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


def free_port() -> int:
    """A port for a subprocess that must be told one, and find it again after a restart."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
