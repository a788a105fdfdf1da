"""A Python program that looks at itself while it runs: `python -m bench.sampled OUT PROGRAM ARGS…`

What comes in: where to write, a console script (`loragate serve`), and SIGUSR1 when to begin. What
goes out, when the program ends: a line for each Python function that was running at a tick of the
CPU clock, with how often. What C code did is counted for the Python function that called it.
"""

from __future__ import annotations

import atexit
import runpy
import signal
import sys
from collections import Counter
from pathlib import Path
from types import FrameType

#: CPU seconds between two looks. The kernel may round it up to its own tick.
PERIOD_S = 0.001

ticks: Counter[tuple[str, str]] = Counter()


def tick(_signal: int, frame: FrameType | None) -> None:
    if frame is not None:
        code = frame.f_code
        ticks[code.co_filename, code.co_qualname] += 1


def begin(_signal: int, _frame: FrameType | None) -> None:
    signal.setitimer(signal.ITIMER_PROF, PERIOD_S, PERIOD_S)


def write(out: Path) -> None:
    signal.setitimer(signal.ITIMER_PROF, 0)
    total = ticks.total()
    lines = [
        f"{count / total:11.2%}  {name}  ({'/'.join(Path(file).parts[-2:])})"
        for (file, name), count in ticks.most_common()
    ]
    out.write_text("\n".join(lines) + "\n")


def main() -> None:
    out, program = Path(sys.argv[1]), sys.argv[2]
    sys.argv = sys.argv[2:]
    atexit.register(write, out)
    # uvicorn raises the signal that ended it once more, which would end us before we write.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.signal(signal.SIGPROF, tick)
    signal.signal(signal.SIGUSR1, begin)
    runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    main()
