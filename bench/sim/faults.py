"""What can go wrong with a simulated replica, and when: the words of a fault script.

What comes in: JSON or dataclasses. What goes out: `Fault`s that a replica plays. Those with
`times` meet so many of the next inference requests; the others are states of the replica, ended by
`heal` (hang, slow, lying), `restart` (kill, dead engine), or both.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec


class Kind(StrEnum):
    """What happens."""

    KILL = "kill"  # the listening socket and every connection close
    RESTART = "restart"  # comes (back) on the same port and remembers nothing
    DEAD_ENGINE = "dead_engine"  # the server lives: 500 to requests, 503 to /health
    HANG = "hang"  # the engine ends no step, the server accepts
    SLOW = "slow"  # every step takes `factor` times as long
    LYING = "lying"  # answers are those of the base, whatever was asked for
    HEAL = "heal"  # the three above end
    UNAVAILABLE = "unavailable"  # `times` requests get a 503
    RESET_BEFORE = "reset_before"  # `times` requests get a reset instead of an answer
    RESET_AFTER = "reset_after"  # `times` streams are reset after `tokens`; others as above


class Fault(msgspec.Struct, frozen=True):
    """One of them."""

    kind: Kind
    times: int = 1
    factor: float = 10.0
    tokens: int = 1


class Scripted(msgspec.Struct, frozen=True):
    """A fault of one replica at a moment of simulated time after the start."""

    at_s: float
    replica: int
    fault: Fault


def parse_script(data: bytes) -> tuple[Scripted, ...]:
    """A script from JSON: `[{"at_s": 2, "replica": 0, "fault": {"kind": "kill"}}]`."""
    return msgspec.json.decode(data, type=tuple[Scripted, ...])
