"""Decides from an adapter's two files whether a pool can serve it. Pure.

What comes in: the bytes of adapter_config.json, the open weights, the base and the pool. What goes
out: `AdapterFacts`, or one `AdapterRejected` with every fault. No weights are read, only their
header. An engine would find the same faults, but as a server error, on a replica that is serving.

What is refused, and with which words, follows what vLLM refuses, and what it would leave out
without saying so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from app.control.base_layout import layout_of
from app.control.inspect_tensors import Declared, inspect_tensors
from app.control.rank_pattern import ALLOWED, Ranks, unsafe_keys
from app.control.safetensors_header import read_header
from app.domain import BaseModel, Pool
from app.errors import AdapterRejected, Fault
from app.strict_json import load_object, shown

CONFIG = "adapter_config.json"
MAX_CONFIG_BYTES = 4 << 20
MAX_TARGETS = 20_000
#: More than anyone reads; a file of noise has one for each of its tensors.
MAX_FAULTS = 50

#: Initialisations that leave the base as it was. PiSSA and its like change the base's weights
#: when PEFT loads the adapter, which a server with one base for all adapters cannot do.
PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """What an adapter's files say of themselves, once checked. `rank` is the largest."""

    rank: int
    target_modules: tuple[str, ...]
    tensors: int
    bytes: int

    @property
    def targets_lm_head(self) -> bool:
        return "lm_head" in self.target_modules


def inspect(
    config_raw: bytes, weights: BinaryIO, weights_bytes: int, *, base: BaseModel, pool: Pool
) -> AdapterFacts:
    """Check an adapter for `pool`.

    Raises:
        AdapterRejected: with all that is wrong with it.
    """
    faults: list[Fault] = []
    config = load_object(config_raw, CONFIG, faults)
    tensors = read_header(weights, weights_bytes, faults)
    if config is None:
        raise AdapterRejected(_few(faults))
    declared = _check_config(config, base, pool, faults)
    seen = inspect_tensors(tensors, declared, layout_of(base.config), faults)
    if faults:
        raise AdapterRejected(_few(faults))
    return AdapterFacts(
        rank=seen.rank,
        target_modules=seen.modules,
        tensors=len(tensors),
        bytes=len(config_raw) + weights_bytes,
    )


def named_base(config_raw: bytes) -> str | None:
    """The base an adapter_config.json names, if it can be read at all."""
    name = (load_object(config_raw, CONFIG, []) or {}).get("base_model_name_or_path")
    return name if isinstance(name, str) else None


def is_base(named: str, base: BaseModel) -> bool:
    """Whether an adapter that names its base so was made for this one.

    A local path says nothing outside the machine it was on, so its last part decides; a hub id
    ("owner/name") must match as a whole.
    """
    names = {name.rstrip("/") for name in (base.name, *base.aliases)}
    named = named.rstrip("/")
    if named in names:
        return True
    if named.count("/") == 1 and not named.startswith(("/", ".", "~")):
        return named.lower() in {name.lower() for name in names}
    return named.rpartition("/")[2] in {name.rpartition("/")[2] for name in names}


def _few(faults: list[Fault]) -> list[Fault]:
    if len(faults) <= MAX_FAULTS:
        return faults
    rest = len(faults) - MAX_FAULTS
    return [*faults[:MAX_FAULTS], Fault("adapter", f"{rest} more faults", "none")]


def _check_config(
    config: Mapping[str, Any], base: BaseModel, pool: Pool, faults: list[Fault]
) -> Declared:
    if config.get("peft_type") != "LORA":
        faults.append(Fault("peft_type", shown(config.get("peft_type")), "LORA"))
    _check_base(config, base, faults)
    for field, (fine, allowed) in FEATURES.items():
        if not fine(config.get(field)):
            faults.append(Fault(field, shown(config[field]), allowed))
    alpha = config.get("lora_alpha")
    if not _number(alpha):
        faults.append(Fault("lora_alpha", shown(alpha), "a number"))
    _check_pattern("alpha_pattern", config.get("alpha_pattern"), _number, "numbers", faults)
    return Declared(
        ranks=_check_ranks(config, pool, faults),
        targets=_check_targets(config.get("target_modules"), faults),
    )


