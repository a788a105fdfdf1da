"""JSON that means the same to every reader.

What comes in: bytes someone else wrote. What goes out: an object, or a fault. Stricter than
`json.loads`: a key written twice is refused, because what we checked could then differ from what
an engine reads, and so are NaN, over-deep nesting and anything that is not UTF-8.
"""

from __future__ import annotations

import json
from typing import Any

from app.errors import Fault


def load_object(raw: bytes, field: str, faults: list[Fault]) -> dict[str, Any] | None:
    """The object in `raw`; None, and one more fault, when there is none."""
    try:
        value = json.loads(
            raw.decode(), object_pairs_hook=_without_twins, parse_constant=_no_constant
        )
    except _NotStrict as exc:
        faults.append(Fault(field, str(exc), "strict JSON"))
        return None
    except RecursionError:
        faults.append(Fault(field, "nested too deeply", "strict JSON"))
        return None
    except ValueError as exc:  # not UTF-8, not JSON, or an integer of thousands of digits
        faults.append(Fault(field, shown(str(exc)), "strict JSON"))
        return None
    if not isinstance(value, dict):
        faults.append(Fault(field, f"JSON of type {type(value).__name__}", "a JSON object"))
        return None
    return value


def shown(value: object, most: int = 200) -> object:
    """A value as it may stand in an error: itself when small, else the start of its text."""
    if value is None or isinstance(value, bool | float):
        return value
    if isinstance(value, int) and value.bit_length() <= 64:
        return value
    text = value if isinstance(value, str) else _text(value)
    # A lone surrogate is allowed in JSON and in Python, and cannot be sent to anyone.
    text = text.encode(errors="backslashreplace").decode()
    return text if len(text) <= most else f"{text[:most]}… ({len(text)} characters)"


def _text(value: object) -> str:
    try:
        return json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return f"a {type(value).__name__}"


class _NotStrict(Exception):
    """Valid for `json`, not for us."""


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twin = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _NotStrict(f"the key {shown(twin)!r} twice in one object")
    return found


def _no_constant(name: str) -> Any:
    raise _NotStrict(name)
