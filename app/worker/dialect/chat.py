"""Replies of /v1/chat/completions, whole and streamed.

What comes in: deltas of sequences. What goes out: JSON bytes. It must not know: sockets, how
tokens are chosen.
"""

from __future__ import annotations

from typing import Any

from app.worker.dialect.envelope import DONE, FINGERPRINT, Envelope, Tally, event, to_json
from app.worker.dialect.logprobs import LogprobWriter
from app.worker.dialect.prompts import Prompt
from app.worker.dialect.requests import ChatRequest, Message
from app.worker.samplers.delta import Delta
from app.worker.samplers.tokens import Tokens


class ChatReply:
    """One conversation, `n` answers."""

    def __init__(
        self, request: ChatRequest, prompt: Prompt, tokens: Tokens, envelope: Envelope
    ) -> None:
        self.request = request
        self.prompt = prompt
        self.envelope = envelope
        self.role = "assistant" if request.add_generation_prompt else request.messages[-1].role
        self._tokens = tokens
        self._tally = Tally([len(prompt.ids)], request.n)
        as_ids = request.return_tokens_as_token_ids
        self._writers = [LogprobWriter(tokens, as_ids=as_ids) for _ in range(request.n)]
        self._begun = False

    def whole(self, deltas: list[Delta]) -> bytes:
        """The one body of a reply that is not streamed."""
        ordered = sorted(deltas, key=lambda one: one.index)
        told = ordered[0].prompt_logprobs
        writer = LogprobWriter(self._tokens, as_ids=False)
        choices = [self._choice(delta) for delta in ordered]
        usage = {
            **self._tally.usage(),
            "prompt_tokens_details": None,
            "completion_tokens_details": None,
        }
        return to_json(
            {
                **self.envelope.head("chat.completion"),
                "choices": choices,
                "service_tier": None,
                "system_fingerprint": FINGERPRINT,
                "usage": usage,
                "prompt_logprobs": None if told is None else writer.prompt(told),
                "prompt_token_ids": self.prompt.ids if self.request.return_token_ids else None,
                "prompt_text": self.prompt.text if self.request.return_prompt_text else None,
                "kv_transfer_params": None,
            }
        )

    def chunk(self, delta: Delta) -> bytes:
        """One event of a stream; before the first, the role of every choice."""
        begin = b"" if self._begun else self._roles()
        self._begun = True
        self._tally.completion[delta.index] += len(delta.token_ids)
        choice: dict[str, Any] = {
            "index": delta.index,
            "delta": {"content": delta.text},
            "logprobs": self._logprobs(delta),
            "finish_reason": delta.finish_reason,
        }
        if delta.finish_reason is not None:
            choice["stop_reason"] = delta.stop_reason
        choice["token_ids"] = delta.token_ids if self.request.return_token_ids else None
        body: dict[str, Any] = {**self.envelope.head("chat.completion.chunk"), "choices": [choice]}
        if self.request.continuous_usage:
            body["usage"] = self._tally.usage_of(delta.index)
        if delta.finish_reason is not None and not self.request.include_usage:
            body["system_fingerprint"] = FINGERPRINT
        return begin + event(body)

    def end(self) -> bytes:
        """What closes a stream."""
        if not self.request.include_usage:
            return DONE
        body = {
            **self.envelope.head("chat.completion.chunk"),
            "choices": [],
            "usage": self._tally.usage(),
            "system_fingerprint": FINGERPRINT,
        }
        return event(body) + DONE

    def _roles(self) -> bytes:
        events = [
            self._opening(index, {"role": self.role, "content": ""}, first=True)
            for index in range(self.request.n)
        ]
        if self.request.echo and (said := self._said()):
            events += [self._opening(index, {"content": said}) for index in range(self.request.n)]
        return b"".join(events)

    def _opening(self, index: int, delta: dict[str, str], *, first: bool = False) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        body: dict[str, Any] = {**self.envelope.head("chat.completion.chunk"), "choices": [choice]}
        if self.request.continuous_usage:
            body["usage"] = self._tally.usage_of(index)
        if first:
            body["prompt_token_ids"] = self.prompt.ids if self.request.return_token_ids else None
            body["prompt_text"] = self.prompt.text if self.request.return_prompt_text else None
        return event(body)

    def _choice(self, delta: Delta) -> dict[str, Any]:
        self._tally.completion[delta.index] += len(delta.token_ids)
        said = self._said() if self.request.echo else ""
        message = {
            "role": self.role,
            "content": said + delta.text,
            "refusal": None,
            "annotations": None,
            "audio": None,
            "function_call": None,
            "reasoning": None,
        }
        return {
            "index": delta.index,
            "message": message,
            "logprobs": self._logprobs(delta),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
            "token_ids": delta.token_ids if self.request.return_token_ids else None,
        }

    def _logprobs(self, delta: Delta) -> dict[str, Any] | None:
        if not self.request.logprobs:
            return None
        return self._writers[delta.index].chat(
            delta.logprobs,
            top=self.request.top_logprobs,
            everything=bool(self.request.logprob_token_ids),
        )

    def _said(self) -> str:
        """What the last message says, if the answer continues in its role."""
        last: Message = self.request.messages[-1]
        return last.content if last.role == self.role and isinstance(last.content, str) else ""
