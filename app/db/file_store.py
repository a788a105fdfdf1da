"""The file store: uploaded and produced files on disk, named by what they are.

What comes in: bytes, as they arrive. What goes out: a digest, and the path of the file that holds
exactly these bytes from then on. Knows nothing of whose they are or of what they mean.

    root/tmp/<random>                   being written; gone when its `incoming()` ends
    root/parts/<upload id>/<part id>    a part of an upload, until the upload ends
    root/<digest[:2]>/<digest>          whole, read-only, on disk for good

A file's modification time is when it was last committed. `discard` spares the young ones, so
bytes that were found already here are kept until the row that needs them is written. All of it
blocks: call what moves bytes in a thread.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from app.clock import Clock, SystemClock
from app.db import durable
from app.db.faults import from_disk
from app.errors import BodyTooLarge

_NAME = "file store"
_CHUNK = 1 << 20


class Incoming:
    """A file being written, which is counted and hashed as it comes. Blocking."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.path = path
        self.bytes = 0
        self._max_bytes = max_bytes
        self._digest = hashlib.sha256()
        self._file = path.open("xb")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with suppress(OSError):  # what a full disk did not take is not wanted any more
            self._file.close()
        self.path.unlink(missing_ok=True)

    def write(self, data: bytes) -> None:
        """Add to the file.

        Raises:
            BodyTooLarge: it would be longer than allowed.
            StorageUnavailable: the disk does not take it.
        """
        self.bytes += len(data)
        if self.bytes > self._max_bytes:
            raise BodyTooLarge(f"The file is over {self._max_bytes} bytes, which is the most here.")
        self._digest.update(data)
        with from_disk(_NAME):
            self._file.write(data)

    def seal(self) -> str:
        """Make it read-only and safe from a power failure; answers its sha-256."""
        with from_disk(_NAME):
            self._file.flush()
            os.fchmod(self._file.fileno(), 0o444)
            os.fsync(self._file.fileno())
            self._file.close()
        return self._digest.hexdigest()


class FileStore:
    """A folder of content-addressed files. Several gateways may share it."""

    def __init__(self, root: Path, clock: Clock | None = None) -> None:
        self.root = root
        self._clock = clock or SystemClock()
        self._tmp = root / "tmp"
        self._parts = root / "parts"

    def path(self, digest: str) -> Path:
        """Where the bytes of `digest` are, or would be."""
        return self.root / digest[:2] / digest

    @contextmanager
    def incoming(self, max_bytes: int) -> Iterator[Incoming]:
        """A new file to write; gone at the end of the block unless it was kept by then."""
        with from_disk(_NAME):
            self._tmp.mkdir(parents=True, exist_ok=True)
            incoming = Incoming(self._tmp / secrets.token_hex(16), max_bytes)
        with incoming:
            yield incoming

    def commit(self, incoming: Incoming) -> str:
        """Keep a written file for good and return its digest.

        When this returns it survives a power failure. Identical bytes are kept once.
        """
        digest = incoming.seal()
        target = self.path(digest)
        with from_disk(_NAME):
            if not self.renew(digest):
                durable.stamp(incoming.path, self._clock)
                _move_durably(incoming.path, target)
            durable.fsync(target.parent)
        return digest

    def renew(self, digest: str) -> bool:
        """Let the file count as just committed, so that it stays for a while; False if not here."""
        return durable.renew(self.path(digest), self._clock)

    def discard(self, digest: str, *, older_than_s: float) -> bool:
        """Delete the file of `digest` unless it was committed within `older_than_s`.

        It is moved out of sight in one step before it is looked at, so a commit that comes later
        starts afresh, and one that came just before is seen and gets it back.
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
            os.rename(doomed, target)  # over a newer copy, if there is one: the same bytes
            return False
        doomed.unlink(missing_ok=True)
        return True

    def digests(self) -> Iterator[str]:
        """Every digest in the store."""
        return durable.digests(self.root)

    def sweep_staging(self, older_than_s: float) -> int:
        """Remove what crashed writers left behind; returns how many files."""
        stale = [
            entry
            for entry in durable.entries(self._tmp)
            if durable.aged(entry, self._clock, older_than_s)
        ]
        for entry in stale:
            entry.unlink(missing_ok=True)
        return len(stale)

    # uploads that come in parts

    def keep_part(self, incoming: Incoming, upload: str, part: str) -> None:
        """Keep a written file as a part of an upload, where it survives a power failure."""
        incoming.seal()
        with from_disk(_NAME):
            _move_durably(incoming.path, self._parts / upload / part)

    def join_parts(
        self, upload: str, parts: Sequence[str], incoming: Incoming, check: Callable[[], None]
    ) -> str:
        """Write parts one after another; answers the md5 of the whole.

        `check` is called between pieces and may raise, to stop.

        Raises:
            FileNotFoundError: the upload ended meanwhile.
        """
        md5 = hashlib.md5(usedforsecurity=False)
        for part in parts:
            with (self._parts / upload / part).open("rb") as file:
                while piece := file.read(_CHUNK):
                    check()
                    md5.update(piece)
                    incoming.write(piece)
        return md5.hexdigest()

    def drop_part(self, upload: str, part: str) -> None:
        """Delete one part."""
        (self._parts / upload / part).unlink(missing_ok=True)
        with suppress(OSError):  # not empty, or gone
            (self._parts / upload).rmdir()

    def drop_parts(self, upload: str) -> None:
        """Delete every part of an upload that ended."""
        shutil.rmtree(self._parts / upload, ignore_errors=True)

    def uploads(self, older_than_s: float) -> list[str]:
        """The uploads of which parts are here, but for those to which a part just came."""
        aged = [
            entry
            for entry in durable.entries(self._parts)
            if durable.aged(entry, self._clock, older_than_s)
        ]
        return [entry.name for entry in aged]


def _move_durably(source: Path, target: Path) -> None:
    """Rename, making the target's folder, so that neither name is lost with the power."""
    durable.make_folder(target.parent)
    os.replace(source, target)
    durable.fsync(target.parent)
