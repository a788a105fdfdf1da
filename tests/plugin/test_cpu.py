"""vLLM's LoRA on the CPU: a row without an adapter is left alone, the others get theirs."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loragate_vllm import cpu
from loragate_vllm.known import Unknown

from tests.plugin.punica import PunicaWrapperCPU

SLOTS, RANK, HIDDEN, VOCAB = 3, 2, 5, 7


def bgmv_shrink(
    inputs: torch.Tensor,
    lora_b_weights: torch.Tensor,
    output_tensor: torch.Tensor,
    lora_indices_tensor: torch.Tensor,
    scaling: float = 1.0,
) -> None:
    """As vLLM 0.32 has it: an index of -1 is the last slot."""
    chosen = lora_b_weights[lora_indices_tensor].squeeze(1)
    output_tensor[:] = scaling * torch.einsum("bi,boi->bo", inputs, chosen)


def ops() -> ModuleType:
    module = ModuleType("lora_ops")
    for name in ("bgmv_shrink", "bgmv_expand", "bgmv_expand_slice"):
        setattr(module, name, bgmv_shrink)
    return module


def wrapper() -> type:
    return type("PunicaWrapperCPU", (PunicaWrapperCPU,), {})


def stacked() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    down = torch.randn(SLOTS, 1, RANK, HIDDEN, generator=generator)
    return down, torch.randn(SLOTS, 1, VOCAB, RANK, generator=generator)


@given(st.lists(st.integers(-1, SLOTS - 1), min_size=1, max_size=8))
@settings(deadline=None)  # torch warms up
def test_a_row_without_an_adapter_is_left_alone(indices: list[int]) -> None:
    down, _ = stacked()
    inputs = torch.randn(len(indices), HIDDEN)
    found = torch.zeros(len(indices), RANK)
    cpu.leave_alone(bgmv_shrink)(inputs, down, found, torch.tensor(indices), 0.5)
    for row, slot in enumerate(indices):
        expected = torch.zeros(RANK) if slot < 0 else 0.5 * down[slot, 0] @ inputs[row]
        torch.testing.assert_close(found[row], expected)


def test_installing_twice_is_installing_once() -> None:
    module, users, kind = ops(), ops(), wrapper()
    cpu.check(module, kind)
    cpu.install(module, users, kind)
    once = module.bgmv_expand
    cpu.check(module, kind)
    cpu.install(module, users, kind)
    assert module.bgmv_expand is once is users.bgmv_expand
    assert once is not bgmv_shrink


@pytest.mark.parametrize("padding", [0, 3])
@given(st.lists(st.integers(-1, SLOTS - 1), min_size=1, max_size=8))
@settings(deadline=None)  # torch warms up
def test_lm_head_is_added_to_the_rows_of_its_adapter(padding: int, indices: list[int]) -> None:
    (down, up), kind = stacked(), wrapper()
    cpu.install(ops(), ops(), kind)
    hidden = torch.randn(len(indices), HIDDEN)
    logits = torch.randn(len(indices), VOCAB + padding)
    before = logits.clone()
    kind([], indices).add_lora_logits(logits, hidden, down, up, 2.0)
    for row, slot in enumerate(indices):
        expected = before[row].clone()
        if slot >= 0:
            expected[:VOCAB] += 2.0 * up[slot, 0] @ (down[slot, 0] @ hidden[row])
        torch.testing.assert_close(logits[row], expected)


def test_rows_and_adapters_must_be_as_many() -> None:
    (down, up), kind = stacked(), wrapper()
    cpu.install(ops(), ops(), kind)
    with pytest.raises(ValueError, match="4 rows of logits, 2 adapters"):
        kind([], [0, 1]).add_lora_logits(
            torch.zeros(4, VOCAB), torch.zeros(4, HIDDEN), down, up, 1.0
        )


def other_shrink(x: Any, weights: Any, out: Any, indices: Any) -> None: ...


def test_other_functions_are_not_touched() -> None:
    module = ops()
    module.bgmv_expand = other_shrink  # type: ignore[attr-defined]
    with pytest.raises(Unknown, match="other_shrink takes"):
        cpu.check(module, wrapper())
    del module.bgmv_expand
    with pytest.raises(Unknown, match="has no bgmv_expand"):
        cpu.check(module, wrapper())
