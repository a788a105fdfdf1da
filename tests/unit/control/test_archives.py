"""Two files come out of an archive, or nothing does."""

from __future__ import annotations

import gzip
import io
import stat
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from app.control import archives
from app.control.archives import GZIP, MAX_MEMBERS, PACKING_BYTES, TAR, ZIP, unpack
from app.errors import AdapterRejected

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FILES = {CONFIG: b"{}", WEIGHTS: b"weights"}
MAX = 1 << 20


def tar_of(files: dict[str, bytes], *entries: tarfile.TarInfo) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for entry in entries:
            tar.addfile(entry, io.BytesIO(bytes(entry.size)))
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return out.getvalue()


def zip_of(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as packed:
        for name, content in files.items():
            packed.writestr(name, content)
    return out.getvalue()


def packed_as(media_type: str, files: dict[str, bytes]) -> bytes:
    if media_type == ZIP:
        return zip_of(files)
    raw = tar_of(files)
    return gzip.compress(raw) if media_type == GZIP else raw


def nothing() -> None:
    """Never stops."""


def unpacked(
    raw: bytes, media_type: str, max_bytes: int = MAX, check: Callable[[], None] = nothing
) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        inside = Path(folder, "in")
        inside.mkdir()
        try:
            unpack(io.BytesIO(raw), media_type, inside, max_bytes=max_bytes, check=check)
        finally:
            left = {path.name: path.read_bytes() for path in inside.iterdir()}
            assert left.keys() <= {*FILES, "probe.json"}
            assert list(Path(folder).iterdir()) == [inside]
        return left


def refusal(raw: bytes, media_type: str, max_bytes: int = MAX) -> str:
    with pytest.raises(AdapterRejected) as caught:
        unpacked(raw, media_type, max_bytes)
    return str(caught.value)


def special(kind: bytes, name: str = "x", target: str = "") -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, target
    return entry


every_type = pytest.mark.parametrize("media_type", [TAR, GZIP, ZIP])


@every_type
@pytest.mark.parametrize("folder", ["", "./", "pirate/", "./pirate/"])
def test_the_two_files_come_out(media_type: str, folder: str) -> None:
    files = {folder + name: content for name, content in FILES.items()}
    more = {folder + "README.md": b"#", folder + "checkpoints/deep/trainer_state.json": b"{}"}
    assert unpacked(packed_as(media_type, files | more), media_type) == FILES


@every_type
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("/etc/passwd", "relative"),
        ("../escape", "relative"),
        ("a/../../escape", "relative"),
        ("a\\..\\escape", "relative"),
        ("C:/x", "relative"),
        ("bell\x07", "relative"),
        ("x" * 600, "at most 512"),
        ("adapter_model.bin", "safetensors"),
        ("training_args.BIN", "safetensors"),
        ("optimizer.pt", "safetensors"),
        ("a/state.pkl", "safetensors"),
    ],
)
def test_a_bad_name_is_refused_even_if_nobody_wants_the_file(
    media_type: str, name: str, said: str
) -> None:
    assert said in refusal(packed_as(media_type, FILES | {name: b"x"}), media_type)


@pytest.mark.parametrize("media_type", [TAR, GZIP])
@pytest.mark.parametrize(
    "entry",
    [
        special(tarfile.SYMTYPE, "link", "/etc/passwd"),
        special(tarfile.SYMTYPE, WEIGHTS, "/etc/passwd"),
        special(tarfile.LNKTYPE, "link", CONFIG),
        special(tarfile.FIFOTYPE, "pipe"),
        special(tarfile.CHRTYPE, "tty"),
        special(tarfile.BLKTYPE, "disk"),
    ],
    ids=lambda entry: f"{entry.type!r} {entry.name}",
)
def test_links_and_devices_are_refused(media_type: str, entry: tarfile.TarInfo) -> None:
    raw = tar_of(FILES, entry)
    body = gzip.compress(raw) if media_type == GZIP else raw
    assert "no links, no devices" in refusal(body, media_type)


def test_a_link_in_a_zip_is_refused() -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as packed:
        link = zipfile.ZipInfo(WEIGHTS)
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        packed.writestr(link, "/etc/passwd")
        packed.writestr(CONFIG, b"{}")
    assert "no links" in refusal(out.getvalue(), ZIP)


def test_an_encrypted_or_oddly_packed_zip_is_refused() -> None:
    assert "stored or deflated" in refusal(zip_of(FILES, zipfile.ZIP_BZIP2), ZIP)
    raw = bytearray(zip_of(FILES))
    raw[raw.index(b"PK\x01\x02") + 8] |= 1
    assert "no encryption" in refusal(bytes(raw), ZIP)


@every_type
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_twice_is_refused(media_type: str) -> None:
    files = tar_of(FILES, tarfile.TarInfo("./" + CONFIG), tarfile.TarInfo("README"))
    if media_type == ZIP:
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as packed:
            for name in (*FILES, CONFIG):
                packed.writestr(name, b"x")
        files = out.getvalue()
    elif media_type == GZIP:
        files = gzip.compress(files)
    assert "each name once" in refusal(files, media_type)


