"""One token for every row: penalties, filters, chance, and what the odds were.

What comes in: logits of a step and the sequences of its rows. What goes out: a token and its
logprobs for each. It must not know: caches, adapters, text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from app.worker.samplers import filters
from app.worker.samplers.delta import TokenLogprobs
from app.worker.samplers.limits import Limits
from app.worker.samplers.sequence import Sequence

Drawn = list[tuple[int, TokenLogprobs | None]]


class Draw:
    """The draw for one composition of rows; make a new one when rows join or leave.

    Per-row settings become tensors once, and each kind of work is skipped when no row asks.
    """

    def __init__(self, rows: Rows[Sequence], limits: Limits, device: torch.device) -> None:
        self.rows = list(rows)
        self.limits = limits
        self.device = device
        params = [row.params for row in rows]
        self._penalized = self._where(lambda row: row.penalties is not None)
        self._allowed = [
            (i, torch.tensor(p.allowed_token_ids, device=device))
            for i, p in enumerate(params)
            if p.allowed_token_ids is not None
        ]
        self._biased = [
            (i, torch.tensor([*p.logit_bias], device=device), self._tensor(p.logit_bias.values()))
            for i, p in enumerate(params)
            if p.logit_bias
        ]
        self._patient = [i for i, p in enumerate(params) if p.min_tokens > 0]
        self._random = self._where(lambda row: not row.params.greedy)
        self._likely = self._where(lambda row: row.params.min_p > 0 and not row.params.greedy)
        self._topped = self._where(lambda row: row.params.filtered and not row.params.greedy)
        self._temperature = self._values("temperature", self._random)
        self._min_p = self._values("min_p", self._likely)
        self._top_p = self._values("top_p", self._topped)
        self._reported = self._where(
            lambda row: row.params.logprobs is not None or bool(row.params.logprob_token_ids)
        )

    def __call__(self, logits: Tensor) -> Drawn:
        """Draw. `logits` is [rows, vocabulary] in float32 and may be changed."""
        odds = logits[self._reported].log_softmax(dim=-1) if self._reported else None
        self._constrain(logits)
        chosen = logits.argmax(dim=-1)
        if self._random:
            chosen[self._random] = self._chance(logits[self._random])
        tokens = chosen.tolist()
        found: dict[int, TokenLogprobs] = {}
        if odds is not None:
            asked = [self.rows[row] for row in self._reported]
            report = describe(odds, chosen[self._reported], asked)
            found = dict(zip(self._reported, report, strict=True))
        return [(token, found.get(row)) for row, token in enumerate(tokens)]

    def _where(self, wanted: Callable[[Sequence], bool]) -> list[int]:
        return [index for index, row in enumerate(self.rows) if wanted(row)]

    def _values(self, name: str, rows: list[int]) -> Tensor:
        return self._tensor(getattr(self.rows[row].params, name) for row in rows)

    def _tensor(self, values: Iterable[float]) -> Tensor:
        return torch.tensor([float(value) for value in values], device=self.device)

    def _constrain(self, logits: Tensor) -> None:
        """What can change even the likeliest token."""
        for row, allowed in self._allowed:
            kept = logits[row, allowed]
            logits[row] = filters.NEVER
            logits[row, allowed] = kept
        for row, tokens, bias in self._biased:
            logits[row, tokens] += bias
        for row in self._patient:
            sequence = self.rows[row]
            if len(sequence.token_ids) < sequence.params.min_tokens:
                logits[row, self.limits.forbidden_early(sequence.params)] = filters.NEVER
        if self._penalized:
            logits[self._penalized] = self._penalize(logits[self._penalized])

    def _penalize(self, logits: Tensor) -> Tensor:
        said = [p for row in self._penalized if (p := self.rows[row].penalties) is not None]
        return filters.penalize(
            logits,
            prompt=torch.stack([one.prompt for one in said]),
            counts=torch.stack([one.counts for one in said]),
            repetition=self._values("repetition_penalty", self._penalized),
            frequency=self._values("frequency_penalty", self._penalized),
            presence=self._values("presence_penalty", self._penalized),
        )

    def _chance(self, logits: Tensor) -> Tensor:
        """Draw by odds: the largest ratio of probability to exponential noise."""
        logits = logits / self._temperature[:, None]
        place = {row: index for index, row in enumerate(self._random)}
        if self._likely:
            some = [place[row] for row in self._likely]
            logits[some] = filters.keep_likely(logits[some], self._min_p)
        if self._topped:
            some = [place[row] for row in self._topped]
            logits[some] = filters.keep_top(logits[some], self._top_k(logits), self._top_p)
        noise = torch.empty_like(logits).exponential_()
        for row, index in place.items():
            generator = self.rows[row].generator
            if generator is not None:
                # Its own stream of chance: company in the batch changes nothing.
                noise[index].exponential_(generator=generator)
        return logits.softmax(dim=-1).div_(noise).argmax(dim=-1)

    def _top_k(self, logits: Tensor) -> Tensor:
        everything = logits.shape[1]
        wanted = [self.rows[row].params.top_k for row in self._topped]
        counts = [min(k, everything) if k > 0 else everything for k in wanted]
        return torch.tensor(counts, device=self.device)


def describe(odds: Tensor, chosen: Tensor, rows: Rows[Sequence]) -> list[TokenLogprobs]:
    """For each row: the chosen token, then the alternatives it asked to see."""
    mine = odds.gather(1, chosen[:, None])
    ranks = (odds >= mine).sum(dim=-1).tolist()
    counts = [_count(row, odds.shape[1]) for row in rows]
    best = odds.topk(max(counts), dim=-1)
    best_ids, best_odds = best.indices.tolist(), best.values.tolist()
    result = []
    for place, (row, token, own) in enumerate(
        zip(rows, chosen.tolist(), mine[:, 0].tolist(), strict=True)
    ):
        listed = row.params.logprob_token_ids
        if listed:
            ids, values = list(listed), odds[place, list(listed)].tolist()
        else:
            ids, values = best_ids[place][: counts[place]], best_odds[place][: counts[place]]
        result.append(TokenLogprobs([token, *ids], [own, *values], ranks[place]))
    return result


def _count(row: Sequence, vocab_size: int) -> int:
    wanted = row.params.logprobs
    if row.params.logprob_token_ids or wanted is None:
        return 0
    return vocab_size if wanted == -1 else min(wanted, vocab_size)


def describe_prompt(odds: Tensor, actual: Tensor, count: int) -> list[TokenLogprobs]:
    """For each position: the token that is there, then the `count` likeliest."""
    mine = odds.gather(1, actual[:, None])
    ranks = (odds >= mine).sum(dim=-1).tolist()
    best = odds.topk(odds.shape[1] if count == -1 else min(count, odds.shape[1]), dim=-1)
    ids = torch.cat((actual[:, None], best.indices), dim=1).tolist()
    values = torch.cat((mine, best.values), dim=1).tolist()
    return [TokenLogprobs(*one) for one in zip(ids, values, ranks, strict=True)]
