"""What is counted: usage per key and model, requests, training steps, and their durations.

What comes in: one call per ended request or step. What goes out: `UsageRecord`s for the control
plane to write down, and plain integers for `/metrics`. Runs on the event loop only, so it needs no
lock.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

from app.domain import Usage, UsageRecord

#: Upper bounds of the histograms, in seconds.
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Meter:
    """Counts since the start (for `/metrics`) and since the last `drain` (for the registry)."""

    def __init__(self) -> None:
        self.requests: dict[tuple[str, int], int] = {}
        self.durations: dict[str, tuple[list[int], list[float]]] = {}
        self.tokens: dict[str, list[int]] = {}
        self.steps: dict[str, tuple[list[int], list[float]]] = {}
        self.trained_tokens: dict[str, int] = {}
        self.batches = 0
        self.parts = 0
        self.coalesced = 0
        self.calls_saved = 0
        self._pending: dict[tuple[str, str], list[int]] = {}

    def ended(self, path: str, status: int, duration_s: float) -> None:
        """Count a request that ended with `status` (499: the client left)."""
        key = (path, status)
        self.requests[key] = self.requests.get(key, 0) + 1
        _observe(self.durations, path, duration_s)

    def used(self, key_id: str, model: str, prompt_tokens: int, completion_tokens: int) -> None:
        """Bill one request of `model` (an upstream name) to a key."""
        pending = self._pending.get((key_id, model))
        if pending is None:
            pending = self._pending[(key_id, model)] = [0, 0, 0]
        pending[0] += 1
        pending[1] += prompt_tokens
        pending[2] += completion_tokens
        tokens = self.tokens.get(model)
        if tokens is None:
            tokens = self.tokens[model] = [0, 0]
        tokens[0] += prompt_tokens
        tokens[1] += completion_tokens

    def trained(self, trainer: str, tokens: int, duration_s: float) -> None:
        """Count a training step that was recorded: what its worker computed, and how long."""
        _observe(self.steps, trainer, duration_s)
        self.trained_tokens[trainer] = self.trained_tokens.get(trainer, 0) + tokens

    def split(self, parts: int) -> None:
        """Count a batch of prompts that was sent in several calls."""
        self.batches += 1
        self.parts += parts

    def merged(self, requests: int) -> None:
        """Count requests that one call answered."""
        self.coalesced += requests
        self.calls_saved += requests - 1

    def drain(self) -> list[UsageRecord]:
        """Take what was used since the last call. Give it to `restore` if it could not be kept."""
        pending, self._pending = self._pending, {}
        return [
            UsageRecord(key_id, model, requests, Usage(prompt, completion))
            for (key_id, model), (requests, prompt, completion) in pending.items()
        ]

    def restore(self, records: Iterable[UsageRecord]) -> None:
        """Put back records that could not be written down."""
        for record in records:
            pending = self._pending.setdefault((record.key_id, record.model), [0, 0, 0])
            pending[0] += record.requests
            pending[1] += record.usage.prompt_tokens
            pending[2] += record.usage.completion_tokens


def _observe(into: dict[str, tuple[list[int], list[float]]], label: str, value: float) -> None:
    """Add a value to a histogram: counts by bucket, and the sum."""
    found = into.get(label)
    if found is None:
        found = into[label] = ([0] * (len(BUCKETS) + 1), [0.0])
    counts, total = found
    counts[bisect_left(BUCKETS, value)] += 1
    total[0] += value