def _check_base(config: Mapping[str, Any], base: BaseModel, faults: list[Fault]) -> None:
    named = config.get("base_model_name_or_path")
    if not isinstance(named, str) or not is_base(named, base):
        names = " or ".join((base.name, *base.aliases))
        faults.append(Fault("base_model_name_or_path", shown(named), names))


def _check_ranks(config: Mapping[str, Any], pool: Pool, faults: list[Fault]) -> Ranks | None:
    allowed = f"1 to {pool.max_lora_rank}, the max_lora_rank of pool {pool.name}"

    def fine(rank: object) -> bool:
        return type(rank) is int and 1 <= rank <= pool.max_lora_rank

    rank = config.get("r")
    if not fine(rank):
        faults.append(Fault("r", shown(rank), allowed))
    pattern = config.get("rank_pattern")
    if not _check_pattern("rank_pattern", pattern, fine, allowed, faults) or not fine(rank):
        return None
    return Ranks(config["r"], pattern or {})


def _check_pattern(
    field: str, pattern: Any, fine: Callable[[Any], bool], allowed: str, faults: list[Fault]
) -> bool:
    if pattern is None:
        return True
    if not isinstance(pattern, dict):
        faults.append(Fault(field, shown(pattern), "an object"))
        return False
    if unsafe := unsafe_keys(pattern):
        faults.append(Fault(field, shown(unsafe[0]), ALLOWED))
        return False
    bad = {key: value for key, value in pattern.items() if not fine(value)}
    faults += [Fault(f"{field}.{shown(key)}", shown(bad[key]), allowed) for key in bad]
    return not bad


def _check_targets(targets: Any, faults: list[Fault]) -> frozenset[str] | None:
    """The last parts of the module names; None when an expression stands for them.

    The expression is not run: the tensors say which modules it meant.
    """
    if isinstance(targets, str) and 0 < len(targets) <= 4096:
        return None
    if isinstance(targets, list) and 0 < len(targets) <= MAX_TARGETS:
        names = [name for name in targets if isinstance(name, str) and name]
        if len(names) == len(targets):
            return frozenset(name.rpartition(".")[2] for name in names)
    faults.append(Fault("target_modules", shown(targets), "module names"))
    return None


def _number(value: Any) -> bool:
    if type(value) is int:
        return value.bit_length() <= 63
    return type(value) is float and math.isfinite(value)


def _off(value: Any) -> bool:
    return not value


def _plain_init(value: Any) -> bool:
    return not isinstance(value, str) or value.lower() in PLAIN_INITS


#: Settings of PEFT's LoraConfig that must be left off: field -> (is it fine?, what is allowed).
FEATURES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "bias": (lambda value: value in (None, "none"), "none"),
    "lora_bias": (_off, "false"),
    "use_dora": (_off, "false: DoRA is not served"),
    "use_qalora": (_off, "false"),
    "use_bdlora": (_off, "null"),
    "modules_to_save": (_off, "null: whole modules are not served"),
    "trainable_token_indices": (_off, "null: whole embeddings are not served"),
    "alora_invocation_tokens": (_off, "null: activated LoRA is not served"),
    "arrow_config": (_off, "null"),
    "layer_replication": (_off, "null"),
    "target_parameters": (_off, "null: only modules are served"),
    "megatron_config": (_off, "null"),
    "ensure_weight_tying": (_off, "false"),
    "fan_in_fan_out": (_off, "false"),
    "init_lora_weights": (
        _plain_init,
        f"true, false or {', '.join(PLAIN_INITS)}; convert with PEFT's "
        "path_initial_model_for_weight_conversion",
    ),
}
