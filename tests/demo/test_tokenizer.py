"""The tokenizer takes any text and gives it back; the chat template writes ChatML."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app import demo

pytest.importorskip("transformers")
pytestmark = pytest.mark.worker

from transformers import AutoTokenizer  # noqa: E402

TOKENIZER = AutoTokenizer.from_pretrained(demo.MODEL_DIR, local_files_only=True)


@settings(deadline=None, max_examples=300)
@given(st.text())
def test_any_text_survives(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert ids == TOKENIZER.encode(text, add_special_tokens=False)


@settings(deadline=None, max_examples=100)
@given(st.text(min_size=1), st.text(min_size=1))
def test_a_chat_is_its_turns_in_order(question: str, answer: str) -> None:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    written = TOKENIZER.apply_chat_template(turns, tokenize=False)
    assert written == (
        f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
    )


def test_a_prompt_ends_where_the_assistant_begins() -> None:
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello!"}]
    written = TOKENIZER.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert written == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHello!<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_a_turn_ends_with_the_end_token_of_the_model() -> None:
    assert TOKENIZER.eos_token == "<|im_end|>"
    assert TOKENIZER.encode("<|im_end|>") == [TOKENIZER.eos_token_id]
    assert TOKENIZER.bos_token is None


@pytest.mark.parametrize("label", ["True", "False", " True", " False"])
def test_labels_are_single_tokens(label: str) -> None:
    assert len(TOKENIZER.encode(label)) == 1
