"""One row's life: the tokens it has, the text they make, and when it ends.

What comes in: the next token. What goes out: `Delta`s for whoever asked. It must not know:
batches, caches, HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence as Ids

import torch

from app.worker.samplers.adapters import Adapter
from app.worker.samplers.delta import Delta, PromptLogprobs, TokenLogprobs
from app.worker.samplers.detokenizer import Detokenizer
from app.worker.samplers.limits import Limits
from app.worker.samplers.params import SamplingParams
from app.worker.samplers.stops import OutputText
from app.worker.samplers.ticket import Ticket
from app.worker.samplers.tokens import Tokens


class Penalties:
    """What a sequence has said, as tensors over the vocabulary; kept only where it matters."""

    def __init__(self, prompt: Ids[int], vocab_size: int, device: torch.device) -> None:
        self.prompt = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self.prompt[torch.tensor(list(prompt), device=device)] = True
        self.counts = torch.zeros(vocab_size, device=device)

    def said(self, token: int) -> None:
        self.counts[token] += 1


class Sequence:
    """A prompt being continued."""

    def __init__(
        self,
        ticket: Ticket,
        index: int,
        prompt: list[int],
        params: SamplingParams,
        adapter: Adapter | None,
        tokens: Tokens,
    ) -> None:
        self.ticket = ticket
        self.prompt = prompt
        self.params = params
        self.adapter = adapter
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self.penalties: Penalties | None = None
        self.generator: torch.Generator | None = None
        self._text = OutputText(params.stop, include_stop=params.include_stop_str_in_output)
        self._detokenizer = Detokenizer(
            lambda ids: tokens.decode(ids, skip_special_tokens=params.skip_special_tokens), prompt
        )
        self._news = Delta(index)

    @property
    def slot(self) -> str | None:
        return None if self.adapter is None else self.adapter.slot

    @property
    def last_token(self) -> int:
        return self.token_ids[-1]

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def prepare(self, seed: int | None, vocab_size: int, device: torch.device) -> None:
        """Set up what only some requests need."""
        if seed is not None and not self.params.greedy:
            self.generator = torch.Generator(device).manual_seed(seed)
        if self.params.penalized:
            self.penalties = Penalties(self.prompt, vocab_size, device)

    def tell_prompt_logprobs(self, logprobs: PromptLogprobs) -> None:
        self._news.prompt_logprobs = logprobs

    def push(self, token: int, logprobs: TokenLogprobs | None, limits: Limits) -> None:
        """Take the next token and see whether it is the last."""
        self.token_ids.append(token)
        self._news.token_ids.append(token)
        if logprobs is not None:
            self._news.logprobs.append(logprobs)
        if self.penalties is not None:
            self.penalties.said(token)
        stopped = self._check_token(token, limits)
        if stopped and not self.params.include_stop_str_in_output:
            return
        met = self._text.push(
            self._detokenizer.push(token),
            check=len(self.token_ids) > self.params.min_tokens,
        )
        if met is not None:
            self._finish("stop", met)

    def take(self) -> Delta | None:
        """The news, if they are wanted now."""
        if not (self.params.stream or self.finished):
            return None
        news = self._news
        news.text = self._text.take(finished=self.finished)
        self._news = Delta(news.index)
        return news

    def _check_token(self, token: int, limits: Limits) -> bool:
        """Whether this very token ends the sequence, rather than how many there are."""
        if token == limits.eos_id and not self.params.ignore_eos:
            self._finish("stop", None)
            return True
        extra = () if self.params.ignore_eos else limits.stop_token_ids
        if token in self.params.stop_token_ids or token in extra:
            self._finish("stop", token)
            return True
        if len(self.token_ids) >= min(
            self.params.max_tokens, limits.max_model_len - len(self.prompt)
        ):
            self._finish("length", None)
        return False

    def _finish(self, reason: str, stop: int | str | None) -> None:
        self.finish_reason = self._news.finish_reason = reason
        self._news.stop_reason = stop
