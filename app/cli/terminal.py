"""The two streams of the command line: results on stdout, everything else on stderr."""

from __future__ import annotations

import sys
from typing import NoReturn

from rich.console import Console
from rich.text import Text

#: Into a pipe or a file a table is as wide as it is, not as wide as a screen.
_PIPE_WIDTH = 240

stdout = Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)
stderr = Console(stderr=True, highlight=False)


def fail(message: str) -> NoReturn:
    """Say what is wrong in one line, and end."""
    line = Text("error: ", style="bold red").append(" ".join(message.split()), style="not bold")
    stderr.print(line, soft_wrap=True)
    sys.exit(1)
