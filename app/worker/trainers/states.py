"""What a run leaves on disk: who it is, its newest state, and adapters written for sampling.

What comes in: folders an engine filled. What goes out: the same, whole or not at all. Every
method may raise StorageUnavailable and is called off the event loop. It must not know: engines,
the order of ops.

    root/{run}/run.json              base, adapter and the greatest fence seen
    root/{run}/state-{seq}/          manifest.json, and `engine/` as the engine wrote it
    root/{run}/adapters/{name}/      a PEFT folder
    root/{run}/.tmp-*                being written, or being deleted
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import msgspec

from app.errors import InvalidRequest, StorageUnavailable
from app.ops import Lora, SavedFile
from app.worker.trainers.oplog import Done

T = TypeVar("T")

#: What runs, adapters for sampling and their files may be called: one plain path segment.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@+-]{0,199}")
ENGINE = "engine"

_RECORD, _MANIFEST, _ADAPTERS, _TMP = "run.json", "manifest.json", "adapters", ".tmp-"
_STATE = re.compile(r"state-(\d+)")
_DISK = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EIO,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EFBIG,
    errno.ESTALE,
}


class Record(msgspec.Struct, frozen=True):
    """Who a run is, known from when it is opened first."""

    base_model: str
    lora: Lora
    fence: int


class Manifest(msgspec.Struct, frozen=True):
    """What a state says beside the engine's files, whose SHA-256 are in `files`."""

    record: Record
    next_seq: int
    optim_steps: int
    outcomes: list[Done]
    files: dict[str, str] = {}


class States:
    """The folder of all runs. Several workers may share it, each with its own runs."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock: int | None = None

    def start(self) -> None:
        """Make the folder, and remove what a killed worker left half done.

        Every worker holds a shared lock; whoever gets it exclusively is alone, so nobody is
        writing what looks half done.
        """
        with from_disk():
            self.root.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.root / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            with suppress(BlockingIOError):
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for left in (*self.root.glob(f"{_TMP}*"), *self.root.glob(f"*/{_TMP}*")):
                    _remove(left)
            fcntl.flock(self._lock, fcntl.LOCK_SH)

    def close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def runs(self) -> Iterator[tuple[str, int]]:
        """Every run on disk and the number its next op would have; nothing is verified."""
        with from_disk(), suppress(FileNotFoundError, NotADirectoryError):
            for folder in sorted(self.root.iterdir()):
                if NAME.fullmatch(folder.name) and folder.is_dir():
                    yield folder.name, max(_seqs(folder), default=0) + 1

    def record(self, run: str) -> Record | None:
        """Who the run is, if it was ever opened here."""
        return _read(self._folder(run) / _RECORD, Record)

    def write_record(self, run: str, record: Record) -> None:
        """Keep who the run is; it survives a power failure when this returns."""
        folder = self._folder(run)
        with from_disk():
            folder.mkdir(parents=True, exist_ok=True)
            _sync(self.root)
            temporary = folder / f"{_TMP}{secrets.token_hex(8)}"
            try:
                temporary.write_bytes(msgspec.json.encode(record))
                _sync(temporary)
                temporary.rename(folder / _RECORD)
            finally:
                temporary.unlink(missing_ok=True)
            _sync(folder)

    def newest(self, run: str) -> tuple[Manifest, Path] | None:
        """The newest state that is whole, and the engine's folder in it."""
        folder = self._folder(run)
        for seq in sorted(_seqs(folder), reverse=True):
            state = folder / f"state-{seq}"
            manifest = _read(state / _MANIFEST, Manifest)
            if manifest is None:
                continue
            with suppress(FileNotFoundError), from_disk():
                if manifest.files == _digests(state / ENGINE):
                    return manifest, state / ENGINE
        return None

    def lend(self, run: str) -> Path:
        """An empty folder of the run, to be removed by whoever asked for it."""
        folder = self._folder(run) / f"{_TMP}{secrets.token_hex(8)}"
        with from_disk():
            folder.mkdir(parents=True)
        return folder

    @contextmanager
    def writing(self, run: str) -> Iterator[Path]:
        """An empty folder to write and commit; what is left of it at the end is removed."""
        folder = self.lend(run)
        try:
            with from_disk():
                yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def commit_state(self, run: str, written: Path, manifest: Manifest) -> None:
        """Make a written folder, with the engine's files in `engine/`, the run's only state."""
        with from_disk():
            folder = self._folder(run)
            whole = msgspec.structs.replace(manifest, files=_digests(written / ENGINE))
            (written / _MANIFEST).write_bytes(msgspec.json.encode(whole))
            _sync_tree(written)
            place = folder / f"state-{manifest.next_seq - 1}"
            _discard(place, folder)
            written.rename(place)
            _sync(folder)
            for seq in _seqs(folder):
                if seq != manifest.next_seq - 1:
                    _discard(folder / f"state-{seq}", folder)

    def commit_adapter(self, run: str, written: Path, name: str) -> list[SavedFile]:
        """Make a written folder the adapter `name`, in place of one of that name."""
        with from_disk():
            files = [
                SavedFile(file, (written / file).stat().st_size, digest)
                for file, digest in _digests(written).items()
            ]
            _sync_tree(written)
            place = self._folder(run) / _ADAPTERS / plain(name)
            place.parent.mkdir(exist_ok=True)
            _discard(place, self._folder(run))
            written.rename(place)
            _sync(place.parent)
            return files

    def file(self, run: str, name: str, file: str) -> Path | None:
        """A file of an adapter, if it is there."""
        path = self._folder(run) / _ADAPTERS / plain(name) / plain(file)
        return path if path.is_file() else None

    def delete(self, run: str) -> None:
        """Remove every trace of a run; out of sight at once, then for good."""
        with from_disk():
            _discard(self._folder(run), self.root)

    def _folder(self, run: str) -> Path:
        return self.root / plain(run)


@contextmanager
def from_disk() -> Iterator[None]:
    """Translate what a full or broken disk raises, through libraries of Rust and C++ too."""
    try:
        yield
    except Exception as exc:
        code = exc.errno if isinstance(exc, OSError) else None
        if code not in _DISK and "No space left" not in str(exc):
            raise
        reason = os.strerror(code or errno.ENOSPC)
        raise StorageUnavailable(
            f"The worker cannot write to its state folder: {reason}. "
            "Mend that on the worker's machine, or point LORAGATE_WORKER_STATE_DIR elsewhere."
        ) from exc


def plain(name: str) -> str:
    """The name, if it can be one path segment.

    Raises:
        InvalidRequest: it cannot.
    """
    if not NAME.fullmatch(name):
        raise InvalidRequest(
            f"{name[:80]!r} cannot be a name: up to 200 letters, digits and . _ : @ + - are "
            "allowed, a letter or digit first"
        )
    return name


def _seqs(folder: Path) -> list[int]:
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [int(found[1]) for name in names if (found := _STATE.fullmatch(name))]


def _read(path: Path, kind: type[T]) -> T | None:
    """A JSON file, or None when it is missing or not what it should be."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.DecodeError):
        return None


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by relative path."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            found[path.relative_to(folder).as_posix()] = digest
    return found


def _discard(folder: Path, aside: Path) -> None:
    """Delete a folder so that it is never there in part: it is moved `aside` first."""
    doomed = aside / f"{_TMP}{secrets.token_hex(8)}"
    with suppress(FileNotFoundError):
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync_tree(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
