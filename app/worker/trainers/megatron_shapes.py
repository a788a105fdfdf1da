"""How a Llama-like model's weights are cut over tensor-parallel ranks.

What comes in: a Hugging Face config. What goes out: for each linear, which of its dimensions is
cut and how far it is padded. Pure. It must not know: Megatron, devices, files.

Ranks get whole key-value groups and equally many. Where there are too few, groups of zeros are
added behind the last one: their values are zero, so they add nothing to the output, and as their
columns of `o_proj` are zero too nothing ever flows back, so they stay zero in training. The same
holds for columns of zeros in the MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from app.errors import ConfigurationError

#: The linears of a layer, as Hugging Face calls them within it, in the order of its modules.
PROJECTIONS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
#: Families that differ from Llama by a bias on q, k and v, or by norms on q and k, at most.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
FULL = "full_attention"
#: Angles that depend on nothing but the position; Llama 3's stretched ones among them.
ROPE_TYPES = ("default", "linear", "llama3")


@dataclass(frozen=True, slots=True)
class Cut:
    """A tensor cut in equal pieces along `dim`, after zeros from `size` up to `padded`.

    `dim` None: every rank has all of it.
    """

    dim: int | None = None
    size: int = 0
    padded: int = 0

    def piece(self, whole: Tensor, rank: int, ranks: int) -> Tensor:
        """What a rank has of the whole; new memory."""
        if self.dim is None:
            return whole.clone()
        zeros = [0, 0] * (whole.dim() - 1 - self.dim) + [0, self.padded - self.size]
        return functional.pad(whole, zeros).chunk(ranks, self.dim)[rank].contiguous()

    def shape(self, whole: tuple[int, int], ranks: int) -> tuple[int, int]:
        """What of a matrix's shape each of the ranks has."""
        mine = list(whole)
        if self.dim is not None:
            mine[self.dim] = self.padded // ranks
        return mine[0], mine[1]

    def whole(self, pieces: Sequence[Tensor]) -> Tensor:
        """The pieces of all ranks put together, without the zeros behind them."""
        if self.dim is None:
            return pieces[0]
        return torch.cat(list(pieces), self.dim).narrow(self.dim, 0, self.size).contiguous()


@dataclass(frozen=True, slots=True)
class Shapes:
    """The sizes of a model, and what they are padded to for `ranks` tensor-parallel ranks."""

    layers: int
    hidden: int
    heads: int
    groups: int
    head_dim: int
    ffn: int
    vocabulary: int
    max_length: int
    ranks: int

    @property
    def padded_groups(self) -> int:
        return _multiple(self.groups, self.ranks)

    @property
    def heads_per_group(self) -> int:
        return self.heads // self.groups

    @property
    def padded_heads(self) -> int:
        return self.padded_groups * self.heads_per_group

    @property
    def padded_ffn(self) -> int:
        return _multiple(self.ffn, self.ranks)

    @property
    def padded_vocabulary(self) -> int:
        return _multiple(self.vocabulary, self.ranks)

    @property
    def vocabulary_cut(self) -> Cut:
        return Cut(0, self.vocabulary, self.padded_vocabulary)

    def weight(self, projection: str) -> Cut:
        """How the weight [out, in] of one of PROJECTIONS is cut."""
        heads = self.heads * self.head_dim, self.padded_heads * self.head_dim
        groups = self.groups * self.head_dim, self.padded_groups * self.head_dim
        match projection.rpartition(".")[2]:
            case "q_proj":
                return Cut(0, *heads)
            case "k_proj" | "v_proj":
                return Cut(0, *groups)
            case "o_proj":
                return Cut(1, *heads)
            case "gate_proj" | "up_proj":
                return Cut(0, self.ffn, self.padded_ffn)
            case "down_proj":
                return Cut(1, self.ffn, self.padded_ffn)
        raise ValueError(projection)

    def features(self, projection: str) -> tuple[int, int]:
        """(out, in) of one of PROJECTIONS, unpadded."""
        cut = self.weight(projection)
        return (cut.size, self.hidden) if cut.dim == 0 else (self.hidden, cut.size)


def shapes(config: Any, folder: Path, ranks: int, stages: int) -> Shapes:
    """The shapes of a Hugging Face config.

    Raises:
        ConfigurationError: a model that this engine would compute wrongly, or layers that the
            stages cannot share equally.
    """
    _check(config, folder)
    if config.num_hidden_layers % stages:
        raise ConfigurationError(
            f"{folder} has {config.num_hidden_layers} layers, which {stages} stages cannot share "
            "equally. Set LORAGATE_WORKER_PIPELINE_PARALLEL to a divisor."
        )
    head_dim = getattr(config, "head_dim", None)
    return Shapes(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        groups=config.num_key_value_heads,
        head_dim=head_dim or config.hidden_size // config.num_attention_heads,
        ffn=config.intermediate_size,
        vocabulary=config.vocab_size,
        max_length=config.max_position_embeddings,
        ranks=ranks,
    )


def check_shared(config: Any, folder: Path, ranks: int, stages: int) -> None:
    """Whether ranks can share a model as it is, where nothing is padded.

    Raises:
        ConfigurationError: they cannot; the message names the setting.
    """
    if stages > 1:
        raise ConfigurationError(
            f"LORAGATE_WORKER_PIPELINE_PARALLEL is {stages}, and with Megatron-Bridge only 1 is "
            "supported. Set LORAGATE_WORKER_TENSOR_PARALLEL, LORAGATE_WORKER_DATA_PARALLEL or "
            "LORAGATE_WORKER_MEGATRON_ENGINE=core."
        )
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if (size := getattr(config, name, None)) is not None and size % ranks:
            raise ConfigurationError(
                f"{folder} has {name} {size}, which {ranks} ranks cannot share equally. Set "
                "LORAGATE_WORKER_TENSOR_PARALLEL to a divisor, or "
                "LORAGATE_WORKER_MEGATRON_ENGINE=core."
            )


def _check(config: Any, folder: Path) -> None:
    if config.model_type not in FAMILIES:
        raise _refused(folder, f"is a {config.model_type} model", f"trains {_listed(FAMILIES)}")
    if config.hidden_act != "silu":
        raise _refused(folder, f"has hidden_act {config.hidden_act!r}", "knows silu")
    windows = [kind for kind in getattr(config, "layer_types", None) or () if kind != FULL]
    if windows or (getattr(config, "sliding_window", None) and not hasattr(config, "layer_types")):
        raise _refused(folder, "has layers with sliding attention", "knows full attention")
    if config.model_type == "llama" and (config.attention_bias or config.mlp_bias):
        raise _refused(folder, "has biases in its linears", "knows none in Llama")
    if config.model_type == "qwen3" and config.attention_bias:
        raise _refused(folder, "has attention_bias", "knows none in Qwen3")
    if (kind := config.rope_parameters["rope_type"]) not in ROPE_TYPES:
        found = f"has positions of the type {kind!r}"
        raise _refused(folder, found, f"knows {_listed(ROPE_TYPES)}")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)


def _multiple(number: int, of: int) -> int:
    return -(-number // of) * of


def _refused(folder: Path, found: str, allowed: str) -> ConfigurationError:
    return ConfigurationError(
        f"{folder} {found}; the Megatron trainer {allowed}. "
        "Set LORAGATE_WORKER_TRAINER=hf or another LORAGATE_WORKER_MODEL."
    )
