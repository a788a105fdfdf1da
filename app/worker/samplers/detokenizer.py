"""Tokens to text, one at a time.

What comes in: the ids of a sequence as they are chosen. What goes out: text that later tokens
will not change. It must not know: stop strings, requests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from app.worker.samplers.tokens import LONGEST_CHARACTER, REPLACEMENT

# How much of the prompt is decoded along: enough for a space or a split character at the seam.
CONTEXT_TOKENS = 6


class Detokenizer:
    """Decodes a short window of recent tokens and shows what the newest one added.

    A single token has no text of its own: bytes of one character may be spread over several
    tokens, and sentencepiece-like decoders drop the space of whatever comes first.
    """

    def __init__(self, decode: Callable[[list[int]], str], prompt: Sequence[int]) -> None:
        self._decode = decode
        # A character the prompt leaves unfinished belongs to whoever finishes it.
        self._window, self._read = self._context(list(prompt))
        self._shown = decode(self._window[: self._read])

    def push(self, token: int) -> str:
        """The text `token` completes; empty while a character is unfinished."""
        self._window.append(token)
        text = self._decode(self._window)
        if len(text) <= len(self._shown) or text.endswith(REPLACEMENT):
            return ""
        added = text[len(self._shown) :]
        # Keep what was just read as the context of what comes next.
        self._window = self._window[self._read :]
        self._read = len(self._window)
        self._shown = self._decode(self._window)
        return added

    def _context(self, prompt: list[int]) -> tuple[list[int], int]:
        """The end of the prompt, and how many of its tokens end where a character does.

        One unfinished character spoils all the bytes before it for decoders that fall back to
        bytes (they replace the whole run), so its tokens are set aside before looking for where
        a character begins.
        """
        for unfinished in range(min(LONGEST_CHARACTER, len(prompt) + 1)):
            end = len(prompt) - unfinished
            for count in range(CONTEXT_TOKENS, CONTEXT_TOKENS + LONGEST_CHARACTER):
                window = prompt[max(0, end - count) : end]
                text = self._decode(window)
                if not text.startswith(REPLACEMENT) and not text.endswith(REPLACEMENT):
                    return window + prompt[end:], len(window)
        return [], 0
