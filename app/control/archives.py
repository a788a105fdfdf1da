"""Takes an adapter's two files out of an archive someone sent, a probe, and nothing else.

What comes in: a tar, tar.gz or zip file, and an empty folder. What goes out: adapter_config.json
and adapter_model.safetensors in that folder, and probe.json if there is one beside them; or
`AdapterRejected`. Every name in the archive is checked, the unwanted members' too; only these
files are written, under names of our own.

Sizes are counted while inflating: what an archive's headers say of them is not believed. Blocking:
run in a thread.
"""

from __future__ import annotations

import errno
import gzip
import io
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Protocol

from app.control.inspect_probe import PROBE_FILE
from app.control.interruptible import Check
from app.db.blobs import FILES
from app.errors import AdapterRejected, Fault
from app.strict_json import shown

TAR, GZIP, ZIP = "application/x-tar", "application/gzip", "application/zip"

MAX_MEMBERS = 1000
MAX_NAME = 512
#: What packing may add to the weights: headers, padding, small files beside them.
PACKING_BYTES = 4 << 20
_CHUNK = 1 << 16
#: The libraries read a tar's long names and a zip's directory whole, however long they claim to
#: be; no single read may be longer than this.
_TAR_READ, _ZIP_READ = 1 << 16, 1 << 20

_WANTED = (*FILES, PROBE_FILE)

#: What `torch.load` and its like would run code from.
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


def unpack(
    archive: IO[bytes], media_type: str, folder: Path, *, max_bytes: int, check: Check
) -> None:
    """Write the adapter's files into `folder`.

    `max_bytes` bounds what the archive may inflate to. `check` is called before each piece of
    work and may raise, to stop.

    Raises:
        AdapterRejected: the archive is broken or hostile, or holds no adapter.
    """
    if media_type == GZIP:
        with _translated(), _inflated(archive, folder, max_bytes, check) as tar:
            _take(_tar_members(tar), folder, _Budget(max_bytes, check))
    elif media_type == TAR:
        with _translated():
            _take(_tar_members(archive), folder, _Budget(max_bytes, check))
    elif media_type == ZIP:
        with _translated():
            _take(_zip_members(archive), folder, _Budget(max_bytes, check))
    else:
        raise _refused("media type", shown(media_type), f"{TAR}, {GZIP} or {ZIP}")


@dataclass(frozen=True, slots=True)
class _Member:
    """One entry: its name, whether it is a file, a folder or something else, how to read it."""

    name: str
    kind: str
    open: Callable[[], IO[bytes]]


class _Budget:
    """Counts bytes, and stops at the limit or when told to."""

    def __init__(self, max_bytes: int, check: Check) -> None:
        self._most = max_bytes
        self._left = max_bytes
        self._check = check

    def spend(self, count: int) -> None:
        self._check()
        self._left -= count
        if self._left < 0:
            raise _refused("size", f"over {self._most} bytes", f"at most {self._most} bytes")


class _Guarded(io.RawIOBase):
    """A file that refuses to be read in huge pieces."""

    def __init__(self, file: IO[bytes], most: int) -> None:
        self._file = file
        self._most = most

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def read(self, size: int | None = -1) -> bytes:
        to_the_end = size is None or size < 0
        data = self._file.read(self._most + 1 if to_the_end else min(size or 0, self._most + 1))
        if len(data) > self._most:
            raise _refused("header", f"over {self._most} bytes", f"at most {self._most} bytes")
        return data


def _take(members: Iterator[_Member], folder: Path, budget: _Budget) -> None:
    names: set[str] = set()
    found: dict[str, str] = {}
    for member in members:
        budget.spend(0)
        name = _checked_name(member, names)
        names.add(name)
        if len(names) > MAX_MEMBERS:
            raise _refused("members", f"over {MAX_MEMBERS}", f"at most {MAX_MEMBERS}")
        inside, _, last = name.rpartition("/")
        if member.kind != "file" or last not in _WANTED or "/" in inside:
            continue
        if last in found:
            raise _refused(last, f"{found[last] or '.'} and {inside or '.'}", "in one place")
        found[last] = inside
        with member.open() as source:
            _write(source, folder / last, budget)
    missing = [file for file in FILES if file not in found]
    if missing:
        raise AdapterRejected(
            [
                Fault(f"archive: {file}", "missing", "at the top, or in one folder")
                for file in missing
            ]
        )
    if len(set(found.values())) > 1:
        raise _refused("folders", sorted(set(found.values())), "all files in one")


