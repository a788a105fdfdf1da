"""From a source of weights to checked files in the store.

What comes in: a `Source`, the bases it may be for, and the store. What goes out: `Admitted`, whose
digest names files that are on disk for good; or an error, and nothing left behind. No SQL: no
transaction is open while bytes move.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from app.control.archives import PACKING_BYTES, unpack
from app.control.folders import copy_adapter
from app.control.hub import fetch_adapter
from app.control.inspect_adapter import (
    CONFIG,
    MAX_CONFIG_BYTES,
    AdapterFacts,
    inspect,
    is_base,
    named_base,
)
from app.control.inspect_probe import (
    MAX_PROBE_BYTES,
    PROBE_FILE,
    read_probe,
    vocab_size_of,
)
from app.control.interruptible import Check, in_thread
from app.db.blobs import CONFIG_FILE, WEIGHTS_FILE, AdapterStore
from app.domain import BaseModel, Pool, Probe
from app.errors import AdapterRejected, BodyTooLarge, Fault, InvalidRequest
from app.settings import Settings
from app.strict_json import shown

_CHUNK = 1 << 20


class Source(Protocol):
    """A place weights come from."""

    async def fetch(self, folder: Path, settings: Settings) -> str:
        """Put the adapter's files into `folder`; the answer says where they are from."""


@dataclass(frozen=True, slots=True)
class PathSource:
    """A folder on the gateway's machine, under one of `LORAGATE_IMPORT_DIRS`.

    `roots` replaces that allow-list for folders the program itself brings (the demo); it must
    never come from a request.
    """

    path: Path
    roots: tuple[Path, ...] | None = None

    async def fetch(self, folder: Path, settings: Settings) -> str:
        roots = settings.import_dirs if self.roots is None else self.roots
        await in_thread(
            lambda check: copy_adapter(
                self.path, roots, folder, max_bytes=settings.max_adapter_bytes, check=check
            )
        )
        return f"path:{self.path}"


@dataclass(frozen=True, slots=True)
class ArchiveSource:
    """An uploaded archive: `application/x-tar`, `application/gzip` or `application/zip`."""

    chunks: AsyncIterator[bytes]
    media_type: str

    async def fetch(self, folder: Path, settings: Settings) -> str:
        archive = folder / "archive"
        most = settings.max_adapter_bytes
        await self._receive(archive, most)

        def work(check: Check) -> None:
            with archive.open("rb") as file:
                unpack(file, self.media_type, folder, max_bytes=most, check=check)

        await in_thread(work)
        return f"upload:{self.media_type}"

    async def _receive(self, to: Path, most: int) -> None:
        received = 0
        waiting = bytearray()
        with to.open("xb") as file:
            async for chunk in self.chunks:
                received += len(chunk)
                if received > most + PACKING_BYTES:
                    raise BodyTooLarge(f"The archive is over {most} bytes.")
                waiting += chunk
                if len(waiting) >= _CHUNK:
                    await asyncio.to_thread(file.write, bytes(waiting))
                    waiting.clear()
            await asyncio.to_thread(file.write, bytes(waiting))


@dataclass(frozen=True, slots=True)
class HubSource:
    """A repository on the configured Hugging Face endpoint. `revision`: branch, tag or commit."""

    repo: str
    revision: str | None = None

    async def fetch(self, folder: Path, settings: Settings) -> str:
        commit = await fetch_adapter(self.repo, self.revision, folder, settings)
        return f"hub:{self.repo}@{commit}"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A base the weights may be for, and the pool that would serve them."""

    base: BaseModel
    pool: Pool


@dataclass(frozen=True, slots=True)
class Admitted:
    """Weights in the store: their digest, what they are, whence, and the base they fit.

    `probe` came beside them. It is no part of the digest and not in the store.
    """

    digest: str
    facts: AdapterFacts
    base_model: str
    source: str
    probe: Probe | None


async def admit(
    source: Source, *, candidates: Sequence[Candidate], store: AdapterStore, settings: Settings
) -> Admitted:
    """Fetch, check and store the weights.

    With one candidate they are checked for that; with more, for the one their
    adapter_config.json names.
    """
    with store.staging() as folder:
        whence = await source.fetch(folder, settings)
        chosen, facts = await in_thread(partial(_inspect, folder, candidates))
        probe = await in_thread(lambda _: _probe_in(folder, chosen.base))
        digest = await in_thread(lambda _: store.commit(folder))
    return Admitted(digest, facts, chosen.base.name, whence, probe)


def _inspect(
    folder: Path, candidates: Sequence[Candidate], check: Check
) -> tuple[Candidate, AdapterFacts]:
    check()
    config, weights = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    size = config.stat().st_size
    if size > MAX_CONFIG_BYTES:
        allowed = f"at most {MAX_CONFIG_BYTES} bytes"
        raise AdapterRejected([Fault(CONFIG, f"{size} bytes", allowed)])
    raw = config.read_bytes()
    chosen = _choose(raw, candidates)
    with weights.open("rb") as file:
        facts = inspect(raw, file, weights.stat().st_size, base=chosen.base, pool=chosen.pool)
    return chosen, facts


def _probe_in(folder: Path, base: BaseModel) -> Probe | None:
    path = folder / PROBE_FILE
    if not path.is_file():
        return None
    size = path.stat().st_size
    if size > MAX_PROBE_BYTES:
        allowed = f"at most {MAX_PROBE_BYTES} bytes"
        raise AdapterRejected([Fault(PROBE_FILE, f"{size} bytes", allowed)])
    return read_probe(path.read_bytes(), vocab_size_of(base.config))


def _choose(config_raw: bytes, candidates: Sequence[Candidate]) -> Candidate:
    if len(candidates) == 1:
        return candidates[0]
    named = named_base(config_raw)
    fitting = [c for c in candidates if named is not None and is_base(named, c.base)]
    if len(fitting) != 1:
        names = ", ".join(candidate.base.name for candidate in candidates)
        raise InvalidRequest(
            f"Say which base_model the weights are for: adapter_config.json names "
            f"{shown(named)}, and there are pools for {names}.",
            param="base_model",
        )
    return fitting[0]
