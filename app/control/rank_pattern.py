"""PEFT's per-module ranks: which rank `rank_pattern` gives a module.

What comes in: `r` and the pattern of an adapter_config.json. What goes out: a rank for each
module name. PEFT and vLLM run the pattern's keys as regular expressions; a stranger's expression
can take forever to match, there and here, so only a small, harmless part of the syntax is let in.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

MAX_KEYS = 20_000
MAX_EXPRESSIONS = 32
MAX_KEY_LENGTH = 300
ALLOWED = (
    r"module names; in them \. \d+ [0-9] (a|b), and ^ or .* first; "
    f"at most {MAX_EXPRESSIONS} such expressions and {MAX_KEYS} names"
)

_NAME = re.compile(r"\^?[\w.\-]+\$?", re.ASCII)
_HARMLESS = re.compile(
    r"\^?(?:\.\*)?(?:[\w\-]|\\?\.|\\d\+|\[[0-9\-]+\]|\((?:\?:)?[\w\-]+(?:\|[\w\-]+)*\))+\$?",
    re.ASCII,
)


def unsafe_keys(keys: Iterable[str]) -> list[str]:
    """The keys that are not let in; all of what is too many."""
    keys = list(keys)
    expressions = [key for key in keys if not _NAME.fullmatch(key)]
    unsafe = [key for key in keys if len(key) > MAX_KEY_LENGTH]
    unsafe += [key for key in expressions if len(key) <= MAX_KEY_LENGTH and not _harmless(key)]
    return unsafe or keys[MAX_KEYS:] or expressions[MAX_EXPRESSIONS:]


class Ranks:
    """The rank of each module. The first key that ends the module's name, at a dot, wins."""

    def __init__(self, r: int, pattern: Mapping[str, int]) -> None:
        self._r = r
        self._names: dict[str, tuple[int, int]] = {}
        self._expressions: list[tuple[int, re.Pattern[str], int]] = []
        for order, (key, rank) in enumerate(pattern.items()):
            if _NAME.fullmatch(key):
                self._names[key.removesuffix("$")] = (order, rank)
            else:
                self._expressions.append((order, re.compile(rf"(.*\.)?({key})$"), rank))

    def of(self, module: str) -> int:
        """The rank the module's tensors must have."""
        parts = module.split(".")
        ends = [".".join(parts[at:]) for at in range(len(parts))]
        found = [self._names[end] for end in (f"^{module}", *ends) if end in self._names]
        found += [
            (order, rank)
            for order, expression, rank in self._expressions
            if expression.match(module)
        ]
        return min(found)[1] if found else self._r


def _harmless(key: str) -> bool:
    """Whether matching takes a time that is short whatever the name."""
    if not _HARMLESS.fullmatch(key) or key.count("+") > 2:
        return False
    try:
        re.compile(key)
    except re.error:  # [9-0]
        return False
    return True
