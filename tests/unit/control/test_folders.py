"""A folder may be read when it really lies where folders may be read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from app.control import folders
from app.control.folders import copy_adapter
from app.errors import AdapterRejected, InvalidRequest, LoragateError, NotFound, SourceUnavailable
from tests.fakes.adapters import write_adapter

NAMES = ["adapter_config.json", "adapter_model.safetensors"]


def nothing() -> None:
    """Never stops."""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "allowed"
    write_adapter(folder / "pirate")
    return folder


def copied(path: Path, root: Path, max_bytes: int = 1 << 20) -> list[str]:
    into = root.parent / "into"
    into.mkdir()
    copy_adapter(path, [root], into, max_bytes=max_bytes, check=nothing)
    return sorted(file.name for file in into.iterdir())


def test_the_two_files_are_copied(root: Path) -> None:
    (root / "pirate" / "optimizer.pt").write_bytes(b"x")
    assert copied(root / "pirate", root) == NAMES


def test_links_inside_the_allowed_folder_are_followed(root: Path) -> None:
    # As in a hub's cache: a snapshot is a folder of links to blobs.
    snapshot = root / "snapshot"
    snapshot.mkdir()
    for name in NAMES:
        (snapshot / name).symlink_to(f"../pirate/{name}")
    (root / "latest").symlink_to("snapshot")
    assert copied(root / "latest", root) == NAMES


def test_an_allowed_folder_may_be_a_link_itself(root: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(root)
    assert copied(tmp_path / "link" / "pirate", tmp_path / "link") == NAMES


def outside(root: Path) -> Path:
    return write_adapter(root.parent / "outside")


def linked_folder(root: Path) -> Path:
    (root / "link").symlink_to(outside(root))
    return root / "link"


def linked_file(root: Path) -> Path:
    folder = root / "sly"
    folder.mkdir()
    (folder / NAMES[0]).symlink_to(outside(root) / NAMES[0])
    (folder / NAMES[1]).symlink_to(outside(root) / NAMES[1])
    return folder


def loop(root: Path) -> Path:
    (root / "loop").symlink_to("loop")
    return root / "loop" / "x"


@pytest.mark.parametrize(
    "ask",
    [
        outside,
        linked_folder,
        linked_file,
        lambda root: root / ".." / outside(root).name,
        lambda root: Path(f"{root}-twin"),
        lambda root: Path("pirate"),
        lambda root: Path("~/pirate"),
        lambda root: root / "nul\0",
    ],
)
def test_what_leads_outside_is_refused_without_a_hint(
    root: Path, ask: Callable[[Path], Path]
) -> None:
    with pytest.raises(InvalidRequest, match="LORAGATE_IMPORT_DIRS") as caught:
        copied(ask(root), root)
    assert caught.value.param == "source.path"
    assert list((root.parent / "into").iterdir()) == []


@pytest.mark.parametrize(
    ("ask", "error"),
    [
        (lambda root: root / "missing", NotFound),
        (lambda root: root / "pirate" / NAMES[0], NotFound),
        (loop, LoragateError),
        (lambda root: root, AdapterRejected),
    ],
)
def test_a_folder_without_an_adapter_is_refused(
    root: Path, ask: Callable[[Path], Path], error: type[Exception]
) -> None:
    with pytest.raises(error):
        copied(ask(root), root)


def test_a_pickle_is_called_by_its_name(root: Path) -> None:
    (root / "pirate" / NAMES[1]).rename(root / "pirate" / "adapter_model.bin")
    with pytest.raises(AdapterRejected, match="a pickle"):
        copied(root / "pirate", root)


def test_a_pipe_is_refused_and_not_waited_for(root: Path) -> None:
    (root / "pirate" / NAMES[1]).unlink()
    os.mkfifo(root / "pirate" / NAMES[1])
    with pytest.raises(AdapterRejected):
        copied(root / "pirate", root)


def test_too_large_is_refused(root: Path) -> None:
    with pytest.raises(AdapterRejected, match="at most 1000 bytes"):
        copied(root / "pirate", root, max_bytes=1000)


@pytest.mark.parametrize("place", ["pirate", f"pirate/{NAMES[1]}"])
def test_a_link_put_there_after_the_look_is_not_followed(
    root: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    target = outside(root)
    look = folders._check_present

    def look_and_lose(folder: Path) -> None:
        look(folder)
        (root / place).rename(root / "moved")
        (root / place).symlink_to(target / Path(place).name if "/" in place else target)

    # The path was resolved and looked at; now it changes, and is resolved again for each file.
    monkeypatch.setattr(folders, "_check_present", look_and_lose)
    with pytest.raises(InvalidRequest):
        copied(root / "pirate", root)


def test_a_link_put_there_after_the_resolution_is_not_followed(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = outside(root)
    resolve = folders._resolved

    def resolve_and_lose(*args: object) -> Path:
        real = resolve(*args)  # type: ignore[arg-type]
        if real.name == NAMES[1]:
            real.parent.rename(root / "moved")
            real.parent.symlink_to(target)
        return real

    monkeypatch.setattr(folders, "_resolved", resolve_and_lose)
    with pytest.raises(SourceUnavailable):
        copied(root / "pirate", root)