@every_type
def test_the_files_belong_in_one_place(media_type: str) -> None:
    in_two = {f"a/{CONFIG}": b"{}", f"b/{WEIGHTS}": b"w"}
    assert "all files in one" in refusal(packed_as(media_type, in_two), media_type)
    twice = {f"a/{name}": b"" for name in FILES} | {f"b/{CONFIG}": b""}
    assert "in one place" in refusal(packed_as(media_type, twice), media_type)
    deep = {f"a/b/{name}": b"" for name in FILES}
    assert "missing" in refusal(packed_as(media_type, deep), media_type)
    assert WEIGHTS in refusal(packed_as(media_type, {CONFIG: b"{}"}), media_type)


@every_type
def test_a_probe_beside_the_files_comes_out_too(media_type: str) -> None:
    beside = {f"a/{name}": data for name, data in {**FILES, "probe.json": b"{}"}.items()}
    assert unpacked(packed_as(media_type, beside), media_type)["probe.json"] == b"{}"
    apart = {**FILES, "a/probe.json": b"{}"}
    assert "all files in one" in refusal(packed_as(media_type, apart), media_type)
    deeper = {**FILES, "a/b/probe.json": b"{}"}
    assert set(unpacked(packed_as(media_type, deeper), media_type)) == set(FILES)


@every_type
def test_too_many_members_are_refused(media_type: str) -> None:
    many = {f"f{n}": b"" for n in range(MAX_MEMBERS + 1)}
    assert "members" in refusal(packed_as(media_type, many), media_type)


@every_type
def test_what_inflates_over_the_limit_is_refused(media_type: str) -> None:
    large = FILES | {WEIGHTS: bytes(MAX)}
    assert "over" in refusal(packed_as(media_type, large), media_type)


def test_a_bomb_beside_the_files_goes_off_in_nobodys_hands() -> None:
    bomb = FILES | {"zeros.txt": bytes(MAX + PACKING_BYTES)}
    assert "over" in refusal(packed_as(GZIP, bomb), GZIP)  # a gzip cannot be skipped through
    assert unpacked(packed_as(ZIP, bomb), ZIP) == FILES  # a zip can


def test_a_long_name_that_is_not_one_takes_no_memory() -> None:
    entry = tarfile.TarInfo("x")
    entry.type, entry.size = tarfile.GNUTYPE_LONGNAME, 10 << 20
    assert "header" in refusal(tar_of(FILES, entry), TAR)
    pax = tarfile.TarInfo("x")
    pax.type, pax.size = tarfile.XHDTYPE, 10 << 20
    assert "header" in refusal(tar_of(FILES, pax), TAR)


def test_a_zip_that_is_all_directory_takes_no_memory() -> None:
    many = zip_of({f"folder/{n:06d}": b"" for n in range(20_000)}, zipfile.ZIP_STORED)
    assert "header" in refusal(many, ZIP)


def test_an_unknown_type_is_refused() -> None:
    assert "media type" in refusal(b"", "application/x-rar")


@every_type
def test_it_stops_when_told_to(media_type: str) -> None:
    class Told(Exception):
        pass

    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls > 3:
            raise Told

    raw = packed_as(media_type, FILES | {WEIGHTS: bytes(500_000)})
    with pytest.raises(Told):
        unpacked(raw, media_type, check=check)


def test_a_full_disk_is_not_the_archives_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(archives, "_write", full)
    with pytest.raises(OSError, match="No space left"):
        unpacked(tar_of(FILES), TAR)


NAMES = st.sampled_from(
    [CONFIG, WEIGHTS, "a/" + CONFIG, "a/" + WEIGHTS, "README.md", "../x", "/x", "", ".", "a", "é"]
)


def attempt(raw: bytes) -> None:
    for media_type in (TAR, GZIP, ZIP):
        try:
            unpacked(raw, media_type, max_bytes=4096)
        except AdapterRejected as exc:
            str(exc).encode()


@given(st.binary(max_size=2000))
@example(b"")
@example(b"\x1f\x8b")
@example(bytes(1024))
@settings(max_examples=150, deadline=None)
def test_noise_is_only_ever_refused(raw: bytes) -> None:
    attempt(raw)


@given(st.dictionaries(NAMES | st.text(st.characters(codec="utf-8"), max_size=5), st.binary()))
@settings(max_examples=100, deadline=None)
def test_odd_archives_are_taken_or_refused(files: dict[str, bytes]) -> None:
    for media_type in (TAR, GZIP, ZIP):
        try:
            raw = packed_as(media_type, files)
        except (ValueError, IndexError):  # a name the writer itself refuses
            continue
        attempt(raw)


@given(
    st.sampled_from([tar_of(FILES), zip_of(FILES), gzip.compress(tar_of(FILES), mtime=0)]),
    st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), min_size=1, max_size=8),
    st.integers(0, 1 << 16),
)
@settings(max_examples=400, deadline=None)
def test_damaged_archives_are_taken_or_refused(
    raw: bytes, damage: list[tuple[int, int]], cut: int
) -> None:
    body = bytearray(raw)
    for at, value in damage:
        body[at % len(body)] = value
    attempt(bytes(body[: cut if cut % 3 == 0 else None]))
