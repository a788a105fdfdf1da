"""Files in the store are complete, named by their content, and gone only when nobody looks."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from app.clock import Clock
from app.db import blobs, durable
from app.db.blobs import FILES, AdapterStore
from tests.fakes.adapters import write_adapter


class MovableClock:
    """Wall time that moves when told to."""

    def __init__(self) -> None:
        self.at = datetime(2030, 1, 1, tzinfo=UTC)

    def now(self) -> datetime:
        return self.at

    def monotonic(self) -> float:
        return self.at.timestamp()


@pytest.fixture
def clock() -> MovableClock:
    return MovableClock()


@pytest.fixture
def store(tmp_path: Path, clock: MovableClock) -> AdapterStore:
    return AdapterStore(tmp_path / "store", clock)


def put(store: AdapterStore, seed: int = 0) -> str:
    with store.staging() as folder:
        write_adapter(folder, seed=seed)
        (folder / "leftover").write_bytes(b"x")
        return store.commit(folder)


def test_files_are_kept_under_their_digest(store: AdapterStore) -> None:
    digest = put(store)
    assert sorted(path.name for path in store.path(digest).iterdir()) == sorted(FILES)
    assert all(path.stat().st_mode & 0o777 == 0o444 for path in store.path(digest).iterdir())
    assert store.path(digest).parent.name == digest[:2]
    assert list(store.digests()) == [digest]
    assert list((store.root / "tmp").iterdir()) == []


def test_the_same_files_are_kept_once(store: AdapterStore) -> None:
    first = put(store)
    before = (store.path(first) / FILES[0]).stat().st_ino
    assert put(store) == first
    assert (store.path(first) / FILES[0]).stat().st_ino == before
    assert put(store, seed=1) != first
    assert len(list(store.digests())) == 2


def test_staging_is_gone_whatever_happens(store: AdapterStore) -> None:
    with pytest.raises(FileNotFoundError), store.staging() as folder:
        (folder / "new" / "x").write_bytes(b"x")
    assert list((store.root / "tmp").iterdir()) == []
    with pytest.raises(FileNotFoundError), store.staging() as folder:
        store.commit(folder)
    assert list((store.root / "tmp").iterdir()) == []
    assert list(store.digests()) == []


def test_losing_the_race_to_commit_is_no_failure(
    store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    renew = durable.renew
    seen = []

    def look_too_early(path: Path, clock: Clock) -> bool:
        seen.append(path)
        if len(seen) == 1:
            with monkeypatch.context() as patched:
                patched.setattr(durable, "renew", renew)
                put(store)
            return False
        return renew(path, clock)

    monkeypatch.setattr(durable, "renew", look_too_early)
    digest = put(store)
    assert list(store.digests()) == [digest]
    assert list((store.root / "tmp").iterdir()) == []


def test_only_old_files_are_discarded(store: AdapterStore, clock: MovableClock) -> None:
    digest = put(store)
    assert not store.discard(digest, older_than_s=60)
    clock.at += timedelta(seconds=61)
    put(store)  # committed again: young again
    assert not store.discard(digest, older_than_s=60)
    clock.at += timedelta(seconds=61)
    assert store.discard(digest, older_than_s=60)
    assert not store.path(digest).exists()
    assert list((store.root / "tmp").iterdir()) == []
    assert not store.discard(digest, older_than_s=60)


def test_files_committed_while_being_discarded_come_back(
    store: AdapterStore, clock: MovableClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = put(store)
    clock.at += timedelta(seconds=61)
    rename = blobs.os.rename

    def commit_first(source: Path, target: Path) -> None:
        monkeypatch.setattr(blobs.os, "rename", rename)
        put(store)
        rename(source, target)

    monkeypatch.setattr(blobs.os, "rename", commit_first)
    assert not store.discard(digest, older_than_s=60)
    assert store.path(digest).is_dir()


def test_what_a_crash_left_in_staging_is_swept(store: AdapterStore) -> None:
    (store.root / "tmp" / "crashed").mkdir(parents=True)
    (store.root / "tmp" / "crashed" / "archive").write_bytes(b"x")
    real = AdapterStore(store.root)  # the file system's own times
    assert real.sweep_staging(older_than_s=3600) == 0
    assert real.sweep_staging(older_than_s=0) == 1
    assert list((store.root / "tmp").iterdir()) == []


def test_an_empty_store_has_nothing_to_say(store: AdapterStore) -> None:
    assert list(store.digests()) == []
    assert store.sweep_staging(0) == 0
