"""The adapter of a prompt row is that of the request it belongs to."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loragate_vllm.rows import PromptLogits, start_of

from tests.plugin.punica import LogitsProcessorWithLoRA, PunicaWrapperCPU, PunicaWrapperGPU

TOKENS = (0, 0, 0, -1, -1, 2, 2, 2, 2)
SAMPLED = (0, -1, 2)
KINDS = (PunicaWrapperCPU, PunicaWrapperGPU)


def hidden(count: int = len(TOKENS)) -> torch.Tensor:
    # A step's rows lie in a longer buffer.
    return torch.randn(40, 3)[7 : 7 + count]


@given(st.integers(0, 12), st.integers(0, 12), st.integers(0, 5), st.integers(1, 4))
@settings(deadline=None)  # torch warms up
def test_a_slice_is_found_where_it_was_cut(start: int, count: int, before: int, width: int) -> None:
    whole = torch.randn(40, width)[before : before + 12]
    rows = whole[start : start + count]
    if rows.shape[0]:
        assert start_of(rows, whole) == start


def test_what_is_no_slice_is_not_found() -> None:
    buffer = torch.randn(40, 4)
    whole = buffer[10:20]
    assert start_of(whole[2:5].clone(), whole) is None
    assert start_of(whole[torch.tensor([2, 3])], whole) is None
    assert start_of(whole[:, :2], whole) is None
    assert start_of(whole[::2], whole) is None
    assert start_of(buffer[9:12], whole) is None
    assert start_of(buffer[18:21], whole) is None
    assert start_of(torch.randn(1, 4).expand(3, 4), torch.randn(1, 4).expand(5, 4)) is None


@pytest.mark.parametrize("kind", KINDS)
@given(st.data())
@settings(deadline=None)  # torch warms up
def test_each_row_has_its_own_adapter(kind: type[PunicaWrapperCPU], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(TOKENS) - 1))
    stop = data.draw(st.integers(start + 1, len(TOKENS)))
    punica, whole = kind(TOKENS, SAMPLED), hidden()
    processor = LogitsProcessorWithLoRA(punica)
    found = PromptLogits(processor, [punica], whole)(whole[start:stop])
    assert found.squeeze(1).tolist() == list(TOKENS[start:stop])
    # And the rows sampled have theirs again.
    assert processor(torch.zeros(3, 1)).squeeze(1).tolist() == list(SAMPLED)


@pytest.mark.parametrize("kind", KINDS)
def test_the_sampled_rows_are_restored_after_an_error(kind: type[PunicaWrapperCPU]) -> None:
    punica, whole = kind(TOKENS, SAMPLED), hidden()

    def fail(rows: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        PromptLogits(fail, [punica], whole)(whole[:5])
    assert LogitsProcessorWithLoRA(punica)(torch.zeros(3, 1)).squeeze(1).tolist() == list(SAMPLED)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_cannot_be_told_get_no_number(
    kind: type[PunicaWrapperCPU], caplog: pytest.LogCaptureFixture
) -> None:
    punica, whole = kind(TOKENS, SAMPLED), hidden()
    prompt_logits = PromptLogits(LogitsProcessorWithLoRA(punica), [punica], whole)
    found = prompt_logits(whole[2:6].clone())
    assert found.shape == (4, 1)
    assert found.isnan().all()
    assert "cannot tell which prompt rows" in caplog.text


def test_a_step_of_another_order_gets_no_number() -> None:
    punica, whole = PunicaWrapperCPU(TOKENS[:-1], SAMPLED), hidden()
    found = PromptLogits(LogitsProcessorWithLoRA(punica), [punica], whole)(whole[:2])
    assert found.isnan().all()


def test_a_rank_without_logits_has_none() -> None:
    punica, whole = PunicaWrapperCPU(TOKENS, SAMPLED), hidden()
    assert PromptLogits(lambda rows: None, [punica], whole)(whole[:2].clone()) is None
