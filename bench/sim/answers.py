"""What a simulated replica says, and how it is written down: bodies, events, logprobs.

What comes in: who answers, to which prompts, how long. What goes out: bytes in vLLM's shapes. An
answer begins with the name of the adapter that made it and a digest of its prompt, so that a wrong
adapter or a lost place in a batch shows in the text; `said` tells what it must be.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import msgspec

from bench.sim.prefix import BYTES_PER_TOKEN, Prompt, count_tokens, prompt_bytes
from bench.sim.requests import Ask

CREATED = 1_795_233_172

dumps = msgspec.json.encode


def digest(prompt: Prompt) -> str:
    return f"{zlib.crc32(prompt_bytes(prompt)):08x}"


def token_text(adapter: str, prompt: Prompt, position: int) -> str:
    """One token of an answer."""
    match position:
        case 0:
            return adapter
        case 1:
            return f" {digest(prompt)}"
    return f" t{position}"


def said(adapter: str, prompt: Prompt, tokens: int) -> str:
    """The whole answer of an adapter to a prompt."""
    return "".join(token_text(adapter, prompt, position) for position in range(tokens))


def logprob(adapter: str, prompt: Prompt, position: int) -> float:
    """A number that only this adapter gives this position of this prompt."""
    seed = f"{adapter} {digest(prompt)} {position}".encode()
    return -(zlib.crc32(seed) % 4000) / 1000 - 0.001


def tokenize(text: str) -> list[int]:
    """Ids that remember their bytes: a one, and up to four of them."""
    data = text.encode()
    starts = range(0, len(data), BYTES_PER_TOKEN)
    return [int.from_bytes(b"\1" + data[at : at + BYTES_PER_TOKEN]) for at in starts]


def detokenize(tokens: list[int]) -> str:
    parts = [token.to_bytes(BYTES_PER_TOKEN + 1).lstrip(b"\0")[1:] for token in tokens]
    return b"".join(parts).decode(errors="replace")


@dataclass(frozen=True, slots=True)
class Shape:
    """One request's answer, before it is generated."""

    chat: bool
    rid: str
    model: str
    speaker: str
    ask: Ask
    prompts: list[Prompt]
    limit: int

    @property
    def choices(self) -> int:
        return len(self.prompts) * self.ask.choices_each

    def prompt_of(self, index: int) -> Prompt:
        return self.prompts[index // self.ask.choices_each]

    def usage(self) -> dict[str, int]:
        prompt_tokens = sum(count_tokens(prompt) for prompt in self.prompts)
        completion_tokens = self.choices * self.limit
        return {
            "prompt_tokens": prompt_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "completion_tokens": completion_tokens,
        }

    def body(self) -> bytes:
        """The whole answer."""
        shell = self._shell("chat.completion" if self.chat else "text_completion")
        choice = self._chat_choice if self.chat else self._choice
        shell["choices"] = [choice(index) for index in range(self.choices)]
        return dumps(shell | {"usage": self.usage()})

    def opening(self) -> bytes:
        """What a stream begins with: a chat names the role of each choice."""
        if not self.chat:
            return b""
        delta = {"role": "assistant", "content": ""}
        return b"".join(self._event(self._part(i, "", delta)) for i in range(self.choices))

    def frame(self, index: int) -> tuple[bytes, bytes]:
        """What stands before and after the text of every event but the last, written once."""
        whole = self._event(self._part(index, "@text@"))
        before, _, after = whole.partition(b"@text@")
        return before, after

    def event(self, index: int, position: int) -> bytes:
        """One token as an event, with its logprobs and, at the end, why it ended."""
        prompt = self.prompt_of(index)
        part = self._part(index, token_text(self.speaker, prompt, position))
        part["finish_reason"] = "length" if position + 1 >= self.limit else None
        if self.ask.logprobs is not None and self.ask.logprobs is not False:
            part["logprobs"] = self._logprobs(prompt, range(position, position + 1))
        return self._event(part)

    def closing(self) -> bytes:
        """Usage if it was asked for, and the end."""
        usage = b""
        if self.ask.with_usage:
            kind = "chat.completion.chunk" if self.chat else "text_completion"
            shell = self._shell(kind) | {"choices": [], "usage": self.usage()}
            usage = b"data: " + dumps(shell) + b"\n\n"
        return usage + b"data: [DONE]\n\n"

    def _shell(self, kind: str) -> dict[str, Any]:
        prefix = "chatcmpl" if self.chat else "cmpl"
        return {
            "id": f"{prefix}-{self.rid}",
            "object": kind,
            "created": CREATED,
            "model": self.model,
        }

    def _event(self, part: dict[str, Any]) -> bytes:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return b"data: " + dumps(self._shell(kind) | {"choices": [part]}) + b"\n\n"

    def _part(self, index: int, text: str, delta: dict[str, Any] | None = None) -> dict[str, Any]:
        said = {"delta": delta or {"content": text}} if self.chat else {"text": text}
        return {"index": index, **said, "logprobs": None, "finish_reason": None}

    def _choice(self, index: int) -> dict[str, Any]:
        ask, prompt = self.ask, self.prompt_of(index)
        text = said(self.speaker, prompt, self.limit)
        if ask.echo:
            text = (prompt if isinstance(prompt, str) else detokenize(list(prompt))) + text
        logprobs = None
        if ask.logprobs is not None and ask.logprobs is not False:
            first = -count_tokens(prompt) if ask.echo else 0
            logprobs = self._logprobs(prompt, range(first, self.limit))
        return {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": "length",
            "stop_reason": None,
            "prompt_logprobs": self._prompt_logprobs(prompt),
            "prompt_token_ids": _ids(prompt) if ask.return_token_ids else None,
        }

    def _chat_choice(self, index: int) -> dict[str, Any]:
        prompt = self.prompt_of(index)
        text = said(self.speaker, prompt, self.limit)
        rows = self._logprobs(prompt, range(self.limit)) if self.ask.logprobs else None
        return {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": rows,
            "finish_reason": "length",
            "stop_reason": None,
        }

    def _logprobs(self, prompt: Prompt, positions: range) -> dict[str, Any]:
        """Positions below zero are the prompt's own, which an echo brings along."""
        ids = _ids(prompt)
        texts, values = [], []
        for position in positions:
            echoed = position < 0
            texts.append(
                detokenize([ids[position]])
                if echoed
                else token_text(self.speaker, prompt, position)
            )
            first = echoed and position == -len(ids)
            values.append(None if first else logprob(self.speaker, prompt, position))
        if self.chat:
            return {"content": [self._row(*pair) for pair in zip(texts, values, strict=True)]}
        offsets = [sum(map(len, texts[:at])) for at in range(len(texts))]
        top = [
            None if value is None else {text: value}
            for text, value in zip(texts, values, strict=True)
        ]
        return {
            "text_offset": offsets,
            "token_logprobs": values,
            "tokens": texts,
            "top_logprobs": top,
        }

    def _row(self, text: str, value: float | None) -> dict[str, Any]:
        row = {"token": text, "logprob": value, "bytes": list(text.encode())}
        return row | {"top_logprobs": [row] * min(1, self.ask.top_logprobs or 0)}

    def _prompt_logprobs(self, prompt: Prompt) -> list[dict[str, Any] | None] | None:
        if self.ask.prompt_logprobs is None:
            return None
        ids = _ids(prompt)
        rows: list[dict[str, Any] | None] = [None]
        for at in range(1, len(ids)):
            value = logprob(self.speaker, prompt, at - len(ids))
            row = {"logprob": value, "rank": 1, "decoded_token": detokenize([ids[at]])}
            rows.append({str(ids[at]): row})
        return rows


def _ids(prompt: Prompt) -> list[int]:
    return tokenize(prompt) if isinstance(prompt, str) else list(prompt)
