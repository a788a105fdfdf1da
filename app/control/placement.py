"""Which replicas each adapter version should live on: a plan, as data. Pure.

What comes in: how much each version is asked for, and what each replica holds. What goes out:
homes, and the loads and unloads that bring them about. `control.tasks.place` applies it.

One replica is home to a cold version; a hot one gets as many as its share of the pool's traffic
asks for. Plans are stable: what fits stays where it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from app.serving.rendezvous import key, weights

#: Requests at once for which one copy of a version is enough, whatever its share.
PER_COPY = 4.0
#: A version loses a copy when its share asks for this much less than one fewer.
SHRINK = 0.7
#: Planned load of a replica, in means: up to which it gets homes, and keeps those it has.
TAKE, KEEP = 1.25, 1.5
#: Demand below this is none.
NOTHING = 1e-3


@dataclass(frozen=True, slots=True)
class Wanted:
    """A version that is asked for.

    `demand` is in requests a second and `concurrency` in requests at once, both smoothed. `homes`
    are the ids of the replicas it lives on now.
    """

    name: str
    demand: float
    concurrency: float = 0.0
    homes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Seen:
    """A replica that takes requests: how many versions it can be home to, and which it holds."""

    id: str
    slots: int
    holds: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Action:
    """Load or unload one version on one replica."""

    replica: str
    name: str


@dataclass(frozen=True, slots=True)
class Plan:
    """`homes` by version; `loads` bring about what it lacks, `unloads` end what is over."""

    homes: Mapping[str, tuple[str, ...]]
    loads: tuple[Action, ...]
    unloads: tuple[Action, ...]


def plan(wanted: Sequence[Wanted], seen: Sequence[Seen], over: frozenset[str]) -> Plan:
    """Give every version its homes, most wanted first, as long as there are slots.

    A version keeps its homes unless one has far more than its share of the demand; else it gets
    the first replicas of its rendezvous order that have a slot and are not far above the mean. So
    a plan that was followed is planned again, and a replica lost or added moves what is on it.

    Args:
        over: versions to unload wherever they are held.
    """
    total = sum(one.demand for one in wanted)
    board = _Board(seen, total)
    homes: dict[str, tuple[str, ...]] = {}
    for one in sorted(wanted, key=lambda one: (-one.demand, one.name)):
        found = board.place(one, copies(one, total, len(seen)))
        if found:
            homes[one.name] = found
    holds = {replica.id: replica.holds for replica in seen}
    missing = [
        Action(replica, one.name)
        for one in wanted
        for replica in homes.get(one.name, ())
        if one.demand > NOTHING and one.name not in holds[replica]
    ]
    ended = [
        Action(replica.id, name)
        for replica in seen
        for name in sorted(replica.holds & over)
        if replica.id not in homes.get(name, ())
    ]
    return Plan(homes, tuple(missing), tuple(ended))


def copies(one: Wanted, total: float, replicas: int) -> int:
    """How many replicas a version should be on.

    In proportion to its share of the demand, if enough requests are there at once for more than
    one replica to be of use. A copy too many is kept until it is clearly too many.
    """
    if not replicas:
        return 0
    share = one.demand / total * replicas if total else 0.0
    use = min(share, one.concurrency / PER_COPY)
    wanted = max(1, min(replicas, ceil(use - 1e-9)))
    now = min(len(one.homes), replicas)
    if wanted < now and use > (now - 1) * SHRINK:
        return now
    return wanted


class _Board:
    """The replicas while homes are given out, by their place in `seen`."""

    def __init__(self, seen: Sequence[Seen], total: float) -> None:
        self._ids = [replica.id for replica in seen]
        self._places = {id: place for place, id in enumerate(self._ids)}
        self._keys = [key(id) for id in self._ids]
        self._room = [replica.slots for replica in seen]
        self._load = [0.0] * len(seen)
        self._mean = total / len(seen) if seen else 0.0

    def place(self, one: Wanted, copies: int) -> tuple[str, ...]:
        """Take places for a version: fewer than `copies` only if there are no more slots."""
        part = one.demand / copies if copies else 0.0
        now = [self._places[id] for id in one.homes if id in self._places]
        found = [at for at in now if self._fits(at, part, KEEP)][:copies]
        if len(found) < copies:
            self._add(found, now, one.name, part, copies)
        for at in found:
            self._room[at] -= 1
            self._load[at] += part
        return tuple([self._ids[at] for at in found])

    def _add(self, found: list[int], now: list[int], name: str, part: float, copies: int) -> None:
        """Find more: in rendezvous order those that are not far above the mean."""
        wants = weights(key(name), self._keys)
        for at in found:
            wants[at] = -1
        while len(found) < copies and (best := max(wants)) >= 0:
            at = wants.index(best)
            wants[at] = -1
            if self._fits(at, part, TAKE):
                found.append(at)
        if len(found) == copies:
            return
        # All are above the mean or out of slots: stay, or go where there is least to do.
        stay = [at for at in now if at not in found and self._room[at] > 0]
        rest = [
            at
            for at, room in enumerate(self._room)
            if room > 0 and at not in found and at not in stay
        ]
        rest.sort(key=self._load.__getitem__)
        found.extend([*stay, *rest][: copies - len(found)])

    def _fits(self, at: int, part: float, bound: float) -> bool:
        return self._room[at] > 0 and self._load[at] + part <= bound * self._mean