def _checked_name(member: _Member, names: set[str]) -> str:
    """The member's name in one form, or AdapterRejected."""
    raw = member.name
    parts = [part for part in raw.split("/") if part not in ("", ".")]
    name = "/".join(parts)
    if member.kind == "special":
        raise _refused("member", shown(raw), "files and folders; no links, no devices")
    if raw.startswith("/") or ".." in parts or "\\" in raw or not raw.isprintable() or ":" in raw:
        raise _refused("member", shown(raw), "a relative name inside the archive")
    if len(raw) > MAX_NAME:
        raise _refused("member", shown(raw), f"a name of at most {MAX_NAME} characters")
    if name in names and member.kind == "file":
        raise _refused("member", shown(raw), "each name once")
    if member.kind == "file" and name.lower().endswith(PICKLES):
        raise _refused("member", shown(raw), "no pickles: weights come as safetensors")
    return name


def _write(source: _Readable, path: Path, budget: _Budget) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(fd, "wb") as file:
        while chunk := source.read(_CHUNK):
            budget.spend(len(chunk))
            file.write(chunk)


@contextmanager
def _inflated(
    archive: IO[bytes], folder: Path, max_bytes: int, check: Check
) -> Iterator[IO[bytes]]:
    """The tar inside a gzip, as a file that can be skipped through without inflating it again."""
    path = folder / "inflated.tar"
    try:
        with gzip.GzipFile(fileobj=archive, mode="rb") as source:
            _write(source, path, _Budget(max_bytes + PACKING_BYTES, check))
        with path.open("rb") as tar:
            yield tar
    finally:
        path.unlink(missing_ok=True)


def _tar_members(archive: IO[bytes]) -> Iterator[_Member]:
    guarded = _Guarded(archive, _TAR_READ)
    with tarfile.open(
        fileobj=guarded, mode="r:", encoding="utf-8", errors="strict", errorlevel=2
    ) as tar:
        for entry in tar:
            plain = entry.isreg() and not entry.issparse()
            kind = "file" if plain else "folder" if entry.isdir() else "special"
            yield _Member(entry.name, kind, partial(_tar_file, tar, entry))


def _tar_file(tar: tarfile.TarFile, entry: tarfile.TarInfo) -> IO[bytes]:
    file = tar.extractfile(entry)
    assert file is not None  # it is a regular file
    return file


def _zip_members(archive: IO[bytes]) -> Iterator[_Member]:
    with zipfile.ZipFile(_Guarded(archive, _ZIP_READ)) as packed:
        for info in packed.infolist():
            if info.flag_bits & 0x1:
                raise _refused("member", shown(info.filename), "no encryption")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise _refused("member", shown(info.filename), "stored or deflated")
            yield _Member(info.filename, _zip_kind(info), partial(packed.open, info))


def _zip_kind(info: zipfile.ZipInfo) -> str:
    # The upper half holds the Unix mode, when a Unix program made the archive.
    format_ = stat.S_IFMT(info.external_attr >> 16)
    if info.is_dir() and format_ in (0, stat.S_IFDIR):
        return "folder"
    return "file" if format_ in (0, stat.S_IFREG) and not info.is_dir() else "special"


@contextmanager
def _translated() -> Iterator[None]:
    """Every way in which the libraries say that an archive is broken, as one."""
    try:
        yield
    except OSError as exc:
        # gzip's own errors have no errno; a nonsense offset is an invalid argument to seek.
        # A full disk is neither, and no fault of the archive.
        if exc.errno not in (None, errno.EINVAL, errno.EOVERFLOW):
            raise
        raise _broken(exc) from exc
    except _BROKEN as exc:
        raise _broken(exc) from exc


_BROKEN = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    zlib.error,
    struct.error,
    EOFError,
    IndexError,
    NotImplementedError,
    OverflowError,
    RecursionError,
    RuntimeError,
    ValueError,
)


def _broken(exc: Exception) -> AdapterRejected:
    return _refused("file", shown(str(exc)) or type(exc).__name__, "a whole archive of its type")


def _refused(what: str, found: object, allowed: object) -> AdapterRejected:
    return AdapterRejected([Fault(f"archive: {what}", found, allowed)])
