"""Rows of files and uploads on both databases, and what is collected when."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from app.control import files, uploads
from app.control.tasks.collect_files import CollectFiles
from app.control.uploads import UploadStatus
from app.db.engine import Database
from app.db.file_store import FileStore
from app.domain import File, JobKind
from app.errors import BodyTooLarge, Conflict, NotFound
from app.jobs import queue
from tests.contract.registry import MovableClock

YOUNG_S = 60.0


@pytest.fixture
def clock() -> MovableClock:
    return MovableClock()


@pytest.fixture
def store(tmp_path: Path, clock: MovableClock) -> FileStore:
    return FileStore(tmp_path / "files", clock)


@pytest.fixture
def collect(db: Database, store: FileStore, clock: MovableClock) -> CollectFiles:
    return CollectFiles(db, store, clock, older_than_s=YOUNG_S)


async def put(
    db: Database, store: FileStore, clock: MovableClock, content: bytes, **fields: Any
) -> File:
    fields = {"key_id": "key-1", "filename": "a", "purpose": "fine-tune"} | fields
    with store.incoming(1000) as incoming:
        incoming.write(content)
        digest = store.commit(incoming)
    async with db.begin() as session:
        return await files.create(session, clock, size=len(content), digest=digest, **fields)


async def delete(db: Database, clock: MovableClock, file: File) -> None:
    async with db.begin() as session:
        await files.delete(session, clock, file.id, file.key_id)


async def submit(db: Database, clock: MovableClock, **named: str | None) -> str:
    spec = {"training_file": "file-none", "validation_file": None} | named
    async with db.begin() as session:
        new = queue.NewJob(JobKind.FINE_TUNE, "key-1", spec)
        return (await queue.submit(session, clock, new)).id


def kept(store: FileStore, file: File) -> bool:
    return store.path(file.digest).exists()


async def test_bytes_go_with_the_last_file_that_has_them(
    db: Database, store: FileStore, clock: MovableClock, collect: CollectFiles
) -> None:
    one, two = [await put(db, store, clock, b"same", key_id=f"key-{n}") for n in (1, 2)]
    await delete(db, clock, one)
    clock.forward(YOUNG_S)
    assert (await collect.activate())["collected"] == 0
    await delete(db, clock, two)
    assert (await collect.activate())["collected"] == 1
    assert not kept(store, one)
    assert (await collect.activate())["stored"] == 0


async def test_bytes_without_a_row_are_kept_while_one_may_come(
    db: Database, store: FileStore, clock: MovableClock, collect: CollectFiles
) -> None:
    with store.incoming(1000) as incoming:
        incoming.write(b"soon")
        digest = store.commit(incoming)
    clock.forward(YOUNG_S - 1)
    assert (await collect.activate())["collected"] == 0
    clock.forward(1)
    assert (await collect.activate())["collected"] == 1
    assert not store.path(digest).exists()


@pytest.mark.parametrize("field", ["training_file", "validation_file"])
async def test_a_deleted_file_stays_while_a_job_needs_it(
    db: Database, store: FileStore, clock: MovableClock, collect: CollectFiles, field: str
) -> None:
    file = await put(db, store, clock, b"lines")
    job = await submit(db, clock, **{field: file.id})
    await delete(db, clock, file)
    clock.forward(10 * YOUNG_S)
    await collect.activate()
    assert kept(store, file)
    async with db.read() as session:
        assert await files.for_job(session, file.id) == file
        with pytest.raises(NotFound):
            await files.get(session, clock, file.id, None)
    async with db.begin() as session:
        await queue.request_pause(session, clock, job)
    await collect.activate()
    assert kept(store, file), "a paused job goes on some day"
    async with db.begin() as session:
        await queue.request_cancel(session, clock, job)
    assert (await collect.activate())["collected"] == 1
    assert not kept(store, file)
    async with db.read() as session:
        with pytest.raises(NotFound, match="any more"):
            await files.for_job(session, file.id)


async def test_a_file_whose_time_is_over_is_gone_at_once(
    db: Database, store: FileStore, clock: MovableClock, collect: CollectFiles
) -> None:
    file = await put(db, store, clock, b"lines", expires_after_s=3600)
    other = await put(db, store, clock, b"others", purpose="batch")
    assert other.expires_at == clock.now() + timedelta(days=30)
    clock.forward(3600)
    async with db.read() as session:
        with pytest.raises(NotFound):
            await files.get(session, clock, file.id, "key-1")
        assert (await files.list_(session, clock, None)).data == (other,)
    report = await collect.activate()
    assert (report["expired"], report["collected"]) == (1, 1)
    assert (await collect.activate())["expired"] == 0
    assert kept(store, other)


async def test_a_deleted_file_has_a_place_in_a_list_for_a_while(
    db: Database, store: FileStore, clock: MovableClock, collect: CollectFiles
) -> None:
    made = [await put(db, store, clock, bytes([n])) for n in range(3)]
    await delete(db, clock, made[1])
    await collect.activate()
    async with db.read() as session:
        page = await files.list_(session, clock, "key-1", after=made[1].id)
    assert page.data == (made[0],)
    assert not page.has_more


async def test_what_a_crash_left_behind(
    db: Database, store: FileStore, clock: MovableClock, collect: CollectFiles
) -> None:
    """Half a file, and parts of an upload that nobody remembers."""
    with store.incoming(1000) as incoming:
        store.keep_part(incoming, "upload-forgotten", "part-1")
    (store.root / "tmp" / "0123").write_bytes(b"half")
    clock.forward(10**9)
    report = await collect.activate()
    assert (report["staging"], report["uploads"]) == (1, 1)
    assert [path for path in store.root.rglob("*") if path.is_file()] == []


async def begun(db: Database, clock: MovableClock) -> str:
    async with db.begin() as session:
        upload = await uploads.create(
            session,
            clock,
            key_id="key-1",
            filename="a",
            purpose="fine-tune",
            mime_type="text/jsonl",
            size=10,
        )
    return upload.id


async def test_an_upload_ends_by_its_age(
    db: Database, store: FileStore, clock: MovableClock, collect: CollectFiles
) -> None:
    upload = await begun(db, clock)
    with store.incoming(1000) as incoming:
        incoming.write(b"0123456789")
        store.keep_part(incoming, upload, "part-1")
    async with db.begin() as session:
        await uploads.add_part(session, clock, upload, "key-1", part_id="part-1", size=10)
    clock.forward(uploads.LIFETIME_S - 1)
    await collect.activate()
    assert store.uploads(0) == [upload], "it may still be completed"
    clock.forward(1)
    async with db.begin() as session:
        assert (await uploads.show(session, clock, upload, None)).status is UploadStatus.EXPIRED
        with pytest.raises(Conflict, match="is expired"):
            await uploads.complete(session, clock, upload, "key-1", digest="0" * 64)
        with pytest.raises(Conflict, match="is expired"):
            await uploads.add_part(session, clock, upload, "key-1", part_id="part-2", size=1)
    clock.forward(10**9)
    await collect.activate()
    assert store.uploads(0) == []


async def test_only_one_end_of_an_upload_counts(db: Database, clock: MovableClock) -> None:
    upload = await begun(db, clock)
    async with db.begin() as session:
        done = await uploads.complete(session, clock, upload, "key-1", digest="0" * 64)
    assert done.file is not None
    async with db.begin() as session:
        with pytest.raises(Conflict, match="is completed"):
            await uploads.cancel(session, clock, upload, "key-1")
    async with db.read() as session:
        assert await uploads.show(session, clock, upload, "key-1") == done


async def test_an_upload_has_no_endless_parts(
    db: Database, clock: MovableClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = await begun(db, clock)
    monkeypatch.setattr(uploads, "MAX_PARTS", 2)
    async with db.begin() as session:
        for part in ("part-1", "part-2"):
            await uploads.add_part(session, clock, upload, None, part_id=part, size=0)
        with pytest.raises(BodyTooLarge, match="has 2 parts"):
            await uploads.add_part(session, clock, upload, None, part_id="part-3", size=0)
