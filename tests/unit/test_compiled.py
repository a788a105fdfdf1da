"""The build with a compiled hot path: what is compiled, that nobody gets it unasked, its use."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import pytest

from bench import compiled
from bench.compiled import ROOT

builders = pytest.importorskip("hatchling.builders.wheel", reason="hatchling is not installed")

MODULES = [path.removesuffix(".py").replace("/", ".") for path in compiled.modules()]


@pytest.fixture
def hook(tmp_path: Path) -> Any:
    """What hatchling makes of this checkout's pyproject.toml."""
    return builders.WheelBuilder(str(ROOT)).get_build_hooks(str(tmp_path))["custom"]


def build_data() -> dict[str, Any]:
    return {"force_include": {}, "pure_python": True, "infer_tag": False}


def test_every_module_of_the_list_is_there() -> None:
    assert sorted(set(MODULES)) == MODULES
    for module in MODULES:
        importlib.import_module(module)


@pytest.mark.parametrize("value", [None, "", "0"])
def test_nothing_is_compiled_unasked(
    hook: Any, value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LORAGATE_COMPILE", raising=False)
    if value is not None:
        monkeypatch.setenv("LORAGATE_COMPILE", value)
    data = build_data()
    assert hook.dependencies() == []
    hook.initialize("standard", data)
    hook.finalize("standard", data, "")
    assert data == build_data()


def test_asked_for_it_needs_mypyc_and_a_copy(hook: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAGATE_COMPILE", "1")
    assert [name.partition("]")[0] for name in hook.dependencies()] == ["mypy[mypyc"]
    with pytest.raises(RuntimeError, match="leave --editable out"):
        hook.initialize("editable", build_data())


def test_the_compiled_modules_are_those_that_run() -> None:
    if (missing := compiled.missing()) is not None:
        pytest.skip(f"the gateway is {missing}")
    show = (
        "import importlib, json, sys;"
        "print(json.dumps([importlib.import_module(name).__file__ for name in sys.argv[1:]]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", show, *MODULES],
        env={**os.environ, "PYTHONPATH": str(compiled.FOLDER)},
        cwd=compiled.FOLDER,
        capture_output=True,
        text=True,
        check=True,
    )
    files = json.loads(done.stdout)
    assert len(files) == len(MODULES)
    for file in files:
        assert file.startswith(str(compiled.FOLDER))
        assert file.endswith(tuple(EXTENSION_SUFFIXES))
