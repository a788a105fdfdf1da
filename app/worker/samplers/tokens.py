"""Text and token ids: one tokenizer behind few, thread-safe questions.

What comes in: a Hugging Face tokenizer. What goes out: ids, text, and the text of one token as
logprobs show it. It must not know: requests, tensors.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from typing import Any

REPLACEMENT = "\ufffd"
LONGEST_CHARACTER = 4


class Tokens:
    """Remembers the text of every token it was asked about."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        # Truncation keeps the end of a prompt, as vLLM does.
        tokenizer.truncation_side = "left"
        self.eos_id: int | None = tokenizer.eos_token_id
        self._texts: dict[int, str] = {}
        self._metaspace = _metaspace(tokenizer)
        self._fast = getattr(tokenizer, "backend_tokenizer", None)
        # A fast tokenizer keeps its truncation as state: one caller at a time.
        self._lock = threading.Lock()

    def encode(
        self, text: str, *, add_special_tokens: bool = True, keep_last: int | None = None
    ) -> list[int]:
        """The ids of `text`; with `keep_last`, no more than so many, special tokens included."""
        with self._lock:
            ids: list[int] = self.tokenizer.encode(
                text,
                add_special_tokens=add_special_tokens,
                truncation=keep_last is not None,
                max_length=keep_last,
                verbose=False,
            )
        return ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]] | None:
        """Ids, and the (begin, end) of the characters each stands for; no special ones added.

        None if the tokenizer cannot tell.
        """
        if self._fast is None:
            return None
        with self._lock:
            found = self.tokenizer(
                text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )
        return found["input_ids"], found["offset_mapping"]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        if self._fast is not None:
            text: str = self._fast.decode(ids, skip_special_tokens=skip_special_tokens)
            return text
        return str(self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The vocabulary entries themselves, markers and all."""
        return [piece or "" for piece in self.tokenizer.convert_ids_to_tokens(list(ids))]

    def text_of(self, token: int, context: Sequence[int] = ()) -> str:
        """One token's text after `context`: empty while a character is incomplete."""
        text = self._texts.get(token)
        if text is None:
            text = self._texts[token] = self._alone(token)
        return self._completing(token, context) if text.endswith(REPLACEMENT) else text

    def apply_chat_template(self, messages: list[dict[str, Any]], **kwargs: Any) -> str:
        with self._lock:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **kwargs))

    def _alone(self, token: int) -> str:
        text = self.decode([token])
        if self._metaspace is None:
            return text
        # Decoding a lone piece drops its leading spaces; the piece still has them.
        piece = self.pieces([token])[0]
        spaces = len(piece) - len(piece.lstrip(self._metaspace))
        return " " * max(0, spaces - (len(text) - len(text.lstrip(" ")))) + text

    def _completing(self, token: int, context: Sequence[int]) -> str:
        for count in range(1, min(len(context), LONGEST_CHARACTER) + 1):
            before = list(context[-count:])
            whole = self.decode([*before, token])
            if whole.endswith(REPLACEMENT):
                continue
            # Tokens that ended inside this character showed "": their bytes belong here.
            while before and self.decode(before[-1:]).endswith(REPLACEMENT):
                before.pop()
            return whole[_common(self.decode(before) if before else "", whole) :]
        return ""


def _common(prefix: str, text: str) -> int:
    count = 0
    for ours, theirs in zip(prefix, text, strict=False):
        if ours != theirs:
            break
        count += 1
    return count


def _metaspace(tokenizer: Any) -> str | None:
    """The character that stands for a space in a sentencepiece-like vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    splitter = json.loads(backend.to_str()).get("pre_tokenizer") or {}
    for part in (splitter, *splitter.get("pretokenizers", ())):
        if part.get("type") == "Metaspace":
            return str(part.get("replacement", "\u2581"))
    return None
