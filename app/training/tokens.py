"""The examples of a job as token ids, kept in a file of its own while the job runs.

What comes in: what the trainer rendered. What goes out: data for its ops. A job's tokens may be
more than memory wants to hold beside the requests being served, so only where each one starts is
kept there. It must not know: JSON, files' names, steps.
"""

from __future__ import annotations

import os
import tempfile
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from app.db.faults import from_disk
from app.ops import Datum, Rendered, Tensor

_WIDTH = 4  # bytes of an int32, and of a float32


class Examples:
    """Examples of one sequence each, or of two (`dpo`: preferred, then not). Closing removes them.

    Raises from all that touches the disk:
        StorageUnavailable: it is full, or away.
    """

    def __init__(self, folder: Path, sequences: int = 1) -> None:
        self._sequences = sequences
        with from_disk("file store"):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder, buffering=1 << 20)  # noqa: SIM115
        self._starts = array("q", [0])  # in tokens; sequence i lies between starts i and i + 1
        self._weights = array("f")  # the sum of each sequence's

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._weights) // self._sequences

    def add(self, sequences: Sequence[Rendered]) -> None:
        """One more example. Each sequence has two tokens or more, and as many weights."""
        for rendered in sequences:
            tokens, weights = rendered.tokens, rendered.weights
            if tokens is None or weights is None:
                raise ValueError("a sequence without tokens or weights")
            with from_disk("file store"):
                self._file.write(tokens.data)
                self._file.write(weights.data)
            self._starts.append(self._starts[-1] + tokens.shape[0])
            self._weights.append(weight_of(rendered))

    def seal(self) -> None:
        """Everything is added; from now on it is read."""
        with from_disk("file store"):
            self._file.flush()

    def tokens(self, example: int) -> int:
        """Tokens that a pass over an example computes: each but the last of a sequence."""
        at = example * self._sequences
        return self._starts[at + self._sequences] - self._starts[at] - self._sequences

    def weight(self, example: int) -> float:
        """The sum of an example's weights."""
        at = example * self._sequences
        return sum(self._weights[at : at + self._sequences])

    def data(self, example: int, scale: float = 1.0) -> list[Datum]:
        """The example's sequences, shifted, with every weight times `scale`."""
        at = example * self._sequences
        return [self._datum(at + offset, scale) for offset in range(self._sequences)]

    def start(self, example: int, most: int) -> list[int]:
        """The first tokens of an example's first sequence, `most` of them at most."""
        tokens, _ = self._read(example * self._sequences)
        return memoryview(tokens).cast("i")[:most].tolist()

    def _datum(self, sequence: int, scale: float) -> Datum:
        tokens, weights = self._read(sequence)
        shape = (len(tokens) // _WIDTH - 1,)
        if scale != 1.0:
            scaled = array("f", [weight * scale for weight in memoryview(weights).cast("f")])
            weights = scaled.tobytes()
        return Datum(
            tokens=Tensor("int32", shape, tokens[:-_WIDTH]),
            targets=Tensor("int32", shape, tokens[_WIDTH:]),
            weights=Tensor("float32", shape, weights[_WIDTH:]),
        )

    def _read(self, sequence: int) -> tuple[bytes, bytes]:
        start, end = self._starts[sequence], self._starts[sequence + 1]
        half = (end - start) * _WIDTH
        with from_disk("file store"):
            both = os.pread(self._file.fileno(), 2 * half, 2 * start * _WIDTH)
        return both[:half], both[half:]


def weight_of(rendered: Rendered) -> float:
    """The sum of the weights that count: nothing predicts the first token."""
    if rendered.weights is None:
        return 0.0
    return sum(memoryview(rendered.weights.data).cast("f")[1:])
