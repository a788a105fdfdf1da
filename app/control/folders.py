"""Copies an adapter's two files, and a probe beside them, from a folder on this machine.

What comes in: a path someone asked for and the folders they may ask for. What goes out: copies.
The path is resolved first and then walked from its allowed root without following any link, so a
link put there in between leads to a refusal and not somewhere else. Blocking: run in a thread.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from app.control.inspect_probe import PROBE_FILE
from app.control.interruptible import Check
from app.db.blobs import FILES, WEIGHTS_FILE
from app.db.faults import NO_ROOM
from app.errors import AdapterRejected, Fault, InvalidRequest, NotFound, SourceUnavailable
from app.strict_json import shown

PARAM = "source.path"
_CHUNK = 1 << 20


def copy_adapter(
    path: Path, roots: Sequence[Path], into: Path, *, max_bytes: int, check: Check
) -> None:
    """Copy the files of the folder `path`, which must lie under one of `roots`.

    Raises:
        InvalidRequest: the path is not one that may be asked for.
        NotFound: there is no such folder.
        AdapterRejected: the folder holds no adapter, or too large a one.
        SourceUnavailable: the files cannot be read.
    """
    allowed = [Path(os.path.realpath(root)) for root in roots]
    folder = _resolved(path, path, allowed)
    try:
        if not folder.is_dir():
            raise NotFound(f"There is no folder {shown(str(path))}.", param=PARAM)
        _check_present(folder)
        left = max_bytes
        probe = (PROBE_FILE,) if (folder / PROBE_FILE).exists() else ()
        for name in (*FILES, *probe):
            real = _resolved(path, folder / name, allowed)
            with _opened(real, allowed) as source:
                left = _copy(source, into / name, left, max_bytes, check)
    except OSError as exc:
        if exc.errno in NO_ROOM:
            raise  # that was the copy, not what is copied
        reason = exc.strerror or type(exc).__name__
        raise SourceUnavailable(f"{shown(str(path))} cannot be read: {reason}.") from exc


def _resolved(asked: Path, path: Path, allowed: Sequence[Path]) -> Path:
    """Where the path really leads, links followed; refused when that is outside."""
    try:
        real = Path(os.path.realpath(path)) if path.is_absolute() else None
    except (OSError, ValueError):  # a NUL, a loop of links
        real = None
    if real is None or not any(real.is_relative_to(root) for root in allowed):
        raise InvalidRequest(
            f"{shown(str(asked))} is not a folder that adapters may be taken from: give the "
            "absolute path of one under LORAGATE_IMPORT_DIRS, or upload an archive.",
            param=PARAM,
        )
    return real


def _check_present(folder: Path) -> None:
    missing = [name for name in FILES if not (folder / name).is_file()]
    if not missing:
        return
    faults = [Fault(name, "missing", "a file") for name in missing]
    if WEIGHTS_FILE in missing and (folder / "adapter_model.bin").exists():
        faults = [Fault("adapter_model.bin", "a pickle", WEIGHTS_FILE)]
    raise AdapterRejected(faults)


@contextmanager
def _opened(real: Path, allowed: Sequence[Path]) -> Iterator[IO[bytes]]:
    """Open a resolved file, walking down from its root and following nothing."""
    root = next(root for root in allowed if real.is_relative_to(root))
    at = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        *folders, name = real.relative_to(root).parts
        for part in folders:
            inside = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=at)
            os.close(at)
            at = inside
        # O_NONBLOCK: opening a named pipe would wait for its writer.
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=at)
    finally:
        os.close(at)
    with os.fdopen(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise AdapterRejected([Fault(real.name, "not a regular file", "a file")])
        yield file


def _copy(source: IO[bytes], to: Path, left: int, max_bytes: int, check: Check) -> int:
    with to.open("xb") as file:
        while chunk := source.read(_CHUNK):
            check()
            left -= len(chunk)
            if left < 0:
                allowed = f"at most {max_bytes} bytes"
                raise AdapterRejected([Fault("size", f"over {max_bytes} bytes", allowed)])
            file.write(chunk)
    return left
