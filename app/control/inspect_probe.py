"""Decides whether a probe can be what it says. Pure.

What comes in: the bytes of a probe.json, or the object in it, and the size of the base's
vocabulary if it is known. What goes out: a `Probe`, or faults. Whether a replica agrees with it is
for `serving.verify`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from app.domain import Probe
from app.errors import AdapterRejected, Fault
from app.strict_json import load_object, shown

PROBE_FILE = "probe.json"
MAX_ROWS = 32
MAX_IDS = 512
#: Room for that many numbers, each on an indented line of its own.
MAX_PROBE_BYTES = 2 << 20
DTYPES = ("float32", "bfloat16", "float16")
#: A sum of rounded exponentials may be a little under one, and its logarithm's share over it.
_ROUNDING = 1e-3


def read_probe(raw: bytes, vocab_size: int | None) -> Probe:
    """The probe in a probe.json.

    Raises:
        AdapterRejected: with all that is wrong with it.
    """
    faults: list[Fault] = []
    value = load_object(raw, PROBE_FILE, faults)
    if value is None:
        raise AdapterRejected(faults)
    return checked_probe(value, vocab_size, f"{PROBE_FILE}: ")


def checked_probe(value: Mapping[str, Any], vocab_size: int | None, where: str = "") -> Probe:
    """The probe in an object; `where` goes before the fields' names in the faults.

    Raises:
        AdapterRejected: with all that is wrong with it.
    """
    faults: list[Fault] = []
    token_ids = _check_rows(value.get("token_ids"), f"{where}token_ids", 2, MAX_IDS, faults)
    logprobs = _check_rows(value.get("logprobs"), f"{where}logprobs", 1, MAX_IDS - 1, faults)
    _check_ids(token_ids, f"{where}token_ids", vocab_size, faults)
    _check_logprobs(logprobs, f"{where}logprobs", faults)
    if token_ids and logprobs:
        _check_shape(token_ids, logprobs, f"{where}logprobs", faults)
    dtype = value.get("dtype", "float32")
    if dtype not in DTYPES:
        faults.append(Fault(f"{where}dtype", shown(dtype), ", ".join(DTYPES)))
    if faults:
        raise AdapterRejected(faults)
    return Probe(
        token_ids=tuple(map(tuple, token_ids)),
        logprobs=tuple(tuple(map(float, row)) for row in logprobs),
        dtype=dtype,
    )


def vocab_size_of(config: Mapping[str, Any] | None) -> int | None:
    """How many token ids a base with this config.json knows; None if it does not say."""
    known = config or {}
    inner = known.get("text_config")
    size = known.get("vocab_size", inner.get("vocab_size") if isinstance(inner, dict) else None)
    return size if type(size) is int and size > 0 else None


def _check_rows(
    value: Any, field: str, least: int, most: int, faults: list[Fault]
) -> list[list[Any]]:
    """The rows, if they are few and short enough to look at; otherwise none."""
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_ROWS:
        found = len(value) if isinstance(value, list) else shown(value)
        faults.append(Fault(field, found, f"a list of 1 to {MAX_ROWS} rows"))
        return []
    for at, row in enumerate(value):
        if not isinstance(row, list) or not least <= len(row) <= most:
            found = len(row) if isinstance(row, list) else shown(row)
            faults.append(Fault(f"{field}[{at}]", found, f"a list of {least} to {most} numbers"))
            return []
    return value


def _check_ids(
    rows: list[list[Any]], field: str, vocab_size: int | None, faults: list[Fault]
) -> None:
    most = 2**31 if vocab_size is None else vocab_size
    for at, row in enumerate(rows):
        wrong = [i for i in row if type(i) is not int or not 0 <= i < most]
        if wrong:
            faults.append(Fault(f"{field}[{at}]", shown(wrong[0]), f"token ids, 0 to {most - 1}"))


def _check_logprobs(rows: list[list[Any]], field: str, faults: list[Fault]) -> None:
    for at, row in enumerate(rows):
        wrong = [number for number in row if not _is_logprob(number)]
        if wrong:
            found = shown(wrong[0]) if not isinstance(wrong[0], float) else str(wrong[0])
            faults.append(Fault(f"{field}[{at}]", found, "natural logarithms of probabilities"))


def _is_logprob(value: Any) -> bool:
    if type(value) is int:
        return -(2**31) <= value <= 0
    return type(value) is float and math.isfinite(value) and value <= _ROUNDING


def _check_shape(
    token_ids: list[list[Any]], logprobs: list[list[Any]], field: str, faults: list[Fault]
) -> None:
    if len(token_ids) != len(logprobs):
        faults.append(Fault(field, f"{len(logprobs)} rows", f"{len(token_ids)}, as of token_ids"))
        return
    for at, (ids, row) in enumerate(zip(token_ids, logprobs, strict=True)):
        if len(row) != len(ids) - 1:
            allowed = f"{len(ids) - 1}, one for each id but the first"
            faults.append(Fault(f"{field}[{at}]", f"{len(row)} numbers", allowed))
