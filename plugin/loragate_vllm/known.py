"""Which vLLM this plugin knows, and how it tells.

What comes in: functions and objects of a running vLLM. What goes out: nothing, or `Unknown` with
what is different. A version alone proves little, so what gets patched is looked at as well.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

#: The minor versions whose code was read.
VERSIONS = ((0, 24), (0, 32))


class Unknown(Exception):
    """This vLLM differs from the ones known; the message says where."""


def check_version(version: str) -> None:
    """Raise unless `version` is of a known minor."""
    major, _, rest = version.partition(".")
    minor = rest.partition(".")[0]
    found = (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None
    if found not in VERSIONS:
        names = ", ".join(f"{major}.{minor}" for major, minor in VERSIONS)
        raise Unknown(f"vLLM {version} is not one of the versions known ({names})")


def check_call(function: Callable[..., object], *names: str) -> None:
    """Raise unless the first parameters of `function` are `names`."""
    found = tuple(inspect.signature(function).parameters)[: len(names)]
    if found != names:
        raise Unknown(f"{function.__qualname__} takes {found}, not {names}")


def check_has(thing: object, *names: str) -> None:
    """Raise unless `thing` has the attributes `names`."""
    if missing := [name for name in names if not hasattr(thing, name)]:
        raise Unknown(f"{type(thing).__qualname__} has no {', '.join(missing)}")


def patched(function: Callable[..., object]) -> bool:
    """Whether this plugin made `function`: vLLM may run the plugin twice in one process."""
    return getattr(function, "loragate", False)


def mark(function: Callable[..., object]) -> None:
    """Say that this plugin made `function`."""
    function.loragate = True  # type: ignore[attr-defined]
