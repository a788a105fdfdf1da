"""What `adapters add` sends: a tar any reader understands, of exactly the announced size."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.cli.archive import FILES, upload_of
from app.errors import InvalidRequest


@given(sizes=st.tuples(st.integers(0, 3000), st.integers(0, 3000)))
def test_the_stream_is_a_tar_of_the_announced_size(
    tmp_path_factory: pytest.TempPathFactory, sizes: tuple[int, int]
) -> None:
    folder = tmp_path_factory.mktemp("adapter")
    for name, size in zip(FILES, sizes, strict=True):
        (folder / name).write_bytes(b"x" * size)
    (folder / "README.md").write_text("not sent")
    upload = upload_of(folder)
    sent = b"".join(upload.chunks())
    assert len(sent) == upload.size
    with tarfile.open(fileobj=io.BytesIO(sent), mode="r:") as archive:
        assert {m.name: m.size for m in archive} == dict(zip(FILES, sizes, strict=True))


@pytest.mark.parametrize(
    ("name", "media_type"),
    [
        ("a.tar", "application/x-tar"),
        ("a.tar.gz", "application/gzip"),
        ("a.tgz", "application/gzip"),
        ("a.zip", "application/zip"),
    ],
)
def test_an_archive_is_sent_as_it_is(tmp_path: Path, name: str, media_type: str) -> None:
    (tmp_path / name).write_bytes(b"whatever")
    upload = upload_of(tmp_path / name)
    assert (upload.media_type, upload.size) == (media_type, 8)
    assert b"".join(upload.chunks()) == b"whatever"


def test_what_is_no_adapter_is_said_plainly(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="no folder or archive"):
        upload_of(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(InvalidRequest, match="neither a folder nor one of"):
        upload_of(tmp_path / "notes.txt")
    with pytest.raises(InvalidRequest, match=r"no adapter_config\.json and no adapter_model"):
        upload_of(tmp_path)
