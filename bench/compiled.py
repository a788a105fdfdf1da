"""The build of the gateway whose hot path is compiled: where `make compiled` leaves it.

What goes out: its folder, the modules in it that are to be compiled, whether it is this checkout's.
"""

from __future__ import annotations

import tomllib
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / ".compiled"


def modules() -> list[str]:
    """The sources that a build compiles, as paths below the checkout."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    hook = project["tool"]["hatch"]["build"]["targets"]["wheel"]["hooks"]["custom"]
    return list(hook["modules"])


def missing() -> str | None:
    """What keeps the build from standing for this checkout; None if it does."""
    if not FOLDER.is_dir():
        return "not compiled: `make compiled` does that"
    for source in (ROOT / "app").rglob("*.py"):
        copy = FOLDER / source.relative_to(ROOT)
        if not copy.is_file() or copy.read_bytes() != source.read_bytes():
            return "compiled from other sources: `make compiled` does that again"
    for module in modules():
        stem = FOLDER / module.removesuffix(".py")
        if not any(Path(f"{stem}{suffix}").is_file() for suffix in EXTENSION_SUFFIXES):
            return f"compiled without {module}: `make compiled` does that"
    return None
