"""A pool as the data plane knows it now: its replicas, and which of them each adapter lives on.

What comes in: replicas that come and go, homes planned by `control.tasks.place`. What goes out:
the few replicas worth looking at for one request. No I/O.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from app.domain import Pool
from app.serving.affinity import PrefixTable
from app.serving.rendezvous import key, weights
from app.serving.replica import LiveReplica
from app.serving.retries import RetryBudget

#: A home found on the spot may have this much more than the mean load.
_BOUND = 1.25
#: Engines told apart before their bits are given out anew: each restart takes one more.
_BITS = 512


class LivePool:
    """The replicas of one pool and what they share.

    `homes` maps versions (upstream names) to the replicas they should be on, best first. Requests
    go to homes and to any other replica that holds the version. `arrivals` counts requests by
    version since the last plan, and `inflight` and `waiting` are sums over the replicas.
    """

    def __init__(self, config: Pool, now: float) -> None:
        self.config = config
        self.replicas: list[LiveReplica] = []
        self.inflight = 0
        self.waiting = 0
        self.homes: dict[str, tuple[LiveReplica, ...]] = {}
        self.arrivals: dict[str, int] = {}
        self.prefixes = PrefixTable()
        self.budget = RetryBudget(now)
        self._candidates: dict[str, tuple[LiveReplica, ...]] = {}
        self._bits = 0

    def new_bit(self) -> int:
        """One more engine for the prefix table to tell apart."""
        if self._bits >= _BITS + len(self.replicas):
            self.prefixes = PrefixTable()
            for number, replica in enumerate(self.replicas):
                replica.bit = 1 << number
            self._bits = len(self.replicas)
        self._bits += 1
        return 1 << (self._bits - 1)

    def configure(self, config: Pool) -> None:
        if config != self.config:
            self.config = config
            for replica in self.replicas:
                replica.residency.resize(config.max_loras, config.cpu_slots)
                replica.serve_line()

    def consists_of(self, replicas: list[LiveReplica]) -> None:
        """Replicas came or went; homes on those that went are given up."""
        self.replicas = replicas
        here = set(replicas)
        self.rehome({name: [r for r in homes if r in here] for name, homes in self.homes.items()})

    def rehome(self, homes: dict[str, list[LiveReplica]]) -> None:
        """Follow a plan. What it leaves out finds a home again when it is asked for."""
        self.homes = {name: tuple(replicas) for name, replicas in homes.items() if replicas}
        self._candidates.clear()

    def forget_candidates(self, name: str | None = None) -> None:
        """A replica began or ceased to hold this version (None: any)."""
        if name is None:
            self._candidates.clear()
        else:
            self._candidates.pop(name, None)

    def mean_load(self) -> float:
        """Requests a replica would have if all had the same."""
        return (self.inflight + self.waiting) / (len(self.replicas) or 1)

    def candidates(self, name: str, now: float) -> Sequence[LiveReplica]:
        """Where requests for a version go: its homes; until all of them hold it, others that do."""
        found = self._candidates.get(name)
        if found is None:
            holders = self.holders(name)
            homes = self.homes.get(name) or (() if holders else self._settle(name, now))
            found = homes
            if not homes or any(home not in holders for home in homes):
                found = (*homes, *(r for r in holders if r not in homes))
            self._candidates[name] = found
        return found

    def holders(self, name: str) -> list[LiveReplica]:
        """The replicas that hold a version, or soon will."""
        return [r for r in self.replicas if name in r.residency.known or name in r.loads]

    def next_best(self, name: str, now: float, but: Collection[LiveReplica]) -> LiveReplica | None:
        """The replica an adapter would live on if these did not exist. None if there is none."""
        able = [r for r in self.replicas if r.allows(now) and r not in but]
        if not able:
            return None
        wants = weights(key(name), [r.key for r in able])
        return able[wants.index(max(wants))]

    def _settle(self, name: str, now: float) -> tuple[LiveReplica, ...]:
        """Find a first home: rendezvous hashing with bounded loads.

        (V. Mirrokni, M. Thorup, M. Zadimoghaddam, "Consistent Hashing with Bounded Loads", 2018.)
        """
        bound = _BOUND * self.mean_load() + 1
        full = {r for r in self.replicas if r.inflight + r.line.length > bound}
        home = self.next_best(name, now, full) or self.next_best(name, now, ())
        if home is None:
            return ()
        self.homes[name] = (home,)
        return self.homes[name]
