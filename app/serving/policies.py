"""Which replica takes a request. Pure functions of one signature; no await, no I/O."""

from __future__ import annotations

from collections.abc import Container, Iterable

from app.serving.fleet import LiveReplica


def least_inflight(replicas: Iterable[LiveReplica], tried: Container[str]) -> LiveReplica | None:
    """The available replica with the fewest requests; of equals, the one left alone the longest.

    Returns None if none is available that was not tried.
    """
    best: LiveReplica | None = None
    best_rank = (0, 0)
    for replica in replicas:
        if not replica.available or replica.id in tried:
            continue
        rank = (replica.inflight, replica.last_claim)
        if best is None or rank < best_rank:
            best, best_rank = replica, rank
    return best


def preferred(
    replicas: Iterable[LiveReplica], tried: Container[str], prefer: str | None
) -> LiveReplica | None:
    """The replica `prefer` if it is available and was not tried; else as `least_inflight`."""
    if prefer is not None and prefer not in tried:
        for replica in replicas:
            if replica.id == prefer and replica.available:
                return replica
    return least_inflight(replicas, tried)
