"""The README's commands, found so that tests can run them.

What comes in: Markdown. What goes out: its fenced blocks that follow a line
`<!-- test: NAME -->`, in order, by that name. Whatever else the README says is not run.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
#: The longest block trains an adapter.
RUN_S = 180
_BLOCK = re.compile(
    r"^<!-- test: (?P<name>[\w-]+) -->\n```(?P<language>bash|python)\n(?P<code>.*?)^```$",
    re.S | re.M,
)
_MARKER = re.compile(r"^<!-- test:", re.M)


@dataclass(frozen=True)
class Block:
    """One block: which test runs it, in what language, and its text."""

    name: str
    language: str
    code: str

    def run(self, replace: Mapping[str, str], *, cwd: Path, env: Mapping[str, str]) -> str:
        """Run it as a reader would, with some addresses replaced; return what it printed."""
        return run_code(self.language, _replaced(self.code, replace), cwd=cwd, env=env)


def blocks(markdown: Path = ROOT / "README.md") -> list[Block]:
    """The marked blocks of a page; a marker that no block follows is a mistake."""
    text = markdown.read_text()
    found = [Block(m["name"], m["language"], m["code"]) for m in _BLOCK.finditer(text)]
    assert len(found) == len(_MARKER.findall(text)), f"a marker in {markdown} has no block"
    return found


def run_code(language: str, code: str, *, cwd: Path, env: Mapping[str, str] | None = None) -> str:
    """Run a snippet from a shell in which the virtual environment is active."""
    bin_dir = Path(sys.executable).parent
    command = {
        "bash": ["bash", "-euo", "pipefail", "-c", code],
        "python": [sys.executable, "-c", code],
    }[language]
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, "PATH": f"{bin_dir}:{os.environ['PATH']}", **(env or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=RUN_S,
        check=False,
    )
    assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
    assert '"error"' not in done.stdout, done.stdout
    return done.stdout


def _replaced(code: str, replace: Mapping[str, str]) -> str:
    for old, new in replace.items():
        code = code.replace(old, new)
    return code
