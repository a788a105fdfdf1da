"""The weights that `adapters add` sends: a folder as a tar stream, or an archive as it is.

What comes in: a folder or an archive's path. What goes out: chunks whose sum is known before the
first is read, so that the gateway can refuse by size. Nothing is packed on disk or in memory.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from app.errors import InvalidRequest

FILES = ("adapter_config.json", "adapter_model.safetensors")
PROBE_FILE = "probe.json"
_SUFFIXES = {
    ".tar": "application/x-tar",
    ".tar.gz": "application/gzip",
    ".tgz": "application/gzip",
    ".zip": "application/zip",
}
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Upload:
    """What is sent: `paths` packed as a tar, or one archive as it stands."""

    paths: tuple[Path, ...]
    packed: bool
    media_type: str
    size: int

    def chunks(self) -> Iterator[bytes]:
        if not self.packed:
            yield from _read(self.paths[0])
            return
        for path in self.paths:
            member = tarfile.TarInfo(path.name)
            member.size = path.stat().st_size
            yield member.tobuf(
                tarfile.USTAR_FORMAT if member.size < 8 << 30 else tarfile.PAX_FORMAT
            )
            yield from _read(path)
            yield bytes(-member.size % tarfile.BLOCKSIZE)
        yield bytes(2 * tarfile.BLOCKSIZE)


def upload_of(source: Path) -> Upload:
    """The upload for a folder with an adapter's files, or for an archive of them.

    Raises:
        InvalidRequest: there is no adapter at `source`.
    """
    if source.is_dir():
        return _folder(source)
    if not source.is_file():
        raise InvalidRequest(f"there is no folder or archive {source}")
    for suffix, media_type in _SUFFIXES.items():
        if source.name.endswith(suffix):
            return Upload((source,), False, media_type, source.stat().st_size)
    raise InvalidRequest(f"{source} is neither a folder nor one of {', '.join(_SUFFIXES)}")


def _folder(source: Path) -> Upload:
    paths = tuple(source / name for name in FILES)
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise InvalidRequest(
            f"{source} has no {' and no '.join(missing)}; an adapter folder is what PEFT's "
            "save_pretrained writes"
        )
    if (source / PROBE_FILE).is_file():
        paths = (*paths, source / PROBE_FILE)
    sizes = [path.stat().st_size for path in paths]
    blocks = sum(tarfile.BLOCKSIZE + size + -size % tarfile.BLOCKSIZE for size in sizes)
    return Upload(paths, True, "application/x-tar", blocks + 2 * tarfile.BLOCKSIZE)


def _read(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk
