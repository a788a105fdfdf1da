"""Checks an adapter's tensors: names, pairs, shapes, dtypes. Pure.

What comes in: tensors from a safetensors header, what the config declared, and the base's layout
if it is known. What goes out: the largest rank and the modules changed; faults on the way.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from app.control.base_layout import EMBEDDING, Layout
from app.control.rank_pattern import Ranks
from app.control.safetensors_header import Tensor
from app.errors import Fault
from app.strict_json import shown

PREFIX = "base_model.model."
MAX_NAME = 256
FLOATS = ("F16", "BF16", "F32", "F64")

_LINEAR = re.compile(r"(?P<module>[\w.\-]+)\.lora_(?P<side>[AB])\.weight", re.ASCII)
_EMBEDDING = re.compile(r"(?P<module>[\w.\-]+)\.lora_embedding_(?P<side>[AB])", re.ASCII)
#: PEFT saves these beside an embedding's LoRA; they are the base's own and engines skip them.
_BASE_WEIGHTS = (f".{EMBEDDING}.base_layer.weight", ".lm_head.base_layer.weight")


@dataclass(frozen=True, slots=True)
class Declared:
    """What the config said. `ranks` None: unusable; `targets` None: not a list of names."""

    ranks: Ranks | None
    targets: frozenset[str] | None


@dataclass(frozen=True, slots=True)
class Seen:
    """What the tensors say."""

    rank: int
    modules: tuple[str, ...]


def inspect_tensors(
    tensors: Mapping[str, Tensor], declared: Declared, layout: Layout | None, faults: list[Fault]
) -> Seen:
    """Check every tensor and add what is wrong to `faults`."""
    if layout is not None and declared.targets is not None:
        unknown = sorted(declared.targets - layout.sizes.keys())
        if unknown:
            faults.append(Fault("target_modules", shown(unknown), layout.modules))
    pairs = _pairs(tensors, faults)
    ranks = [_check_pair(module, pairs[module], declared, layout, faults) for module in pairs]
    if not pairs:
        faults.append(Fault("adapter_model.safetensors: tensors", len(tensors), "LoRA pairs"))
    return Seen(
        rank=max(ranks, default=0),
        modules=tuple(sorted({module.rpartition(".")[2] for module in pairs})),
    )


def _pairs(
    tensors: Mapping[str, Tensor], faults: list[Fault]
) -> dict[str, dict[str, tuple[str, Tensor]]]:
    """By module, then side: the tensor and its full name."""
    pairs: dict[str, dict[str, tuple[str, Tensor]]] = {}
    for name, tensor in tensors.items():
        if name.endswith(_BASE_WEIGHTS):
            continue
        short = name.removeprefix(PREFIX)
        found = _LINEAR.fullmatch(short) or _EMBEDDING.fullmatch(short)
        if found is None or short == name or len(name) > MAX_NAME:
            allowed = f"{PREFIX}<module>.lora_A.weight and lora_B.weight"
            faults.append(Fault(f"tensor {shown(name)}", "not part of a LoRA", allowed))
            continue
        sides = pairs.setdefault(found["module"], {})
        if found["side"] in sides:
            faults.append(Fault(f"tensor {name}", f"a second {found['side']}", "one A and one B"))
        sides[found["side"]] = (name, tensor)
        if tensor.dtype not in FLOATS:
            faults.append(Fault(f"tensor {name}: dtype", tensor.dtype, ", ".join(FLOATS)))
    return pairs


def _check_pair(
    module: str,
    sides: Mapping[str, tuple[str, Tensor]],
    declared: Declared,
    layout: Layout | None,
    faults: list[Fault],
) -> int:
    """Check one module's A and B; the answer is its rank, 0 when it has none."""
    last = module.rpartition(".")[2]
    if declared.targets is not None and last not in declared.targets:
        allowed = "only modules that target_modules names"
        faults.append(Fault(f"module {module}", "LoRA tensors", allowed))
    if sides.keys() != {"A", "B"}:
        faults.append(Fault(f"module {module}", f"only lora_{min(sides)}", "lora_A and lora_B"))
        return 0
    (name_a, a), (name_b, b) = sides["A"], sides["B"]
    if len(a.shape) != 2 or len(b.shape) != 2 or not 0 < a.shape[0] == b.shape[1]:
        found = f"A {list(a.shape)}, B {list(b.shape)}"
        faults.append(Fault(f"module {module}: shapes", found, "A [r, inputs], B [outputs, r]"))
        return 0
    rank = a.shape[0]
    if declared.ranks is not None and rank != (wanted := declared.ranks.of(module)):
        faults.append(Fault(f"module {module}: rank", rank, wanted))
    if layout is not None:
        _check_sizes(module, (name_a, name_b), (a.shape[1], b.shape[0]), layout, faults)
    return rank


def _check_sizes(
    module: str,
    names: tuple[str, str],
    found: tuple[int, int],
    layout: Layout,
    faults: list[Fault],
) -> None:
    wanted = layout.size_of(module)
    if wanted is None:
        allowed = f"{layout.modules} in layers 0 to {layout.layers - 1}"
        faults.append(Fault(f"module {module}", "not in the base", allowed))
        return
    lookup = module == f"model.{EMBEDDING}"
    if any(("lora_embedding_" in name) is not lookup for name in names):
        kind = "lora_embedding_A and _B" if lookup else "lora_A and lora_B"
        faults.append(Fault(f"module {module}", " and ".join(names), kind))
        return
    for which, is_, must in zip(("inputs", "outputs"), found, wanted, strict=True):
        if is_ != must:
            faults.append(Fault(f"module {module}: {which}", is_, must))
