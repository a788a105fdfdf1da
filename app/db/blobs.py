"""The adapter store: weights on disk, named by what they are.

What comes in: a staged folder with an adapter's two files. What goes out: a digest, and the path
of the folder that holds exactly these files from then on. Knows nothing of adapters' names or of
what the files mean.

    root/tmp/<random>/            being written; gone when its `staging()` ends
    root/<digest[:2]>/<digest>/   complete, read-only, on disk for good

A folder's modification time is when it was last committed. `discard` spares the young ones, so a
registration that found its files already here keeps them until its row is written.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from app.clock import Clock, SystemClock
from app.db import durable
from app.db.faults import from_disk

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
FILES = (CONFIG_FILE, WEIGHTS_FILE)


class AdapterStore:
    """A folder of content-addressed adapters. Several gateways may share it."""

    def __init__(self, root: Path, clock: Clock | None = None) -> None:
        self.root = root
        self._clock = clock or SystemClock()
        self._tmp = root / "tmp"

    def path(self, digest: str) -> Path:
        """Where the files of `digest` are, or would be."""
        return self.root / digest[:2] / digest

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A private folder to write in, on the store's file system. Removed at the end.

        What the disk refuses inside, `commit` included, leaves as StorageUnavailable.
        """
        folder = self._tmp / secrets.token_hex(16)
        with from_disk():
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(mode=0o700)
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def commit(self, staged: Path) -> str:
        """Keep a staged folder's two files for good and return their digest.

        When this returns they survive a power failure. Identical files are kept once.
        """
        digest = digest_of(staged)
        target = self.path(digest)
        if durable.renew(target, self._clock):
            durable.fsync(target.parent)  # whoever put them there may not have come to it yet
            return digest
        complete = self._tmp / f"{digest}.{secrets.token_hex(8)}"
        complete.mkdir(mode=0o755)
        try:
            for name in FILES:
                os.replace(staged / name, complete / name)
                _seal(complete / name)
            durable.stamp(complete, self._clock)
            durable.fsync(complete)
            durable.make_folder(target.parent)
            try:
                os.rename(complete, target)
            except OSError:
                # Someone else committed the same files first; anything else is a real failure.
                if not durable.renew(target, self._clock):
                    raise
        finally:
            shutil.rmtree(complete, ignore_errors=True)
        durable.fsync(target.parent)
        return digest

    def discard(self, digest: str, *, older_than_s: float) -> bool:
        """Delete the files of `digest` unless they were committed within `older_than_s`.

        They are moved out of sight in one step before they are looked at, so a commit that
        comes later starts afresh, and one that came just before is seen and gets them back.
        """
        target = self.path(digest)
        if not durable.aged(target, self._clock, older_than_s):
            return False
        doomed = self._tmp / f"{digest}.{secrets.token_hex(8)}"
        self._tmp.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(target, doomed)
        except FileNotFoundError:
            return False
        if not durable.aged(doomed, self._clock, older_than_s):
            with suppress(OSError):  # committed anew meanwhile: that copy stays, ours goes
                os.rename(doomed, target)
                return False
        shutil.rmtree(doomed, ignore_errors=True)
        return True

    def digests(self) -> Iterator[str]:
        """Every digest in the store."""
        return (found for found in durable.digests(self.root) if self.path(found).is_dir())

    def sweep_staging(self, older_than_s: float) -> int:
        """Remove what crashed writers left in staging; returns how many folders."""
        stale = [entry for entry in durable.entries(self._tmp) if self._idle(entry, older_than_s)]
        for entry in stale:
            shutil.rmtree(entry, ignore_errors=True)
        return len(stale)

    def _idle(self, folder: Path, older_than_s: float) -> bool:
        """Whether it is a folder in which nothing changed for that long."""
        if folder.is_symlink() or not folder.is_dir():
            return False
        try:
            changed = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
        except FileNotFoundError:
            return False
        return self._clock.now().timestamp() - changed >= older_than_s


def digest_of(folder: Path) -> str:
    """What the folder's adapter is called in a store: made of its two files, and no others."""
    files = [[name, _sha256(folder / name)] for name in sorted(FILES)]
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _seal(path: Path) -> None:
    path.chmod(0o444)
    durable.fsync(path)
