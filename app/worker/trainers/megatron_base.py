"""The base model that Megatron's ranks hold: what differs between the engines.

What comes in: packed sequences, and the adapter to compute them with. What goes out: logprobs on
the last stage, hidden states on the others. It must not know: runs, losses, files.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from app.worker.trainers.megatron_packing import Packed
from app.worker.trainers.megatron_shapes import Cut

if TYPE_CHECKING:
    from app.worker.trainers.megatron_vectors import Local


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear as Hugging Face names it, and how its weight [outs, ins] is cut over the ranks."""

    name: str
    ins: int
    outs: int
    cut: Cut


class Base(Protocol):
    """This rank's part of a frozen model, which may wear one adapter at a time."""

    @property
    def linears(self) -> Sequence[Linear]:
        """All of the whole model that an adapter may have, in the order of Hugging Face's."""

    @property
    def here(self) -> Collection[str]:
        """The names of those that are on this rank's stage."""

    #: The longest sequence, and the size of a hidden state.
    max_length: int
    hidden: int
    #: Whether this rank's stage is the first or the last.
    first: bool
    last: bool

    def cuts(self, linear: Linear, rank: int) -> tuple[Cut, Cut]:
        """How A [rank, ins] and B [outs, rank] of a linear are cut.

        Raises:
            InvalidRequest: a rank that the tensor-parallel ranks cannot share.
        """

    def wear(self, local: Local, weights: Tensor, gradient: Tensor | None) -> None:
        """Compute with the adapter of this rank's `weights` from now on.

        What flows back is added to `gradient`, if there is one.
        """

    def bare(self) -> None:
        """Compute without an adapter from now on."""

    def forward(
        self, packed: Packed, targets: Tensor, taken: Tensor | None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """One batch through this rank's stage.

        Args:
            targets: int64 [tokens], of all stages.
            taken: what the stage before gave, [tokens, 1, hidden]; None on the first.

        Returns:
            On the last stage the targets' logprobs, float32 [tokens], and whether each was the
            likeliest, bool [tokens]; on the others hidden states [tokens, 1, hidden].
        """
