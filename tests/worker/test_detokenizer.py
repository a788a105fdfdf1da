"""Tokens to text, whatever the tokenizer does with bytes and spaces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.worker.samplers.detokenizer import Detokenizer
from app.worker.samplers.tokens import Tokens
from tests.worker.tiny import byte_level, sentencepiece_like

TOKENIZERS = {"byte_level": Tokens(byte_level()), "metaspace": Tokens(sentencepiece_like())}
WORDS = st.text("abc hello é日😀ñ\n'", max_size=40)

pytestmark = pytest.mark.worker


def stream(tokens: Tokens, prompt: list[int], answer: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokens.decode, prompt)
    return [detokenizer.push(token) for token in answer]


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=WORDS, data=st.data())
def test_pieces_add_up_to_the_text(name: str, text: str, data: st.DataObject) -> None:
    tokens = TOKENIZERS[name]
    whole = tokens.encode(f"x{text}.")
    seam = data.draw(st.integers(1, len(whole)))
    prefixes = (tokens.decode(whole[:end]) for end in range(seam, -1, -1))
    begun = next(prefix for prefix in prefixes if not prefix.endswith("\ufffd"))
    assert "".join(stream(tokens, whole[:seam], whole[seam:])) == tokens.decode(whole)[len(begun) :]


def test_a_character_split_behind_a_long_run_of_bytes() -> None:
    """One unfinished character spoils the whole run for a decoder that falls back to bytes."""
    tokens = TOKENIZERS["metaspace"]
    whole = tokens.encode("x" + "'é" * 40 + "😀.")
    assert "".join(stream(tokens, whole[:-2], whole[-2:])) == "😀."


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_split_character_is_held_back(name: str) -> None:
    tokens = TOKENIZERS[name]
    pieces = stream(tokens, tokens.encode("a"), tokens.encode("😸"))
    assert len(pieces) > 1
    assert pieces[-1] == "😸"
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_leading_space_survives() -> None:
    tokens = TOKENIZERS["metaspace"]
    ids = tokens.encode("hello world")
    seam = len(tokens.encode("hello"))
    assert "".join(stream(tokens, ids[:seam], ids[seam:])) == " world"


def test_an_unfinished_character_at_the_end_is_not_shown() -> None:
    tokens = TOKENIZERS["byte_level"]
    assert stream(tokens, tokens.encode("a"), tokens.encode("😸")[:-1])[-1] == ""


def test_a_token_s_text_waits_for_its_character() -> None:
    tokens = TOKENIZERS["byte_level"]
    ids = tokens.encode("😸")
    context: list[int] = []
    texts = []
    for token in ids:
        texts.append(tokens.text_of(token, context))
        context.append(token)
    assert texts == [""] * (len(ids) - 1) + ["😸"]


def test_a_lone_token_keeps_its_space() -> None:
    tokens = TOKENIZERS["metaspace"]
    world = tokens.encode("hello world")[-1]
    assert tokens.text_of(world).startswith(" ") == tokens.pieces([world])[0].startswith("\u2581")
