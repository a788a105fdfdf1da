"""Cutting, dealing and packing: what every rank must do alike, as algebra."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional
from transformers import LlamaConfig, MistralConfig

from app.errors import ConfigurationError
from app.worker.trainers.megatron_batches import batches, deal
from app.worker.trainers.megatron_packing import PackedAttention, pack
from app.worker.trainers.megatron_shapes import PROJECTIONS, Cut, Shapes, shapes
from app.worker.trainers.megatron_weights import Weights

pytestmark = [pytest.mark.worker]

YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 2.0}
CPU = torch.device("cpu")


@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 4), st.sampled_from([None, 0, 1]))
def test_pieces_put_together_are_the_whole(
    size: int, other: int, ranks: int, dim: int | None
) -> None:
    padded = -(-size // ranks) * ranks
    whole = torch.rand((size, other) if dim == 0 else (other, size))
    cut = Cut() if dim is None else Cut(dim, size, padded)
    pieces = [cut.piece(whole, rank, ranks) for rank in range(ranks)]
    assert len({piece.shape for piece in pieces}) == 1
    assert torch.equal(cut.whole(pieces), whole)
    if dim is not None:
        assert torch.cat(pieces, dim).narrow(dim, size, padded - size).abs().sum() == 0


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=20),
    st.integers(1, 4),
    st.integers(1, 80),
    st.booleans(),
)
def test_every_example_is_computed_once(
    lengths: list[int], copies: int, limit: int, pairs: bool
) -> None:
    together = 2 if pairs else 1
    lengths = lengths * together
    hands = deal(lengths, together, copies)
    assert len(hands) == copies
    every = [batch for hand in hands for batch in batches(hand, lengths, limit)]
    assert sorted(at for batch in every for at in batch) == list(range(len(lengths)))
    for batch in every:
        assert len(batch) == together or sum(lengths[at] for at in batch) <= limit
        if pairs:
            assert batch[1::2] == [at + 1 for at in batch[::2]]


def test_a_hand_is_no_longer_than_another_by_more_than_an_example() -> None:
    lengths = [9, 1, 5, 5, 2, 8, 3]
    tokens = [sum(lengths[at] for unit in hand for at in unit) for hand in deal(lengths, 1, 3)]
    assert max(tokens) - min(tokens) <= 3


@given(
    st.lists(st.integers(1, 24), min_size=1, max_size=8), st.sampled_from([(2, 2), (4, 2), (3, 1)])
)
def test_attention_keeps_sequences_apart(lengths: list[int], heads: tuple[int, int]) -> None:
    lengths.sort(reverse=True)
    query_heads, groups = heads
    attention = PackedAttention(SimpleNamespace(kv_channels=4))
    packed = pack([torch.zeros(length, dtype=torch.long) for length in lengths], CPU)
    total = sum(lengths)
    query, key, value = (torch.randn(total, 1, n, 4) for n in (query_heads, groups, groups))
    found = attention(query, key, value, packed)
    parts = []
    for q, k, v in zip(*(tensor.split(lengths) for tensor in (query, key, value)), strict=True):
        repeats = query_heads // groups
        q, k, v = (tensor[:, 0].transpose(0, 1) for tensor in (q, k, v))
        k, v = k.repeat_interleave(repeats, 0), v.repeat_interleave(repeats, 0)
        parts.append(functional.scaled_dot_product_attention(q, k, v, is_causal=True))
    wanted = torch.cat([part.transpose(0, 1).flatten(1) for part in parts])
    torch.testing.assert_close(found[:, 0], wanted, atol=1e-5, rtol=1e-5)
    assert packed.positions.tolist() == [at for length in lengths for at in range(length)]
    # Of two sequences side by side none is padded to more than twice its length.
    assert sum(block.rows * block.width for block in packed.blocks) <= 2 * total


def test_sizes_are_padded_to_whole_groups() -> None:
    sizes = Shapes(2, 48, 6, 3, 8, 75, 301, 128, ranks=2)
    assert (sizes.padded_groups, sizes.padded_heads) == (4, 8)
    assert (sizes.padded_ffn, sizes.padded_vocabulary) == (76, 302)
    cuts = {name: sizes.weight(f"x.{name}") for name in ("q_proj", "k_proj", "o_proj", "down_proj")}
    assert cuts == {
        "q_proj": Cut(0, 48, 64),
        "k_proj": Cut(0, 24, 32),
        "o_proj": Cut(1, 48, 64),
        "down_proj": Cut(1, 75, 76),
    }
    assert [sizes.features(name) for name in PROJECTIONS] == [
        (48, 48),
        (24, 48),
        (24, 48),
        (48, 48),
        (75, 48),
        (75, 48),
        (48, 75),
    ]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LlamaConfig(attention_bias=True), "biases"),
        (LlamaConfig(mlp_bias=True), "biases"),
        (LlamaConfig(hidden_act="gelu"), "hidden_act 'gelu'"),
        (LlamaConfig(rope_parameters=YARN), "positions of the type 'yarn'"),
        (MistralConfig(sliding_window=64), "sliding attention"),
        (SimpleNamespace(model_type="gpt2"), "gpt2 model; the Megatron trainer trains llama"),
    ],
)
def test_models_that_would_come_out_wrong_are_refused(config: Any, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        shapes(config, Path("model"), 1, 1)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"neither model\.safetensors nor"):
        Weights(tmp_path)


@pytest.mark.skipif(find_spec("megatron") is None, reason="pip install 'loragate[megatron]'")
def test_importing_the_trainer_imports_no_megatron() -> None:
    code = "import sys, app.worker.trainers.megatron; sys.exit('megatron.core' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
