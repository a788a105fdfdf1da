"""What a simulated replica costs in time and holds in memory, read from a file.

What comes in: `sim_figures.toml`, which says where each number comes from. What goes out: one
frozen `Figures`. It must not know how the numbers are used.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FILE = Path(__file__).parent.parent / "sim_figures.toml"


@dataclass(frozen=True, slots=True)
class Figures:
    """One replica. Times are milliseconds of its own clock."""

    base_ms: float
    prefill_ms_per_token: float
    decode_ms_per_sequence: float
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_tokens: int
    blocks: int
    gpu_slots: int
    cpu_slots: int
    disk_load_ms: float
    slot_swap_ms: float

    def step_ms(self, prefill_tokens: int, decoding: int) -> float:
        """What one step takes, adapters aside."""
        prefill_ms = self.prefill_ms_per_token * prefill_tokens
        return self.base_ms + prefill_ms + self.decode_ms_per_sequence * decoding


@cache
def read(path: Path = FILE) -> Figures:
    """The figures of a file; its tables only sort them for the reader."""
    tables = tomllib.loads(path.read_text())
    return Figures(**{name: value for table in tables.values() for name, value in table.items()})
