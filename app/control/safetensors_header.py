"""Reads a safetensors file's header, without the library and without the weights.

What comes in: an open file and its size. What goes out: every tensor's dtype and shape, and what
is wrong with the file. The layout: 8 bytes, little endian, the header's length; the header, a JSON
object padded with spaces; then the data, which the tensors' offsets must cover exactly, so that
nothing hides between them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, BinaryIO

from app.errors import Fault
from app.strict_json import load_object, shown

MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 200_000
MAX_DIMENSIONS = 8

DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}
FIELD = "adapter_model.safetensors"


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor as the header declares it."""

    dtype: str
    shape: tuple[int, ...]


def read_header(file: BinaryIO, file_bytes: int, faults: list[Fault]) -> dict[str, Tensor]:
    """The tensors by name. What cannot be trusted is left out and told in `faults`."""
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    most = min(MAX_HEADER_BYTES, file_bytes - 8)
    if len(prefix) < 8 or not 2 <= length <= most:
        allowed = f"2 to {max(most, 2)} bytes"
        faults.append(Fault(f"{FIELD}: header length", length if prefix else None, allowed))
        return {}
    raw = file.read(length)
    if len(raw) < length or not raw.startswith(b"{"):
        faults.append(Fault(f"{FIELD}: header", "not a JSON object", "a safetensors header"))
        return {}
    header = load_object(raw, f"{FIELD}: header", faults)
    if header is None:
        return {}
    _check_metadata(header.pop("__metadata__", {}), faults)
    if len(header) > MAX_TENSORS:
        faults.append(Fault(f"{FIELD}: tensors", len(header), f"at most {MAX_TENSORS}"))
        return {}
    return _tensors(header, file_bytes - 8 - length, faults)


def _tensors(header: dict[str, Any], data_bytes: int, faults: list[Fault]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    spans: list[tuple[int, int]] = []
    for name, entry in header.items():
        problem = _problem(entry)
        if problem is None:
            begin, end = entry["data_offsets"]
            tensors[name] = Tensor(entry["dtype"], tuple(entry["shape"]))
            spans.append((begin, end))
        else:
            faults.append(Fault(f"{FIELD}: {shown(name)}", shown(entry), problem))
    if len(spans) == len(header):
        _check_cover(spans, data_bytes, faults)
    return tensors


def _problem(entry: Any) -> str | None:
    """What an entry should have been, or None when it is well formed."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        return "dtype, shape and data_offsets"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        return f"dtype one of {', '.join(DTYPE_BYTES)}"
    if not _sizes(shape) or len(shape) > MAX_DIMENSIONS:
        return f"a shape of at most {MAX_DIMENSIONS} sizes"
    if not _sizes(offsets) or len(offsets) != 2:
        return "data_offsets [begin, end]"
    size = math.prod(shape) * DTYPE_BYTES[dtype]
    if offsets[1] - offsets[0] != size:
        return f"offsets {shown(size)} bytes apart, as dtype and shape say"
    return None


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(
        type(size) is int and 0 <= size < 1 << 63 for size in value
    )


def _check_cover(spans: list[tuple[int, int]], data_bytes: int, faults: list[Fault]) -> None:
    reached = 0
    for begin, end in sorted(spans):
        if begin != reached:
            faults.append(
                Fault(f"{FIELD}: data_offsets", f"{begin} after {reached}", "no gap, no overlap")
            )
            return
        reached = end
    if reached != data_bytes:
        faults.append(Fault(f"{FIELD}: data", f"{data_bytes} bytes", f"{reached} bytes"))


def _check_metadata(metadata: Any, faults: list[Fault]) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        faults.append(Fault(f"{FIELD}: __metadata__", shown(metadata), "strings by name"))
