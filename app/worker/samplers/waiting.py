"""Who waits to be read, and who is next.

What comes in: prompts. What goes out: groups that fit in one prefill pass, their adapters in
memory. It must not know: threads, caches, who is told.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from app.errors import LoragateError
from app.worker.samplers.adapters import Adapter, Resident
from app.worker.samplers.sequence import Sequence
from app.worker.samplers.ticket import Ticket


@dataclass(slots=True)
class Group:
    """Sequences of one prompt: it is read once for all of them."""

    prompt: list[int]
    sequences: list[Sequence]
    adapter: Adapter | None

    @property
    def ticket(self) -> Ticket:
        return self.sequences[0].ticket

    @property
    def prompt_logprobs(self) -> int | None:
        return self.sequences[0].params.prompt_logprobs

    @property
    def slot(self) -> str | None:
        return None if self.adapter is None else self.adapter.slot


class Waiting:
    """First come, first served: nobody is overtaken, so nobody starves."""

    def __init__(self, resident: Resident, *, max_batch: int, pass_tokens: int) -> None:
        self._resident = resident
        self._max_batch = max_batch
        self._pass_tokens = pass_tokens
        self._groups: deque[Group] = deque()

    def __len__(self) -> int:
        return len(self._groups)

    def __iter__(self) -> Iterator[Group]:
        return iter(self._groups)

    def append(self, group: Group) -> None:
        self._groups.append(group)

    def drop(self, tickets: set[Ticket]) -> None:
        """Forget these requests."""
        if tickets:
            self._groups = deque(one for one in self._groups if one.ticket not in tickets)

    def admit(self, running: int, refuse: Callable[[Group, LoragateError], None]) -> list[Group]:
        """The next groups to read, each sequence with a claim on its adapter.

        A group whose adapter cannot be loaded is refused; one whose adapter has no free slot
        waits, and all behind it.
        """
        picked: list[Group] = []
        while self._groups and self._fits(running, picked, self._groups[0]):
            group = self._groups[0]
            try:
                ready = group.adapter is None or self._resident.ensure(group.adapter)
            except LoragateError as exc:
                self._groups.popleft()
                refuse(group, exc)
                continue
            if not ready:
                break
            self._groups.popleft()
            self._claim(group)
            picked.append(group)
        return picked

    def _fits(self, running: int, picked: list[Group], group: Group) -> bool:
        taken = running + sum(len(other.sequences) for other in picked)
        if taken + len(group.sequences) > self._max_batch:
            return False
        if not picked:
            return True
        # Padded to the longest; those that want prompt logprobs are read apart from the rest.
        longest = max(len(group.prompt), *(len(other.prompt) for other in picked))
        alike = (group.prompt_logprobs is None) == (picked[0].prompt_logprobs is None)
        return alike and longest * (len(picked) + 1) <= self._pass_tokens

    def _claim(self, group: Group) -> None:
        if group.adapter is not None:
            for _ in group.sequences:
                self._resident.claim(group.adapter)
