"""What both stores ask of a disk: to keep names through a power failure, and to tell ages.

What comes in: paths. What goes out: nothing but what the disk then holds. A path's modification
time is when it was last stamped, by the store's own clock. All of it blocks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from app.clock import Clock


def fsync(path: Path) -> None:
    """Make a file's bytes, or a folder's names, safe from a power failure."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_folder(folder: Path) -> None:
    """Make a folder, and make its name survive a power failure."""
    folder.mkdir(parents=True, exist_ok=True)
    fsync(folder.parent)


def entries(folder: Path) -> list[Path]:
    """What is in a folder, in the order of names; nothing if there is no such folder."""
    try:
        with os.scandir(folder) as found:
            return sorted(Path(entry.path) for entry in found)
    except (FileNotFoundError, NotADirectoryError):
        return []


def digests(root: Path) -> Iterator[str]:
    """The names of what a store keeps under `root/<digest[:2]>/<digest>`."""
    for shard in entries(root):
        if len(shard.name) == 2:
            yield from (entry.name for entry in entries(shard) if len(entry.name) == 64)


def stamp(path: Path, clock: Clock) -> None:
    """Let a path count as just committed.

    Raises:
        FileNotFoundError: it is not there.
    """
    now = clock.now().timestamp()
    os.utime(path, (now, now))


def renew(path: Path, clock: Clock) -> bool:
    """`stamp`, or False if it is not there."""
    try:
        stamp(path, clock)
    except FileNotFoundError:
        return False
    return True


def aged(path: Path, clock: Clock, older_than_s: float) -> bool:
    """Whether it was last stamped that long ago. A missing one has no age."""
    try:
        return clock.now().timestamp() - path.stat().st_mtime >= older_than_s
    except FileNotFoundError:
        return False
