"""Sequences end to end in one row: each must come out as if it were alone in its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from app.errors import ConfigurationError
from app.worker.trainers.attention import Sequences, flat_attention
from app.worker.trainers.shared import SharedModel

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
}


@pytest.mark.parametrize("lengths", [(5,), (4, 4, 4), (1, 2, 40, 3, 17, 33), (16, 15, 1)])
@pytest.mark.parametrize("window", [None, 3, 100])
def test_each_sequence_sees_itself_only(lengths: tuple[int, ...], window: int | None) -> None:
    """Values and gradients, with fewer heads of keys than of queries."""
    torch.manual_seed(0)
    total = sum(lengths)
    query, key, value = (
        torch.randn(1, heads, total, 8, dtype=torch.float64, requires_grad=True)
        for heads in (4, 2, 2)
    )
    found, _ = flat_attention(
        torch.nn.Module(), query, key, value, None, 0.3,
        sequences=Sequences(lengths, CPU), sliding_window=window,
    )  # fmt: skip
    parts = []
    for q, k, v in zip(*(states.split(lengths, 2) for states in (query, key, value)), strict=True):
        back = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])[None]
        seen = (back >= 0) & (back < (window or total))
        parts.append(
            functional.scaled_dot_product_attention(
                q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), seen, scale=0.3
            )
        )
    wanted = torch.cat(parts, 2).transpose(1, 2)
    assert torch.allclose(found, wanted, atol=1e-12)
    noise = torch.randn_like(wanted)
    ours = torch.autograd.grad((found * noise).sum(), (query, key, value))
    theirs = torch.autograd.grad((wanted * noise).sum(), (query, key, value))
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, atol=1e-12)


def test_positions_count_from_the_start_of_each_sequence() -> None:
    assert Sequences((3, 1, 2), CPU).positions.tolist() == [[0, 1, 2, 0, 0, 1]]


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(
            lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=2)), id="a window"
        ),
        pytest.param(
            lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)), id="norms of queries and keys"
        ),
    ],
)
def test_other_models_pass_the_trainers_own_check(model: Any) -> None:
    torch.manual_seed(0)
    made = model().eval()
    shared = SharedModel(made)
    ids = torch.arange(30) % 40
    ours, _ = shared.logprobs(ids[:-1], ids[1:], [20, 9])
    for part, start, stop in ((ours[:20], 0, 20), (ours[20:], 20, 29)):
        logits = made(input_ids=ids[None, start:stop]).logits[0]
        wanted = logits.log_softmax(-1).gather(1, ids[start + 1 : stop + 1, None])[:, 0]
        assert torch.allclose(part, wanted, atol=1e-4)


def test_a_model_that_caps_its_attention_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="Gemma2Attention caps its attention"):
        SharedModel(Gemma2ForCausalLM(Gemma2Config(**SIZES)).eval())
