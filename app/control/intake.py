"""From a source of weights to checked files in the store.

What comes in: a `Source`, the bases it may be for, and the store. What goes out: `Admitted`, whose
digest names files that are on disk for good; or an error, and nothing left behind. No SQL: no
transaction is open while bytes move.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from app.control.inspect_adapter import AdapterFacts
from app.db.blobs import AdapterStore
from app.domain import BaseModel, Pool
from app.settings import Settings


@dataclass(frozen=True, slots=True)
class PathSource:
    """A folder on the gateway's machine, under one of `LORAGATE_IMPORT_DIRS`.

    `roots` replaces that allow-list for folders the program itself brings (the demo); it must
    never come from a request.
    """

    path: Path
    roots: tuple[Path, ...] | None = None

    def __str__(self) -> str:
        return f"path:{self.path}"


@dataclass(frozen=True, slots=True)
class ArchiveSource:
    """An uploaded archive: `application/x-tar`, `application/gzip` or `application/zip`."""

    chunks: AsyncIterator[bytes]
    media_type: str

    def __str__(self) -> str:
        return f"upload:{self.media_type}"


@dataclass(frozen=True, slots=True)
class HubSource:
    """A repository on the configured Hugging Face endpoint. `revision`: branch, tag or commit."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"hub:{self.repo}" + (f"@{self.revision}" if self.revision else "")


Source = PathSource | ArchiveSource | HubSource


@dataclass(frozen=True, slots=True)
class Candidate:
    """A base the weights may be for, and the pool that would serve them."""

    base: BaseModel
    pool: Pool


@dataclass(frozen=True, slots=True)
class Admitted:
    """Weights in the store: their digest, what they are, and the base they were checked for."""

    digest: str
    facts: AdapterFacts
    base_model: str


async def admit(
    source: Source, *, candidates: Sequence[Candidate], store: AdapterStore, settings: Settings
) -> Admitted:
    """Fetch, check and store the weights.

    With one candidate they are checked for that; with more, for the one their
    adapter_config.json names.
    """
    raise NotImplementedError
