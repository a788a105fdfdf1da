"""Whether what a replica serves is what was trained. Pure.

What comes in: a version's probe and a replica's logprobs for the same token ids. What goes out: a
verdict with its numbers. Who asks the replica, and what happens to it, is not known here.

The tolerances. In float32 on both sides a right adapter agrees to about 1e-4, so 1e-3 is allowed.
In half precision two right answers differ by rounding. Measured in bfloat16 on an H100 and an H200,
vLLM against transformers with PEFT, in nats, on random token ids, whose rounding is worse than of
likely text. Right adapters of a model of 1.1 billion parameters had a largest difference of 0.25
among 29,000 tokens and a mean of 0.03, 0.042 in the worst prompt; those of the demo model 0.28 and
0.03, 0.048 in the worst. One whose lm_head was left out had 0.249 and 0.070; those whose lm_head
went to other rows had 2 to 4, and 0.26 to 0.52. So the mean tells them apart, at 0.05; the largest
difference, at 0.4, is for a few rows that are very wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from app.domain import Probe

EXACT = "float32"


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far logprobs may be apart, in nats: the largest difference and the mean one."""

    max_abs: float
    mean_abs: float


EXACT_TOLERANCE = Tolerance(max_abs=1e-3, mean_abs=1e-3)
HALF_TOLERANCE = Tolerance(max_abs=0.4, mean_abs=0.05)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a comparison found.

    `worst` is the row and the place in it of the token id with the largest difference; None if
    the replica's numbers have another shape than the probe's, or some are no numbers.
    """

    ok: bool
    max_abs: float
    mean_abs: float
    tolerance: Tolerance
    worst: tuple[int, int] | None
    fault: str = ""

    def __str__(self) -> str:
        if self.fault:
            return f"no logprobs to compare with the probe's: {self.fault}"
        assert self.worst is not None
        row, place = self.worst
        return (
            f"logprobs {'agree' if self.ok else 'differ'}: "
            f"max {self.max_abs:.4g} (allowed {self.tolerance.max_abs:g}), "
            f"mean {self.mean_abs:.4g} (allowed {self.tolerance.mean_abs:g}), "
            f"worst at row {row}, token {place}"
        )


def compare(probe: Probe, served: Sequence[Sequence[float]], dtype: str) -> Verdict:
    """Hold a replica's logprobs against the probe's.

    `dtype` is what the replica computes in. The float32 tolerance needs float32 on both sides; a
    dtype that nobody knows is taken for half precision.
    """
    exact = probe.dtype == EXACT and dtype == EXACT
    tolerance = EXACT_TOLERANCE if exact else HALF_TOLERANCE
    if fault := _fault(probe, served):
        return Verdict(False, math.inf, math.inf, tolerance, None, fault)
    differences = [
        (abs(theirs - ours), (row, place))
        for row, pair in enumerate(zip(probe.logprobs, served, strict=True))
        for place, (theirs, ours) in enumerate(zip(*pair, strict=True), 1)
    ]
    max_abs, worst = max(differences, key=lambda difference: difference[0])
    mean_abs = math.fsum(difference for difference, _ in differences) / len(differences)
    ok = max_abs <= tolerance.max_abs and mean_abs <= tolerance.mean_abs
    return Verdict(ok, max_abs, mean_abs, tolerance, worst)


def _fault(probe: Probe, served: Sequence[Sequence[float]]) -> str:
    """Why the two cannot be compared; empty if they can."""
    wanted, found = list(map(len, probe.logprobs)), list(map(len, served))
    if found != wanted:
        return f"rows of {found} numbers came, not of {wanted}"
    if not all(math.isfinite(number) for row in served for number in row):
        return "some of them are not numbers"
    return ""
