"""Which replica takes a request: filter, score in [0, 1], pick. No await, no I/O.

What comes in: a pool, the name asked for, the prompt, who was tried. What goes out: one
replica, which may still have to be waited for. The work does not grow with the pool: a version has
a few homes, and of a base's many replicas a few are drawn.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence

from app.serving.affinity import blocks
from app.serving.pool import LivePool
from app.serving.replica import LiveReplica
from app.serving.request import InferenceRequest

#: What the parts of a score count for; together 1.
RESIDENCY = 0.5
PREFIX = 0.25
LOAD = 0.25
#: Residency of a version: serves at once, can be loaded without evicting, is being loaded.
RESIDENT = 1.0
IN_MEMORY = 0.9
ROOM = 0.8
LOADING = 0.6
#: Replicas this close to the best are as good: of two of them the less loaded one is taken.
CLOSE = 0.05
#: A replica with this many times the mean load is left out while another is below.
BOUND = 1.5
#: Replicas looked at.
FEW = 4

Fits = Callable[[LiveReplica], bool]


def pick(
    pool: LivePool,
    name: str,
    request: InferenceRequest,
    now: float,
    *,
    tried: Collection[LiveReplica] = (),
    fits: Fits | None = None,
) -> LiveReplica | None:
    """The replica for one request of `name`, an upstream name; None if there is none.

    Args:
        request: its prompt's beginning counts, if there is a choice.
        now: monotonic seconds.
        tried: replicas that this request was refused by.
        fits: says of a replica whether it can answer this request at all.
    """
    adapted = name != pool.config.served_name
    among = pool.candidates(name, now) if adapted else pool.replicas
    usable = _usable(among, name, now, tried, fits)
    if not usable and adapted:
        usable = _usable(pool.holders(name), name, now, tried, fits)
    if len(usable) > 1:
        return _best(pool, name, request, now, usable, adapted=adapted)
    if usable:
        return usable[0]
    if not adapted:
        return None
    others = _usable(pool.replicas, name, now, tried, fits)
    return pool.next_best(name, now, [r for r in pool.replicas if r not in others])


def _usable(
    among: Sequence[LiveReplica],
    name: str,
    now: float,
    tried: Collection[LiveReplica],
    fits: Fits | None,
) -> list[LiveReplica]:
    return [
        r
        for r in among
        if r.allows(now)
        and r not in tried
        and (not r.quarantined or name not in r.quarantined)
        and (fits is None or fits(r))
    ]


def _best(
    pool: LivePool,
    name: str,
    request: InferenceRequest,
    now: float,
    usable: Sequence[LiveReplica],
    *,
    adapted: bool,
) -> LiveReplica:
    chain = blocks(name, request.prefix)
    few = _few(pool, chain, usable)
    bound = BOUND * pool.mean_load() + 2
    below = [r for r in few if r.inflight + r.line.length <= bound]
    few = below or few
    depths = pool.prefixes.depths(chain, [r.bit for r in few]) if chain else [0.0] * len(few)
    scale = pool.mean_load() + 4
    scores = [
        RESIDENCY * (residency(r, name) if adapted else RESIDENT)
        + PREFIX * depth
        + LOAD * scale / (scale + r.load(now))
        for r, depth in zip(few, depths, strict=True)
    ]
    chosen = _of_two(few, scores, now)
    if chain:
        pool.prefixes.note(chain, chosen.bit)
    return chosen


def residency(replica: LiveReplica, name: str) -> float:
    """How ready a replica is to serve a version, in [0, 1]."""
    mirror = replica.residency
    if mirror.in_slot(name):
        return RESIDENT
    if mirror.in_memory(name):
        return IN_MEMORY
    if name in replica.loads:
        return LOADING
    return ROOM if mirror.room else 0.0


def _few(pool: LivePool, chain: list[int], usable: Sequence[LiveReplica]) -> list[LiveReplica]:
    """All of a few; of many, one that has seen the prefix and others by chance."""
    if len(usable) <= FEW:
        return list(usable)
    drawn = [usable[int(random.random() * len(usable))] for _ in range(FEW - 1)]
    seen = pool.prefixes.last_seen(chain)
    if seen:
        drawn.extend([r for r in usable if r.bit & seen][:1])
    return list(dict.fromkeys(drawn))


def _of_two(few: list[LiveReplica], scores: list[float], now: float) -> LiveReplica:
    """Of those close to the best score, the less loaded of two drawn.

    (M. Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", 2001.)
    """
    floor = max(scores) - CLOSE
    best = [r for r, score in zip(few, scores, strict=True) if score >= floor]
    if len(best) > 2:
        best = random.sample(best, 2)
    if len(best) == 1:
        return best[0]
    one, other = best
    return min(one, other, key=lambda r: (r.load(now), r.last_claim))
