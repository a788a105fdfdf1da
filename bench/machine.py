"""The machine of a measurement, in words that tell a reader what to expect, and nothing more.

What goes out: strings without host names, addresses or paths.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path

from bench.peers import ROOT, Contender, python_of

_ASK_VERSIONS = """
import importlib.metadata as m, platform, sys
for name in sys.argv[1:]:
    print(name, m.version(name))
print("Python", platform.python_version())
"""


def in_words() -> str:
    """Processor, cores, memory, kernel, Python."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    model = re.search(r"^model name\s*: (.+)$", cpuinfo, re.M)
    name = re.sub(r"\((R|TM)\)", "", model[1]).strip() if model else platform.machine()
    virtual = ", virtual machine" if re.search(r"^flags.*\bhypervisor\b", cpuinfo, re.M) else ""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    kernel = ".".join(re.findall(r"\d+", platform.release())[:2])
    cores = len(os.sched_getaffinity(0))
    return (
        f"{name}{virtual}, {cores} cores, {memory:.0f} GiB of memory, Linux {kernel}, "
        f"Python {platform.python_version()}"
    )


def load_average() -> float:
    """How many processes wanted a core during the last minute."""
    return os.getloadavg()[0]


def versions(contender: Contender) -> dict[str, str]:
    """The packages a contender is made of, as installed."""
    names = [re.split(r"[\[<>=~!]", requirement)[0] for requirement in contender.requirements]
    if not names:
        return {}
    argv = [str(python_of(contender.environment)), "-c", _ASK_VERSIONS, *names]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    return dict(line.split(" ", 1) for line in done.stdout.splitlines())


def commit() -> str | None:
    """The commit being measured, marked if the files differ from it; None outside a checkout."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return described.stdout.strip() or None
