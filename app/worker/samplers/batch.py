"""The rows that run together, and the two passes that move them: prefill and decode.

What comes in: groups of sequences that share a prompt. What goes out: sequences with one more
token. It must not know: threads, queues, who waits.
"""

from __future__ import annotations

from collections.abc import Sequence as Groups

import torch
from torch import Tensor

from app.worker.samplers.cache import KvRows
from app.worker.samplers.delta import PromptLogprobs
from app.worker.samplers.draw import Draw, describe_prompt
from app.worker.samplers.model import CausalModel
from app.worker.samplers.sequence import Sequence
from app.worker.samplers.waiting import Group


class Batch:
    """Sequence i is cache row i."""

    def __init__(self, model: CausalModel, pass_tokens: int) -> None:
        self.model = model
        self.pass_tokens = pass_tokens
        self.sequences: list[Sequence] = []
        self._rows = KvRows()
        self._draw: Draw | None = None

    def __len__(self) -> int:
        return len(self.sequences)

    def prefill(self, groups: Groups[Group]) -> None:
        """Read the groups' prompts, give each sequence its first token, let them join."""
        every = groups[0].prompt_logprobs is not None
        rows = KvRows()
        self.model.layers.use([group.slot for group in groups])
        prompts = [group.prompt for group in groups]
        width = max(map(len, prompts))
        found: list[PromptLogprobs] = [[None] for _ in groups]
        logits = torch.empty(0)
        passes = self.model.prefill(prompts, rows, every=every, pass_tokens=self.pass_tokens)
        for start, logits in passes:
            if every:
                self._describe(groups, found, start - width, logits)
        index = [row for row, group in enumerate(groups) for _ in group.sequences]
        joining = [sequence for group in groups for sequence in group.sequences]
        for group, logprobs in zip(groups, found, strict=True):
            if every:
                for sequence in group.sequences:
                    sequence.tell_prompt_logprobs(logprobs)
        last = logits[:, -1].index_select(0, torch.tensor(index, device=logits.device))
        self._push(Draw(joining, self.model.limits, self.model.device), last)
        staying = [place for place, sequence in enumerate(joining) if not sequence.finished]
        if staying:
            self._rows.join(rows, [index[place] for place in staying])
            self.sequences += [joining[place] for place in staying]
        self._changed()

    def decode(self) -> None:
        """One more token for every row."""
        if self._draw is None:
            self._draw = Draw(self.sequences, self.model.limits, self.model.device)
            self.model.layers.use([sequence.slot for sequence in self.sequences])
        last = torch.tensor([[sequence.last_token] for sequence in self.sequences])
        logits = self.model.forward(last, self._rows, 1)
        self._push(self._draw, logits[:, -1])

    def drop(self, leaving: set[Sequence]) -> None:
        """Take rows out; the last ones fill the gaps."""
        for row in range(len(self.sequences) - 1, -1, -1):
            if self.sequences[row] not in leaving:
                continue
            self._rows.remove(row)
            self.sequences[row] = self.sequences[-1]
            self.sequences.pop()
            self._changed()

    def clear(self) -> list[Sequence]:
        """Forget every row, and the memory they held."""
        lost, self.sequences = self.sequences, []
        self._rows = KvRows()
        self._changed()
        return lost

    def _changed(self) -> None:
        self._draw = None

    def _push(self, draw: Draw, logits: Tensor) -> None:
        for sequence, (token, logprobs) in zip(draw.rows, draw(logits), strict=True):
            sequence.push(token, logprobs, self.model.limits)

    def _describe(
        self, groups: Groups[Group], found: list[PromptLogprobs], start: int, logits: Tensor
    ) -> None:
        """Logprobs of the prompt tokens one pass predicts. Columns count back from the end."""
        for row, group in enumerate(groups):
            length = len(group.prompt)
            # The token in column c is predicted by the logits of column c - 1.
            begin = max(start, -length)
            end = min(start + logits.shape[1], -1)
            if begin >= end:
                continue
            actual = group.prompt[length + begin + 1 : length + end + 1]
            odds = logits[row, begin - start : end - start].log_softmax(dim=-1)
            count = group.prompt_logprobs or 0
            ids = torch.tensor(actual, device=odds.device)
            found[row] += describe_prompt(odds, ids, count)
