"""Replies of /v1/completions, whole and streamed.

What comes in: deltas of sequences. What goes out: JSON bytes. It must not know: sockets, how
tokens are chosen.
"""

from __future__ import annotations

from typing import Any

from app.worker.dialect.envelope import DONE, FINGERPRINT, Envelope, Tally, event, to_json
from app.worker.dialect.logprobs import LogprobWriter
from app.worker.dialect.prompts import Prompt
from app.worker.dialect.requests import CompletionRequest
from app.worker.samplers.delta import Delta, PromptLogprobs
from app.worker.samplers.tokens import Tokens


class CompletionReply:
    """Choice `index` is sample `index % n` of prompt `index // n`."""

    def __init__(
        self,
        request: CompletionRequest,
        prompts: list[Prompt],
        tokens: Tokens,
        envelope: Envelope,
    ) -> None:
        self.request = request
        self.prompts = prompts
        self.envelope = envelope
        self._tokens = tokens
        self._tally = Tally([len(prompt.ids) for prompt in prompts], request.n)
        as_ids = request.return_tokens_as_token_ids
        self._writers = [
            LogprobWriter(tokens, as_ids=as_ids) for _ in range(len(prompts) * request.n)
        ]
        self._begun: set[int] = set()

    def whole(self, deltas: list[Delta]) -> bytes:
        """The one body of a reply that is not streamed."""
        choices = [self._choice(delta) for delta in sorted(deltas, key=lambda one: one.index)]
        usage = {
            **self._tally.usage(),
            "prompt_tokens_details": None,
            "completion_tokens_details": None,
        }
        return to_json(
            {
                **self.envelope.head("text_completion"),
                "choices": choices,
                "service_tier": None,
                "system_fingerprint": FINGERPRINT,
                "usage": usage,
                "kv_transfer_params": None,
            }
        )

    def chunk(self, delta: Delta) -> bytes:
        """One event of a stream."""
        index = delta.index
        first = index not in self._begun
        self._begun.add(index)
        echo = self.request.echo and first
        show_ids = first and (self.request.echo or self.request.return_token_ids)
        choice = {
            "index": index,
            "text": self._text(delta, echo=echo),
            "logprobs": self._logprobs(delta, echo=echo),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
            "prompt_token_ids": self._prompt(index).ids if show_ids else None,
            "token_ids": delta.token_ids if self.request.return_token_ids else None,
        }
        self._tally.completion[index] += len(delta.token_ids)
        body: dict[str, Any] = {**self.envelope.head("text_completion"), "choices": [choice]}
        if self.request.continuous_usage:
            body["usage"] = self._tally.usage_of(index)
        if delta.finish_reason is not None and not self.request.include_usage:
            body["system_fingerprint"] = FINGERPRINT
        return event(body)

    def end(self) -> bytes:
        """What closes a stream."""
        if not self.request.include_usage:
            return DONE
        body = {
            **self.envelope.head("text_completion"),
            "choices": [],
            "usage": self._tally.usage(),
            "system_fingerprint": FINGERPRINT,
        }
        return event(body) + DONE

    def _choice(self, delta: Delta) -> dict[str, Any]:
        index, request = delta.index, self.request
        self._tally.completion[index] += len(delta.token_ids)
        prompt_logprobs = None
        if delta.prompt_logprobs is not None:
            writer = LogprobWriter(self._tokens, as_ids=False)
            prompt_logprobs = writer.prompt(delta.prompt_logprobs)
        return {
            "index": index,
            "text": self._text(delta, echo=request.echo),
            "logprobs": self._logprobs(delta, echo=request.echo),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
            "token_ids": delta.token_ids if request.return_token_ids else None,
            "prompt_logprobs": prompt_logprobs,
            "prompt_token_ids": self._prompt(index).ids if request.return_token_ids else None,
        }

    def _text(self, delta: Delta, *, echo: bool) -> str:
        if not echo:
            return delta.text
        # With the ids at hand nobody needs the prompt's text again.
        prompt = "" if self.request.return_token_ids else self._prompt(delta.index).text or ""
        return prompt if self.request.prompt_only else prompt + delta.text

    def _logprobs(self, delta: Delta, *, echo: bool) -> dict[str, list[Any]] | None:
        if self.request.logprobs is None:
            return None
        writer = self._writers[delta.index]
        token_ids: list[int] = []
        found: PromptLogprobs = []
        if echo and delta.prompt_logprobs is not None:
            token_ids += self._prompt(delta.index).ids
            found += delta.prompt_logprobs
        if self.request.prompt_only:
            return writer.completion(token_ids, found)
        told = writer.completion(token_ids, found)
        writer.turn()
        answer = writer.completion(delta.token_ids, list(delta.logprobs))
        return {name: told[name] + answer[name] for name in told} if token_ids else answer

    def _prompt(self, index: int) -> Prompt:
        return self.prompts[index // self.request.n]
