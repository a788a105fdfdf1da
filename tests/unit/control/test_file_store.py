"""Bytes on disk: kept for good or not at all, and nothing left of what was given up."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.db.file_store import FileStore
from app.errors import BodyTooLarge
from tests.contract.registry import MovableClock

MOST = 1000


@pytest.fixture
def clock() -> MovableClock:
    return MovableClock()


@pytest.fixture
def store(tmp_path: Path, clock: MovableClock) -> FileStore:
    return FileStore(tmp_path / "files", clock)


def put(store: FileStore, content: bytes) -> str:
    with store.incoming(MOST) as incoming:
        incoming.write(content)
        return store.commit(incoming)


def on_disk(store: FileStore) -> list[str]:
    found = (path for path in store.root.rglob("*") if path.is_file())
    return sorted(str(path.relative_to(store.root)) for path in found)


def test_a_file_is_named_by_its_bytes(store: FileStore) -> None:
    digest = put(store, b"hello")
    assert digest == hashlib.sha256(b"hello").hexdigest()
    assert store.path(digest).read_bytes() == b"hello"
    assert store.path(digest).stat().st_mode & 0o777 == 0o444
    assert list(store.digests()) == [digest]
    assert put(store, b"hello") == digest
    assert on_disk(store) == [f"{digest[:2]}/{digest}"]


def test_what_is_not_kept_leaves_nothing(store: FileStore) -> None:
    with store.incoming(MOST) as incoming:
        incoming.write(b"hello")
    assert on_disk(store) == []
    with pytest.raises(ZeroDivisionError), store.incoming(MOST) as incoming:
        raise ZeroDivisionError
    assert on_disk(store) == []


def test_the_limit_is_a_byte_more_than_what_fits(store: FileStore) -> None:
    put(store, bytes(MOST))
    with store.incoming(MOST) as incoming:
        incoming.write(bytes(MOST))
        with pytest.raises(BodyTooLarge, match="over 1000 bytes"):
            incoming.write(b"x")
    assert len(on_disk(store)) == 1


def test_discard_spares_what_was_just_committed(store: FileStore, clock: MovableClock) -> None:
    digest = put(store, b"hello")
    clock.forward(59)
    assert not store.discard(digest, older_than_s=60)
    clock.forward(1)
    put(store, b"hello")  # the same again: as young as if it were new
    assert not store.discard(digest, older_than_s=60)
    clock.forward(60)
    assert store.renew(digest)
    assert not store.discard(digest, older_than_s=60)
    clock.forward(60)
    assert store.discard(digest, older_than_s=60)
    assert on_disk(store) == []
    assert not store.discard(digest, older_than_s=60)
    assert not store.renew(digest)


def test_a_commit_while_it_is_discarded_gets_it_back(
    store: FileStore, clock: MovableClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was old when `discard` looked, and renewed before it was moved out of sight."""
    digest = put(store, b"hello")
    clock.forward(60)
    rename = os.rename

    def renewed_first(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "rename", rename)
        store.renew(digest)
        rename(source, target)

    monkeypatch.setattr(os, "rename", renewed_first)
    assert not store.discard(digest, older_than_s=60)
    assert store.path(digest).read_bytes() == b"hello"


def test_what_a_crash_left_is_swept(store: FileStore, clock: MovableClock) -> None:
    digest = put(store, b"hello")
    left = store.root / "tmp" / "0123"
    left.write_bytes(b"half")
    now = clock.now().timestamp()
    os.utime(left, (now, now))
    clock.forward(59)
    assert store.sweep_staging(60) == 0
    clock.forward(1)
    assert store.sweep_staging(60) == 1
    assert on_disk(store) == [f"{digest[:2]}/{digest}"]


def test_an_empty_store_has_nothing(store: FileStore) -> None:
    assert list(store.digests()) == []
    assert store.sweep_staging(0) == 0
    assert store.uploads(0) == []


@given(pieces=st.lists(st.binary(max_size=50), min_size=1, max_size=6), data=st.data())
def test_parts_are_joined_in_the_order_asked(
    pieces: list[bytes], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    store = FileStore(tmp_path_factory.mktemp("files"))
    for number, piece in enumerate(pieces):
        with store.incoming(MOST) as incoming:
            incoming.write(piece)
            store.keep_part(incoming, "upload-1", f"part-{number}")
    order = data.draw(st.permutations(range(len(pieces))))
    whole = b"".join(pieces[number] for number in order)
    with store.incoming(MOST) as incoming:
        md5 = store.join_parts(
            "upload-1", [f"part-{number}" for number in order], incoming, lambda: None
        )
        digest = store.commit(incoming)
    assert md5 == hashlib.md5(whole).hexdigest()
    assert store.path(digest).read_bytes() == whole
    assert store.uploads(0) == ["upload-1"]
    store.drop_parts("upload-1")
    assert on_disk(store) == [f"{digest[:2]}/{digest}"]
    assert store.uploads(0) == []


def test_the_last_part_dropped_takes_its_folder_along(store: FileStore) -> None:
    for part in ("part-1", "part-2"):
        with store.incoming(MOST) as incoming:
            incoming.write(b"x")
            store.keep_part(incoming, "upload-1", part)
    store.drop_part("upload-1", "part-1")
    assert on_disk(store) == ["parts/upload-1/part-2"]
    store.drop_part("upload-1", "part-2")
    store.drop_part("upload-1", "part-2")
    assert not (store.root / "parts" / "upload-1").exists()
