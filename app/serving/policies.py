"""Which replica takes a request: filter, score in [0, 1], pick. No await, no I/O.

What comes in: a pool, the name asked for, the prompt, who was tried. What goes out: one
replica, which may still have to be waited for. The work does not grow with the pool: a version has
a few homes, and of a base's many replicas a few are drawn.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence

from app.serving.affinity import BLOCK, blocks
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
    chain: list[int] = []
    if len(among) > 1 and len(request.body) >= BLOCK:
        chain = blocks(name, request.prefix)
    elif len(among) <= FEW and not tried and fits is None:
        ready = _least_of_ready(among, name, now, adapted=adapted)
        if ready is not None and ready.takes(name):
            return ready
    few = among if len(among) <= FEW else _few(pool, chain, among)
    usable = _usable(few, name, now, tried, fits)
    chosen = _choose(pool, name, chain, now, usable, adapted=adapted)
    if chosen is not None and chosen.takes(name):
        return chosen
    # To wait is worse than any score: is there another that holds it and has a place?
    able = _usable(pool.holders(name) if adapted else among, name, now, tried, fits)
    free = [r for r in able if r.takes(name)]
    chosen = _choose(pool, name, chain, now, free, adapted=adapted) or chosen
    chosen = chosen or _choose(pool, name, chain, now, able, adapted=adapted)
    if chosen is not None or not adapted:
        return chosen
    others = _usable(pool.replicas, name, now, tried, fits)
    return pool.next_best(name, now, [r for r in pool.replicas if r not in others])


def _choose(
    pool: LivePool,
    name: str,
    chain: Sequence[int],
    now: float,
    usable: Sequence[LiveReplica],
    *,
    adapted: bool,
) -> LiveReplica | None:
    if len(usable) < 2:
        return usable[0] if usable else None
    return _best(pool, name, chain, now, usable, adapted=adapted)


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
        if r.available
        and r not in tried
        and (r.breaker.closed or r.breaker.allows(now))
        and (not r.quarantined or name not in r.quarantined)
        and (fits is None or fits(r))
    ]


def _least_of_ready(
    among: Sequence[LiveReplica], name: str, now: float, *, adapted: bool
) -> LiveReplica | None:
    """If all can serve it at once, nothing but their load tells them apart: the least loaded.

    Of equals it is the one left alone for longest. This is the usual case, in one pass.
    """
    best: LiveReplica | None = None
    best_load = 0.0
    for replica in among:
        if not (replica.available and replica.breaker.closed) or replica.quarantined:
            return None
        if adapted and not replica.residency.in_slot(name):
            return None
        load = replica.load(now)
        if (
            best is None
            or load < best_load
            or (load == best_load and replica.last_claim < best.last_claim)
        ):
            best, best_load = replica, load
    return best


def _best(
    pool: LivePool,
    name: str,
    chain: Sequence[int],
    now: float,
    usable: Sequence[LiveReplica],
    *,
    adapted: bool,
) -> LiveReplica:
    mean = pool.mean_load()
    loads = [r.load(now) for r in usable]
    bound = max(BOUND * mean + 2, min(loads))
    depths = pool.prefixes.depths(chain, [r.bit for r in usable]) if chain else [0.0] * len(usable)
    scale = mean + 4
    scores = [
        RESIDENCY * (residency(r, name) if adapted else RESIDENT)
        + PREFIX * depth
        + LOAD * scale / (scale + load)
        if load <= bound
        else 0.0
        for r, depth, load in zip(usable, depths, loads, strict=True)
    ]
    chosen = _of_two(usable, scores, loads)
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


def _few(
    pool: LivePool, chain: Sequence[int], among: Sequence[LiveReplica]
) -> Sequence[LiveReplica]:
    """Of many, some by chance and one that has seen the prefix."""
    drawn = [among[int(random.random() * len(among))] for _ in range(FEW - 1)]
    if seen := pool.prefixes.last_seen(chain):
        for replica in among:
            if replica.bit & seen:
                drawn.append(replica)
                break
    return list(dict.fromkeys(drawn))


def _of_two(usable: Sequence[LiveReplica], scores: list[float], loads: list[float]) -> LiveReplica:
    """Of those close to the best score, the less loaded of two drawn.

    (M. Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", 2001.)
    """
    floor = max(scores) - CLOSE
    best = [at for at, score in enumerate(scores) if score >= floor]
    if len(best) > 2:
        best = random.sample(best, 2)
    at = min(best, key=lambda at: (loads[at], usable[at].last_claim))
    return usable[at]
