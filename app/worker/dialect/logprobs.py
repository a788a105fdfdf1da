"""Logprobs as completions, chat and prompts show them.

What comes in: token ids and their logprobs. What goes out: plain dicts and lists for JSON. It
must not know: requests, tensors.
"""

from __future__ import annotations

from typing import Any

from app.worker.samplers.delta import TokenLogprobs
from app.worker.samplers.tokens import LONGEST_CHARACTER, Tokens

# JSON has no infinity.
LEAST = -9999.0


class LogprobWriter:
    """Writes one choice, chunk by chunk; remembers where its text and context stand."""

    def __init__(self, tokens: Tokens, *, as_ids: bool) -> None:
        self._tokens = tokens
        self._as_ids = as_ids
        self._offset = 0
        self._context: list[int] = []

    def completion(
        self, token_ids: list[int], found: list[TokenLogprobs | None]
    ) -> dict[str, list[Any]]:
        """OpenAI's completions form. A position without logprobs is the very first token."""
        texts: list[str] = []
        offsets: list[int] = []
        values: list[float | None] = []
        best: list[dict[str, float] | None] = []
        for token, one in zip(token_ids, found, strict=True):
            names = self._names([token] if one is None else one.ids, corrected=one is not None)
            offsets.append(self._offset)
            texts.append(names[0])
            values.append(None if one is None else max(one.logprobs[0], LEAST))
            best.append(None if one is None else _by_text(names, one))
            self._offset += len(names[0])
            if one is not None:
                self._follow(token)
        return {
            "text_offset": offsets,
            "token_logprobs": values,
            "tokens": texts,
            "top_logprobs": best,
        }

    def chat(
        self, found: list[TokenLogprobs], *, top: int, everything: bool
    ) -> dict[str, list[dict[str, Any]]]:
        """OpenAI's chat form."""
        content = []
        for one in found:
            names = self._names(one.ids)
            listed = dict(zip(one.ids, zip(names, one.logprobs, strict=True), strict=True))
            shown = len(listed) if everything or top == -1 else top
            content.append(
                {
                    **_chat_token(names[0], one.logprobs[0]),
                    "top_logprobs": [_chat_token(*pair) for pair in list(listed.values())[:shown]],
                }
            )
            self._follow(one.ids[0])
        return {"content": content}

    def prompt(self, found: list[TokenLogprobs | None]) -> list[dict[int, dict[str, Any]] | None]:
        """vLLM's prompt form: by token id, the prompt's own token first."""
        result: list[dict[int, dict[str, Any]] | None] = []
        for one in found:
            if one is None:
                result.append(None)
                continue
            ranks = (one.rank, *range(1, len(one.ids)))
            entry: dict[int, dict[str, Any]] = {}
            named = zip(one.ids, one.logprobs, ranks, self._names(one.ids, text=True), strict=True)
            for token, value, rank, name in named:
                entry[token] = {
                    "logprob": max(value, LEAST),
                    "rank": rank,
                    "decoded_token": name,
                }
            result.append(entry)
            self._follow(one.ids[0])
        return result

    def turn(self) -> None:
        """The prompt is over: characters do not span into the answer."""
        self._context.clear()

    def _names(self, ids: list[int], *, corrected: bool = True, text: bool = False) -> list[str]:
        if self._as_ids and not text:
            return [f"token_id:{token}" for token in ids]
        if not corrected:
            return [self._tokens.decode([token]) for token in ids]
        return [self._tokens.text_of(token, self._context) for token in ids]

    def _follow(self, token: int) -> None:
        self._context.append(token)
        del self._context[:-LONGEST_CHARACTER]


def _by_text(names: list[str], one: TokenLogprobs) -> dict[str, float]:
    """Tokens of equal text share an entry; the token itself may be listed twice."""
    values = dict(zip(one.ids, zip(names, one.logprobs, strict=True), strict=True))
    return {name: max(value, LEAST) for name, value in values.values()}


def _chat_token(name: str, value: float) -> dict[str, Any]:
    return {
        "token": name,
        "logprob": max(value, LEAST),
        "bytes": list(name.encode("utf-8", errors="replace")),
    }
